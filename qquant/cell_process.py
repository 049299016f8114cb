"""The process of one cell of a profile, seen from outside: started, listened to, ended, and judged if it says nothing.

What the process does is profile_cell.py's, which cells there are profile_grid.py's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qquant.profile_report import CellKey, CellRequest, ProfileCell, out_of_memory_line

_COMMAND = (sys.executable, "-P", "-c", "from qquant.profile_cell import main; main()")
"""-P: nothing is imported from the folder that the command happens to be run in."""
_LARGE_BYTES = "65536"
"""Blocks of this size on are given back to the system when they are freed, so that resident memory is memory in use.
The cell lifts this before it takes times, see ``profile_cell``."""
_TAIL_BYTES = 20_000
"""Of what a process wrote before it ended without an answer."""


def measure_apart(request: CellRequest, on_step: Callable[[int, int], None] = lambda done, of: None) -> ProfileCell:
    """Measure a cell in a process of its own; however that process ends, this one gets a cell.

    Args:
        request: the cell.
        on_step: told the loading and generations done, and of how many.
    """
    steps, done = 2 + request.warmups + request.repeats, 0
    on_step(done, steps)
    answer = None
    with tempfile.TemporaryFile() as noise, _started(request, noise) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(request.model_dump_json().encode() + b"\n")
            child.stdin.flush()  # and stays open: its end tells the cell that nobody waits any more
        except BrokenPipeError:
            pass  # ended before it read: why is seen below
        for line in child.stdout:
            content = json.loads(line)
            if "cell" in content:
                answer = ProfileCell.model_validate_json(json.dumps(content["cell"]))
                break
            on_step(done := done + 1, steps)
        status = 0 if answer is not None else child.wait()
        noise.seek(max(0, noise.seek(0, os.SEEK_END) - _TAIL_BYTES))
        said = noise.read().decode(errors="replace")
    return answer or _without_answer(request.key, status, said)


@contextmanager
def _started(request: CellRequest, noise: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a cell; it is killed when the block is left, whatever leaves it."""
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = {} if request.threads is None else {"OMP_NUM_THREADS": str(request.threads)}
    freeing = {"MALLOC_MMAP_THRESHOLD_": _LARGE_BYTES, "MALLOC_TRIM_THRESHOLD_": _LARGE_BYTES}
    child = subprocess.Popen(
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=noise,
        env={**os.environ, **freeing, **threads, "PYTHONPATH": os.pathsep.join(paths)},
        start_new_session=True,  # Ctrl-C at a terminal goes to us, and we end it
    )
    try:
        yield child
    finally:
        child.kill()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with suppress(OSError):  # what it did not read any more
                    stream.close()
        child.wait()


def _without_answer(key: CellKey, status: int, said: str) -> ProfileCell:
    """A cell whose process ended by itself: for lack of memory if the kernel killed it, or its last words say so."""
    killed = status == -signal.SIGKILL
    memory = "the process was killed (SIGKILL), as the kernel does when memory runs out" if killed else None
    memory = memory or out_of_memory_line(said)
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
    name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return ProfileCell(
        key=key,
        status="out-of-memory" if memory else "failed",
        reason=memory or f"the process ended with {name}: {last}",
        memory=None,
        speed=None,
        predicted=None,
        measured_peak_bytes=None,
    )
