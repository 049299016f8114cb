"""Finding the blocks of a model: families by table, others by structure, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qquant.calibrate import samples_from_ids
from qquant.capture import discover_stages
from qquant.config import QuantizeConfig
from qquant.errors import BadModelError
from qquant.models.layouts import Layout, block_list, find_attentions, find_layout, linears
from qquant.models.qwen.modeling import QWenLMHeadModel
from qquant.quantizing import quantize_checkpoint
from tests.conftest import TINY, Factory
from tests.qwen_folders import make_qwen

KNOWN = ("qwen2", "qwen3", "llama", "mistral")
# Found by structure alone and quantized end to end below: family -> options beside the tiny ones.
BY_STRUCTURE: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16},  # four norms per block, attention that alternates
    "olmo2": {},  # norms after attention and MLP
    "phi3": {},  # fused query-key-value and gate-up
    "starcoder2": {},  # layer norms and an MLP without a gate
}
BLOCK = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def skeleton(family: str, **options: Any) -> nn.Module:
    """A tiny model of a family on the meta device."""
    config = AutoConfig.for_model(family, **{**TINY, "pad_token_id": 0, **options})
    with init_empty_weights():
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def decoder(*blocks: nn.Module, **others: nn.Module) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList(blocks)
    for name, module in others.items():
        model.add_module(name, module)
    return model


@pytest.mark.parametrize("family", KNOWN)
def test_a_known_family_is_found_in_the_table(family: str) -> None:
    model = skeleton(family)
    layout = find_layout(model, family)
    assert layout.blocks == "model.layers"
    assert layout.units is not None
    assert [unit.tail for unit in layout.units] == ["self_attn.o_proj", "mlp.down_proj"]
    assert [name for unit in layout.units for stage in unit.stages for name in stage] == BLOCK
    assert list(linears(block_list(model, layout)[0])) == BLOCK


@pytest.mark.parametrize("family", KNOWN)
def test_the_table_agrees_with_what_a_run_of_the_block_shows(family: str) -> None:
    """A contract with transformers: the stages written down are those that data meets."""
    config = AutoConfig.for_model(family, **TINY)
    model = AutoModelForCausalLM.from_config(config).eval()
    layout = find_layout(model, family)
    assert layout.units is not None
    stages = discover_stages(
        block_list(model, layout)[0], "0", lambda: model(input_ids=torch.arange(4)[None], use_cache=False)
    )
    assert [set(stage) for stage in stages] == [set(stage) for unit in layout.units for stage in unit.stages]


def test_the_original_qwen_is_in_the_table_and_runs_in_that_order(tmp_path: Path) -> None:
    model = QWenLMHeadModel.from_pretrained(make_qwen(tmp_path))
    layout = find_layout(model, "qwen")
    assert layout.blocks == "transformer.h"
    assert layout.units is not None
    stages = discover_stages(
        block_list(model, layout)[0], "0", lambda: model(input_ids=torch.arange(4)[None], use_cache=False)
    )
    listed = [list(stage) for unit in layout.units for stage in unit.stages]
    assert stages == listed == [["attn.c_attn"], ["attn.c_proj"], ["mlp.w1", "mlp.w2"], ["mlp.c_proj"]]
    assert [unit.tail for unit in layout.units] == ["attn.c_proj", "mlp.c_proj"]


def test_attentions_are_named_with_the_norms_before_them(tmp_path: Path) -> None:
    model = QWenLMHeadModel.from_pretrained(make_qwen(tmp_path, num_hidden_layers=1))
    assert find_attentions(model, "qwen") == {"transformer.h.0.attn": "transformer.h.0.ln_1"}
    llama = skeleton("llama", num_hidden_layers=1)
    assert find_attentions(llama, "llama") == {"model.layers.0.self_attn": "model.layers.0.input_layernorm"}
    assert find_attentions(llama, "made up") == {}
    assert find_attentions(llama, "qwen") == {}


@pytest.mark.parametrize("family", list(BY_STRUCTURE))
def test_an_unknown_family_is_found_by_its_structure(family: str) -> None:
    assert find_layout(skeleton(family, **BY_STRUCTURE[family]), family) == Layout("model.layers", None)


def test_a_family_found_by_structure_says_once_which_parts_of_the_method_it_goes_without(
    checkpoint: Factory, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qquant.telling.said", set())
    folder, samples = checkpoint("olmo2"), samples_from_ids([list(range(24))])
    quantize_checkpoint(folder, samples, QuantizeConfig(method="gptq", group_size=32), tmp_path / "plain")
    assert caplog.text == ""
    quantize_checkpoint(folder, samples, QuantizeConfig(group_size=32), tmp_path / "out")
    assert caplog.text.count("not folded") == 1
    assert caplog.text.count("(residual)") == 1


@pytest.mark.parametrize("family", list(BY_STRUCTURE))
def test_a_family_found_by_structure_is_quantized_end_to_end(checkpoint: Factory, tmp_path: Path, family: str) -> None:
    """quantize_checkpoint compares what it wrote with what it walked, so finishing is the proof."""
    folder = checkpoint(family, **BY_STRUCTURE[family])
    samples = samples_from_ids([list(range(24)), list(range(100, 140))])
    log = quantize_checkpoint(folder, samples, QuantizeConfig(group_size=32), tmp_path / "out")
    assert len(log.modules) == 2 * len(linears(block_list(skeleton(family, **BY_STRUCTURE[family]), LAYERS)[0]))


LAYERS = Layout("model.layers", None)


def test_the_outermost_of_equally_long_lists_is_taken() -> None:
    def block() -> nn.Module:
        inner = nn.Module()
        inner.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
        return inner

    assert find_layout(decoder(block(), block(), block()), "made up").blocks == "layers"


def test_a_list_without_linears_is_no_list_of_blocks() -> None:
    model = decoder(nn.Linear(2, 2), nn.Linear(2, 2), norms=nn.ModuleList([nn.LayerNorm(2) for _ in range(5)]))
    assert find_layout(model, "made up").blocks == "layers"


def test_a_model_without_blocks_is_refused_with_the_known_families() -> None:
    with pytest.raises(BadModelError, match="llama, mistral, qwen, qwen2, qwen3"):
        find_layout(nn.Sequential(nn.Linear(2, 2)), "made up")


def test_a_model_with_no_block_at_all_is_refused() -> None:
    with pytest.raises(BadModelError, match="at least one block"):
        find_layout(skeleton("llama", num_hidden_layers=0), "llama")


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_fused_experts_are_refused_by_name(family: str) -> None:
    with pytest.raises(BadModelError, match=r"model\.layers\.0\.mlp\.experts\.\w+ .* mixture-of-experts"):
        find_layout(skeleton(family), family)


def test_a_convolution_is_refused_by_name() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 3))
    with pytest.raises(BadModelError, match=r"layers\.0\.1\.weight"):
        find_layout(decoder(block), "made up")


def test_a_known_family_with_other_linears_is_refused() -> None:
    model = skeleton("llama")
    del model.get_submodule("model.layers.1.mlp").gate_proj
    with pytest.raises(BadModelError, match=r"model\.layers\.1 holds"):
        find_layout(model, "llama")
