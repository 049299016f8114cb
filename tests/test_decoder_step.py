"""One token through a decoder layer by ``layer_step``: the bits of the layer itself, and when it steps aside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, DynamicCache

from qquant.cache_room import Room
from qquant.decoder_step import DecoderStep
from qquant.layer_ops import kernels_are_live
from qquant.random_models import random_model

pytestmark = pytest.mark.skipif(not kernels_are_live(), reason="qquant._C is not built")

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def make(family: str = "qwen2", precision: Any = "int4", sizes: dict[str, int] | None = None) -> Any:
    config = AutoConfig.for_model(family, num_hidden_layers=2, vocab_size=300, head_dim=32, **SIZES | (sizes or {}))
    return random_model(config, precision=precision, dtype=torch.bfloat16, device=torch.device("cpu"))


def layers_of(model: Any) -> list[nn.Module]:
    return list(model.model.layers)


def plain(model: Any) -> Any:
    """The same weights without the step."""
    other = copy.deepcopy(model)
    for layer in layers_of(other):
        layer.__dict__.pop("forward", None)
    return other


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each layer's call that the operators compute."""
    calls: list[int] = []
    ready = DecoderStep._ready

    def count(step: DecoderStep, x: Tensor, positions: Any) -> Any:
        found = ready(step, x, positions)
        if found is not None:
            calls.append(1)
        return found

    monkeypatch.setattr(DecoderStep, "_ready", count)
    return calls


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def continued(model: Any, cache: DynamicCache, count: int, batch: int = 1) -> list[Tensor]:
    return [model(input_ids=tokens(batch, 1) + i, past_key_values=cache).logits for i in range(count)]


@torch.no_grad()
def prompted(model: Any, batch: int = 1, mask: Tensor | None = None) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens(batch, 5), past_key_values=cache, attention_mask=mask)
    return cache


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3"])
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_the_step_gives_the_bits_of_the_layer(family: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(family, precision)
    other = plain(model)
    calls = counted(model, monkeypatch)
    for batch in (1, 3):
        ours, theirs = (continued(one, prompted(one, batch), 4, batch) for one in (model, other))
        assert same(ours, theirs)
    assert len(calls) == 2 * 4 * len(layers_of(model))


def test_padded_batches_see_their_mask() -> None:
    model = make()
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :2] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    given = {"input_ids": tokens(2, 5), "attention_mask": mask, "output_logits": True, "return_dict_in_generate": True}
    ours, theirs = (one.generate(**given, **options).logits for one in (model, plain(model)))
    assert same(list(ours), list(theirs))


def test_caches_with_a_common_past_do_not_write_into_each_other() -> None:
    model = make()
    found = []
    for one in (model, plain(model)):
        cache = prompted(one)
        logits = continued(one, cache, 2)
        twin = copy.copy(cache)
        twin.layers = [copy.copy(layer) for layer in cache.layers]
        deep = copy.deepcopy(cache)
        logits += continued(one, cache, 3) + continued(one, twin, 3) + continued(one, deep, 3)
        cache.crop(-2)
        found.append(logits + continued(one, cache, 2) + continued(one, twin, 2))
    assert same(*found)


def test_a_cache_grows_beyond_its_room() -> None:
    room = Room(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    assert room.capacity == 3 + 64
    model = make()
    ours, theirs = (continued(one, prompted(one), 70) for one in (model, plain(model)))
    assert same(ours, theirs)


def test_the_state_dict_stays_what_it_was() -> None:
    model = make()
    assert list(model.state_dict()) == list(plain(model).state_dict())


@pytest.mark.parametrize("part", ["self_attn", "mlp", "self_attn.q_proj", "input_layernorm"])
def test_hooks_on_parts_are_called(part: str) -> None:
    model, calls = make(), []
    cache = prompted(model)
    layers_of(model)[0].get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
    continued(model, cache, 1)
    assert calls == [1]


def test_a_linear_that_was_replaced_is_used() -> None:
    model = make()
    layer: Any = layers_of(model)[0]
    zero = nn.Linear(SIZES["intermediate_size"], SIZES["hidden_size"], bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(zero.weight)
    layer.mlp.down_proj = zero
    other = plain(model)
    assert same(*(continued(one, prompted(one), 2) for one in (model, other)))


def test_a_linear_that_was_unpacked_is_used() -> None:
    model = make()
    layer: Any = layers_of(model)[0]
    before = continued(model, prompted(model), 1)
    layer.mlp.down_proj.scales = layer.mlp.down_proj.scales * 2
    after = continued(model, prompted(model), 1)
    assert not same(before, after)
    assert same(after, continued(plain(model), prompted(plain(model)), 1))


def test_hidden_states_are_still_given_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    with torch.no_grad():
        found = model(input_ids=tokens(1, 1), output_hidden_states=True).hidden_states
    assert len(found) == len(layers_of(model)) + 1
    calls = counted(model, monkeypatch)
    continued(model, prompted(model), 1)
    assert len(calls) == len(layers_of(model))


def test_gradients_and_prompts_go_the_layers_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    calls = counted(model, monkeypatch)
    model(input_ids=tokens(1, 1))
    with torch.no_grad():
        model(input_ids=tokens(1, 4))
    assert calls == []
