"""The names of other tools over our engine, so that scripts written for them run after one changed import.

Each module imitates one tool's interface and nothing else; what the names mean here is in docs/.
"""
