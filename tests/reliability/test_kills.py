"""A run is killed with SIGKILL at every named point, at random calls and after random times, again while it resumes, or
stopped by SIGTERM and SIGINT; the same command then ends in the same folder, byte for byte, with nothing beside it.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.conftest import JOBS, Job, Jobs
from tests.reliability.faulty import Fault
from tests.reliability.runs import (
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USAGE,
    Launcher,
    assert_no_partial,
    assert_one_line,
    finished,
    journals,
    points,
    tree,
)

ROW = "killed and stopped"
QUICK_POINTS = 6
SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT}


def recover(launcher: Launcher, job: Job, room: Path, *histories: Fault) -> str:
    """Run once per fault, then until done; the word for what came of it."""
    out = room / "out"
    for number, fault in enumerate(histories):
        if out.exists():
            break
        ended = launcher.run(job.order(room, [fault]))
        late = number > 0 and ended.code == EXIT_OK  # a run that goes on has fewer calls
        assert late or ended.code == -signal.SIGKILL, ended.said
        if late:
            break
        assert_no_partial(out, job.whole)
    if out.exists():
        return settled(launcher, job, room)
    finished(launcher, job.order(room), out, job.whole)
    return "same bytes after going on"


def settled(launcher: Launcher, job: Job, room: Path) -> str:
    """The target was complete already: it stays so, and the next command removes what lies beside it."""
    if [path.name for path in room.iterdir()] != ["out"]:
        launcher.run(job.order(room))
    assert assert_no_partial(room / "out", job.whole)
    assert [path.name for path in room.iterdir()] == ["out"]
    return "complete when killed"


def empty(room: Path, name: object) -> Path:
    """A room inside the room, for one case of many."""
    folder = room / str(name)
    folder.mkdir()
    return folder


def kill_at(found: list[Fault], launcher: Launcher, job: Job, room: Path, outcome: Any) -> None:
    failures = []
    for fault in found:
        try:
            outcome(recover(launcher, job, empty(room, f"{fault.kind}-{fault.number}"), fault))
        except AssertionError as error:
            failures.append(f"{fault} at {job.calls[fault.number - 1]}: {error}")
    assert not failures, "\n".join(failures)


def test_some_named_points(launcher: Launcher, job: Jobs, room: Path, outcome: Any) -> None:
    whole = job(*JOBS["llama-gptq"])
    found = points(whole.calls)
    kill_at(found[:: len(found) // QUICK_POINTS + 1], launcher, whole, room, outcome)


@pytest.mark.reliability
@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("kind", ["kill-before", "kill-half", "kill-after"])
def test_every_named_point(name: str, kind: str, launcher: Launcher, job: Jobs, room: Path, outcome: Any) -> None:
    whole = job(*JOBS[name])
    kill_at([fault for fault in points(whole.calls) if fault.kind == kind], launcher, whole, room, outcome)


def test_an_output_that_is_moved_away_before_its_run_tidied_up(
    launcher: Launcher, job: Jobs, room: Path, tmp_path: Path, outcome: Any
) -> None:
    whole = job(*JOBS["llama-gptq"])
    renamed = [number for number, call in enumerate(whole.calls, start=1) if call.file.endswith(" -> out")]
    assert launcher.run(whole.order(room, [Fault("kill-after", renamed[-1])])).code == -signal.SIGKILL
    (room / "out").rename(tmp_path / "mine")
    before = tree(room)
    ended = launcher.run(whole.order(room))
    assert ended.code == EXIT_USAGE, ended.said
    assert_one_line(ended)
    assert tree(room) == before
    outcome("refused, nothing touched")
    (tmp_path / "mine").rename(room / "out")
    outcome(settled(launcher, whole, room))


def random_fault(chance: random.Random, calls: int) -> Fault:
    return Fault(chance.choice(["kill-before", "kill-half", "kill-after"]), chance.randint(1, calls))


@pytest.mark.reliability
@pytest.mark.parametrize("seed", range(50))
def test_a_random_call(seed: int, launcher: Launcher, job: Jobs, room: Path, outcome: Any) -> None:
    whole = job(*JOBS[list(JOBS)[seed % len(JOBS)]])
    outcome(recover(launcher, whole, room, random_fault(random.Random(seed), len(whole.calls))))


@pytest.mark.reliability
@pytest.mark.parametrize("seed", range(50))
def test_a_random_time(seed: int, launcher: Launcher, job: Jobs, room: Path, outcome: Any) -> None:
    whole = job(*JOBS[list(JOBS)[seed % len(JOBS)]])
    running = launcher.start(whole.order(room))
    time.sleep(random.Random(seed).uniform(0, 1.2 * whole.seconds))
    running.tell(signal.SIGKILL)
    if running.wait().code == EXIT_OK or (room / "out").exists():
        outcome(settled(launcher, whole, room))
        return
    assert_no_partial(room / "out", whole.whole)
    outcome(recover(launcher, whole, room))


@pytest.mark.reliability
@pytest.mark.parametrize("seed", range(20))
def test_killed_again_while_going_on(seed: int, launcher: Launcher, job: Jobs, room: Path, outcome: Any) -> None:
    chance = random.Random(1000 + seed)
    whole = job(*JOBS[list(JOBS)[seed % len(JOBS)]])
    calls = len(whole.calls)
    again = [random_fault(chance, calls // 4) for _ in range(1 + seed % 2)]
    outcome(recover(launcher, whole, room, Fault("kill-after", chance.randint(calls // 4, calls // 2)), *again))


@pytest.mark.parametrize("name", ["llama-gptq", pytest.param("qwen2-best", marks=pytest.mark.reliability)])
def test_a_run_that_is_killed_again_and_again_still_ends(
    name: str, launcher: Launcher, job: Jobs, room: Path, outcome: Any
) -> None:
    """Each time after half of the calls of a whole run: what was finished is never done again."""
    whole = job(*JOBS[name])
    for _ in range(4):
        if launcher.run(whole.order(room, [Fault("kill-after", len(whole.calls) // 2)])).code == EXIT_OK:
            break
        outcome("killed")
        assert_no_partial(room / "out", whole.whole)
    assert assert_no_partial(room / "out", whole.whole)
    outcome("same bytes after going on")


def stop_at(kind: str, number: int, launcher: Launcher, whole: Job, room: Path) -> str:
    """A signal at some call; what came of it."""
    ended = launcher.run(whole.order(room, [Fault(kind, number)]))
    assert "Traceback" not in ended.said, ended.said
    if ended.code == EXIT_OK:
        assert assert_no_partial(room / "out", whole.whole)
        return "complete when stopped"
    assert not assert_no_partial(room / "out", whole.whole)
    begun = any(journal.read_bytes().count(b"\n") > 1 for journal in journals(room))  # its head is no finished piece
    ends = (EXIT_STOPPED,) if begun else (EXIT_STOPPED, 130, -SIGNALS[kind])
    assert ended.code in ends, f"{ended.code}: {ended.said}"
    finished(launcher, whole.order(room), room / "out", whole.whole)
    return "exit 75, same bytes after going on" if begun else "ended before anything was finished, then same bytes"


@pytest.mark.parametrize("kind", ["term", pytest.param("int", marks=pytest.mark.reliability)])
def test_a_signal_at_half_of_the_way(kind: str, launcher: Launcher, job: Jobs, room: Path, outcome: Any) -> None:
    whole = job(*JOBS["llama-gptq"])
    outcome(stop_at(kind, len(whole.calls) // 2, launcher, whole, room))


@pytest.mark.reliability
@pytest.mark.parametrize("kind", SIGNALS)
@pytest.mark.parametrize("seed", range(15))
def test_a_signal_at_a_random_call(
    seed: int, kind: str, launcher: Launcher, job: Jobs, room: Path, outcome: Any
) -> None:
    whole = job(*JOBS[list(JOBS)[seed % len(JOBS)]])
    number = random.Random(2000 + seed).randint(1, len(whole.calls))
    outcome(stop_at(kind, number, launcher, whole, room))


@pytest.mark.reliability
@pytest.mark.parametrize("kind", SIGNALS)
def test_a_signal_to_the_command_itself(kind: str, launcher: Launcher, job: Jobs, room: Path, outcome: Any) -> None:
    """Not a forked process, but ``python -m``; the signal comes as soon as something is kept."""
    whole = job(*JOBS["qwen2-best"])
    command = [sys.executable, "-m", "qquant.gptq", *whole.order(room).arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    ) as process:
        journal, limit = room / "out.unfinished" / "journal.jsonl", time.monotonic() + 120
        while process.poll() is None and time.monotonic() < limit:
            if journal.exists() and journal.read_bytes().count(b"\n") > 1:  # its first line is no piece
                break
            time.sleep(0.01)
        process.send_signal(SIGNALS[kind])
        _, said = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, said
    assert_no_partial(room / "out", whole.whole)
    finished(launcher, whole.order(room), room / "out", whole.whole)
    outcome("exit 75, same bytes after going on")
