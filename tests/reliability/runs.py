"""Runs of ``python -m qquant.gptq`` in processes that are forked, broken and looked at; and what must hold after them.

How a run is broken is faulty.py's; which runs there are is the tests'. A process is forked from one that has imported
everything (warm.py), so that a run takes a second instead of ten.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from tests.reliability.faulty import Call, Fault

HANG_S = 240.0
"""A run takes one or two seconds alone, and some ten on a machine that has much else to do."""
EXIT_OK, EXIT_USAGE, EXIT_MEMORY, EXIT_DAMAGED, EXIT_DISK, EXIT_STOPPED = 0, 2, 3, 5, 7, 75


@dataclass(frozen=True)
class Order:
    """One run: everything its process is told."""

    arguments: tuple[str, ...]
    """Of ``python -m qquant.gptq``."""
    room: Path
    """The folder that is watched: the output's parent. Beside it, ``log`` files say what the run said."""
    faults: tuple[Fault, ...] = ()
    allocation: int | None = None
    """Which allocation fails, from 1; 0: none, but all are counted."""
    folder: Path | None = None
    """Working directory."""
    threads: int = 1
    spilled: bool = False
    """As if no activations fitted into memory, and saving took no time."""
    file_bytes: int | None = None
    """RLIMIT_FSIZE."""
    more_memory: int | None = None
    """Bytes of address space that it may take on top of what it has: RLIMIT_AS."""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    code: int
    """Exit code; -9 for one that was killed."""
    said: str
    """Standard output and error."""
    calls: tuple[Call, ...]
    """What it did in the room, the call included at which it died."""
    allocations: int
    """How many there were, where they were counted."""
    seconds: float


class Running:
    """A process that is at work."""

    def __init__(self, context: ForkServerContext, order: Order) -> None:
        self._log = order.room.with_name(f"{order.room.name}.log-{time.monotonic_ns()}")
        self._began = time.monotonic()
        self._process: ForkServerProcess = context.Process(target=_work, args=(order, self._log), daemon=True)
        self._process.start()

    def wait(self) -> Ended:
        """Until it ends; one that does not end is a failure of the test."""
        self._process.join(HANG_S)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"the run hung for {HANG_S:g} s; it had said: {self._text('said')}")
        lines = self._text("calls").splitlines()
        ended = Ended(
            code=code,
            said=self._text("said"),
            calls=tuple(Call(*json.loads(line)) for line in lines),
            allocations=int(self._text("allocations") or 0),
            seconds=time.monotonic() - self._began,
        )
        for kind in ("said", "calls", "allocations"):
            self._file(kind).unlink(missing_ok=True)
        return ended

    def until_stopped(self) -> None:
        """Until SIGSTOP holds it; AssertionError if it ends before."""
        status = Path(f"/proc/{self._process.pid}/stat")
        limit = time.monotonic() + HANG_S
        while time.monotonic() < limit and self._process.exitcode is None:
            if status.exists() and status.read_text().rpartition(")")[2].split()[0] == "T":
                return
            time.sleep(0.005)
        raise AssertionError(f"the run was to stop and did not; it said: {self._text('said')}")

    def tell(self, number: int) -> None:
        """Send a signal."""
        if self._process.exitcode is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def _file(self, kind: str) -> Path:
        return self._log.with_suffix(self._log.suffix + f".{kind}")

    def _text(self, kind: str) -> str:
        file = self._file(kind)
        return file.read_text(errors="replace") if file.exists() else ""


class Launcher:
    """Starts runs."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.reliability.warm"])

    def start(self, order: Order) -> Running:
        """Begin a run."""
        return Running(self._context, order)

    def run(self, order: Order) -> Ended:
        """A run from beginning to end."""
        return self.start(order).wait()

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """A function of a test module, in a fresh process; AssertionError if it fails."""
        process = self._context.Process(target=function, args=arguments, daemon=True)
        process.start()
        process.join(10 * HANG_S)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == 0, f"{function.__name__} ended with {process.exitcode}"


def _work(order: Order, log: Path) -> None:
    """In the forked process: make the world as the order says, then what the command line does."""
    output = os.open(f"{log}.said", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # The line buffering of a terminal, so that a killed run has said what it said.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(order.environment)
    if "TZ" in order.environment:
        time.tzset()
    if order.folder is not None:
        os.chdir(order.folder)
    import torch
    import typer

    from qquant.gptq import quantize_command
    from qquant.needs import Needs
    from qquant.run import Pace
    from tests.reliability.allocations import Refusing
    from tests.reliability.faulty import install

    torch.set_num_threads(order.threads)
    if order.spilled:
        setattr(Needs, "spills", lambda *_, **__: True)  # noqa: B010  mypy forbids the assignments
        setattr(Pace, "due", True)  # noqa: B010
    # A list of the calls would meet the limit on the size of files before the output does.
    install(order.room, order.faults, None if order.file_bytes is not None else Path(f"{log}.calls"))
    if order.file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does at its start; the write then fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.file_bytes, order.file_bytes))
    if order.more_memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + order.more_memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.argv = ["gptq", *order.arguments]
    if order.allocation is None:
        typer.run(quantize_command)
        return
    with Refusing(order.allocation) as refusing:
        try:
            typer.run(quantize_command)
        finally:
            Path(f"{log}.allocations").write_text(str(refusing.count))


def journals(room: Path) -> list[Path]:
    """Of the parts of a run that are unfinished in a room."""
    return sorted(room.glob("out.unfinished*/journal.jsonl"))


def tree(folder: Path) -> dict[str, str]:
    """Every file and folder below a folder with the sha256 of its content; links are named as such."""
    return {str(path.relative_to(folder)): _content(path) for path in sorted(folder.rglob("*"))}


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()


def assert_no_partial(out: Path, whole: Mapping[str, str]) -> bool:
    """After whatever happened: nothing at the target, or all of it; and beside it only what a run goes on from.

    Returns:
        Whether it is there.
    """
    known = {out.name, f"{out.name}.unfinished", f"{out.name}.unfinished-measured"}
    strangers = {path.name for path in out.parent.iterdir()} - known
    assert not strangers, f"left beside the target: {sorted(strangers)}"
    if not out.exists():
        return False
    assert tree(out) == whole, "the target is neither absent nor complete"
    return True


def assert_one_line(ended: Ended) -> None:
    """An error is one line that begins with ``error:``, and no traceback."""
    assert "Traceback" not in ended.said, ended.said
    assert [line.startswith("error: ") for line in ended.said.splitlines()].count(True) == 1, ended.said


def finished(launcher: Launcher, order: Order, out: Path, whole: Mapping[str, str]) -> None:
    """The same command once more ends in the whole folder, and nothing else is left beside it."""
    ended = launcher.run(order)
    assert ended.code == EXIT_OK, ended.said
    assert tree(out) == whole
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def points(calls: Sequence[Call]) -> list[Fault]:
    """Every named fail point: before, after, and for writes in the middle of, the first call of each kind."""
    first: dict[Call, int] = {}
    for number, call in enumerate(calls, start=1):
        first.setdefault(call, number)
    return [
        Fault(kind, number)
        for call, number in first.items()
        for kind in ("kill-before", "kill-half", "kill-after")
        if kind != "kill-half" or call.operation in ("write", "pwrite")
    ]
