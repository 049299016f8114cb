"""Shapes read off a skeleton are those of the model that is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from qquant.errors import BadModelError, UsageError
from qquant.models.sizes import SIZES, size_config
from qquant.random_models import config_from_dict
from qquant.shapes import model_shapes
from tests.conftest import Factory

PARAMETERS = {
    # The first three as design facts state them, the others as their model cards' files hold them.
    "qwen-1.8b": 1_836_828_672,
    "qwen-7b": 7_721_324_544,
    "qwen-72b": 72_287_920_128,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
}


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items(), ids=list(PARAMETERS))
def test_a_named_size_has_the_parameters_of_the_published_model(name: str, parameters: int) -> None:
    assert model_shapes(config_from_dict(size_config(name))).parameters == parameters


@pytest.mark.parametrize("tie", [False, True], ids=["own_head", "tied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_shapes_are_those_of_the_loaded_model(checkpoint: Factory, family: str, tie: bool) -> None:
    folder = checkpoint(family, tie=tie)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    shapes = model_shapes(AutoConfig.from_pretrained(folder))
    assert shapes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shapes.tied is tie
    assert {(x.name, x.outputs, x.inputs) for x in shapes.linears} == {
        (name.removesuffix(".weight"), *parameter.shape)
        for name, parameter in model.named_parameters()
        if ".layers." in name and parameter.ndim == 2
    }
    assert {x.name.rpartition(".")[2] for x in shapes.linears if x.tail} == {"o_proj", "down_proj"}
    assert shapes.query_norms is (family == "qwen3")


def test_stages_are_the_linears_that_share_an_input(tiny_qwen2: Path) -> None:
    # hidden 64, 4 query heads and 2 key heads of 16, inner width 128
    shapes = model_shapes(AutoConfig.from_pretrained(tiny_qwen2))
    assert shapes.stages == ((64, 64 + 32 + 32), (64, 64), (64, 256), (128, 64))


def test_reading_shapes_leaves_the_configuration_as_it_was(tiny_qwen2: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_qwen2)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    model_shapes(config)
    assert config.quantization_config == {"quant_method": "gptq", "bits": 4}


def test_an_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"qwen-7b.*got 'qwen-8b'"):
        size_config("qwen-8b")


def test_a_size_is_a_fresh_copy() -> None:
    size_config("qwen-7b")["hidden_size"] = 1
    assert SIZES["qwen-7b"]["hidden_size"] == 4096


def test_a_model_with_other_than_keys_and_values_is_refused() -> None:
    config = AutoConfig.for_model(
        "qwen3_next", hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_experts=0, vocab_size=64
    )
    with pytest.raises(BadModelError):
        model_shapes(config)
