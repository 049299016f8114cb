"""What loading a quantized checkpoint takes at its peak, in a process of its own that does nothing else."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "bench_load.py"
SIZE = ("--size", "qwen2.5-0.5b", "--vocabulary", "32768")
MEGABYTE = 1_000_000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a process's peak")
def test_loading_adds_at_most_the_files_and_a_seventh(tmp_path: Path) -> None:
    """The peak is the model, which is as large as its files, and the layers of one block on their way into it.

    The interpreter and its libraries are what the process held when loading began; what of them is first touched
    while loading is some 5 % of these files.
    """
    written = runpy.run_path(str(BENCHMARK))
    written["write_checkpoint"](written["parse"]([*SIZE, "--make-into", str(tmp_path)]))
    command = [sys.executable, str(BENCHMARK), "--load-from", str(tmp_path), "--kernels", "auto"]
    environment = os.environ | {"PYTHONPATH": str(BENCHMARK.parent.parent)}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    cost = json.loads(run.stdout)
    assert cost["peak_source"] == "vmhwm_since_reset"
    assert cost["file_bytes"] > 200 * MEGABYTE
    assert cost["peak_rss_bytes"] - cost["rss_before_bytes"] < 1.15 * cost["file_bytes"]
