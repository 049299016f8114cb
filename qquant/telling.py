"""How work says how far it is, and once what it did not use: a signature, a listener that hears nothing, a warning.

What a terminal shows of progress is progress.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]
"""(what is being done, how far, of how much); details of one step come after a colon."""


def unheard(what: str, done: int, total: int) -> None:
    """Listen to nothing."""


said: set[str] = set()
"""What ``say_once`` will not say again, here or by whoever said it in another way."""


def say_once(text: str, key: str = "", *, logger: str = "qquant") -> bool:
    """Warn of something that was not used, but not at every call; returns True, as a traced function must something.

    Args:
        text: the warning.
        key: what stands for it in ``said``; empty: the text itself.
        logger: name of the logger that gets it.
    """
    if (key or text) not in said:
        said.add(key or text)
        logging.getLogger(logger).warning("%s", text)
    return True
