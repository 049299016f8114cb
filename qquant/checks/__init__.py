"""What ``qquant verify`` looks at in a checkpoint's folder, one kind of fault per room; nothing in it is ever run.

Rooms import one another by their full names; this face imports nothing.
"""
