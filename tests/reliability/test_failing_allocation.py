"""The n-th allocation of torch is refused, or the kernel gives no more memory (RLIMIT_AS): a run ends with exit code 3
and one line, or goes on in smaller steps to the same bytes; the same command afterwards ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.conftest import Job
from tests.reliability.runs import (
    EXIT_MEMORY,
    EXIT_OK,
    Ended,
    Launcher,
    assert_no_partial,
    assert_one_line,
    finished,
)

ROW = "memory that is refused"
FIRST, ALL = 20, 100
QUICK = 3
MEGABYTES = (0, 1, 2, 4, 8, 16, 32, 64)

Jobs = Callable[..., Job]


def judge(ended: Ended, launcher: Launcher, whole: Job, room: Path) -> str:
    there = assert_no_partial(room / "out", whole.whole)
    if ended.code == EXIT_OK:
        assert there
        return "same bytes at once"
    assert ended.code == EXIT_MEMORY, f"{ended.code}: {ended.said}"
    assert_one_line(ended)
    assert not there
    finished(launcher, whole.order(room), room / "out", whole.whole)
    return "exit 3, same bytes afterwards"


def refuse(found: Sequence[int], launcher: Launcher, whole: Job, room: Path, outcome: Any) -> None:
    failures = []
    for number in found:
        place = room / str(number)
        place.mkdir()
        try:
            ended = launcher.run(whole.order(place, allocation=number))
            outcome(judge(ended, launcher, whole, place))
        except AssertionError as error:
            failures.append(f"allocation {number}: {error}")
    assert not failures, "\n".join(failures)


def chosen(launcher: Launcher, whole: Job, room: Path) -> list[int]:
    """The first ones, and others spread evenly to the last."""
    (room / "counted").mkdir()
    count = launcher.run(whole.order(room / "counted", allocation=0)).allocations
    assert count > 10 * ALL
    return [*range(1, FIRST + 1), *range(FIRST + 1, count + 1, -(-count // (ALL - FIRST)))]


def test_some_allocations_fail(launcher: Launcher, job: Jobs, room: Path, outcome: Any) -> None:
    whole = job("llama", "gptq")
    refuse(chosen(launcher, whole, room)[:: ALL // QUICK], launcher, whole, room, outcome)


@pytest.mark.reliability
@pytest.mark.parametrize("name", [("qwen2", "best"), ("llama", "gptq")], ids=["qwen2-best", "llama-gptq"])
def test_a_hundred_allocations_fail(
    name: tuple[str, str], launcher: Launcher, job: Jobs, room: Path, outcome: Any
) -> None:
    whole = job(*name)
    refuse(chosen(launcher, whole, room), launcher, whole, room, outcome)


@pytest.mark.reliability
@pytest.mark.parametrize("megabytes", MEGABYTES)
def test_the_kernel_gives_no_more(megabytes: int, launcher: Launcher, job: Jobs, room: Path, outcome: Any) -> None:
    whole = job("llama", "gptq")
    outcome(judge(launcher.run(whole.order(room, more_memory=megabytes << 20)), launcher, whole, room))
