"""The n-th write, fsync, rename or reservation fails with ENOSPC or EIO, once or from then on; files hit the kernel's
own limit of size (RLIMIT_FSIZE); folders are read-only or vanish. A run then ends with exit code 7 and one line, the
target is never half-written, and the same command ends in the same bytes once the disk is mended.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.conftest import Job
from tests.reliability.faulty import Call, Fault
from tests.reliability.runs import (
    EXIT_DISK,
    EXIT_OK,
    Ended,
    Launcher,
    assert_no_partial,
    assert_one_line,
    finished,
)

ROW = "disk that fails"
QUICK = 3
PARTS = 4
MANY = 50
SIZES = (2_000, 5_000, 20_000, 100_000, 900_000)

Jobs = Callable[..., Job]


def first_of_each(calls: Sequence[Call]) -> list[int]:
    """The first call of each kind, from 1."""
    return sorted({call: number for number, call in reversed(list(enumerate(calls, start=1)))}.values())


def judge(ended: Ended, launcher: Launcher, whole: Job, room: Path) -> str:
    """What must hold after a run whose disk failed, and the word for what came of it."""
    out = room / "out"
    there = assert_no_partial(out, whole.whole)
    if ended.code == EXIT_OK:
        assert there
        return "complete all the same"
    assert ended.code == EXIT_DISK, f"{ended.code}: {ended.said}"
    assert_one_line(ended)
    if there:  # the failure came after the rename; the folder is whole
        return "exit 7, complete"
    finished(launcher, whole.order(room), out, whole.whole)
    return "exit 7, same bytes afterwards"


def sweep(kinds: Sequence[str], found: Sequence[int], launcher: Launcher, whole: Job, room: Path, outcome: Any) -> None:
    failures = []
    for number in found:
        for kind in kinds:
            place = room / f"{kind}-{number}"
            place.mkdir()
            try:
                ended = launcher.run(whole.order(place, [Fault(kind, number)]))
                outcome(judge(ended, launcher, whole, place))
            except AssertionError as error:
                failures.append(f"{kind}:{number} at {whole.calls[number - 1]}: {error}")
            shutil.rmtree(place)
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("kind", ["ENOSPC", pytest.param("EIO", marks=pytest.mark.reliability)])
def test_some_calls_fail(kind: str, launcher: Launcher, job: Jobs, room: Path, outcome: Any) -> None:
    whole = job("llama", "gptq")
    found = first_of_each(whole.calls)
    sweep([kind], found[:: len(found) // QUICK + 1], launcher, whole, room, outcome)


@pytest.mark.reliability
@pytest.mark.parametrize("part", range(PARTS))
def test_every_call_finds_the_disk_full(part: int, launcher: Launcher, job: Jobs, room: Path, outcome: Any) -> None:
    whole = job("llama", "gptq")
    sweep(["ENOSPC"], range(1 + part, len(whole.calls) + 1, PARTS), launcher, whole, room, outcome)


@pytest.mark.reliability
@pytest.mark.parametrize("part", range(PARTS))
def test_every_third_call_and_one_of_each_kind_fails(
    part: int, launcher: Launcher, job: Jobs, room: Path, outcome: Any
) -> None:
    whole = job("llama", "gptq")
    found = sorted({*first_of_each(whole.calls), *range(1, len(whole.calls) + 1, 3)})
    sweep(["EIO"], found[part::PARTS], launcher, whole, room, outcome)


@pytest.mark.reliability
@pytest.mark.parametrize("kind", ["ENOSPC+", "EIO+", "half-ENOSPC", "half-ENOSPC+"])
@pytest.mark.parametrize("name", [("qwen2", "best"), ("llama", "gptq")], ids=["qwen2-best", "llama-gptq"])
def test_it_stays_full_or_takes_a_half(
    name: tuple[str, str], kind: str, launcher: Launcher, job: Jobs, room: Path, outcome: Any
) -> None:
    whole = job(*name)
    found = first_of_each(whole.calls)
    if kind.startswith("half"):
        found = [number for number in found if whole.calls[number - 1].operation == "write"]
    sweep([kind], found[:: 2 if len(found) > MANY else 1], launcher, whole, room, outcome)


@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=() if size == 20_000 else pytest.mark.reliability) for size in SIZES]
)
def test_the_kernel_refuses_larger_files(size: int, launcher: Launcher, job: Jobs, room: Path, outcome: Any) -> None:
    whole = job("llama", "gptq")
    assert any(path.stat().st_size > SIZES[-1] for path in whole.source.iterdir())
    outcome(judge(launcher.run(whole.order(room, file_bytes=size)), launcher, whole, room))


@pytest.mark.parametrize("kind", ["EROFS+", pytest.param("EACCES+", marks=pytest.mark.reliability)])
def test_the_folder_is_read_only(kind: str, launcher: Launcher, job: Jobs, room: Path, outcome: Any) -> None:
    """By the error that Linux gives, since permissions do not hold the user who runs tests in a container."""
    whole = job("llama", "gptq")
    outcome(judge(launcher.run(whole.order(room, [Fault(kind, 1)])), launcher, whole, room))
    assert [path.name for path in room.iterdir()] == ["out"]


@pytest.mark.reliability
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
@pytest.mark.parametrize("all_of_it", [False, True], ids=["what lies in the folder", "the folder"])
def test_everything_vanishes_meanwhile(
    share: float, all_of_it: bool, launcher: Launcher, job: Jobs, room: Path, outcome: Any
) -> None:
    whole = job("llama", "gptq")
    running = launcher.start(whole.order(room, [Fault("stop", round(share * len(whole.calls)))]))
    running.until_stopped()
    for path in [room] if all_of_it else list(room.iterdir()):
        shutil.rmtree(path)
    running.tell(signal.SIGCONT)
    ended = running.wait()
    room.mkdir(exist_ok=True)
    outcome(judge(ended, launcher, whole, room))
