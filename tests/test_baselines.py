"""bitsandbytes as a baseline: what its two formats make of a model, against their definitions worked out here.

Most tests run only where the optional package is installed; those of refusals run everywhere.
"""

from __future__ import annotations

import importlib.util
import logging
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qquant.baselines import (
    BitsAndBytesKind,
    check_bitsandbytes,
    load_bitsandbytes,
    unlisted_bytes_of,
    weights_bytes_of,
)
from qquant.checkpoint import load_model
from qquant.errors import BadModelError, UsageError
from tests.conftest import Factory
from tests.qwen_folders import make_qwen

CPU = torch.device("cpu")
IDS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
KINDS: tuple[BitsAndBytesKind, ...] = ("nf4", "llm-int8")
BLOCK = 64

installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
# Its imports use a part of torch that torch is about to drop; the first test that imports it would fail.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def _linears(model: Any) -> list[str]:
    """Names of what is quantized: every linear but the output head."""
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__.startswith("Linear") and "lm_head" not in name
    ]


def _nf4_levels() -> Tensor:
    """Sixteen levels: quantiles of the normal distribution, zero among them, scaled to end at -1 and 1.

    As Dettmers et al. describe them (QLoRA, arXiv:2305.14314): eight at and below zero and nine at and above it, evenly
    spaced in probability up to that of half a level short of the end.
    """
    normal = statistics.NormalDist()
    end = (1 - 1 / 30 + 1 - 1 / 32) / 2
    upper = [normal.inv_cdf(end + (0.5 - end) * step / 8) for step in range(8)]
    lower = [-normal.inv_cdf(end + (0.5 - end) * step / 7) for step in range(7)]
    levels = torch.tensor(sorted([*upper, 0.0, *lower]), dtype=torch.float64)
    return levels / levels.abs().max()


def _nf4(weight: Tensor) -> Tensor:
    """Each weight at the nearest level of its block of 64, in float64."""
    blocks = weight.double().reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scale)[..., None] - _nf4_levels()).abs().argmin(-1)
    return (_nf4_levels()[nearest] * scale).reshape(weight.shape)


def _int8(weight: Tensor) -> Tensor:
    """Each weight at the nearest of 255 levels of its row, in float64."""
    scale = weight.double().abs().amax(1, keepdim=True) / 127
    return (weight.double() / scale).round() * scale


def _with_rounded_weights(folder: Path, kind: BitsAndBytesKind) -> Any:
    model: Any = load_model(folder, dtype=torch.float32, device=CPU)
    for name in _linears(model):
        weight = model.get_submodule(name).weight.data
        weight.copy_(_nf4(weight) if kind == "nf4" else _int8(weight))
    return model


@installed
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_nf4_computes_what_rounded_weights_compute(checkpoint: Factory, family: str) -> None:
    folder = checkpoint(family)
    found = _logits(load_bitsandbytes(folder, "nf4", dtype=torch.float32, device=CPU))
    expected, plain = _logits(_with_rounded_weights(folder, "nf4")), _logits(load_model(folder, device=CPU))
    # Scales and levels are float32; a weight that lies half-way between two levels may go to the other.
    assert float((found - expected).norm()) <= 1e-3 * float((plain - expected).norm())


@installed
def test_llm_int8_is_closer_to_rounded_weights_than_to_none(checkpoint: Factory) -> None:
    folder = checkpoint("qwen2")
    found = _logits(load_bitsandbytes(folder, "llm-int8", dtype=torch.float32, device=CPU))
    expected, plain = _logits(_with_rounded_weights(folder, "llm-int8")), _logits(load_model(folder, device=CPU))
    # Activations are in 8 bits, too: about as much error again as that of the weights, in each of seven linears.
    assert float((found - expected).norm()) <= 4 * float((plain - expected).norm())
    assert float((found - plain).norm()) <= 0.05 * float(plain.norm())


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_all_linears_but_the_head_are_quantized(tiny_qwen2: Path, kind: BitsAndBytesKind) -> None:
    model: Any = load_bitsandbytes(tiny_qwen2, kind, dtype=torch.float32, device=CPU)
    stored = {"nf4": torch.uint8, "llm-int8": torch.int8}[kind]
    assert len(_linears(model)) == 14
    assert {model.get_submodule(name).weight.dtype for name in _linears(model)} == {stored}
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32
    assert not model.training


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_original_qwen_models_can_be_baselines_too(tmp_path: Path, kind: BitsAndBytesKind) -> None:
    folder = make_qwen(tmp_path / "qwen")
    found = _logits(load_bitsandbytes(folder, kind, dtype=torch.float32, device=CPU))
    plain = _logits(load_model(folder, dtype=torch.float32, device=CPU))
    assert 0 < float((found - plain).norm()) < 0.5 * float(plain.norm())


@installed
@pytest.mark.parametrize("tie", [False, True], ids=["own_head", "shared_head"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_codes_scales_and_the_rest_as_the_original_stores_it(
    checkpoint: Factory, kind: BitsAndBytesKind, tie: bool
) -> None:
    folder = checkpoint("qwen2", tie=tie)
    plain: Any = load_model(folder, dtype=torch.float32, device=CPU)
    weights = [plain.get_submodule(name).weight for name in _linears(plain)]
    rest = sum(p.numel() for p in plain.parameters()) - sum(w.numel() for w in weights)
    if kind == "nf4":
        quantized = sum(w.numel() // 2 + 4 * (w.numel() // BLOCK) + 4 * 16 for w in weights)
    else:
        quantized = sum(w.numel() + 4 * len(w) for w in weights)
    model = load_bitsandbytes(folder, kind, dtype=torch.float32, device=CPU)
    assert weights_bytes_of(model, stored_dtype=torch.bfloat16) == quantized + 2 * rest
    _logits(model)
    assert weights_bytes_of(model, stored_dtype=torch.bfloat16) == quantized + 2 * rest


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_no_parameter_lists_are_the_scales(tiny_qwen2: Path, kind: BitsAndBytesKind) -> None:
    plain: Any = load_model(tiny_qwen2, dtype=torch.float32, device=CPU)
    weights = [plain.get_submodule(name).weight for name in _linears(plain)]
    model = load_bitsandbytes(tiny_qwen2, kind, dtype=torch.float32, device=CPU)
    found = unlisted_bytes_of(model)
    if kind == "nf4":
        scales = sum(4 * (w.numel() // BLOCK) for w in weights)
        assert scales + 4 * 16 <= found <= scales + 4 * 16 * len(weights)  # a table of levels each, or one for all
    else:
        assert found == sum(4 * len(w) for w in weights)
    _logits(model)
    assert unlisted_bytes_of(model) == found


@installed
def test_reading_the_state_of_an_nf4_model_leaves_it_as_it_was(tiny_qwen2: Path) -> None:
    model: Any = load_bitsandbytes(tiny_qwen2, "nf4", dtype=torch.float32, device=CPU)
    before = _logits(model)
    model.state_dict()
    assert torch.equal(_logits(model), before)


@installed
def test_layers_of_any_width_can_be_computed(checkpoint: Factory) -> None:
    folder = checkpoint("qwen2", num_attention_heads=5, num_key_value_heads=1, head_dim=12, hidden_size=60)
    model = load_bitsandbytes(folder, "nf4", dtype=torch.float32, device=CPU)
    assert bool(torch.isfinite(_logits(model)).all())


@installed
def test_what_llm_int8_rounds_besides_weights_is_said_once(tiny_qwen2: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _logits(load_bitsandbytes(tiny_qwen2, "llm-int8", dtype=torch.float32, device=CPU))
    assert [record.message for record in caplog.records if "float16" in record.message] == [
        "llm-int8 rounds activations to float16 on their way to 8 bits; the rest runs in float32"
    ]


@installed
def test_missing_weights_are_not_made_up(checkpoint: Factory, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = checkpoint("qwen2")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_bitsandbytes(tmp_path, "nf4", dtype=torch.float32, device=CPU)


@installed
def test_a_quantized_folder_is_refused(checkpoint: Factory, tmp_path: Path) -> None:
    for file in checkpoint("qwen2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    with pytest.raises(UsageError, match="quantized already; give the original"):
        check_bitsandbytes(tmp_path, "nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_package_the_error_says_what_to_install(
    tiny_qwen2: Path, kind: BitsAndBytesKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"pip install 'qquant\[baselines\]'"):
        load_bitsandbytes(tiny_qwen2, kind, dtype=torch.float32, device=CPU)


def test_importing_the_package_cannot_fetch_code_from_a_hub(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')\n")
    (tmp_path / "bitsandbytes.py").write_text("import kernels\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("kernels", *[name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UsageError, match="import of kernels halted"):
        load_bitsandbytes(tiny_qwen2, "nf4", dtype=torch.float32, device=CPU)
    assert "kernels" not in sys.modules


def test_an_unknown_kind_is_refused(tiny_qwen2: Path) -> None:
    with pytest.raises(UsageError, match="must be one of nf4, llm-int8, got 'int3'"):
        check_bitsandbytes(tiny_qwen2, "int3")
