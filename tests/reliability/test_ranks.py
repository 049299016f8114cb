"""torchrun with 1, 2 and 4 processes: the bytes of one; a process that is killed takes the others with it in seconds,
and the same command with another number of processes goes on to the same bytes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from qquant.config import QuantizeConfig
from qquant.model_folder import read_config
from qquant.needs import IMPORTED_BYTES, quantizing_needs
from qquant.shapes import model_shapes
from tests.reliability.conftest import MIXED, Job
from tests.reliability.runs import EXIT_OK, EXIT_STOPPED, Launcher, assert_no_partial, finished, tree

pytestmark = pytest.mark.reliability

ROW = "several processes"
JOBS = {
    "qwen2-best": ("qwen2", "best"),
    "llama-gptq": ("llama", "gptq"),
    "qwen2-mixed": ("qwen2", "best", False, MIXED),
}
REACHED = b'"done: model.layers.1'
"""In the journal when a process is killed: of the second of three blocks something is finished."""
ENDS_WITHIN_S = 60

Jobs = Callable[..., Job]


def as_little_as_goes(whole: Job) -> tuple[str, str]:
    """The option with which activations are kept on the disk."""
    shapes, recipe = model_shapes(read_config(whole.source)), QuantizeConfig(method=whole.method).recipe
    needs = quantizing_needs(shapes, recipe, samples=4, seq_len=32, device="cpu", element_bytes=4)
    return "--max-memory", str(IMPORTED_BYTES + needs.fixed_bytes + 1)


def torchrun(whole: Job, room: Path, ranks: int, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "qquant.gptq", *whole.order(room, [], *more).arguments],
        env=environment, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks, in their order."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        environment = child.environ()
        if "RANK" in environment and "qquant.gptq" in child.cmdline():
            found[int(environment["RANK"])] = child
    return [found[rank] for rank in sorted(found)]


def until_kept(process: subprocess.Popen[str], room: Path) -> None:
    """Wait until some pieces are finished."""
    journal, limit = room / "out.unfinished" / "journal.jsonl", time.monotonic() + 240
    while not journal.exists() or REACHED not in journal.read_bytes():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit, "nothing was finished in time"
        time.sleep(0.005)


def finished_by(ranks: int, whole: Job, room: Path) -> None:
    """So many processes end the run, in the bytes of an undisturbed one and with nothing beside them."""
    with torchrun(whole, room, ranks) as process:
        said = process.communicate(timeout=300)[0]
    assert process.returncode == EXIT_OK, said
    assert tree(room / "out") == whole.whole
    assert [path.name for path in room.iterdir()] == ["out"]


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_processes_makes_the_same_bytes(
    ranks: int, name: str, job: Jobs, room: Path, outcome: Any
) -> None:
    whole = job(*JOBS[name])
    finished_by(ranks, whole, room)
    outcome("same bytes")


@pytest.mark.parametrize(
    ("ranks", "killed", "then", "spilled"),
    [(2, 0, 1, False), (2, 0, 1, True), (2, 1, 4, True), (4, 0, 2, True), (4, 3, 2, False), (1, 0, 2, True)],
)
def test_a_killed_process_ends_all_and_another_number_goes_on(
    ranks: int, killed: int, then: int, spilled: bool, launcher: Launcher, job: Jobs, room: Path, outcome: Any
) -> None:
    whole = job(*JOBS["qwen2-best"])
    with torchrun(whole, room, ranks, *(as_little_as_goes(whole) if spilled else ())) as process:
        until_kept(process, room)
        found = workers(process)
        assert len(found) == ranks
        found[killed].kill()
        _, alive = psutil.wait_procs(found, timeout=ENDS_WITHIN_S)
        assert not alive, "a rank outlived the one that was killed"
        said = process.communicate(timeout=ENDS_WITHIN_S)[0]
    assert process.returncode not in (0, None), said
    assert not assert_no_partial(room / "out", whole.whole)
    kept = (room / "out.unfinished" / "journal.jsonl").read_bytes()
    assert spilled == (b'"activations"' in kept), "of a short run only activations that are spilled are kept"
    if then == 1:
        finished(launcher, whole.order(room), room / "out", whole.whole)
    else:
        finished_by(then, whole, room)
    outcome("all ended, same bytes after going on")


def test_a_signal_to_every_process_stops_them_with_what_is_finished(
    launcher: Launcher, job: Jobs, room: Path, outcome: Any
) -> None:
    whole = job(*JOBS["qwen2-best"])
    with torchrun(whole, room, 2) as process:
        until_kept(process, room)
        found = workers(process)
        for worker in found:
            worker.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=ENDS_WITHIN_S)[0]
    assert f"exitcode  : {EXIT_STOPPED}" in said, said
    assert not assert_no_partial(room / "out", whole.whole)
    finished(launcher, whole.order(room), room / "out", whole.whole)
    outcome("exit 75, same bytes after going on")
