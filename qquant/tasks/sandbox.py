"""Code that nobody has read, run in a process of its own that can do nothing but compute, and how it ended.

What that process gives up, and how, is confined.py's; which code is run and what its end means is humaneval.py's.
docs/task-code.md says what is held off and what is not.
"""

from __future__ import annotations

import builtins
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qquant.errors import UsageError

Status = Literal["passed", "failed", "timed out", "out of memory", "crashed"]

_CONFINED = Path(__file__).with_name("confined.py")
_ENVIRONMENT = {
    # Sets and dicts of text come in one order, so that one program has one verdict.
    "PYTHONHASHSEED": "0",
    "PYTHONSAFEPATH": "1",
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
"""All that the process finds in its environment; no variable of ours goes along."""
_MOST_TOLD_BYTES = 4096
_EXCEPTIONS = frozenset(
    name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)
)


@dataclass(frozen=True)
class Limits:
    """What a program may use before it is ended."""

    processor_seconds: int = 10
    """Counted by the kernel, so that a busy machine does not change a verdict; includes Python's start, about 0.03."""
    wall_seconds: float = 30.0
    """For a program that waits instead of computing."""
    memory_bytes: int = 1 << 29
    """Of its address space, Python itself (about 20 MB) included."""

    def __post_init__(self) -> None:
        if self.processor_seconds < 1 or self.wall_seconds <= 0 or self.memory_bytes < 1 << 26:
            raise UsageError(
                "limits of generated code must be at least 1 processor second, more than 0 seconds and 64 MiB, got "
                f"{self.processor_seconds}, {self.wall_seconds} and {self.memory_bytes} bytes"
            )


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    status: Status
    detail: str
    """Why: the name of a built-in exception or of a signal, or our words; never text of the program."""


@dataclass(frozen=True)
class Enforced:
    """What holds a program here, beside the limits and the filter of system calls without which nothing is run."""

    namespace: bool
    """It has a user and a network of its own, without any interface."""
    landlock: bool
    """The kernel's Landlock lets it do nothing with files but read."""

    def sentence(self) -> str:
        """For a report: all that was in force, and what was not."""
        walls = {"a user and network namespace": self.namespace, "Landlock": self.landlock}
        active = [
            "limits of time and memory",
            "a filter of system calls",
            *(wall for wall, here in walls.items() if here),
        ]
        missing = [wall for wall, here in walls.items() if not here]
        absent = f"; not offered by this system: {', '.join(missing)}" if missing else ""
        return f"Generated code was held by {', '.join(active)}{absent}."


def require_permission(allowed: bool) -> None:
    """Raise UsageError unless the user has allowed that code which a model wrote is run at all."""
    if not allowed:
        raise UsageError(
            "humaneval runs Python code that the model wrote; allow it with --allow-code-execution (in a separate "
            "process with limits), or leave humaneval out of --tasks"
        )


def enforced() -> Enforced:
    """Try the sandbox with an empty program, before anything long is begun that ends in it.

    Raises:
        UsageError: generated code cannot be confined here, so none is run.
    """
    outcome, walls = _run("", Limits())
    if outcome.status != "passed":
        raise _refusal(f"an empty program {outcome.status} ({outcome.detail})")
    return Enforced(namespace="namespace" in walls, landlock="landlock" in walls)


def run_untrusted(code: str, *, limits: Limits | None = None) -> Outcome:
    """Run a program in a fresh, confined process and wait for its end; it may be called from several threads.

    The program passes when it reaches its end without an exception. It finds Python's standard library and nothing
    else: no installed packages, no arguments, no environment, no input; what it prints is thrown away.

    Args:
        code: Python source of the whole program, tests included.
        limits: what it may use; ``Limits()`` by default.

    Raises:
        UsageError: generated code cannot be confined here, so it was not run.
    """
    return _run(code, limits or Limits())[0]


def _run(code: str, limits: Limits) -> tuple[Outcome, tuple[str, ...]]:
    """How a program ended, and the optional walls that it was behind."""
    if sys.platform != "linux":
        raise _refusal(f"there is no sandbox for {sys.platform}")
    token = secrets.token_hex(16)
    deadline = time.monotonic() + limits.wall_seconds
    with tempfile.TemporaryFile() as program:
        program.write(f"{token} {limits.processor_seconds} {limits.memory_bytes}\n".encode())
        program.write(code.encode(errors="replace"))
        program.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-S", "-s", str(_CONFINED)],
            stdin=program,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
    with child:
        returncode = None
        try:
            told = _told(child, deadline)
            if len(told) <= _MOST_TOLD_BYTES:
                returncode = child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass  # which is what no return code says
        finally:
            child.kill()  # it cannot have children of its own
    lines = told.decode(errors="replace").splitlines()
    first = lines[0] if lines else ""
    if len(told) > _MOST_TOLD_BYTES:
        return Outcome("failed", "wrote where only the verdict goes"), tuple(first.split()[1:])
    if first.startswith("refused"):
        raise _refusal(first.removeprefix("refused").strip())
    if not first.startswith("ready") and returncode is not None:
        raise _refusal(f"Python ended with exit code {returncode} before it was confined")
    last = lines[1].partition(" ") if len(lines) == 2 else ("", "", "")
    said = last[2] if secrets.compare_digest(last[0].encode(), token.encode()) else None
    return _outcome(said, returncode, limits), tuple(first.split()[1:])


def _told(child: subprocess.Popen[bytes], deadline: float) -> bytes:
    """What a process writes until it closes its output, its time is over, or it is more than a verdict."""
    assert child.stdout is not None
    descriptor = child.stdout.fileno()
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    told = b""
    while (left := deadline - time.monotonic()) > 0 and len(told) <= _MOST_TOLD_BYTES:
        if waiting.poll(left * 1e3):
            piece = os.read(descriptor, _MOST_TOLD_BYTES)
            if not piece:
                break
            told += piece
    return told


def _outcome(said: str | None, returncode: int | None, limits: Limits) -> Outcome:
    """The end of a process in our words.

    Args:
        said: the verdict that came with the right token, if one did.
        returncode: of the process; None if its time was over.
        limits: that it was under.
    """
    if said == "passed":
        return Outcome("passed", "")
    if said == "out of memory":
        return Outcome("out of memory", f"more than {limits.memory_bytes} bytes")
    if said is not None:
        name = said.removeprefix("failed ")
        return Outcome("failed", name if name in _EXCEPTIONS else "an exception of its own")
    if returncode is None:
        return Outcome("timed out", f"after {limits.wall_seconds:g} seconds")
    if returncode == -signal.SIGXCPU:
        return Outcome("timed out", f"after {limits.processor_seconds} processor seconds")
    if returncode < 0:
        return Outcome("crashed", signal.Signals(-returncode).name)
    return Outcome("failed", "ended before its last line")


def _refusal(reason: str) -> UsageError:
    return UsageError(
        f"generated code is run only where it can be confined, and here it cannot: {reason}. Run this task on Linux "
        "(x86_64 or aarch64) in a container or virtual machine that allows seccomp filters, or leave the task out"
    )
