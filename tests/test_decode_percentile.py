"""Of many decoding steps, the one that 95 % do not exceed; rates and medians are test_profile_cell.py's."""

from __future__ import annotations

import pytest

from qquant.profile_cell import cell_speed
from qquant.profile_report import CellKey


def key_of(steps: int) -> CellKey:
    return CellKey(label="m", precision="fp32", kv_cache="fp32", batch=1, prompt_tokens=4, new_tokens=steps + 1)


def moments(steps: list[float]) -> list[float]:
    """Seconds from the call to each token; the first came after 2.0."""
    found = [2.0]
    for step in steps:
        found.append(found[-1] + step)
    return found


def test_of_forty_steps_two_may_be_slower() -> None:
    # 1 to 40 seconds, the slowest neither last nor first; whole numbers, so that their sums are exact.
    steps = [float(1 + 7 * number % 40) for number in range(40)]
    assert sorted(steps) == [float(number) for number in range(1, 41)]
    speed = cell_speed([moments(steps)], key_of(40))
    assert speed.token_p95_seconds == 38.0  # 38 of 40 are 95 %
    assert speed.token_p50_seconds == 20.5


def test_steps_of_all_repetitions_count_together_and_the_first_token_is_none_of_them() -> None:
    fast, slow = [float(number) for number in range(1, 21)], [float(number) for number in range(21, 41)]
    speed = cell_speed([moments(slow), moments(fast)], key_of(20))
    assert speed.token_p95_seconds == 38.0
    assert speed.token_p50_seconds == 20.5


@pytest.mark.parametrize(("count", "expected"), [(1, 1.0), (19, 19.0), (20, 19.0), (21, 20.0), (100, 95.0)], ids=str)
def test_it_is_the_smallest_step_that_covers_95_percent(count: int, expected: float) -> None:
    steps = [float(number) for number in range(1, count + 1)]
    assert cell_speed([moments(steps)], key_of(count)).token_p95_seconds == expected
