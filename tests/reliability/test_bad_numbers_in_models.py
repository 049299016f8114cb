"""Numbers that lie in one tensor of a whole checkpoint, or in the activations that it makes. The run ends with one
error that names the tensor or the linear and leaves nothing at the target, or its folder is sound and its manifest
names every linear that was not quantized as asked.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from qquant.calibrate import samples_from_ids
from qquant.cli import app
from qquant.config import QuantizeConfig, QuantizeLog
from qquant.errors import BadModelError, NumericError, QquantError
from qquant.quantizing import quantize_checkpoint
from qquant.shards import SINGLE_NAME
from tests.conftest import VOCAB, Factory

ROW, BESIDES = "bad numbers in a checkpoint", ("method", "dtype", "value")
SHAPE = {
    "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
BLOCK = "model.layers.0"
ATTENTION = [f"{BLOCK}.self_attn.{name}_proj" for name in "qkvo"]
MLP = [f"{BLOCK}.mlp.{name}_proj" for name in ("gate", "up", "down")]
LARGEST = float(torch.finfo(torch.bfloat16).max)

Outcome = Callable[..., None]
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def changed(checkpoint: Factory, tmp_path: Path) -> Callable[..., Path]:
    """``changed(change, dtype)``: a folder whose tensors went through ``change``."""

    def make(change: Change, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(checkpoint("qwen2", dtype=dtype, **SHAPE), folder)
        tensors = load_file(folder / SINGLE_NAME)
        change(tensors)
        save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})
        return folder

    return make


def quantized(folder: Path, method: str, **options: Any) -> QuantizeLog:
    ids = torch.randint(0, VOCAB, (4, 24), generator=torch.Generator().manual_seed(0))
    config = QuantizeConfig(method=method, group_size=32, **options)
    return quantize_checkpoint(folder, samples_from_ids(ids), config, folder.parent / "out")


def assert_refused(folder: Path, method: str, kind: type[QquantError], words: str, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        quantized(folder, method, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "out").exists()


def assert_sound(folder: Path, log: QuantizeLog) -> dict[str, str]:
    """No number in the output lies; returns the manifest's fallbacks, which are those of the log."""
    out = folder.parent / "out"
    for name, tensor in load_file(out / SINGLE_NAME).items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), name
        assert not name.endswith(".scales") or (tensor != 0).all(), name
    assert all(math.isfinite(record.relative_error) for record in log.modules)
    fallbacks: dict[str, str] = json.loads((out / "manifest.json").read_text())["fallbacks"]
    assert fallbacks == {record.name: record.fallback for record in log.modules if record.fallback is not None}
    return fallbacks


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", [
    *(f"{linear}.weight" for linear in (*ATTENTION, *MLP)),
    f"{ATTENTION[1]}.bias",
    f"{BLOCK}.input_layernorm.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
])  # fmt: skip
def test_a_tensor_that_is_not_finite_is_named(
    changed: Callable[..., Path], name: str, value: float, outcome: Outcome
) -> None:
    folder = changed(lambda tensors: tensors[name].view(-1)[-1].fill_(value))
    assert_refused(folder, "gptq", BadModelError, f"weights must be finite, {name}")
    outcome("refused")


@pytest.mark.parametrize(("method", "dtype"), [
    ("rtn", torch.float32), ("gptq", torch.float32), ("gptq", torch.bfloat16), ("best", torch.float32)
])  # fmt: skip
@pytest.mark.parametrize("linear", [*ATTENTION, *MLP])
def test_a_linear_too_large_for_float16_scales_is_named(
    changed: Callable[..., Path], linear: str, method: str, dtype: torch.dtype, outcome: Outcome
) -> None:
    """The linear itself, not the first of those that share its inputs; gradients are looked at even before."""
    folder = changed(lambda tensors: tensors[f"{linear}.weight"][3, 5].fill_(LARGEST / 2), dtype)
    assert_refused(folder, method, NumericError, BLOCK if method == "best" else f"{linear}: a group's scale must fit")
    outcome("refused")


@pytest.mark.parametrize("method", ["gptq", "qep+refine", "best"])
@pytest.mark.parametrize(("norm", "size", "linear"), [
    ("input_layernorm", 1e25, ATTENTION[0]),
    ("post_attention_layernorm", 1e25, MLP[0]),
    ("post_attention_layernorm", 1e15, MLP[2]),
])  # fmt: skip
def test_the_linear_whose_inputs_overflow_is_named(
    changed: Callable[..., Path], norm: str, size: float, linear: str, method: str, outcome: Outcome
) -> None:
    """In the third case gate and up only just fit, and their product does not."""
    folder = changed(lambda tensors: tensors[f"{BLOCK}.{norm}.weight"].fill_(size))
    words = BLOCK if method == "best" else f"{linear}: activations must be finite"
    assert_refused(folder, method, NumericError, words)
    outcome("refused")


@pytest.mark.parametrize(("method", "value"), [("gptq", 0.0), ("best", 1e-40)])
@pytest.mark.parametrize("name", [
    *(f"{linear}.weight" for linear in (*ATTENTION, *MLP)),
    f"{BLOCK}.input_layernorm.weight",
    f"{BLOCK}.post_attention_layernorm.weight",
    "model.embed_tokens.weight",
])  # fmt: skip
def test_tensors_of_zeros_and_denormals_are_quantized(
    changed: Callable[..., Path], name: str, value: float, method: str, outcome: Outcome
) -> None:
    folder = changed(lambda tensors: tensors[name].fill_(value))
    log = quantized(folder, method)
    fallbacks = assert_sound(folder, log)
    dead = max(record.dead_columns for record in log.modules)
    if "layernorm" in name and method == "gptq":
        assert dead >= SHAPE["hidden_size"]
    assert not fallbacks
    outcome("sane")


def test_inputs_that_float32_cannot_solve_with_are_a_fallback_that_is_told(
    changed: Callable[..., Path], tmp_path: Path, outcome: Outcome
) -> None:
    folder = changed(lambda tensors: tensors[f"{BLOCK}.post_attention_layernorm.weight"].fill_(3e9))
    fallbacks = assert_sound(folder, quantized(folder, "gptq"))
    assert list(fallbacks) == MLP
    assert all(text.startswith("rounded to nearest: its inputs' mean squares") for text in fallbacks.values())
    shutil.rmtree(tmp_path / "out")
    assert_refused(folder, "gptq", NumericError, f"{MLP[0]}: --strict forbids fallbacks", strict=True)
    outcome("recorded fallback")
    outcome("refused")


def test_the_command_tells_fallbacks_and_strict_forbids_them(
    changed: Callable[..., Path], tmp_path: Path, outcome: Outcome
) -> None:
    folder = changed(lambda tensors: tensors[f"{BLOCK}.post_attention_layernorm.weight"].fill_(3e9))
    (tmp_path / "text.txt").write_text("One two three four five, said the fox to the crow. " * 40)
    words = ["--model", folder, "--data", tmp_path / "text.txt", "--out", tmp_path / "out", "--method", "gptq"]
    words += ["--group-size", 32, "--n-samples", 4, "--seq-len", 24]
    strict = CliRunner().invoke(app, ["quantize", *map(str, words), "--strict"])
    assert strict.exit_code == 6
    assert strict.stderr.splitlines()[-1].startswith(f"error: {MLP[0]}: --strict forbids fallbacks")
    assert not (tmp_path / "out").exists()
    outcome("refused")
    shutil.rmtree(tmp_path / "out.unfinished", ignore_errors=True)
    done = CliRunner().invoke(app, ["quantize", *map(str, words)])
    assert done.exit_code == 0, done.output
    assert "3 linears not as asked, all of them in manifest.json" in done.stderr
    assert all(f"  {linear}: rounded to nearest: " in done.stderr for linear in MLP)
    outcome("recorded fallback")


def test_a_sound_checkpoint_says_that_nothing_fell_back(changed: Callable[..., Path], outcome: Outcome) -> None:
    folder = changed(lambda tensors: None)
    assert assert_sound(folder, quantized(folder, "best", strict=True)) == {}
    outcome("sane")
