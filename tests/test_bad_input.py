"""Bad input through the command line: one clear line, the documented exit code, nothing left where nothing was."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from qquant.calibrate import samples_from_ids
from qquant.cli import app
from qquant.config import ModuleRecord, QuantizeConfig
from qquant.errors import StoppedError
from qquant.quantizing import quantize_checkpoint
from qquant.shards import INDEX_NAME, SINGLE_NAME
from tests.conftest import Factory, make_checkpoint

USAGE, FIT, MODEL, DATA, NUMERIC, DISK = 2, 3, 4, 5, 6, 7
UP = "model.layers.1.mlp.up_proj.weight"
TEXT = "One two three four five, said the fox to the crow. " * 40


@pytest.fixture
def place(tiny_qwen2: Path, tmp_path: Path) -> Path:
    """A folder with a model of its own in ``m`` and calibration data in ``d.txt``."""
    shutil.copytree(tiny_qwen2, tmp_path / "m")
    (tmp_path / "d.txt").write_text(TEXT)
    return tmp_path


def run(
    place: Path, *options: str, model: str | None = None, out: str | None = None, data: str | None = None
) -> Result:
    words = ["--model", model or str(place / "m"), "--out", out or str(place / "out")]
    words += ["--data", data or str(place / "d.txt"), "--n-samples", "2", "--seq-len", "16", "--device", "cpu"]
    return CliRunner().invoke(app, ["quantize", *words, "--group-size", "32", *options])


def everything(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


def check(place: Path, code: int, words: str, run: Callable[[], Result]) -> None:
    """The run ends with ``code`` and one error line that holds ``words``; no file came or went."""
    before = everything(place)
    result = run()
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert lines == result.stderr.splitlines()[-1:]
    assert words in lines[0]
    assert len(lines[0]) < 600
    assert result.stdout == ""
    assert everything(place) == before


def edit(place: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(place / "m" / SINGLE_NAME)
    change(tensors)
    save_file(tensors, place / "m" / SINGLE_NAME, metadata={"format": "pt"})


def configure(place: Path, **changes: Any) -> None:
    file = place / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_same_command_without_a_fault_succeeds(place: Path) -> None:
    result = run(place)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{place / 'out'}\n"
    assert {path.name for path in place.iterdir()} == {"m", "d.txt", "out"}


def test_a_missing_tensor(place: Path) -> None:
    edit(place, lambda tensors: tensors.pop(UP))
    check(place, MODEL, f"tensor {UP} is missing", lambda: run(place))


def test_an_unexpected_tensor(place: Path) -> None:
    edit(place, lambda tensors: tensors.update({"model.adapter.weight": torch.ones(2)}))
    check(place, MODEL, "model.adapter.weight", lambda: run(place))


def test_an_unexpected_shape(place: Path) -> None:
    edit(place, lambda tensors: tensors.update({UP: torch.ones(64, 64)}))
    check(place, MODEL, f"{UP} must have shape [128, 64]", lambda: run(place))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [UP, "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite(place: Path, name: str, value: float) -> None:
    edit(place, lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    check(place, MODEL, f"weights must be finite, {name}", lambda: run(place))


@pytest.mark.parametrize("method", ["best", "gptq", "rtn"])
def test_activations_that_overflow(place: Path, method: str) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        for part in ("gate_proj", "up_proj"):
            tensors[f"model.layers.1.mlp.{part}.weight"] *= 1e30  # float32 ends at 3.4e38, their product does not

    edit(place, enlarge)
    # 2**-24 .. 65504 is what a float16 scale can hold, so rounding refuses what the activations of gptq already show.
    check(place, NUMERIC, "model.layers.1", lambda: run(place, "--method", method))


@pytest.mark.parametrize("way", ["up", "absolute", "link"])
def test_an_index_that_points_outside_the_folder(place: Path, way: str) -> None:
    model, outside = place / "m", place / "outside.safetensors"
    names = list(load_file(model / SINGLE_NAME))
    (model / SINGLE_NAME).rename(outside)
    target = {"up": "../outside.safetensors", "absolute": str(outside), "link": "link.safetensors"}[way]
    (model / "link.safetensors").symlink_to(outside)
    (model / INDEX_NAME).write_text(json.dumps({"weight_map": dict.fromkeys(names, target)}))
    check(place, MODEL, "only name files inside the model folder", lambda: run(place))


def test_an_index_that_names_a_missing_file(place: Path, checkpoint: Factory) -> None:
    shutil.rmtree(place / "m")
    shutil.copytree(checkpoint("qwen2", shards=3), place / "m")
    (place / "m" / "model-00002-of-00003.safetensors").unlink()
    check(place, MODEL, "names model-00002-of-00003.safetensors, which is not there", lambda: run(place))


def test_pickle_weights_only(place: Path) -> None:
    (place / "m" / SINGLE_NAME).rename(place / "m" / "pytorch_model.bin")
    check(place, MODEL, "weights must be safetensors", lambda: run(place))


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file(place: Path, kept: int) -> None:
    content = (place / "m" / SINGLE_NAME).read_bytes()
    (place / "m" / SINGLE_NAME).write_bytes(content[:kept])
    check(place, MODEL, SINGLE_NAME, lambda: run(place))


def test_an_output_that_exists(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "notes.txt").write_text("mine")
    check(place, USAGE, "--overwrite", lambda: run(place))
    check(place, USAGE, "is not one", lambda: run(place, "--overwrite"))
    assert (place / "out" / "notes.txt").read_text() == "mine"


def test_an_output_that_is_a_file(place: Path) -> None:
    (place / "out").write_text("mine")
    check(place, USAGE, "--overwrite", lambda: run(place))
    check(place, USAGE, "is not one", lambda: run(place, "--overwrite"))
    check(place, USAGE, "is a file", lambda: run(place, out=str(place / "out" / "deeper")))
    assert (place / "out").read_text() == "mine"


def test_an_original_is_never_overwritten(place: Path) -> None:
    check(place, USAGE, "is not one", lambda: run(place, "--overwrite", out=str(place / "m")))


def test_an_old_result_is_overwritten_only_by_a_complete_new_one(place: Path) -> None:
    assert run(place).exit_code == 0
    before = (place / "out" / SINGLE_NAME).read_bytes()
    edit(place, lambda tensors: tensors[UP].fill_(float("nan")))
    check(place, MODEL, UP, lambda: run(place, "--overwrite", "--bits", "8"))
    assert (place / "out" / SINGLE_NAME).read_bytes() == before
    edit(place, lambda tensors: tensors[UP].fill_(0.01))
    assert run(place, "--overwrite", "--bits", "8").exit_code == 0
    assert (place / "out" / SINGLE_NAME).read_bytes() != before
    assert {path.name for path in place.iterdir()} == {"m", "d.txt", "out"}


def test_a_group_size_that_does_not_divide(place: Path) -> None:
    before = everything(place)
    result = run(place, "--group-size", "48")
    assert result.exit_code == USAGE
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: model.layers.0.")
    for divisor in ("16", "32", "64"):
        assert divisor in line
    assert everything(place) == before


def test_a_size_that_the_format_cannot_hold(place: Path) -> None:
    shutil.rmtree(place / "m")
    make_checkpoint(place / "m", "qwen2", intermediate_size=144)  # 3-bit codes need multiples of 32
    check(
        place, USAGE, "model.layers.0.mlp.gate_proj: a 3-bit GPTQ tensor",
        lambda: run(place, "--bits", "3", "--group-size", "-1"),
    )  # fmt: skip
    result = run(place, "--bits", "3", "--group-size", "-1")
    remedy = result.stderr.split("--skip '")[1].split("'")[0]
    skips = ["--skip", remedy, "--skip", ".*up_proj", "--skip", ".*down_proj"]
    assert run(place, "--bits", "3", "--group-size", "-1", *skips).exit_code == 0


def test_an_unknown_model_type(place: Path) -> None:
    configure(place, model_type="nosuch")
    check(place, MODEL, "nosuch", lambda: run(place))


def test_a_model_that_is_no_language_model(place: Path) -> None:
    configure(place, model_type="vit")
    check(place, MODEL, "no causal language model", lambda: run(place))


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_a_mixture_of_experts(place: Path, family: str) -> None:
    shutil.rmtree(place / "m")
    make_checkpoint(place / "m", family, moe_intermediate_size=32, shared_expert_intermediate_size=32)
    check(place, MODEL, "fused mixture-of-experts", lambda: run(place))


def test_too_little_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**6, 10**6))
    check(place, FIT, "free", lambda: run(place))


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync"])
def test_a_disk_that_fails_underneath(place: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"os.{call}", full)
    check(place, DISK, "No space left on device", lambda: run(place))


BAD_OPTIONS: dict[str, tuple[list[str], str]] = {
    "five bits": (["--bits", "5"], "bits"),
    "no group": (["--group-size", "0"], "group_size"),
    "no damping": (["--damp-percent", "0"], "damp_percent"),
    "unknown method": (["--method", "awesome"], "method"),
    "a method twice": (["--method", "gar+pivot"], "names both gar and pivot"),
    "unknown clip search": (["--clip-search", "much"], "clip_search"),
    "two orders": (["--desc-act", "--group-aware"], "desc_act"),
    "skip is no regex": (["--skip", "("], "not a regular expression"),
    "override is no regex": (["--override", "(=bits:8"], "not a regular expression"),
    "override without a change": (["--override", ".*"], "an override is"),
    "override of an unknown field": (["--override", ".*=colour:8"], "colour"),
    "override with a wrong value": (["--override", ".*=bits:many"], "override"),
    "override with wrong bits": (["--override", ".*=bits:5"], "bits"),
    "everything skipped": (["--skip", ".*"], "nothing to quantize"),
    "unknown dtype": (["--dtype", "int4"], "dtype must be"),
    "unknown device": (["--device", "abacus"], "device must be"),
    "unknown packing": (["--packing", "loose"], "packing"),
    "no samples": (["--n-samples", "0"], "n_samples"),
    "samples of one token": (["--seq-len", "1"], "seq_len"),
}


@pytest.mark.parametrize(("options", "words"), list(BAD_OPTIONS.values()), ids=list(BAD_OPTIONS))
def test_an_option_that_cannot_be_followed(place: Path, options: list[str], words: str) -> None:
    check(place, USAGE, words, lambda: run(place, *options))


def test_no_data_at_all(place: Path) -> None:
    words = ["quantize", "--model", str(place / "m"), "--out", str(place / "out")]
    check(place, USAGE, "--method rtn", lambda: CliRunner().invoke(app, words))


@pytest.mark.parametrize("content", ["", "one", None], ids=["empty", "too short", "absent"])
def test_data_that_calibrates_nothing(place: Path, content: str | None) -> None:
    (place / "d.txt").unlink()
    if content is not None:
        (place / "d.txt").write_text(content)
    check(place, DATA, "d.txt", lambda: run(place))


def test_a_source_that_is_quantized_already(place: Path) -> None:
    assert run(place).exit_code == 0
    check(place, MODEL, "quantized already", lambda: run(place, model=str(place / "out"), out=str(place / "again")))


@pytest.mark.parametrize("name", ["nosuch", "d.txt", "."], ids=["absent", "a file", "a folder without a model"])
def test_a_model_that_is_not_there(place: Path, name: str) -> None:
    check(place, MODEL, "model", lambda: run(place, model=str(place / name)))


def test_a_model_without_a_tokenizer(place: Path) -> None:
    (place / "m" / "tokenizer.json").unlink()
    check(place, MODEL, "tokenizer", lambda: run(place))


def test_a_config_that_is_no_json(place: Path) -> None:
    (place / "m" / "config.json").write_text("{")
    check(place, MODEL, "config.json", lambda: run(place))


def test_debug_shows_where_it_happened(place: Path) -> None:
    edit(place, lambda tensors: tensors.pop(UP))
    result = run(place, "--debug")
    assert result.exit_code == MODEL
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: tensor {UP}")


def test_an_interruption_leaves_only_what_is_finished(place: Path) -> None:
    def interrupt(record: ModuleRecord) -> None:
        raise KeyboardInterrupt

    before = everything(place)
    with pytest.raises(StoppedError, match="the same command goes on"):
        quantize_checkpoint(
            place / "m",
            samples_from_ids([list(range(20))]),
            QuantizeConfig(group_size=32),
            place / "deep" / "out",
            on_module=interrupt,
        )
    assert [path.name for path in (place / "deep").iterdir()] == ["out.unfinished"]
    shutil.rmtree(place / "deep")
    assert everything(place) == before


def test_ctrl_c_ends_with_75_and_the_same_command_goes_on(place: Path) -> None:
    """A real process and a real signal, sent while it writes."""
    shutil.rmtree(place / "m")
    make_checkpoint(place / "m", "qwen2", num_hidden_layers=12)  # long enough for the signal to meet it
    words = ["--model", str(place / "m"), "--out", str(place / "out"), "--method", "rtn", "--group-size", "32"]
    command = [sys.executable, "-m", "qquant.gptq", *words, "--device", "cpu"]
    journal = place / "out.unfinished" / "journal.jsonl"
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, and Python would leave it so.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert err.splitlines()[-1].startswith("error: stopped; what is finished is saved in")
    assert {path.name for path in place.iterdir()} == {"m", "d.txt", "out.unfinished"}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {path.name for path in place.iterdir()} == {"m", "d.txt", "out"}
