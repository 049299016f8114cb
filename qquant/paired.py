"""Two models on the same items, right or wrong each time: how far apart they are, and what chance alone would do.

Numbers in, numbers out; nothing is drawn at random. Which items and what counts as right is the tasks' business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qquant.errors import UsageError

_Z95 = 1.959963984540054
"""Standard normal quantile of 0.975: 95 % of the distribution lies between it and its negative."""
_HALVINGS = 60
"""Of an interval of length at most 2: what is left is below the rounding of a double near 1."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """A candidate against its baseline on the same items."""

    items: int
    difference: float
    """Share of items the candidate got right less the baseline's share, -1 to 1."""
    ci95_low: float
    """Of the difference, see ``difference_interval``."""
    ci95_high: float
    only_baseline_correct: int
    """Items that the candidate lost."""
    only_candidate_correct: int
    """Items that it won."""
    mcnemar_p: float
    """Exact and two-sided, see ``mcnemar_p``."""


def compare(baseline: Sequence[bool], candidate: Sequence[bool]) -> Paired:
    """Compare two models on the same items.

    Args:
        baseline: for each item whether the baseline was right. Read, never written.
        candidate: the same of the candidate, in the same order.

    Raises:
        UsageError: there are no items, or not as many of one as of the other.
    """
    if not len(baseline) or len(baseline) != len(candidate):
        raise UsageError(
            "a paired comparison needs the same items of both models and at least one, "
            f"got {len(baseline)} of the baseline and {len(candidate)} of the candidate"
        )
    lost = sum(bool(theirs) and not ours for theirs, ours in zip(baseline, candidate, strict=True))
    won = sum(bool(ours) and not theirs for theirs, ours in zip(baseline, candidate, strict=True))
    low, high = difference_interval(won, lost, len(baseline))
    return Paired(
        items=len(baseline),
        difference=(won - lost) / len(baseline),
        ci95_low=low,
        ci95_high=high,
        only_baseline_correct=lost,
        only_candidate_correct=won,
        mcnemar_p=mcnemar_p(won, lost),
    )


def mcnemar_p(won: int, lost: int) -> float:
    """How likely flips at least this uneven are if each is won or lost by the toss of a fair coin.

    Items on which both are right or both wrong say nothing about which is better; 1.0 where there are no others.
    Whole numbers up to the last division, so that the result is right to the last bit for any counts.

    Args:
        won: items that only the candidate got right.
        lost: items that only the baseline got right.

    Source: McNemar's test by the binomial distribution instead of chi-square, two-sided by doubling the tail.
    """
    flips = won + lost
    ways = tail = 1  # ways to choose which of the flips go to the side that has fewer: none of them, to begin with
    for count in range(1, min(won, lost) + 1):
        ways = ways * (flips - count + 1) // count
        tail += ways
    return min(1.0, 2 * tail / (1 << flips))


def difference_interval(won: int, lost: int, items: int) -> tuple[float, float]:
    """95 % confidence limits of the difference between two shares on the same items: all differences not rejected.

    A difference is rejected when the score statistic, whose variance is estimated under that very difference, is
    beyond 1.96. The textbook interval estimates it from the flips seen, and has no width where there were none.

    Args:
        won: items that only the candidate got right.
        lost: items that only the baseline got right.
        items: of all, at least 1 and at least ``won + lost``.

    Returns:
        The limits, -1 to 1, with ``(won - lost) / items`` between them.

    Source: T. Tango, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17, 1998.
    """
    found = (won - lost) / items

    def beyond(difference: float) -> float:
        """By how much the statistic exceeds 1.96, both times its standard deviation, which may be zero."""
        spread = math.sqrt(items * _variance(won, lost, items, difference))
        return items * abs(found - difference) - _Z95 * spread

    return _crossing(beyond, -1.0, found), _crossing(beyond, 1.0, found)


def _variance(won: int, lost: int, items: int, difference: float) -> float:
    """Of one item's outcome (1 won, -1 lost), at the likeliest shares of flips that differ by ``difference``."""
    # The likeliest share of lost items solves a * share**2 + b * share + c = 0.
    a = 2 * items
    b = (2 * items - won + lost) * difference - won - lost
    c = -lost * difference * (1 - difference)
    lost_share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    return max(0.0, 2 * lost_share + difference * (1 - difference))


def _crossing(beyond: Callable[[float], float], outside: float, inside: float) -> float:
    """Where ``beyond`` crosses zero between a place outside of the interval, or at its end, and one inside."""
    for _ in range(_HALVINGS):
        middle = (outside + inside) / 2
        if beyond(middle) > 0:
            outside = middle
        else:
            inside = middle
    return inside
