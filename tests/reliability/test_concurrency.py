"""Two runs into one output, work left by another run, another version or by nobody, an output that appears meanwhile,
links on the way, --overwrite: one run wins, every other ends with exit code 2, and what was there before stays.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qquant.journal import checksum
from tests.reliability.conftest import Job
from tests.reliability.faulty import Fault
from tests.reliability.runs import (
    EXIT_DAMAGED,
    EXIT_OK,
    EXIT_USAGE,
    Ended,
    Launcher,
    assert_one_line,
    finished,
    points,
    tree,
)

ROW = "two runs, one output"
WORK = "out.unfinished"
JOURNAL = "journal.jsonl"

Jobs = Callable[..., Job]
long = pytest.mark.reliability


@pytest.fixture
def whole(job: Jobs) -> Job:
    return job("llama", "gptq")


def refused(ended: Ended, *words: str) -> None:
    assert ended.code == EXIT_USAGE, f"{ended.code}: {ended.said}"
    assert_one_line(ended)
    error = next(line for line in ended.said.splitlines() if line.startswith("error: "))
    assert all(word in error for word in words), error


def call_at(whole: Job, share: float) -> int:
    return max(1, round(share * len(whole.calls)))


def half_done(launcher: Launcher, whole: Job, room: Path) -> None:
    ended = launcher.run(whole.order(room, [Fault("kill-after", call_at(whole, 0.5))]))
    assert ended.code == -signal.SIGKILL, ended.said


@pytest.mark.parametrize("share", [0.5, *(pytest.param(share, marks=long) for share in (0.9, 0.98))])
def test_of_a_run_and_one_in_the_midst_of_it_one_wins(
    share: float, launcher: Launcher, whole: Job, room: Path, outcome: Any
) -> None:
    first = launcher.start(whole.order(room, [Fault("stop", call_at(whole, share))]))
    first.until_stopped()
    refused(launcher.run(whole.order(room)), "another run")
    first.tell(signal.SIGCONT)
    ended = first.wait()
    assert ended.code == EXIT_OK, ended.said
    assert tree(room / "out") == whole.whole
    assert [path.name for path in room.iterdir()] == ["out"]
    outcome("one wins, one refused")


@long
@pytest.mark.parametrize("number", range(1, 8))
def test_a_whole_run_within_the_first_calls_of_another(
    number: int, launcher: Launcher, whole: Job, room: Path, outcome: Any
) -> None:
    """Before the first one holds the lock. It may then find itself refused, or the output made as it would make it."""
    first = launcher.start(whole.order(room, [Fault("stop", number)]))
    first.until_stopped()
    second = launcher.run(whole.order(room))
    first.tell(signal.SIGCONT)
    ended = sorted((first.wait(), second), key=lambda one: one.code)
    assert ended[0].code == EXIT_OK, [one.said for one in ended]
    assert tree(room / "out") == whole.whole
    assert [path.name for path in room.iterdir()] == ["out"]
    if ended[1].code == EXIT_OK:
        outcome("both say that it is there")
        return
    refused(ended[1], "out")
    outcome("one wins, one refused")


@long
@pytest.mark.parametrize("number", range(1, 8))
def test_a_run_that_began_first_and_goes_on_late_does_no_harm(
    number: int, launcher: Launcher, whole: Job, room: Path, outcome: Any
) -> None:
    """The other one is in its midst by then, and is killed later: all that it had finished is still there."""
    first = launcher.start(whole.order(room, [Fault("stop", number)]))
    first.until_stopped()
    faults = [Fault("stop", call_at(whole, 0.5)), Fault("kill-before", call_at(whole, 0.7))]
    second = launcher.start(whole.order(room, faults))
    try:
        second.until_stopped()
    except AssertionError:
        refused(second.wait(), "another run")  # the first one holds the lock already
        first.tell(signal.SIGCONT)
        assert first.wait().code == EXIT_OK
        outcome("one wins, one refused")
        return
    before = (room / WORK / JOURNAL).read_bytes()
    first.tell(signal.SIGCONT)
    refused(first.wait(), "another run")
    assert (room / WORK / JOURNAL).read_bytes() == before
    second.tell(signal.SIGCONT)
    assert second.wait().code == -signal.SIGKILL
    finished(launcher, whole.order(room), room / "out", whole.whole)
    outcome("one goes on, one refused, same bytes")


@long
@pytest.mark.parametrize("number", range(5))
def test_of_three_at_the_same_moment_one_wins(
    number: int, launcher: Launcher, whole: Job, room: Path, outcome: Any
) -> None:
    running = [launcher.start(whole.order(room)) for _ in range(3)]
    ended = [one.wait() for one in running]
    assert sorted(one.code for one in ended) == [EXIT_OK, EXIT_USAGE, EXIT_USAGE], [one.said for one in ended]
    assert tree(room / "out") == whole.whole
    assert [path.name for path in room.iterdir()] == ["out"]
    outcome("one wins, two refused")


@long
@pytest.mark.parametrize(
    ("options", "named"),
    [(("--bits", "8"), "bits"), (("--seed", "1"), "samples"), (("--dtype", "bfloat16"), "dtype")],
    ids=["options", "data", "dtype"],
)
def test_work_of_another_run_is_not_taken(
    options: tuple[str, ...], named: str, launcher: Launcher, whole: Job, room: Path, outcome: Any
) -> None:
    half_done(launcher, whole, room)
    before = tree(room)
    refused(launcher.run(whole.order(room, (), *options)), named)
    assert tree(room) == before
    finished(launcher, whole.order(room), room / "out", whole.whole)
    outcome("refused, then same bytes")


def test_work_of_another_version_is_not_taken(launcher: Launcher, whole: Job, room: Path, outcome: Any) -> None:
    half_done(launcher, whole, room)
    journal = room / WORK / JOURNAL
    head, *lines = journal.read_text(encoding="utf-8").splitlines()
    first = json.loads(head)
    first["identity"]["code"] = "0" * 64
    del first["crc32"]
    first["crc32"] = checksum(first)
    journal.write_text("\n".join([json.dumps(first), *lines, ""]), encoding="utf-8")
    before = tree(room)
    refused(launcher.run(whole.order(room)), "code")
    assert tree(room) == before
    outcome("refused")


@long
def test_a_journal_that_was_cut_off_is_gone_on_with(launcher: Launcher, whole: Job, room: Path, outcome: Any) -> None:
    half_done(launcher, whole, room)
    journal = room / WORK / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-7])
    finished(launcher, whole.order(room), room / "out", whole.whole)
    outcome("same bytes after going on")


@long
@pytest.mark.parametrize("left", ["nothing", "half of the first line"])
def test_a_journal_that_lost_all_is_no_new_beginning(
    left: str, launcher: Launcher, whole: Job, room: Path, outcome: Any
) -> None:
    half_done(launcher, whole, room)
    journal = room / WORK / JOURNAL
    content = journal.read_bytes()
    journal.write_bytes(content[: 0 if left == "nothing" else content.index(b"\n") // 2])
    before = tree(room)
    ended = launcher.run(whole.order(room))
    assert ended.code == EXIT_DAMAGED, ended.said
    assert_one_line(ended)
    assert tree(room) == before
    journal.write_bytes(content)
    finished(launcher, whole.order(room), room / "out", whole.whole)
    outcome("refused, same bytes once it is put back")


@long
def test_what_is_no_journal_is_refused(launcher: Launcher, whole: Job, room: Path, outcome: Any) -> None:
    half_done(launcher, whole, room)
    (room / WORK / JOURNAL).write_bytes(b"\x00\xff not a journal\n" * 3)
    before = tree(room)
    ended = launcher.run(whole.order(room))
    assert ended.code not in (EXIT_OK, 1), ended.said
    assert_one_line(ended)
    assert tree(room) == before
    outcome("refused")


@long
@pytest.mark.parametrize("what", ["a file", "a folder of someone", "a link"])
def test_a_work_folder_that_is_none_is_refused(
    what: str, launcher: Launcher, whole: Job, room: Path, tmp_path: Path, outcome: Any
) -> None:
    place, elsewhere = room / WORK, tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("mine")
    if what == "a file":
        place.write_text("mine")
    elif what == "a link":
        place.symlink_to(elsewhere)
    else:
        shutil.copytree(elsewhere, place)
    before = tree(room), tree(elsewhere)
    refused(launcher.run(whole.order(room)), WORK)
    assert (tree(room), tree(elsewhere)) == before
    outcome("refused")


@pytest.mark.parametrize("what", ["a file", pytest.param("a folder", marks=long), pytest.param("a model", marks=long)])
def test_an_output_that_appears_meanwhile_stays(
    what: str, launcher: Launcher, whole: Job, room: Path, outcome: Any
) -> None:
    out = room / "out"
    rename = next(number for number, call in enumerate(whole.calls, start=1) if call.file.endswith("-> out"))
    running = launcher.start(whole.order(room, [Fault("stop", rename - 10)]))
    running.until_stopped()
    if what == "a file":
        out.write_text("mine")
    elif what == "a folder":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    else:
        shutil.copytree(whole.source, out)
    before = tree(out)
    running.tell(signal.SIGCONT)
    refused(running.wait(), "out")
    assert tree(out) == before
    assert out.is_dir() == (what != "a file")
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    finished(launcher, whole.order(room), out, whole.whole)
    outcome("refused, then same bytes")


@long
def test_a_link_on_the_way_is_followed_and_both_names_are_one(
    launcher: Launcher, whole: Job, room: Path, tmp_path: Path, outcome: Any
) -> None:
    (tmp_path / "link").symlink_to(room)
    by_link = whole.order(tmp_path / "link")
    first = launcher.start(whole.order(room, [Fault("stop", call_at(whole, 0.5))]))
    first.until_stopped()
    refused(launcher.run(by_link), "another run")
    first.tell(signal.SIGKILL)
    first.wait()
    finished(launcher, by_link, room / "out", whole.whole)
    outcome("one wins, one refused")


@long
@pytest.mark.parametrize("options", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_an_output_that_is_a_link_is_refused(
    options: tuple[str, ...], launcher: Launcher, whole: Job, room: Path, tmp_path: Path, outcome: Any
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (room / "out").symlink_to(tmp_path / "elsewhere")
    refused(launcher.run(whole.order(room, (), *options)), "out")
    assert not any((tmp_path / "elsewhere").iterdir())
    outcome("refused")


@long
@pytest.mark.parametrize("kind", ["kill-before", "kill-after"])
def test_an_output_is_replaced_or_it_is_the_old_one(
    kind: str, launcher: Launcher, job: Jobs, whole: Job, tmp_path: Path, outcome: Any
) -> None:
    """Killed at the named points of a run with --overwrite: the next one makes the new folder, and nothing else."""
    old = job("llama", "rtn")

    (tmp_path / "old").mkdir()
    assert launcher.run(old.order(tmp_path / "old")).code == EXIT_OK

    def prepared(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "old", tmp_path / name))

    again = launcher.run(whole.order(prepared("once"), (), "--overwrite"))
    assert again.code == EXIT_OK, again.said
    beginning = next(number for number, call in enumerate(again.calls, start=1) if "config.json" in call.file)
    for fault in points(again.calls):
        if fault.kind != kind or fault.number < beginning:
            continue
        room = prepared(f"{fault.number}")
        ended = launcher.run(whole.order(room, [fault], "--overwrite"))
        assert ended.code == -signal.SIGKILL, ended.said
        before = tree(room / "out") if (room / "out").exists() else None
        assert before in (None, old.whole, whole.whole)
        ended = launcher.run(whole.order(room, (), "--overwrite"))
        assert ended.code == EXIT_OK, f"{fault} at {again.calls[fault.number - 1]}: {ended.said}"
        assert tree(room / "out") == whole.whole
        assert [path.name for path in room.iterdir()] == ["out"]
        outcome("absent when killed, then new" if before is None else "old or new when killed, then new")
