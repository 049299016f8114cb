"""Our attention implementation inside transformers: masks, padding, grouped queries, what it hands on and to whom."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DiffLlamaConfig,
    DynamicCache,
    FalconConfig,
    Gemma2Config,
    Phi3Config,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qquant import kv_attention, kv_ops, plain_attention, telling
from qquant.kv_cache_quant import Int8KVCache
from tests.processor import needs_attention

PROMPT = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
NEXT = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))
# Left padding: the first row has three tokens less.
PADDED = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])


@pytest.fixture(autouse=True)
def say_again() -> None:
    telling.said.clear()


def load(folder: Path, attention: str = "sdpa") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)


def decode(model: Any, lengths: list[int], mask: Tensor | None = None, **options: Any) -> Tensor:
    """Logits of a prompt and of calls of the given lengths after it, all through an int8 cache."""
    cache = Int8KVCache(model.config, **options)
    mask = torch.ones_like(PROMPT) if mask is None else mask
    found, at = [], 0
    with torch.inference_mode():
        found.append(model(PROMPT, attention_mask=mask, past_key_values=cache).logits)
        for length in lengths:
            mask = torch.cat([mask, mask.new_ones(2, length)], 1)
            ids = NEXT[:, at : at + length]
            found.append(model(ids, attention_mask=mask, past_key_values=cache).logits)
            at += length
    # Rows of padding attend to nothing that matters.
    return torch.cat(found, 1)[:, 3:]


def assert_same_but_for_rounding(got: Tensor, expected: Tensor) -> None:
    # Two float32 evaluations of one formula over the same integers; logits are of order 1. Models of one layer only: in
    # a second one, keys that differ by a rounding may land on neighbouring codes.
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


@pytest.fixture(params=["qwen2", "qwen3", "llama", "mistral"])
def folder(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(request.param, num_hidden_layers=1)


@pytest.mark.parametrize("padding", [None, PADDED], ids=["full", "left_padded"])
@pytest.mark.parametrize("options", [{}, {"use_cache_kernel": False}, {"key_rotation": "hadamard"}], ids=str)
@pytest.mark.parametrize(
    "lengths", [[1] * 6, [4, 1, 16], [17, 1]], ids=["steps", "drafts_of_an_assistant", "chunked_prefill"]
)
def test_integers_and_eager_attention_on_dequantized_keys_agree(
    folder: Path, padding: Tensor | None, options: dict[str, Any], lengths: list[int]
) -> None:
    fused = decode(load(folder), lengths, padding, **options)
    assert_same_but_for_rounding(fused, decode(load(folder, "eager"), lengths, padding, **options))


def test_a_sliding_model_agrees_past_its_window(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("mistral", num_hidden_layers=1, sliding_window=8)
    lengths = [1] * 12 + [3, 1, 5]
    assert_same_but_for_rounding(decode(load(folder), lengths, PADDED), decode(load(folder, "eager"), lengths, PADDED))


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2)], ids=["mha", "mqa", "gqa4"])
def test_any_grouping_of_heads_agrees(checkpoint: Callable[..., Path], heads: tuple[int, int]) -> None:
    folder = checkpoint("llama", num_hidden_layers=1, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    assert_same_but_for_rounding(decode(load(folder), [1, 2, 1]), decode(load(folder, "eager"), [1, 2, 1]))


def test_bfloat16_is_as_close_as_its_own_attention(tiny_llama: Path) -> None:
    fused = decode(load(tiny_llama).bfloat16(), [1, 3, 1]).float()
    eager = decode(load(tiny_llama, "eager").bfloat16(), [1, 3, 1]).float()
    exact = decode(load(tiny_llama), [1, 3, 1])
    # The cache of the float32 model holds other roundings; both bfloat16 runs are off by that much and no more.
    assert (fused - exact).abs().max() <= 2 * (eager - exact).abs().max()


def test_other_caches_pass_through_our_attention_bit_for_bit(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2)
    with torch.inference_mode():
        before = model(PROMPT, past_key_values=DynamicCache(config=model.config)).logits
        Int8KVCache(model.config)
        assert model.config._attn_implementation == "qquant_sdpa"
        after = model(PROMPT, past_key_values=DynamicCache(config=model.config)).logits
        assert torch.equal(before, after)
        assert torch.equal(model(PROMPT, use_cache=False).logits, before)


def test_adopting_twice_changes_nothing_and_release_undoes_it(tiny_qwen2: Path) -> None:
    config = load(tiny_qwen2).config
    assert kv_attention.adopt(config)
    assert kv_attention.adopt(config)
    assert config._attn_implementation == "qquant_sdpa"
    kv_attention.release(config)
    assert config._attn_implementation == "sdpa"
    kv_attention.release(config)
    assert config._attn_implementation == "sdpa"


def test_attention_and_mask_are_registered_together(tiny_qwen2: Path) -> None:
    kv_attention.adopt(load(tiny_qwen2).config)
    assert "qquant_sdpa" in ALL_ATTENTION_FUNCTIONS
    assert ALL_MASK_ATTENTION_FUNCTIONS["qquant_sdpa"] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def test_the_attention_implementation_is_not_saved(tiny_qwen2: Path, tmp_path: Path) -> None:
    model = load(tiny_qwen2)
    kv_attention.adopt(model.config)
    model.save_pretrained(tmp_path)
    assert "qquant" not in (tmp_path / "config.json").read_text()


def repeated(states: Tensor, heads: int) -> Tensor:
    return states.repeat_interleave(heads // states.shape[1], dim=1)


@pytest.fixture
def flash() -> Iterator[list[Tensor | None]]:
    """A stand-in for the flash-attention package: its calling convention and mask [B, T], in plain torch."""
    masks: list[Tensor | None] = []

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        masks.append(attention_mask)
        length, tokens = query.shape[2], key.shape[2]
        seen = kv_ops.visible(length, tokens, query.device)
        if options.get("sliding_window"):
            seen = seen.triu(tokens - length - options["sliding_window"] + 1)
        seen = seen.expand(query.shape[0], 1, length, tokens)
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None]
        scores = query @ repeated(key, query.shape[1]).mT * options["scaling"]
        weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
        return (weights @ repeated(value, query.shape[1])).transpose(1, 2).contiguous(), None

    name = "flash_attention_2"
    before = ALL_ATTENTION_FUNCTIONS[name]
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, flash_attention_mask)
    yield masks
    AttentionInterface.register(name, before)


@pytest.mark.parametrize("padding", [None, PADDED], ids=["full", "left_padded"])
@pytest.mark.parametrize("window", [None, 8], ids=["plain", "sliding"])
def test_flash_attention_prefills_and_ours_decodes(
    checkpoint: Callable[..., Path], flash: list[Tensor | None], padding: Tensor | None, window: int | None
) -> None:
    folder = checkpoint("mistral", num_hidden_layers=1, sliding_window=window)
    model = load(folder)
    # Set directly: asking transformers for it would look for the package.
    model.config._attn_implementation = "flash_attention_2"
    fused = decode(model, [1, 1, 3, 1], padding)
    assert model.config._attn_implementation == "qquant_flash_attention_2"
    assert len(flash) == model.config.num_hidden_layers, "only the prompt may reach the base"
    assert_same_but_for_rounding(fused, decode(load(folder, "eager"), [1, 1, 3, 1], padding))


def test_an_option_the_kernel_does_not_know_goes_to_the_base_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = torch.nn.Module()
    x = torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(0))
    config = type("Config", (), {"_attn_implementation": "sdpa"})()
    kv_attention.adopt(config)
    states = kv_attention.QuantizedStates(*kv_ops.encode(x), dtype=torch.float32)
    plain = states.dequantize()
    attend = ALL_ATTENTION_FUNCTIONS["qquant_sdpa"]
    bias = torch.randn(1, 1, 1, 6, generator=torch.Generator().manual_seed(1))
    with caplog.at_level("WARNING", logger="qquant"):
        got, _ = attend(module, x[:, :, -1:], states, states, bias, scaling=0.25)
        attend(module, x[:, :, -1:], states, states, bias, scaling=0.25)
    expected = torch.nn.functional.scaled_dot_product_attention(x[:, :, -1:], plain, plain, attn_mask=bias, scale=0.25)
    torch.testing.assert_close(got.transpose(1, 2), expected)
    assert caplog.text.count("a mask of torch.float32: keys and values were dequantized") == 1


def test_a_compiled_model_gives_the_same_logits(checkpoint: Callable[..., Path]) -> None:
    model = load(checkpoint("llama", num_hidden_layers=1))
    plain = decode(model, [1, 1, 1])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert_same_but_for_rounding(decode(compiled, [1, 1, 1]), plain)


def test_four_bit_values_decode_through_the_base_and_that_is_said(
    checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoint("llama", num_hidden_layers=1, hidden_size=128)
    fused = decode(load(folder), [1, 3, 1], PADDED, value_bits=4)
    assert_same_but_for_rounding(fused, decode(load(folder, "eager"), [1, 3, 1], PADDED, value_bits=4))
    assert caplog.text.count("values of 4 bits") == 1


@pytest.mark.parametrize(
    "config",
    [
        FalconConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=320),
        DiffLlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
            vocab_size=320,
            intermediate_size=64,
        ),
        Phi3Config(
            hidden_size=64,
            num_attention_heads=4,
            num_hidden_layers=2,
            vocab_size=320,
            intermediate_size=64,
            pad_token_id=0,
        ),
        Gemma2Config(
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_hidden_layers=2,
            vocab_size=320,
            intermediate_size=64,
            sliding_window=8,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_models_with_ways_of_their_own_stay_right(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    mask = torch.ones_like(PROMPT)
    with torch.inference_mode():
        before = model(PROMPT, attention_mask=mask).logits
        exact, ours = DynamicCache(config=model.config), Int8KVCache(model.config)
        assert torch.equal(model(PROMPT, attention_mask=mask).logits, before)
        for cache in (exact, ours):
            model(PROMPT, attention_mask=mask, past_key_values=cache)
        mask = torch.cat([mask, mask[:, :1]], 1)
        steps = [model(NEXT[:, :1], attention_mask=mask, past_key_values=cache).logits for cache in (exact, ours)]
    # Half a step is a 500th of a vector's range: logits move by about a hundredth of their spread, by a wrong mask or
    # head as much as they are.
    assert (steps[0] - steps[1]).square().mean().sqrt() < 0.02 * steps[0].std()


@needs_attention
def test_one_token_over_a_bfloat16_cache_takes_the_kernel(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    seen: list[tuple[int, ...]] = []
    attend = plain_attention.attend

    def record(query: Tensor, *rest: Any) -> tuple[Tensor, None]:
        seen.append(tuple(query.shape))
        return attend(query, *rest)

    monkeypatch.setattr(plain_attention, "kernel_is_live", lambda: True)
    monkeypatch.setattr(plain_attention, "attend", record)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint("qwen2", dtype=torch.bfloat16))
    exact = copy.deepcopy(model).float()
    assert kv_attention.use_decode_kernel(model) == [
        "attention (bfloat16): decode_attention for 1 token, torch for more"
    ]
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :2] = 0
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        ids = torch.arange(1, 15).view(2, 7)
        model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
        assert seen == []
        found = model(ids[:, 6:], attention_mask=mask, past_key_values=cache).logits
        expected = exact(ids, attention_mask=mask).logits[:, -1:]
    assert seen == [(2, 4, 1, 16)] * model.config.num_hidden_layers
    # bfloat16 through two layers: 2**-8 of each of some ten roundings.
    assert (found.float() - expected).norm() < 10 * 2**-8 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_the_kernel_cannot_serve_nothing_is_adopted(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(plain_attention, "kernel_is_live", lambda: dtype == torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint("qwen2", dtype=dtype))
    assert kv_attention.use_decode_kernel(model) == []
    assert model.config._attn_implementation == "sdpa"
