"""A run that is cut off goes on where it was, and ends in the bytes of one that was not."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qquant.calibrate import Sample, samples_from_ids
from qquant.capture import head
from qquant.checkpoint import QUANTIZED_FOLDER
from qquant.config import QuantizeConfig, QuantizeLog
from qquant.errors import BadModelError, DamagedWorkError, StoppedError, UnprovenError, UsageError
from qquant.folding import Folder
from qquant.identity import sha256
from qquant.journal import Journal
from qquant.needs import Needs
from qquant.publish import put_in_place
from qquant.quantizing import quantize_checkpoint
from qquant.shard_writer import ShardWriter
from qquant.shards import SINGLE_NAME, CheckpointReader, TensorSpec
from qquant.unfinished import AnotherTry, UnfinishedRun, going_on, work_folder
from tests.conftest import VOCAB, Factory

ONE_BLOCK = {"num_hidden_layers": 2, "intermediate_size": 64}


class Cut(BaseException):
    """The process ends here, as far as the run can tell."""


def some_samples() -> list[Sample]:
    ids = torch.randint(0, VOCAB, (5, 16), generator=torch.Generator().manual_seed(3))
    return [*samples_from_ids(ids[:3]), *samples_from_ids(ids[3:, :9])]


def quantized(source: Path, out: Path, method: str = "best", **options: Any) -> QuantizeLog:
    samples = None if method == "rtn" else some_samples()
    return quantize_checkpoint(source, samples, QuantizeConfig(method=method, group_size=32), out, **options)


def tree(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


def left(out: Path) -> list[str]:
    """What stands beside the output that was not there before."""
    return sorted(path.name for path in out.parent.iterdir() if path.name != out.name)


CASES = [("best", False), ("best", True), ("rtn", False), ("rotate+gptaq", False), ("qep+tune:2", True)]


@pytest.mark.parametrize(("method", "spilled"), CASES, ids=[f"{m}{'-spilled' * s}" for m, s in CASES])
def test_a_run_cut_off_after_every_piece_ends_in_the_same_bytes(
    checkpoint: Factory, tmp_path: Path, method: str, spilled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint("qwen2", **ONE_BLOCK)
    log = quantized(source, tmp_path / "whole" / "out", method)
    expected = tree(tmp_path / "whole" / "out")
    plain, pieces = UnfinishedRun.finish, 0

    def cut(run: UnfinishedRun, key: str, piece: Any) -> None:
        nonlocal pieces
        known = run.finished(key) == piece
        plain(run, key, piece)
        if not known:
            pieces += 1
            raise Cut

    out = tmp_path / "cut" / "out"
    monkeypatch.setattr(UnfinishedRun, "finish", cut)
    monkeypatch.setattr(Needs, "spills", lambda *_, **__: spilled)
    for _ in range(200):
        try:
            found = quantized(source, out, method)
            break
        except Cut:
            assert not out.exists()
    assert tree(out) == expected
    assert [record.name for record in found.modules] == [record.name for record in log.modules]
    assert pieces >= 3
    assert left(out) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_stage_be_finished_and_saved(checkpoint: Factory, tmp_path: Path, number: int) -> None:
    source, seen = checkpoint("qwen2", **ONE_BLOCK), []

    def on_module(record: Any) -> None:
        seen.append(record.name)
        if len(seen) == 2:
            os.kill(os.getpid(), number)

    out = tmp_path / "out"
    with pytest.raises(StoppedError, match="the same command goes on") as error:
        quantized(source, out, "gptq", on_module=on_module)
    assert error.value.exit_code == 75
    assert [name.rpartition(".")[2] for name in seen] == ["q_proj", "k_proj", "v_proj"], "the stage is finished"
    assert not out.exists()
    assert left(out) == ["out.unfinished"]
    again: list[str] = []
    log = quantized(source, out, "gptq", on_module=lambda record: again.append(record.name))
    assert seen + again == [record.name for record in log.modules], "nothing is done twice"
    assert left(out) == []


def test_another_run_is_refused_with_what_differs(checkpoint: Factory, tmp_path: Path) -> None:
    source, out = checkpoint("qwen2", **ONE_BLOCK), tmp_path / "out"
    with pytest.raises(StoppedError):
        quantized(source, out, "gptq", on_module=lambda record: os.kill(os.getpid(), signal.SIGTERM))
    before = (work_folder(out) / "journal.jsonl").read_bytes()
    config = QuantizeConfig(method="gptq", bits=8, group_size=32)
    with pytest.raises(UsageError, match=r"bits was 4 and is 8.*delete .*out\.unfinished to begin anew"):
        quantize_checkpoint(source, some_samples(), config, out)
    with pytest.raises(UsageError, match="calibration samples was"):
        quantize_checkpoint(source, some_samples()[1:], QuantizeConfig(method="gptq", group_size=32), out)
    other = checkpoint("qwen2", seed=1, **ONE_BLOCK)
    with pytest.raises(UsageError, match=r"sha256 of model\.safetensors was"):
        quantized(other, out, "gptq")
    assert (work_folder(out) / "journal.jsonl").read_bytes() == before
    quantized(source, out, "gptq")


def test_two_runs_into_one_output_do_not_meet(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with going_on(out, QUANTIZED_FOLDER, {}, overwrite=False) as run:
        run.finish("a", 1)
        with (
            pytest.raises(UsageError, match="another run is at work"),
            going_on(out, QUANTIZED_FOLDER, {}, overwrite=False),
        ):
            pass
        assert run.finished("a") == 1


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    folder = work_folder(tmp_path / "out")
    folder.mkdir()
    (folder / "diary.txt").write_text("x")
    with (
        pytest.raises(UsageError, match="something else"),
        going_on(tmp_path / "out", QUANTIZED_FOLDER, {}, overwrite=False),
    ):
        pass
    assert [path.name for path in folder.iterdir()] == ["diary.txt"]


def test_nothing_is_left_of_a_run_that_finished_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="early"),
        going_on(tmp_path / "a" / "out", QUANTIZED_FOLDER, {}, overwrite=False),
    ):
        raise ValueError("early")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_cut_off_around_the_rename_is_finished_by_the_same_command(
    tmp_path: Path, moment: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, out = put_in_place, tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "config.json").write_text('{"quantization_config": {}}')

    def cut(new: Path, place: Path, *, aside: Path) -> None:
        if moment == "after":
            plain(new, place, aside=aside)
        raise Cut

    def run_once() -> None:
        with going_on(out, QUANTIZED_FOLDER, {"bits": 4}, overwrite=overwrite) as run:
            if not run.sealed:
                (run.result / "config.json").write_text('{"quantization_config": {"bits": 4}}')
                (run.result / "manifest.json").write_text(json.dumps({"files": {}}))
                run.finish("all", True)
            run.publish()

    with monkeypatch.context() as patch:
        patch.setattr("qquant.unfinished.put_in_place", cut)
        with pytest.raises(Cut):
            run_once()
    run_once()
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "manifest.json"]
    assert "bits" in (out / "config.json").read_text()
    assert left(out) == []


def stopped(source: Path, out: Path, method: str = "gptq") -> dict[str, bytes]:
    """A run that is told to stop at its first linear, and finishes that stage; returns the files that it kept."""
    seen: list[str] = []

    def on_module(record: Any) -> None:
        if not seen:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(record.name)

    with pytest.raises(StoppedError):
        quantized(source, out, method, on_module=on_module)
    assert len(seen) == 3, "queries, keys and values read one input"
    return kept(out)


def kept(out: Path) -> dict[str, bytes]:
    folder = work_folder(out)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fault", ["deleted", "cut off", "another header", "no folder", "no shelf", "shelf cut off"])
def test_a_lost_file_of_a_run_is_an_error_and_costs_nothing_that_is_finished(
    checkpoint: Factory, tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = checkpoint("qwen2", **ONE_BLOCK), tmp_path / "out"
    stopped(source, out)
    file = work_folder(out) / ("hidden-0" if "shelf" in fault else "result") / SINGLE_NAME
    if fault == "no folder":
        shutil.rmtree(file.parent)
    elif fault in ("deleted", "no shelf"):
        file.unlink()
    elif fault == "another header":
        with file.open("r+b") as stream:
            stream.seek(20)
            stream.write(b"?")
    else:
        os.truncate(file, file.stat().st_size - 1)
    before = kept(out)
    caplog.clear()
    with pytest.raises(
        DamagedWorkError, match=rf"{file} is missing or damaged; delete .*out\.unfinished to begin anew"
    ):
        quantized(source, out, "gptq")
    after = kept(out)
    assert "is kept in" not in caplog.text, "the same command would not go on"
    assert {name: after[name] for name in before} == before
    shutil.rmtree(work_folder(out))
    quantized(source, out, "gptq")
    assert left(out) == []


def flip(file: Path, place: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        (before,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([before ^ 1]))


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.qweight", "model.embed_tokens.weight"])
def test_a_finished_tensor_that_changed_on_the_disk_is_an_error(checkpoint: Factory, tmp_path: Path, name: str) -> None:
    source, out = checkpoint("qwen2", **ONE_BLOCK), tmp_path / "out"
    stopped(source, out)
    folder = work_folder(out) / "result"
    file, place = folder / SINGLE_NAME, CheckpointReader(folder).entries[name].start + 3
    flip(file, place)
    with pytest.raises(DamagedWorkError, match=rf"{file} is damaged \(the checksum of {name} differs\); delete .*anew"):
        quantized(source, out, "gptq")
    flip(file, place)
    quantized(source, out, "gptq")
    assert left(out) == []


def test_what_is_not_finished_may_change_on_the_disk(checkpoint: Factory, tmp_path: Path) -> None:
    source, out = checkpoint("qwen2", **ONE_BLOCK), tmp_path / "out"
    quantized(source, tmp_path / "whole", "gptq")
    stopped(source, out)
    folder = work_folder(out) / "result"
    flip(folder / SINGLE_NAME, CheckpointReader(folder).entries["model.layers.1.mlp.down_proj.qweight"].start)
    quantized(source, out, "gptq")
    assert tree(out) == tree(tmp_path / "whole")


def test_a_complete_result_that_changed_on_the_disk_is_not_published(
    checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint("qwen2", **ONE_BLOCK), tmp_path / "out"

    def cut(new: Path, place: Path, *, aside: Path) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr("qquant.unfinished.put_in_place", cut)
        with pytest.raises(Cut):
            quantized(source, out, "gptq")
    for name in (SINGLE_NAME, "config.json", "manifest.json"):
        file = work_folder(out) / "result" / name
        flip(file, file.stat().st_size - 1)
        with pytest.raises(DamagedWorkError, match=rf"{name} (in .* is not|is missing or damaged); delete .* anew"):
            quantized(source, out, "gptq")
        flip(file, file.stat().st_size - 1)
    again: list[str] = []
    quantized(source, out, "gptq", on_module=lambda record: again.append(record.name))
    assert again == []
    assert left(out) == []


@pytest.mark.parametrize("fault", ["deleted", "emptied", "cut off"])
def test_a_lost_journal_is_an_error_and_not_a_new_beginning(checkpoint: Factory, tmp_path: Path, fault: str) -> None:
    source, out = checkpoint("qwen2", **ONE_BLOCK), tmp_path / "out"
    stopped(source, out)
    journal = work_folder(out) / "journal.jsonl"
    content = journal.read_bytes()
    if fault == "deleted":
        journal.unlink()
    else:
        journal.write_bytes(content[: 0 if fault == "emptied" else 40])
    before = kept(out)
    with pytest.raises(DamagedWorkError, match=rf"{journal} is missing or damaged; delete .*anew"):
        quantized(source, out, "gptq")
    assert kept(out) == before
    journal.write_bytes(content)
    quantized(source, out, "gptq")
    assert left(out) == []


def test_a_proof_that_fails_costs_nothing_that_is_finished(
    checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source, out = checkpoint("qwen2", **ONE_BLOCK), tmp_path / "out"
    noise = iter([1, 1.5])
    with monkeypatch.context() as patch:
        patch.setattr("qquant.making.head", lambda *given: next(noise) * head(*given))
        with pytest.raises(UnprovenError, match="differ by"):
            quantized(source, out, "gptq")
    assert "is kept in" in caplog.text
    again: list[str] = []
    quantized(source, out, "gptq", on_module=lambda record: again.append(record.name))
    assert again == []
    assert left(out) == []


def test_channels_are_not_chosen_anew(checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other last bits, on another number of threads say, might choose otherwise than what was written."""
    source = checkpoint("qwen2", **ONE_BLOCK)
    chosen: list[str] = []

    def twos(folder: Folder, seam: Any, size: Tensor, power: Tensor) -> Tensor:
        chosen.append(seam.maker)
        return torch.full((seam.count,), 2.0)

    monkeypatch.setattr(Folder, "_best", twos)
    quantized(source, tmp_path / "whole", "gptq+awq")
    of_a_block = len(chosen) // 2
    assert of_a_block > 1
    out = tmp_path / "out"
    with pytest.raises(StoppedError):
        quantized(source, out, "gptq+awq", on_module=lambda record: os.kill(os.getpid(), signal.SIGTERM))
    chosen.clear()
    quantized(source, out, "gptq+awq")
    assert len(chosen) == of_a_block, "of the other block only"
    assert tree(out) == tree(tmp_path / "whole")


def test_scales_that_are_tuned_again_may_differ_in_their_last_bits(
    checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another number of threads. Cut off between the block and its activations, then while it is written anew."""
    source, out = checkpoint("qwen2", **ONE_BLOCK), tmp_path / "out"
    plain = UnfinishedRun.keep

    def cut_at(kept_key: str, *, before: bool) -> Any:
        def keep(run: UnfinishedRun, key: str, piece: Any) -> None:
            ends = key == kept_key and piece is not None
            if ends and before:
                assert run.writer is not None
                run.writer.sync()
                raise Cut
            plain(run, key, piece)
            if ends:
                raise Cut

        return keep

    def times(by: float) -> Any:
        return lambda block, solved, *_: {name: by * solution.scales for name, solution in solved.items()}

    for before, by in ((False, 1.0), (True, 2.0)):
        with monkeypatch.context() as patch:
            patch.setattr(UnfinishedRun, "keep", cut_at("done: model.layers.0", before=before))
            patch.setattr("qquant.walk.tuned_scales", times(by))
            with pytest.raises(Cut):
                quantized(source, out, "gptq+tune:1")
    monkeypatch.setattr("qquant.walk.tuned_scales", times(1.0))
    quantized(source, out, "gptq+tune:1")
    assert left(out) == []


def test_a_result_that_cannot_be_read_for_its_proof_is_not_the_models_fault(
    checkpoint: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = checkpoint("qwen2", **ONE_BLOCK), tmp_path / "out"

    def unreadable(*_: Any, **__: Any) -> None:
        raise BadModelError("model.safetensors is no whole file")

    with monkeypatch.context() as patch:
        patch.setattr("qquant.making.reopen", unreadable)
        with pytest.raises(DamagedWorkError, match=r"result is damaged \(model\.safetensors is no whole file\)"):
            quantized(source, out, "gptq")
    again: list[str] = []
    quantized(source, out, "gptq", on_module=lambda record: again.append(record.name))
    assert again == [], "all linears were kept"


def test_shards_are_on_the_disk_before_a_piece_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("qquant.unfinished.sync_folder", lambda folder: done.append(f"{folder.name}/*"))
    monkeypatch.setattr("qquant.unfinished.sync", lambda path: done.append(path.name))
    plain = ShardWriter.__init__

    def make(writer: ShardWriter, folder: Path, *given: Any, **options: Any) -> None:
        plain(writer, folder, *given, **options)
        done.append(f"made in {folder.name}")

    monkeypatch.setattr(ShardWriter, "__init__", make)
    with going_on(tmp_path / "out", QUANTIZED_FOLDER, {}, overwrite=False) as run:
        run.begin_result({"a": TensorSpec("F32", (2,))}, max_shard_bytes=1 << 20)
        assert done[-3:] == ["made in result", "result/*", "out.unfinished"]


def sealed_run(out: Path, *, number: int = 0) -> None:
    with going_on(out, QUANTIZED_FOLDER, {"try": number}, overwrite=False, part=number) as run:
        if not run.sealed:
            (run.result / "config.json").write_text('{"quantization_config": {}}')
            (run.result / "manifest.json").write_text(json.dumps({"files": {}}))
            run.finish("all", True)
        run.publish()


def test_a_result_that_was_published_and_taken_away_is_not_published_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def cut(run: UnfinishedRun) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(UnfinishedRun, "remove", cut)
        with pytest.raises(Cut):
            sealed_run(out)
    out.rename(tmp_path / "mine")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"not at .*out any more; delete .*out\.unfinished to begin anew"):
            sealed_run(out)
    assert left(out) == ["mine", "out.unfinished"]
    shutil.rmtree(work_folder(out))
    sealed_run(out)
    assert left(out) == ["mine"]
    assert (out / "manifest.json").is_file()


def two_tries(out: Path) -> None:
    """As a model is quantized once more whose divergence was missed."""
    with suppress(AnotherTry), going_on(out, QUANTIZED_FOLDER, {"try": 0}, overwrite=False) as run:
        run.shelf("large", {"a": TensorSpec("F32", (2,))})
        run.finish("all", True)
        raise AnotherTry
    sealed_run(out, number=1)


@pytest.mark.parametrize("moment", [0, 1, 2, 3, 4, 5])
def test_a_second_try_that_is_cut_off_as_it_tidies_up_blocks_nothing(
    tmp_path: Path, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls, published = tmp_path / "out", 0, False

    def cut_before(name: str) -> None:
        plain = getattr(Path, name)

        def call(path: Path, *given: Any) -> Any:
            nonlocal calls, published
            if published and "unfinished" in str(path):
                calls += 1
                if calls > moment:
                    raise Cut
            done = plain(path, *given)
            published = published or (name == "rename" and path.name == "result")
            return done

        patch.setattr(Path, name, call)

    with monkeypatch.context() as patch:
        for name in ("rename", "unlink", "rmdir"):
            cut_before(name)
        plain_rmtree = shutil.rmtree

        def rmtree(path: Path, ignore_errors: bool = False) -> None:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise Cut
            plain_rmtree(path, ignore_errors=ignore_errors)

        patch.setattr("qquant.unfinished.shutil.rmtree", rmtree)
        with suppress(Cut):
            two_tries(out)
    assert (out / "manifest.json").is_file()
    with suppress(UsageError):  # the output exists, where only an empty folder was left
        two_tries(out)
    assert left(out) == []
    assert (out / "manifest.json").is_file()


def test_a_try_that_is_at_work_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with going_on(out, QUANTIZED_FOLDER, {"try": 0}, overwrite=False) as run:
        run.finish("a", 1)
        sealed_run(out, number=1)
        assert (run.folder / "journal.jsonl").is_file()


def test_another_try_is_no_error_to_tell_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qquant"):
        two_tries(tmp_path / "out")
    assert caplog.text == ""


def test_a_file_that_appears_while_a_run_tidies_up_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, plain = tmp_path / "out", Journal.remove

    def remove(journal: Journal) -> None:
        (work_folder(out) / "note").write_text("mine")
        plain(journal)

    monkeypatch.setattr(Journal, "remove", remove)
    sealed_run(out)
    assert [path.name for path in work_folder(out).iterdir()] == ["note"]
