"""Folding outlier key channels into the queries: exact, reversible, and only where there are outliers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import qquant
from qquant.linear import QuantLinear
from qquant.models.key_fold import can_fold, fold_keys, unfold_keys
from tests.qwen_folders import LONG, make_qwen

IDS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
FAMILIES = ("qwen2", "qwen3", "llama", "mistral")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


def plant_outliers(model: Any, factor: float = 40.0) -> None:
    """Make one rotary pair of each head's keys large and shrink the queries' as much."""
    dim = model.config.head_dim if hasattr(model.config, "head_dim") else 16
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            if hasattr(attention, "k_norm"):
                attention.k_norm.weight[[3, 3 + dim // 2]] *= factor
                attention.q_norm.weight[[3, 3 + dim // 2]] /= factor
                continue
            for linear, by in ((attention.k_proj, factor), (attention.q_proj, 1 / factor)):
                rows = linear.weight.view(-1, 2, dim // 2, linear.in_features)
                rows[:, :, 3] *= by
                if linear.bias is not None:
                    linear.bias.view(-1, 2, dim // 2)[:, :, 3] *= by


def key_range(model: Any) -> float:
    """Largest over median size of the channels that k_proj, or the norm after it, puts out."""
    found: list[Tensor] = []
    for layer in model.model.layers:
        source = getattr(layer.self_attn, "k_norm", layer.self_attn.k_proj)
        source.register_forward_hook(lambda _module, _inputs, keys: found.append(keys.reshape(-1, keys.shape[-1])))
    logits(model)
    sizes = torch.cat(found).abs().amax(0)
    return float(sizes.max() / sizes.median())


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("measured", [False, True], ids=["guessed", "measured"])
def test_logits_stay_bit_for_bit_and_outliers_are_gone(folder: Path, dtype: torch.dtype, measured: bool) -> None:
    model = load(folder)
    plant_outliers(model)
    model = model.to(dtype)
    expected, before = logits(model), weights(model)
    factors = fold_keys(model, model.config, [IDS] if measured else None)
    assert len(factors) == model.config.num_hidden_layers
    # Of float16, the smallest weights may move by 2**-25, which can turn over the last bit of a logit of order 1.
    tolerance = 2.0**-9 if dtype == torch.float16 else 0
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=tolerance)
    assert key_range(model) < 10
    unfold_keys(model, model.config, factors)
    if dtype == torch.float16:
        assert all((t.float() - before[name].float()).abs().max() <= 2.0**-24 for name, t in weights(model).items())
    else:
        assert same(model, before)


def test_factors_are_powers_of_two(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2)
    plant_outliers(model)
    for factor in fold_keys(model, model.config).values():
        assert torch.equal(factor.log2(), factor.log2().round())
        assert (factor >= 1).all()


def test_a_model_without_outliers_is_not_touched(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight.fill_(1)
            weight = layer.self_attn.k_proj.weight
            weight.div_(weight.norm(dim=1, keepdim=True))
    before = weights(model)
    assert fold_keys(model, model.config) == {}
    assert same(model, before)


def test_a_second_fold_finds_nothing_left(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2)
    plant_outliers(model)
    fold_keys(model, model.config)
    assert fold_keys(model, model.config) == {}


def test_biases_make_outliers_too(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias[5] = 50.0
    expected = logits(model)
    assert fold_keys(model, model.config)
    assert torch.equal(logits(model), expected)
    assert key_range(model) < 10


def test_a_fold_out_of_the_range_of_its_dtype_is_left_out_and_that_is_said(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = load(tiny_llama)
    plant_outliers(model)
    model = model.half()
    with torch.no_grad():
        # Times 32 this is beyond the largest float16.
        model.model.layers[0].self_attn.q_proj.weight[3, 0] = 60_000
    before = weights(model)
    factors = fold_keys(model, model.config)
    assert list(factors) == ["model.layers.1.self_attn"]
    assert "left out" in caplog.text
    for name, tensor in model.model.layers[0].state_dict().items():
        assert torch.equal(tensor, before[f"model.layers.0.{name}"])


def test_an_unknown_family_or_a_partial_rotation_cannot_fold(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    assert can_fold(model, model.config)
    model.config.rope_parameters = {**model.config.rope_parameters, "partial_rotary_factor": 0.5}
    assert not can_fold(model, model.config)
    other = load(tiny_llama)
    other.config.model_type = "cohere"
    assert not can_fold(other, other.config)


def test_weights_that_are_not_in_memory_cannot_fold(tiny_llama: Path) -> None:
    model = load(tiny_llama).to("meta")
    assert not can_fold(model, model.config)


class Adapted(torch.nn.Linear):
    """A linear that adds something of its own, as adapters do."""


def test_projections_that_do_more_than_multiply_cannot_fold(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    plain = model.model.layers[0].self_attn.k_proj
    model.model.layers[0].self_attn.k_proj = Adapted(plain.in_features, plain.out_features, bias=False)
    assert not can_fold(model, model.config)


def test_a_language_model_inside_a_larger_one_cannot_fold(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    assert not can_fold(torch.nn.ModuleDict({"language_model": model}), model.config)


def test_packed_projections_fold_into_their_scales(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2)
    plant_outliers(model)
    config = qquant.QuantizeConfig(bits=4, group_size=32, method="rtn")
    qquant.quantize_model(model, [], config)
    expected, before = logits(model), weights(model)
    factors = fold_keys(model, model.config)
    assert len(factors) == model.config.num_hidden_layers
    assert isinstance(model.model.layers[0].self_attn.k_proj, QuantLinear)
    assert torch.equal(logits(model), expected)
    unfold_keys(model, model.config, factors)
    assert same(model, before)


class TestOneProjection:
    """Qwen v1: c_attn holds the rows of queries, keys and values; NTK and LogN set in beyond 16 tokens."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return make_qwen(tmp_path)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("measured", [False, True], ids=["guessed", "measured"])
    @pytest.mark.parametrize("tokens", [9, LONG], ids=["short", "ntk_and_logn"])
    def test_logits_stay_bit_for_bit_and_weights_come_back(
        self, folder: Path, dtype: torch.dtype, measured: bool, tokens: int
    ) -> None:
        model = load(folder, dtype)
        assert can_fold(model, model.config)
        ids = torch.randint(0, 300, (2, tokens), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            expected, before = model(ids, use_cache=False).logits, weights(model)
            factors = fold_keys(model, model.config, [ids] if measured else None)
            assert list(factors) == ["transformer.h.0.attn", "transformer.h.1.attn"]
            assert torch.equal(model(ids, use_cache=False).logits, expected)
        unfold_keys(model, model.config, factors)
        assert same(model, before)

    def test_rows_of_keys_are_divided_and_those_of_queries_multiplied(self, folder: Path) -> None:
        model = load(folder)
        before = weights(model)
        for name, powers in fold_keys(model, model.config).items():
            factor = powers.repeat(1, 2).flatten()  # channels i and i + D / 2 of every head
            assert factor.numel() == 64
            by_row = torch.cat([factor, 1 / factor, torch.ones(64)])
            now = model.get_submodule(name).c_attn
            assert torch.equal(now.weight, before[f"{name}.c_attn.weight"] * by_row[:, None])
            assert torch.equal(now.bias, before[f"{name}.c_attn.bias"] * by_row)

    def test_the_outlier_is_the_channel_with_the_bias(self, folder: Path) -> None:
        model = load(folder)
        for powers in fold_keys(model, model.config, [IDS]).values():
            assert powers[0].argmax() == 5
            assert powers[0, 5] >= 2

    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_packed_projection_folds_into_its_scales(self, folder: Path, bits: Literal[4, 8]) -> None:
        model = load(folder)
        qquant.quantize_model(model, [], qquant.QuantizeConfig(bits=bits, group_size=32, method="rtn"))
        assert isinstance(model.transformer.h[0].attn.c_attn, QuantLinear)
        expected, before = logits(model), weights(model)
        factors = fold_keys(model, model.config)
        assert len(factors) == 2
        assert not torch.equal(model.transformer.h[0].attn.c_attn.scales, before["transformer.h.0.attn.c_attn.scales"])
        assert torch.equal(logits(model), expected)
        unfold_keys(model, model.config, factors)
        assert same(model, before)

    def test_heads_that_rotate_in_part_cannot_fold(self, tmp_path: Path) -> None:
        model = load(make_qwen(tmp_path, rotary_pct=0.5))
        assert not can_fold(model, model.config)
