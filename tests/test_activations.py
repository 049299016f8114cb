"""Samples in memory or on the disk: the same numbers, and none of them lost in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qquant.activations import Streams, in_memory
from qquant.calibrate import samples_from_ids
from qquant.capture import input_of
from qquant.checkpoint import QUANTIZED_FOLDER
from qquant.config import QuantizeConfig
from qquant.errors import DamagedWorkError, DoesNotFitError, StoppedError
from qquant.identity import sha256
from qquant.quantizing import quantize_checkpoint
from qquant.shards import SINGLE_NAME, CheckpointReader
from qquant.unfinished import UnfinishedRun, going_on, work_folder
from tests.conftest import VOCAB, Factory

LENGTHS = [3, 5, 2]


def some_hidden(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(1, length, 4, generator=draw) for length in LENGTHS]


def streams_of(run: UnfinishedRun, *, spilled: bool) -> Streams:
    return Streams(run, LENGTHS, 4, torch.float32, "cpu", with_exact=True, spilled=spilled)


@pytest.mark.parametrize("again_spilled", [False, True])
@pytest.mark.parametrize("spilled", [False, True])
def test_another_process_finds_what_was_committed_and_nothing_newer(
    tmp_path: Path, spilled: bool, again_spilled: bool
) -> None:
    out, old, new = tmp_path / "out", some_hidden(0), some_hidden(1)

    def cut_off() -> None:
        with going_on(out, QUANTIZED_FOLDER, {}, overwrite=False) as run:
            streams = streams_of(run, spilled=spilled)
            for i, hidden in enumerate(old):
                streams.hidden[i] = hidden
            streams.begin_exact()
            streams.commit(3, always=True)
            for i, hidden in enumerate(new):
                streams.hidden[i] = hidden
                assert torch.equal(streams.hidden[i], hidden)
            raise KeyboardInterrupt

    with pytest.raises(StoppedError):
        cut_off()
    with going_on(out, QUANTIZED_FOLDER, {}, overwrite=False) as run:
        streams = streams_of(run, spilled=again_spilled)
        streams.restore()
        assert (streams.restored, streams.block) == (True, 3)
        assert streams.exact is not None
        for i, hidden in enumerate(old):
            assert torch.equal(streams.hidden[i], hidden)
            assert torch.equal(streams.exact[i], hidden)


@pytest.mark.parametrize("spilled", [False, True])
@pytest.mark.parametrize("name", ["hidden", "exact"])
def test_a_sample_that_changed_on_the_disk_is_an_error_and_costs_nothing_else(
    tmp_path: Path, spilled: bool, name: str
) -> None:
    out = tmp_path / "out"

    def again(*, first: bool) -> None:
        with going_on(out, QUANTIZED_FOLDER, {}, overwrite=False) as run:
            streams = streams_of(run, spilled=spilled)
            if first:
                for i, hidden in enumerate(some_hidden()):
                    streams.hidden[i] = hidden
                streams.begin_exact()
                streams.commit(3, always=True)
                raise KeyboardInterrupt
            streams.restore()
            for hidden in (*streams.hidden, *(streams.exact or ())):
                assert hidden.isfinite().all()

    with pytest.raises(StoppedError):
        again(first=True)
    folder = work_folder(out) / f"{name}-0"
    with (folder / SINGLE_NAME).open("r+b") as stream:
        stream.seek(CheckpointReader(folder).entries["1"].start + 7)
        before = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([before[0] ^ 1]))
    with pytest.raises(DamagedWorkError, match=rf"{folder} is damaged \(the checksum of 1 differs\); delete"):
        again(first=False)
    with (folder / SINGLE_NAME).open("r+b") as stream:
        stream.seek(CheckpointReader(folder).entries["1"].start + 7)
        stream.write(before)
    with pytest.raises(StoppedError):
        again(first=True)


@pytest.mark.parametrize("spilled", [False, True])
def test_a_journal_that_lost_its_last_lines_does_not_go_on_with_newer_samples(tmp_path: Path, spilled: bool) -> None:
    out, lines = tmp_path / "out", list[bytes]()

    def again(*, first: bool) -> None:
        with going_on(out, QUANTIZED_FOLDER, {}, overwrite=False) as run:
            streams = streams_of(run, spilled=spilled)
            for block in range(4) if first else ():
                for i, hidden in enumerate(some_hidden(block)):
                    streams.hidden[i] = hidden
                streams.begin_exact()
                streams.commit(block, always=True)
                lines.append((work_folder(out) / "journal.jsonl").read_bytes())
            streams.restore()
            assert torch.equal(streams.hidden[1], some_hidden(streams.block)[1])
            streams.hidden[0] = some_hidden(4)[0]  # the next block has begun, and lies where the last but one did
            raise KeyboardInterrupt

    with pytest.raises(StoppedError):
        again(first=True)
    for left, fits in ((3, True), (2, not spilled), (1, False), (0, False)):  # two versions lie on the disk
        (work_folder(out) / "journal.jsonl").write_bytes(lines[left])
        expected = (StoppedError, "stopped") if fits else (DamagedWorkError, "is of another moment than the journal")
        with pytest.raises(expected[0], match=expected[1]):
            again(first=False)


def test_samples_moved_to_the_disk_in_the_middle_are_all_there(tmp_path: Path) -> None:
    old, new = some_hidden(0), some_hidden(1)
    with going_on(tmp_path / "out", QUANTIZED_FOLDER, {}, overwrite=False) as run:
        streams = streams_of(run, spilled=False)
        for i, hidden in enumerate(old):
            streams.hidden[i] = hidden
        streams.begin_exact()
        streams.hidden[0] = new[0]
        assert streams.spill()
        assert not streams.spill(), "there is nothing left to move"
        for i, hidden in enumerate([new[0], *old[1:]]):
            assert torch.equal(streams.hidden[i], hidden)


def test_a_run_that_keeps_nothing_has_nowhere_to_move_samples() -> None:
    streams = in_memory(some_hidden(), with_exact=False)
    assert not streams.spill()
    assert torch.equal(streams.hidden[1], some_hidden()[1])


@pytest.mark.parametrize("method", ["best", "gptq"])
def test_memory_that_runs_out_once_changes_no_byte(
    checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    source, config = checkpoint("qwen2", intermediate_size=64), QuantizeConfig(method=method, group_size=32)
    samples = samples_from_ids(torch.randint(0, VOCAB, (4, 16), generator=torch.Generator().manual_seed(3)))
    quantize_checkpoint(source, samples, config, tmp_path / "whole")
    plain, calls = input_of, 0

    def short(*given: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise torch.OutOfMemoryError("for once")
        return plain(*given)

    monkeypatch.setattr("qquant.walk.input_of", short)
    quantize_checkpoint(source, samples, config, tmp_path / "short")
    found = [{path.name: sha256(path) for path in (tmp_path / name).iterdir()} for name in ("whole", "short")]
    assert found[0] == found[1]


def test_too_little_memory_is_said_before_anything_is_computed(tiny_qwen2: Path, tmp_path: Path) -> None:
    samples = samples_from_ids([[1, 2, 3]])
    with pytest.raises(DoesNotFitError, match="--max-memory"):
        quantize_checkpoint(tiny_qwen2, samples, QuantizeConfig(group_size=32), tmp_path / "q", max_memory=1 << 20)
    assert list(tmp_path.iterdir()) == []
