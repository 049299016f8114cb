"""Measuring a model that is cut off goes on at the block that it came to, and finds the costs of an undisturbed one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from qquant.config import QuantizeConfig
from qquant.errors import DamagedWorkError, DoesNotFitError, StoppedError
from qquant.mixed_precision import measure
from qquant.run import Pace
from qquant.samples import Sample, samples_from_ids
from qquant.snapshots import Snapshots
from qquant.stage_costs import StageCost
from qquant.unfinished import MEASURING, work_folder
from tests.conftest import VOCAB, Factory

CONFIG = QuantizeConfig(method="gptq", bits=4, group_size=32)
SHAPE = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64}
FAMILIES = ["qwen2", "olmo2"]
"""One whose stages are in the table, and one whose stages are found by watching a sample."""


class Cut(BaseException):
    """The process ends here, as far as the run can tell."""


def some_samples() -> list[Sample]:
    ids = torch.randint(0, VOCAB, (6, 24), generator=torch.Generator().manual_seed(0))
    return [*samples_from_ids(ids[:4]), *samples_from_ids(ids[4:, :9])]


def costs(source: Path, out: Path | None, blocks: list[int] | None = None) -> list[StageCost]:
    def on_progress(what: str, done: int, total: int) -> None:
        if what.startswith("measuring") and blocks is not None:
            blocks.append(done)

    return measure(source, some_samples(), CONFIG, out=out, on_progress=on_progress).costs


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot is taken after every block."""
    monkeypatch.setattr(Pace, "due", True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_cut_off_at_every_call_finds_the_same_costs(
    checkpoint: Factory, tmp_path: Path, always: None, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    source = checkpoint(family, **SHAPE)
    expected = costs(source, None)
    taken, plain = 0, Snapshots.take

    def cut(snapshots: Snapshots, *given: Any) -> None:
        nonlocal taken
        plain(snapshots, *given)
        taken += 1
        raise Cut

    monkeypatch.setattr(Snapshots, "take", cut)
    blocks: list[int] = []
    for _ in range(SHAPE["num_hidden_layers"]):
        with pytest.raises(Cut):
            costs(source, tmp_path / "out", blocks)
    assert costs(source, tmp_path / "out", blocks) == expected
    assert blocks == [0, 1, 2], "no block is gone through twice"
    assert taken == 3
    folder = work_folder(tmp_path / "out", MEASURING)
    assert sorted(path.name for path in folder.iterdir()) == ["journal.jsonl", "result"], "costs are enough"
    assert costs(source, tmp_path / "out", blocks) == expected
    assert blocks == [0, 1, 2], "nothing is measured again"


def test_a_snapshot_that_was_not_whole_counts_for_nothing(
    checkpoint: Factory, tmp_path: Path, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("qwen2", **SHAPE)
    expected, kept = costs(source, None), 0
    plain = Snapshots.take

    def cut(snapshots: Snapshots, told: Any, tensors: dict[str, torch.Tensor], specs: Any) -> None:
        nonlocal kept
        kept += 1
        if kept == 2:
            plain(snapshots, told, Cutting(tensors), specs)
        plain(snapshots, told, tensors, specs)

    monkeypatch.setattr(Snapshots, "take", cut)
    with pytest.raises(Cut):
        costs(source, tmp_path / "out")
    blocks: list[int] = []
    assert costs(source, tmp_path / "out", blocks) == expected
    assert blocks == [1, 2], "from behind the first block, whose snapshot was whole"


class Cutting(dict[str, torch.Tensor]):
    """Tensors of which the process sees some to the disk."""

    def items(self) -> Any:
        yield from list(super().items())[:3]
        raise Cut


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_block_at_hand(checkpoint: Factory, tmp_path: Path, number: int) -> None:
    source = checkpoint("qwen2", **SHAPE)

    def on_progress(what: str, done: int, total: int) -> None:
        if what.startswith("measuring") and done == 1:
            os.kill(os.getpid(), number)

    with pytest.raises(StoppedError, match="the same command goes on"):
        measure(source, some_samples(), CONFIG, out=tmp_path / "out", on_progress=on_progress)
    blocks: list[int] = []
    assert costs(source, tmp_path / "out", blocks) == costs(source, None)
    assert blocks == [2]


def test_a_damaged_snapshot_is_refused_until_it_is_put_back(checkpoint: Factory, tmp_path: Path, always: None) -> None:
    source = checkpoint("qwen2", **SHAPE)

    def on_progress(what: str, done: int, total: int) -> None:
        if what.startswith("measuring") and done == 2:
            raise Cut

    with pytest.raises(Cut):
        measure(source, some_samples(), CONFIG, out=tmp_path / "out", on_progress=on_progress)
    (file,) = work_folder(tmp_path / "out", MEASURING).glob("measuring-*/model.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedWorkError, match="stay as it was written"):
        costs(source, tmp_path / "out")
    file.write_bytes(content)
    blocks: list[int] = []
    assert costs(source, tmp_path / "out", blocks) == costs(source, None)
    assert blocks == [2]


def test_disk_space_is_looked_at_before_anything_is_measured(
    checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("qwen2", **SHAPE)

    class Full:
        free = 100_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Full)
    blocks: list[int] = []
    with pytest.raises(DoesNotFitError, match=r"the work on it take 0\.00 GB"):
        costs(source, tmp_path / "out", blocks)
    assert blocks == []
    assert list(tmp_path.iterdir()) == []
