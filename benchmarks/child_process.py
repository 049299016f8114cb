"""A benchmark's child process, measured from outside by wait4: CPU seconds with all its threads, and peak memory.

Imports neither torch nor qquant: a big parent would show up in its children's ru_maxrss. What is run is others' choice.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
OUR_ENVIRONMENT = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
PEER_ENVIRONMENT = {
    "GPTQMODEL_CPU_WORKERS": "2",  # with one or two CPUs it asks for more workers than it has
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Child:
    """What one process cost."""

    command: str
    cpu_seconds: float
    wall_seconds: float
    peak_mb: float
    returncode: int
    output: str = ""


def run(command: list[str], *, env: dict[str, str], cwd: str, timeout: float | None = None) -> Child:
    """Run a command to its end and return what it cost; its output is kept for a failure.

    A command that is still running after ``timeout`` seconds is killed, and the return code says so.
    """
    limit = [] if timeout is None else ["timeout", "--signal=KILL", str(timeout)]
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*limit, *command], env={**os.environ, **env}, cwd=cwd, stdout=log, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read().decode(errors="replace")
    return Child(
        command=shlex.join(command),
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        wall_seconds=wall,
        peak_mb=usage.ru_maxrss * 1024 / 1e6,
        returncode=process.returncode,
        output=output,
    )


def check(child: Child) -> Child:
    """End the benchmark when a process failed, with the end of what it said."""
    if child.returncode:
        raise SystemExit(f"{child.command}\nfailed with {child.returncode}:\n{child.output[-4000:]}")
    return child
