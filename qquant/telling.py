"""How long work says how far it is: the signature that every recipe takes, and a listener that hears nothing.

What a terminal shows of it is progress.py's.
"""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]
"""(what is being done, how far, of how much); details of one step come after a colon."""


def unheard(what: str, done: int, total: int) -> None:
    """Listen to nothing."""
