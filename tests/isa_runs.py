"""One piece of code run for each instruction set of the CPU kernels; the tests of operators say which code.

Which kernels a process runs is settled at its first call of one, so every set needs a process of its own. All of them
are forked from one interpreter that has imported torch and nothing of ours: that import takes longer than the checks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Outcome(NamedTuple):
    """How the process of one instruction set ended."""

    returncode: int
    said: str
    """Both of its streams."""


def run_for_each(isas: Sequence[str], code: str) -> dict[str, Outcome]:
    """Run ``code`` once with QQUANT_CPU_ISA set to each name in ``isas``, whatever this machine has."""
    command = [sys.executable, "-m", "tests.isa_runs", code, *isas]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the processes of {isas} could not be started: {done.stderr}")
    return {isa: Outcome(*outcome) for isa, outcome in json.loads(done.stdout).items()}


def _forked(isa: str, code: str) -> Outcome:
    """Run ``code`` in a child of this process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        _run_and_end(isa, code, write)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return Outcome(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said)


def _run_and_end(isa: str, code: str, write: int) -> None:
    """What the child does; it never returns to its parent's code."""
    os.environ["QQUANT_CPU_ISA"] = isa
    for stream in (1, 2):
        os.dup2(write, stream)
    returncode = 1
    try:
        exec(compile(code, isa, "exec"), {})
        returncode = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(returncode)


if __name__ == "__main__":
    import torch  # noqa: F401  (what the children have in common)

    print(json.dumps({isa: _forked(isa, sys.argv[1]) for isa in sys.argv[2:]}))
