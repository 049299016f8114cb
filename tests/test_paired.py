"""Paired comparisons: the exact test against counting every coin toss, the interval against its definition and chance.

The definition is worked out here in another way than in the code: constrained likelihoods by search, not by formula.
"""

from __future__ import annotations

import doctest
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from qquant.errors import UsageError
from qquant.paired import compare, difference_interval, mcnemar_p

SMALL = [(won, lost) for won in range(7) for lost in range(7)]
TABLES = {
    "no_flips": (0, 0, 20),
    "one_item": (1, 0, 1),
    "one_flip": (0, 1, 20),
    "even_flips": (5, 5, 40),
    "all_lost": (0, 12, 12),
    "all_flips": (7, 5, 12),
    "many_items": (31, 59, 1000),
}
TRIALS = 4000
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "comparison.md"


def _tossed(flips: int) -> list[int]:
    """Heads of every possible series of tosses."""
    return [sum(series) for series in itertools.product((0, 1), repeat=flips)]


@pytest.mark.parametrize(("won", "lost"), SMALL)
def test_p_counts_the_tosses_that_are_at_least_as_uneven(won: int, lost: int) -> None:
    heads = _tossed(won + lost)
    uneven = sum(abs(2 * count - (won + lost)) >= abs(won - lost) for count in heads)
    assert mcnemar_p(won, lost) == uneven / len(heads)


def test_p_of_thousands_of_flips_agrees_with_the_normal_distribution() -> None:
    won, lost = 7000, 7200
    # Half a toss of continuity correction leaves an error of the order of 1 / flips.
    normal = math.erfc((abs(won - lost) - 1) / math.sqrt(won + lost) / math.sqrt(2))
    assert mcnemar_p(won, lost) == pytest.approx(normal, abs=1 / (won + lost))


def test_p_too_small_for_a_double_is_zero() -> None:
    assert mcnemar_p(0, 5000) == 0.0


def _log_likelihood(won: int, lost: int, items: int, won_share: float, lost_share: float) -> float:
    parts = ((won, won_share), (lost, lost_share), (items - won - lost, 1 - won_share - lost_share))
    return sum(count * math.log(max(share, 1e-300)) for count, share in parts if count)


def _score(won: int, lost: int, items: int, difference: float) -> float:
    """|z| of a difference between the shares, its variance at the likeliest shares of a fine grid that have it."""
    low, high = max(0.0, -difference), (1 - difference) / 2
    places = [low + (high - low) * step / 20000 for step in range(20001)]
    best = max(places, key=lambda lost_share: _log_likelihood(won, lost, items, lost_share + difference, lost_share))
    variance = 2 * best + difference - difference**2
    return abs(won - lost - items * difference) / math.sqrt(items * max(variance, 1e-300))


@pytest.mark.parametrize(("won", "lost", "items"), list(TABLES.values()), ids=list(TABLES))
def test_limits_are_the_differences_that_are_just_not_rejected(won: int, lost: int, items: int) -> None:
    for limit in difference_interval(won, lost, items):
        if abs(limit) < 1:
            # The grid finds the share to 1 / 20000 of its range, and |z| is flat around the likeliest one.
            assert _score(won, lost, items, limit) == pytest.approx(1.96, abs=0.01)
        else:
            assert limit == (won - lost) / items  # there is no difference beyond


@pytest.mark.parametrize(("won", "lost", "items"), list(TABLES.values()), ids=list(TABLES))
def test_interval_holds_the_difference_and_turns_round_with_it(won: int, lost: int, items: int) -> None:
    low, high = difference_interval(won, lost, items)
    assert -1 <= low <= (won - lost) / items <= high <= 1
    assert low < high
    assert difference_interval(lost, won, items) == pytest.approx((-high, -low), abs=1e-12)


def test_interval_without_flips_is_what_its_formula_reduces_to() -> None:
    # With no flips |z| = n d / sqrt(n d (1 - d)), and |z| = 1.96 solves to d = 1.96**2 / (n + 1.96**2).
    for items in (1, 10, 1000):
        limit = 1.959964**2 / (items + 1.959964**2)
        assert difference_interval(0, 0, items) == pytest.approx((-limit, limit), rel=1e-6)


def test_interval_shrinks_as_one_over_the_root_of_the_items() -> None:
    widths = [np.diff(difference_interval(items // 20, items // 10, items))[0] for items in (10_000, 40_000)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=1e-3)  # the next term of the width is of order 1 / items


@pytest.mark.parametrize(
    ("items", "won_share", "lost_share"),
    [(30, 0.05, 0.10), (100, 0.0, 0.02), (100, 0.05, 0.05), (164, 0.03, 0.12), (1000, 0.02, 0.03)],
    ids=["30_items", "rare_flips", "no_difference", "human_eval", "1000_items"],
)
def test_interval_covers_the_true_difference_about_95_times_in_100(
    items: int, won_share: float, lost_share: float
) -> None:
    generator = np.random.default_rng(0)
    counts = generator.multinomial(items, (won_share, lost_share, 1 - won_share - lost_share), size=TRIALS)
    found = {(won, lost): difference_interval(won, lost, items) for won, lost in {(row[0], row[1]) for row in counts}}
    truth = won_share - lost_share
    covered = sum(low <= truth <= high for low, high in (found[row[0], row[1]] for row in counts))
    # Outcomes are whole counts, so the limits jump and coverage with them: it may be above 95 % by any amount (rare
    # flips) and below it by about the probability of one outcome, a point. 4000 trials have a standard error of 0.35.
    assert covered / TRIALS >= 0.94 - 3 * 0.0035


def test_comparison_says_who_won_what() -> None:
    found = compare([True, True, False, False, True], [True, False, True, False, False])
    assert (found.items, found.only_baseline_correct, found.only_candidate_correct) == (5, 2, 1)
    assert found.difference == pytest.approx(-0.2)
    assert (found.ci95_low, found.ci95_high) == difference_interval(1, 2, 5)
    assert found.mcnemar_p == 1.0  # two against one, or one against two, or more uneven: every series of three tosses


def test_models_that_agree_on_every_item_are_not_proved_equal() -> None:
    found = compare([True, False] * 10, [True, False] * 10)
    assert (found.difference, found.mcnemar_p) == (0.0, 1.0)
    assert found.ci95_low < 0 < found.ci95_high


@pytest.mark.parametrize(
    ("baseline", "candidate"), [([], []), ([True], [True, False])], ids=["no_items", "other_items"]
)
def test_items_that_cannot_be_paired_are_refused(baseline: list[bool], candidate: list[bool]) -> None:
    with pytest.raises(UsageError, match="same items of both models and at least one"):
        compare(baseline, candidate)


def test_example_of_the_documentation_is_true() -> None:
    failed, attempted = doctest.testfile(str(DOCUMENT), module_relative=False)
    assert (failed, attempted > 0) == (0, True)
    low, high = difference_interval(60, 80, 1319)
    assert f"± {50 * (high - low):.1f}, because most items cancel" in DOCUMENT.read_text(encoding="utf-8")
    apart = 196 * math.sqrt((664 * 655 + 644 * 675) / 1319**3)  # two scores as if on items of their own
    assert f"uncertain to ± {apart:.1f} points" in DOCUMENT.read_text(encoding="utf-8").replace("\n", " ")
    assert f"{100 * difference_interval(0, 0, 164)[1]:.1f} points" in DOCUMENT.read_text(encoding="utf-8")
