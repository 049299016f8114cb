"""Tasks that a model is asked: how published files are read, put into prompts, run, and judged.

Rooms import one another by their full names; this face imports nothing.
"""
