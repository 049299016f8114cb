"""Every file that an unfinished run left, at several moments, is taken away, emptied, cut short, overwritten or changed
in one bit. The same command then refuses it in one line, at the latest when it comes to need it, loses nothing that is
finished, and goes on once the file is put back; or it did not need what was damaged, and ends in the same bytes.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.conftest import JOBS, Job, Jobs
from tests.reliability.faulty import Fault
from tests.reliability.runs import (
    EXIT_DAMAGED,
    EXIT_OK,
    Launcher,
    assert_no_partial,
    assert_one_line,
    finished,
    journals,
)

ROW = "damaged unfinished work"
MOMENTS = 3
"""Evenly between the first and the last call of a run; at the last of them its result is complete."""


def removed(content: bytes, chance: random.Random) -> bytes | None:
    return None


def emptied(content: bytes, chance: random.Random) -> bytes | None:
    return b""


def cut(content: bytes, chance: random.Random) -> bytes | None:
    return content[: chance.randrange(len(content))]


def overwritten(content: bytes, chance: random.Random) -> bytes | None:
    return bytes(len(content))


def flipped(content: bytes, chance: random.Random) -> bytes | None:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]


Damage = Callable[[bytes, random.Random], bytes | None]
KINDS: tuple[Damage, ...] = (removed, emptied, cut, overwritten, flipped)


def left_at(moment: int, launcher: Launcher, whole: Job, home: Path) -> Path:
    """A room with what a run left that was killed then."""
    room = home / "left" / "room"
    room.mkdir(parents=True)
    sealing = next(number for number, call in enumerate(whole.calls, start=1) if call.file.endswith(" -> out"))
    number = sealing - 1 if moment == MOMENTS else sealing * moment // MOMENTS
    assert launcher.run(whole.order(room, [Fault("kill-after", number)])).code == -signal.SIGKILL
    return room


def outlived(launcher: Launcher, whole: Job, room: Path, file: Path, content: bytes) -> str:
    """The same command after a file was damaged; what came of it."""
    found = file.read_bytes() if file.exists() else None
    finished_before = {journal: journal.read_bytes() for journal in journals(room) if journal != file}
    ended = launcher.run(whole.order(room))
    if ended.code == EXIT_OK:
        assert assert_no_partial(room / "out", whole.whole)
        assert [path.name for path in room.iterdir()] == ["out"]
        return "not needed, same bytes"
    assert ended.code == EXIT_DAMAGED, ended.said
    assert_one_line(ended)
    assert (file.read_bytes() if file.exists() else None) == found, "the damaged file was touched"
    for journal, lines in finished_before.items():
        assert journal.read_bytes().startswith(lines), "what was finished was lost"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    finished(launcher, whole.order(room), room / "out", whole.whole)
    return "refused, same bytes once it is put back"


def some_files(room: Path) -> list[Path]:
    return sorted(path.relative_to(room) for path in room.rglob("*") if path.is_file() and path.stat().st_size)


def damage_all(
    kinds: tuple[Damage, ...], moment: int, launcher: Launcher, whole: Job, home: Path, outcome: Any
) -> None:
    room, chance, failures = left_at(moment, launcher, whole, home), random.Random(moment), []
    for file in some_files(room):
        for number, kind in enumerate(kinds):
            case = home / f"{'-'.join(file.parts)}-{number}" / "room"
            shutil.copytree(room, case)
            content = (case / file).read_bytes()
            damaged = kind(content, chance)
            if damaged is None:
                (case / file).unlink()
            else:
                (case / file).write_bytes(damaged)
            try:
                outcome(outlived(launcher, whole, case, case / file, content))
            except AssertionError as error:
                failures.append(f"{kind.__name__} {file}: {error}")
            shutil.rmtree(case.parent)
    assert not failures, "\n".join(failures)


def test_some_files_of_a_run(launcher: Launcher, job: Jobs, tmp_path: Path, outcome: Any) -> None:
    damage_all((flipped,), 2, launcher, job(*JOBS["llama-gptq"]), tmp_path, outcome)


@pytest.mark.reliability
@pytest.mark.parametrize("moment", range(1, MOMENTS + 1))
@pytest.mark.parametrize("name", JOBS)
def test_every_file_of_a_run(
    name: str, moment: int, launcher: Launcher, job: Jobs, tmp_path: Path, outcome: Any
) -> None:
    damage_all(KINDS, moment, launcher, job(*JOBS[name]), tmp_path, outcome)
