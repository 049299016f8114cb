"""Measuring a model that is cut off goes on at the block that it came to, and finds the costs of an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qquant.config import QuantizeConfig
from qquant.errors import BadModelError, DamagedWorkError, DoesNotFitError, StoppedError, UsageError
from qquant.mixed_precision import measure
from qquant.quantizing import quantize_checkpoint
from qquant.run import Pace
from qquant.samples import Sample, samples_from_ids
from qquant.shards import SINGLE_NAME
from qquant.snapshots import Snapshots
from qquant.stage_costs import StageCost
from qquant.unfinished import MEASURING, UnfinishedRun, work_folder
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


def test_a_journal_that_lost_its_last_lines_is_not_gone_on_with(
    checkpoint: Factory, tmp_path: Path, always: None
) -> None:
    """Rules leave all blocks but the first and the last alone, so that all snapshots are alike in names and shapes."""
    source = checkpoint("qwen2", **{**SHAPE, "num_hidden_layers": 5})
    rules: dict[str, Any] = {"-:.*layers\\.[123]\\..*": {}}
    config = QuantizeConfig.from_dict({"method": "gptq", "bits": 4, "group_size": 32, "dynamic": rules})

    def on_progress(what: str, done: int, total: int) -> None:
        if what.startswith("measuring") and done == 4:
            raise Cut

    with pytest.raises(Cut):
        measure(source, some_samples(), config, out=tmp_path / "out", on_progress=on_progress)
    expected, refused = measure(source, some_samples(), config).costs, []
    lines = (work_folder(tmp_path / "out", MEASURING) / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for kept in range(1, len(lines) + 1):
        out = tmp_path / str(kept) / "out"
        shutil.copytree(work_folder(tmp_path / "out", MEASURING), work_folder(out, MEASURING))
        (work_folder(out, MEASURING) / "journal.jsonl").write_bytes(b"".join(lines[:kept]))
        try:
            assert measure(source, some_samples(), config, out=out).costs == expected, "begun anew, or all was there"
        except DamagedWorkError:
            refused.append(lines[kept - 1])
    assert any(b'"slot": 0' in line for line in refused), "a later snapshot lies where that one was"


def test_a_signal_behind_the_last_block_stops_before_anything_is_quantized(
    checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plain = checkpoint("qwen2", **SHAPE), UnfinishedRun.drop

    def drop(run: UnfinishedRun, name: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(UnfinishedRun, "drop", plain)
        plain(run, name)

    monkeypatch.setattr(UnfinishedRun, "drop", drop)
    with pytest.raises(StoppedError, match="the same command goes on"):
        costs(source, tmp_path / "out")
    blocks: list[int] = []
    assert costs(source, tmp_path / "out", blocks) == costs(source, None)
    assert blocks == [], "all was measured when the signal came"


def test_rules_that_leave_nothing_are_refused_before_anything_is_kept(checkpoint: Factory, tmp_path: Path) -> None:
    config = QuantizeConfig.from_dict({"method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:.*": {}}})
    with pytest.raises(UsageError, match="so there is nothing to choose"):
        measure(checkpoint("qwen2", **SHAPE), some_samples(), config, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def damaged(source: Path, folder: Path) -> Path:
    """The model with a number that is none in its last block."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / SINGLE_NAME)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / SINGLE_NAME, {"format": "pt"})
    return folder


def test_a_model_that_cannot_be_measured_costs_another_run_nothing(
    checkpoint: Factory, tmp_path: Path, always: None
) -> None:
    source, out = checkpoint("qwen2", **SHAPE), tmp_path / "out"
    config = QuantizeConfig(method="gptq", group_size=32)

    def stop(record: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError):
        quantize_checkpoint(source, some_samples(), config, out, on_module=stop)
    before = (work_folder(out) / "journal.jsonl").read_bytes()
    with pytest.raises(BadModelError, match="weights must be finite"):
        costs(damaged(source, tmp_path / "bad"), out)
    assert (work_folder(out) / "journal.jsonl").read_bytes() == before
    assert not work_folder(out, MEASURING).exists()


def test_a_model_that_cannot_be_quantized_costs_what_was_measured_of_another_nothing(
    checkpoint: Factory, tmp_path: Path
) -> None:
    source, out = checkpoint("qwen2", **SHAPE), tmp_path / "out"
    expected = costs(source, out)
    with pytest.raises(BadModelError, match="weights must be finite"):
        quantize_checkpoint(
            damaged(source, tmp_path / "bad"), some_samples(), QuantizeConfig(method="gptq", group_size=32), out
        )
    blocks: list[int] = []
    assert costs(source, out, blocks) == expected
    assert blocks == []


def test_two_parts_of_the_work_for_one_output_are_not_done_at_once(checkpoint: Factory, tmp_path: Path) -> None:
    source, out = checkpoint("qwen2", **SHAPE), tmp_path / "out"

    def on_progress(what: str, done: int, total: int) -> None:
        if what.startswith("measuring"):
            with pytest.raises(UsageError, match="at work"):
                quantize_checkpoint(source, None, QuantizeConfig(method="rtn", group_size=32), out)

    assert len(measure(source, some_samples(), CONFIG, out=out, on_progress=on_progress).costs) == 12
    assert not work_folder(out).exists()


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
