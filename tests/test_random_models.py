"""Random models against what they stand in for: the shapes, the bytes and the size of the weights of real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from qquant import random_models
from qquant.errors import BadModelError, UsageError
from qquant.linear import QuantLinear
from qquant.measure import tensor_bytes
from qquant.random_models import BITS, config_from_dict, random_model
from tests.conftest import TINY

CPU = torch.device("cpu")
SHAPES = {**TINY, "hidden_size": 256, "intermediate_size": 384, "head_dim": 64}


def tiny(family: str = "qwen2", **changes: Any) -> PretrainedConfig:
    if family == "qwen":
        plain = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
        return config_from_dict({"model_type": "qwen", "vocab_size": 320, **plain, **changes})
    return AutoConfig.for_model(family, **{**SHAPES, "tie_word_embeddings": False, **changes})


def made(precision: Any, config: PretrainedConfig | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    return random_model(config or tiny(), precision=precision, dtype=dtype, device=CPU)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "qwen"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_logits_are_finite_and_differ_between_tokens(family: str, precision: str) -> None:
    with torch.inference_mode():
        logits = made(precision, tiny(family))(torch.arange(12)[None]).logits.float()
    assert bool(torch.isfinite(logits).all())
    assert float(logits[0].std(0).min()) > 0


def test_parameters_require_gradients_as_loaded_ones_do(tiny_qwen2: Path) -> None:
    """torch multiplies by others in another way, which takes more memory, and random weights stand for loaded ones."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert all(parameter.requires_grad for parameter in made("bf16").parameters())


@pytest.mark.parametrize("precision", list(BITS))
def test_packed_weights_have_the_size_of_fresh_ones(precision: Any) -> None:
    config = tiny()
    layers = [module for module in made(precision, config).modules() if isinstance(module, QuantLinear)]
    assert len(layers) == 7 * config.num_hidden_layers
    for layer in layers:
        weight = layer.dequantized()
        # 2**14 values and more: their standard deviation is known to about 1 %, and codes repeat in no smaller pattern.
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        # The middle code stands for zero, and there is one code more below it than above: half a step off at most.
        assert abs(weight.mean().item()) < layer.scales.max().item()


def test_a_packed_model_takes_the_bytes_of_its_format() -> None:
    config = tiny()
    plain, packed = made("bf16", config), made("int4", config)
    saved = 0
    for name, layer in packed.named_modules():
        if isinstance(layer, QuantLinear):
            linear = plain.get_submodule(name)
            inputs, outputs = linear.in_features, linear.out_features
            groups = -(-inputs // 128)
            saved += 2 * inputs * outputs - (inputs * outputs // 2 + groups * outputs * (2 + 0.5) + 4 * inputs)
            layer.unpack()
    assert tensor_bytes(plain) - tensor_bytes(packed) == saved


def test_a_model_in_panels_takes_fewer_bytes_than_its_format() -> None:
    """No zeros, which are all one number, and no g_idx; biases are float32 for the kernels."""
    packed = made("int4")
    layers = [layer for layer in packed.modules() if isinstance(layer, QuantLinear)]
    if not all(layer.packed for layer in layers):
        pytest.skip("the CPU kernels (qquant._C) are not built")
    in_panels = tensor_bytes(packed)
    for layer in layers:
        layer.unpack()
    biases = sum(2 * layer.bias.numel() for layer in layers if layer.bias is not None)
    zeros = sum(layer.qzeros.numel() * 4 for layer in layers)
    assert tensor_bytes(packed) - in_panels == zeros + sum(4 * layer.in_features for layer in layers) - biases


def test_nothing_is_filled_before_all_memory_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    ask = torch.empty_like

    def asked(*args: Any, **options: Any) -> torch.Tensor:
        log.append("ask")
        return ask(*args, **options)

    monkeypatch.setattr(torch, "empty_like", asked)
    monkeypatch.setattr(random_models, "_repeat", lambda tensor, pattern: log.append("fill"))
    made("bf16")
    assert "fill" in log
    assert log == sorted(log)


def test_tied_weights_are_one_tensor() -> None:
    model = made("bf16", tiny(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert float(model.lm_head.weight.detach().float().std()) == pytest.approx(0.02, rel=0.05)


def test_the_seed_decides_the_weights() -> None:
    first, again = made("int4").state_dict(), made("int4").state_dict()
    other = random_model(tiny(), precision="int4", dtype=torch.bfloat16, device=CPU, seed=1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "model.layers.0.mlp.up_proj.qweight"
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("precision", ["fp32", "nf4", "llm-int8"])
def test_a_precision_that_is_not_made_is_refused(precision: str) -> None:
    with pytest.raises(UsageError, match=precision):
        made(precision)


def test_linears_that_fill_no_words_are_refused() -> None:
    with pytest.raises(UsageError, match="whole words"):
        made("int4", tiny(intermediate_size=100))


def test_an_unknown_type_of_model_is_refused() -> None:
    with pytest.raises(BadModelError, match="configuration"):
        config_from_dict({"model_type": "no-such-type"})
