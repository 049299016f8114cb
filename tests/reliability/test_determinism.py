"""The same folder from any number of threads, fresh or resumed with another number, under any hash seed, locale, time
zone and working directory; and nothing in it of the machine that made it, nor of the text that it was calibrated on.
"""

from __future__ import annotations

import getpass
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_checkpoint
from tests.reliability.conftest import FAMILIES, Job, arguments
from tests.reliability.faulty import Fault
from tests.reliability.runs import EXIT_OK, Launcher, Order, tree

ROW = "same bytes, nothing local"
WORLDS = {
    "C": {"PYTHONHASHSEED": "0", "LC_ALL": "C", "TZ": "UTC", "PYTHONUTF8": "0"},
    "UTF-8": {"PYTHONHASHSEED": "1", "LC_ALL": "C.UTF-8", "TZ": "Asia/Shanghai"},
    "random": {"PYTHONHASHSEED": "random", "LC_ALL": "POSIX", "TZ": "America/St_Johns", "COLUMNS": "20"},
}
THREADS = (1, 2)
LEFT = ("fresh", "resumed")
PLACES = ("absolute", "relative")


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher, job: Callable[..., Job]) -> Job:
    """A model whose numbers torch computes alike for any number of threads; see tests/test_same_bytes.py."""
    home = tmp_path_factory.mktemp("bfloat16")
    source = make_checkpoint(home / "qwen2-bf16", "qwen2", dtype=torch.bfloat16, **FAMILIES["qwen2"])
    text, room = job("llama", "gptq").text, home / "room"
    room.mkdir()
    ended = launcher.run(Order(arguments(source, text, "best", room), room))
    assert ended.code == EXIT_OK, ended.said
    return Job(source, text, "best", tree(room / "out"), ended.calls, ended.seconds)


def half_done(launcher: Launcher, whole: Job, room: Path, threads: int) -> None:
    """Killed in the middle."""
    ended = launcher.run(whole.order(room, [Fault("kill-after", len(whole.calls) // 2)], threads=threads))
    assert ended.code == -signal.SIGKILL, ended.said


@pytest.mark.parametrize("threads", [pytest.param(1, marks=pytest.mark.reliability), 2])
def test_another_number_of_threads_goes_on(
    threads: int, launcher: Launcher, bfloat16: Job, room: Path, outcome: Any
) -> None:
    half_done(launcher, bfloat16, room, THREADS[threads % 2])
    ended = launcher.run(bfloat16.order(room, threads=threads))
    assert ended.code == EXIT_OK, ended.said
    assert tree(room / "out") == bfloat16.whole
    outcome("same bytes after going on")


@pytest.mark.reliability
@pytest.mark.parametrize(("world", "threads", "left", "place"), list(itertools.product(WORLDS, THREADS, LEFT, PLACES)))
def test_any_surroundings(
    world: str, threads: int, left: str, place: str, launcher: Launcher, bfloat16: Job, room: Path, outcome: Any
) -> None:
    """The command itself, ``python -m qquant.gptq``, in a process that is not forked."""
    if left == "resumed":
        half_done(launcher, bfloat16, room, THREADS[threads % 2])
    words, folder = list(bfloat16.order(room).arguments), Path.cwd()
    if place == "relative":
        folder = bfloat16.source.parent
        words = [os.path.relpath(word, folder) if os.path.isabs(word) else word for word in words]
    environment = {**os.environ, **WORLDS[world], "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    result = subprocess.run(
        [sys.executable, "-m", "qquant.gptq", *words], cwd=folder, env=environment, capture_output=True, timeout=300
    )
    assert result.returncode == EXIT_OK, result.stderr.decode(errors="replace")
    assert tree(room / "out") == bfloat16.whole
    assert [path.name for path in room.iterdir()] == ["out"]
    outcome("same bytes")


@pytest.mark.reliability
@pytest.mark.parametrize("name", [("qwen2", "best"), ("llama", "gptq")], ids=["qwen2-best", "llama-gptq"])
def test_the_same_in_a_copy_of_everything_elsewhere(
    name: tuple[str, str], launcher: Launcher, job: Callable[..., Job], tmp_path: Path, room: Path, outcome: Any
) -> None:
    whole, elsewhere = job(*name), tmp_path / "else where" / "模型"
    shutil.copytree(whole.source, elsewhere / whole.source.name)
    text = shutil.copy(whole.text, elsewhere / whole.text.name)
    words = arguments(elsewhere / whole.source.name, Path(text), whole.method, room)
    ended = launcher.run(Order(words, room))
    assert ended.code == EXIT_OK, ended.said
    assert tree(room / "out") == whole.whole
    outcome("same bytes")


@pytest.mark.parametrize("name", [("llama", "gptq"), pytest.param(("qwen2", "best"), marks=pytest.mark.reliability)])
def test_nothing_local_is_inside(
    name: tuple[str, str], launcher: Launcher, job: Callable[..., Job], room: Path, outcome: Any
) -> None:
    whole = job(*name)
    assert launcher.run(whole.order(room)).code == EXIT_OK
    sentence = whole.text.read_text(encoding="utf-8").splitlines()[0]
    secrets = {
        "the home folder": str(Path.home()),
        "the temporary folder": str(room.parents[1]),
        "the output": str(room),
        "the source": str(whole.source),
        "the name of the data": whole.text.name,
        "the working directory": os.getcwd(),
        "the interpreter": sys.prefix,
        "calibration text": sentence[:30],
        "more of it": sentence[-30:],
        "the host": socket.gethostname(),
        "the user": getpass.getuser(),
    }
    # Short words such as root are in every vocabulary.
    looked_for = {what: secret for what, secret in secrets.items() if len(secret) >= 8 or "/" in secret[1:]}
    files = [path for path in (room / "out").rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        found = [what for what, secret in looked_for.items() if secret.encode() in content]
        assert not found, f"{path.name} holds {found}"
    outcome("files without anything local", len(files))
