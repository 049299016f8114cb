"""Hundreds of blocks in a row: what a run keeps in memory does not grow with the number of blocks."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_checkpoint
from tests.reliability.runs import Launcher

ROW = "memory over many blocks"
BLOCKS, QUICK_BLOCKS = 200, 40
WARM = 10
"""Blocks in which allocators and caches reach the size that they keep."""
MOST_MB_PER_BLOCK = 0.02
"""A block that is not freed is 0.045."""


def resident_by_block(source: Path, room: Path, method: str, found: Path) -> None:
    """In a process of its own: quantize, and write down the resident memory at the end of every block, in bytes."""
    import torch

    from qquant.calibrate import samples_from_ids
    from qquant.config import ModuleRecord, QuantizeConfig
    from qquant.heap import keep_heap_small
    from qquant.quantizing import quantize_checkpoint

    torch.set_num_threads(1)
    keep_heap_small()
    resident: dict[str, int] = {}

    def on_module(record: ModuleRecord) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident[record.name.split(".")[2]] = pages * resource.getpagesize()

    ids = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(0))
    config = QuantizeConfig(method=method, group_size=32)
    quantize_checkpoint(source, samples_from_ids(ids), config, room / "out", on_module=on_module)
    found.write_text(json.dumps(list(resident.values())))


def slope(values: list[int]) -> float:
    """Of the straight line through values at 0, 1, 2 ... that is nearest in least squares."""
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    spread = sum((i - middle) ** 2 for i in range(len(values)))
    return sum((i - middle) * (value - mean) for i, value in enumerate(values)) / spread


@pytest.mark.parametrize(
    ("method", "blocks"),
    [
        ("gptq", QUICK_BLOCKS),
        pytest.param("gptq", BLOCKS, marks=pytest.mark.reliability),
        pytest.param("best", BLOCKS, marks=pytest.mark.reliability),
    ],
)
def test_memory_stays_flat(
    method: str, blocks: int, launcher: Launcher, tmp_path: Path, room: Path, outcome: Callable[..., Any]
) -> None:
    shape: dict[str, Any] = {"num_hidden_layers": blocks, "hidden_size": 32, "intermediate_size": 64}
    source, found = make_checkpoint(tmp_path / "source", "qwen2", **shape), tmp_path / "resident.json"
    launcher.call(resident_by_block, source, room, method, found)
    resident = json.loads(found.read_text())
    assert len(resident) == blocks
    assert slope(resident[WARM:]) / 1e6 < MOST_MB_PER_BLOCK
    outcome("blocks in flat memory", blocks)
