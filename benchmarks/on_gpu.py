"""What the gpu_*.py scripts share: the check for kernels, ceilings of the memory, medians, graphs, the record.

No benchmark itself: ``make gpu`` runs every benchmarks/gpu_*.py and not this. What is timed is each script's own.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qquant import _native
from qquant.results import shown_command

RUNS = 21
GIGABYTE = 10**9
WORTH_A_LAUNCH = 256 << 20
"""Bytes that take an H100 about 0.1 ms, beside which the few microseconds of a graph's launch are little."""
MOST_COPIES = 64


def require_kernels() -> None:
    """End the script, with the remedy, where there is no CUDA device or no ``qquant._C_cuda``."""
    if not torch.cuda.is_available():
        raise SystemExit(f"measures on a CUDA device, and torch {torch.__version__} sees none")
    _native.load_torch_ops()
    [state] = [state for state in _native.status() if state.name == "qquant._C_cuda"]
    if not state.live:
        raise SystemExit(f"measures qquant._C_cuda, which is not here: {state.why}; QQUANT_CUDA=1 {_native.REBUILD}")


def flush_buffer() -> Tensor:
    """Bytes that fill the GPU's cache several times over when they are written."""
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(4 * max(cache_bytes, 1 << 25), dtype=torch.uint8, device="cuda")


def median_ms(run: Callable[[], object], flush: Tensor) -> dict[str, float]:
    """Median, fastest and slowest of RUNS timed calls, each after ``flush`` has filled the GPU's cache."""
    for _ in range(3):
        run()
    times = []
    for _ in range(RUNS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` as a CUDA graph, so that kernels are timed and not their launches; it is run once before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copies_of(moved: int) -> int:
    """How many inputs of so many bytes one graph goes through, so that its launch is a small part of its time."""
    return max(1, min(MOST_COPIES, -(-WORTH_A_LAUNCH // moved)))


def rate(times: dict[str, float], moved: int, copy_gb_s: float | None = None, *, calls: int = 1) -> dict[str, float]:
    """Times of one of the ``calls`` that were timed together, the rate they mean, and its share of the measured copy.

    Args:
        times: as ``median_ms`` returns them.
        moved: bytes of one call.
        copy_gb_s: the measured copy; None: the share is left out.
        calls: how many were timed together.
    """
    result = {name: value / calls for name, value in times.items()}
    result["gb_s"] = moved / result["median_ms"] / 1e6
    if copy_gb_s:
        result["share_of_copy"] = result["gb_s"] / copy_gb_s
    return {name: round(value, 5) for name, value in result.items()}


def ceilings(flush: Tensor) -> dict[str, dict[str, float]]:
    """GB/s of a copy (read plus written) and of a read, found as the largest of 32-bit words."""
    source = torch.randint(0, 255, (GIGABYTE,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    words = source.view(torch.float32)
    return {
        "copy": rate(median_ms(lambda: target.copy_(source), flush), 2 * GIGABYTE),
        "read": rate(median_ms(lambda: words.amax(), flush), GIGABYTE),
    }


def new_record(script: str, limits: dict[str, Any]) -> dict[str, Any]:
    """What every record begins with: what made it, on what, with which kernels and ceilings. Prints the ceilings."""
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}: copy {limits['copy']['gb_s']:.0f} GB/s, read {limits['read']['gb_s']:.0f} GB/s")
    return {
        "schema_version": 1,
        "command": shown_command(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "kernels": torch.ops.qquant.cuda_build_info(),
        "runs": RUNS,
        "ceilings": limits,
    }


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """Write a record as JSON where a path was given; its folder is made."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
