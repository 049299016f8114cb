"""How long somebody else's pattern may take: regular expressions of an untrusted file, judged before they are used.

Python's engine tries every way in which repeats can share a name between them, which for a pattern such as ``(a+)+$``
takes for ever. What the patterns are for is gptq_keys.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import import_module
from typing import Any

# The tree that re itself compiles from; it is not public, and a test holds it to what is used here.
_parser: Any = import_module("re._parser")

_LONGEST = 1 << 14
"""Characters of a pattern."""
_REPEAT = 6
"""Ways, as a power of two, in which one repeat can end within the name of a module."""
_MOST_WAYS = 1 << 26
"""Of all patterns together, for one name: a second or less in the worst case, and honest rules stay under 2^24."""


def endless(patterns: Iterable[str]) -> str | None:
    """Why these patterns could take too long together on a name; None if they cannot, or are no regular expressions.

    Args:
        patterns: regular expressions, as they would be given to ``re.match``.

    Returns:
        A phrase that names the first pattern that is too much.
    """
    total = 0
    for pattern in patterns:
        if len(pattern) > _LONGEST:
            return f"{pattern[:40]!r}... has {len(pattern)} characters"
        try:
            ways = _ways(_parser.parse(pattern))
        except re.error:
            continue  # whoever compiles it says so
        except (RecursionError, OverflowError):
            return f"{pattern[:40]!r} is nested too deep"
        if ways is None:
            return f"{pattern[:40]!r} repeats something that itself can match in several ways"
        total += 1 << min(ways, 64)
        if total > _MOST_WAYS:
            return f"{pattern[:40]!r} and those before it can match in too many ways"
    return None


def _ways(tree: Any) -> int | None:
    """The number of ways to match, as a power of two, of a parsed pattern; None if it grows with every repeat."""
    total = 0
    for kind, value in tree:
        found: int | None = 0
        if str(kind) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, inner = value
            found = _ways(inner)
            if most > 1:
                if found != 0:
                    return None
                found = _REPEAT if most != least else 0
            elif found is not None:
                found += most != least
        elif str(kind) == "BRANCH":
            branches = [_ways(branch) for branch in value[1]]
            found = None if None in branches else max(int(ways or 0) for ways in branches) + len(branches).bit_length()
        elif str(kind) in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
            found = _ways(value if str(kind) == "ATOMIC_GROUP" else value[-1])
        elif str(kind) == "GROUPREF_EXISTS":
            return None
        if found is None:
            return None
        total += found
    return total
