"""Int8KVCache as transformers uses it: every method against an uncompressed cache, plain and sliding."""

from __future__ import annotations

import copy
import random
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, MistralConfig, Qwen2Config, Qwen3NextConfig, T5Config
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from qquant import kv_ops, telling
from qquant.errors import BadModelError, UsageError
from qquant.kv_attention import QuantizedStates
from qquant.kv_cache_quant import Int8KVCache, dequantize_cache_torch, quantize_cache_v
from qquant.kv_layer import SLIDING_SLACK, Int8Layer, Int8SlidingLayer
from qquant.kv_store import hadamard

HEADS, DIM = 2, 16
PLAIN: dict[str, Any] = {
    "use_cache_kernel": True,
    "key_rotation": "none",
    "scheme": "token",
    "value_bits": 8,
    "exact_prefill": True,
    "reserve": 0,
}


def config(**changes: Any) -> LlamaConfig:
    settings = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": HEADS,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "vocab_size": 64,
    } | changes
    return LlamaConfig(**settings)


def layer(**changes: Any) -> Int8Layer:
    return Int8Layer(config(), **PLAIN | changes)


def sliding(window: int, **changes: Any) -> Int8SlidingLayer:
    return Int8SlidingLayer(config(), sliding_window=window, **PLAIN | changes)


def cache_of(settings: Any, **options: Any) -> Any:
    """An Int8KVCache whose layers and inherited methods need no casts."""
    return Int8KVCache(settings, **options)


def draw(generator: torch.Generator, batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, batch, HEADS, tokens, DIM, generator=generator)
    return keys, values


def stored(exact: Tensor) -> Tensor:
    """What the cache must give back for these states, bit for bit."""
    return dequantize_cache_torch(*quantize_cache_v(exact))


def stored_keys(exact: Tensor, offset: Tensor | None) -> Tensor:
    """The same for keys, which are stored less an offset."""
    return stored(exact) if offset is None else stored(exact - offset) + offset


def assert_holds(ours: Int8Layer, theirs: DynamicLayer) -> None:
    assert ours.get_seq_length() == theirs.get_seq_length()
    if not theirs.get_seq_length():
        return
    zero = torch.zeros(1)
    offset = zero if ours.key_offset is None else ours.key_offset
    cases: list[tuple[Any, Any, Tensor]] = [(ours.keys, theirs.keys, offset), (ours.values, theirs.values, zero)]
    for got, exact, taken in cases:
        assert torch.equal(got, stored_keys(exact, taken))
        # Half a step of each vector's own range, plus the float32 rounding of codes, zeros, the product and the offset.
        scale = quantize_cache_v(exact - taken)[1].float()
        assert ((got - exact).abs() <= (0.5 + 2**-10) * scale + 2**-22 * (exact.abs() + taken.abs())).all()


def random_operation(rng: random.Random, generator: torch.Generator, ours: Int8Layer, theirs: DynamicLayer) -> None:
    """One step in the life of a cache, done to both."""
    batch = theirs.keys.shape[0] if theirs.is_initialized and theirs.keys is not None else rng.randint(1, 3)
    held = theirs.get_seq_length()
    kind = rng.choice(["append", "append", "append", "crop", "reorder", "repeat", "select", "mask", "reset"])
    if kind == "append" or not held:
        keys, values = draw(generator, batch, rng.choice([1, 1, 2, 5, 17, 70]))
        ours.update(keys, values)
        theirs.update(keys, values)
    elif kind == "crop":
        count = rng.randint(0, held - 1)
        ours.crop(-count)
        theirs.crop(-count)
    elif kind == "reorder":
        rows = torch.tensor([rng.randrange(batch) for _ in range(batch)])
        ours.reorder_cache(rows)
        theirs.reorder_cache(cast(torch.LongTensor, rows))
    elif kind == "repeat" and batch <= 3:
        ours.batch_repeat_interleave(2)
        theirs.batch_repeat_interleave(2)
    elif kind == "select":
        rows = torch.tensor([rng.randrange(batch) for _ in range(rng.randint(1, batch))])
        ours.batch_select_indices(rows)
        theirs.batch_select_indices(rows)
    elif kind == "mask":
        chosen = torch.tensor([True] + [rng.random() < 0.5 for _ in range(batch - 1)])
        ours.batch_select_indices(chosen)
        theirs.batch_select_indices(chosen)
    elif kind == "reset" and rng.random() < 0.2:
        ours.reset()
        theirs.reset()


@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_random_lives_match_an_uncompressed_cache(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(100):
        ours, theirs = layer(), DynamicLayer()
        for _ in range(rng.randint(2, 8)):
            random_operation(rng, generator, ours, theirs)
        assert_holds(ours, theirs)


@pytest.mark.parametrize("window", [2, 5, 64])
@pytest.mark.parametrize("recording", [False, True])
def test_a_sliding_layer_attends_to_what_an_uncompressed_one_does(window: int, recording: bool) -> None:
    rng, generator = random.Random(window), torch.Generator().manual_seed(window)
    ours, theirs = sliding(window, exact_prefill=False), DynamicSlidingWindowLayer(window)
    if recording:
        ours.activate_past_recording()
        theirs.activate_past_recording()
    for _ in range(120):
        length = rng.choice([1, 1, 1, 3, 20])
        assert ours.get_mask_sizes(length) == theirs.get_mask_sizes(length)
        assert ours.get_seq_length() == theirs.get_seq_length()
        keys, values = draw(generator, 1, length)
        got, exact = ours.update(keys, values), theirs.update(keys, values)
        assert torch.equal(got[0], stored_keys(exact[0], ours.key_offset))
        assert torch.equal(got[1], stored(exact[1]))
        if recording:
            count = rng.randint(0, length)
            ours.crop(-count)
            theirs.crop(-count)
        else:
            assert ours.key_store.tokens <= window + SLIDING_SLACK


def test_a_sliding_layer_past_its_window_refuses_to_crop_what_it_dropped() -> None:
    ours = sliding(4)
    ours.update(*draw(torch.Generator().manual_seed(0), 1, 9))
    with pytest.raises(UsageError, match="activate_past_recording"):
        ours.crop(-1)


def test_crop_to_a_length_is_refused_with_the_remedy() -> None:
    ours = layer()
    ours.update(*draw(torch.Generator().manual_seed(0), 1, 9))
    with pytest.raises(UsageError, match=r"got 3.*get_seq_length"):
        ours.crop(3)


def test_the_first_call_gets_its_exact_states_back() -> None:
    keys, values = draw(torch.Generator().manual_seed(0), 1, 40)
    got = layer().update(keys, values)
    assert got[0] is keys
    assert got[1] is values


def test_a_long_later_call_keeps_its_own_states_exact() -> None:
    generator, ours = torch.Generator().manual_seed(0), layer()
    first, second = draw(generator, 1, 40), draw(generator, 1, 30)
    ours.update(*first)
    keys, values = ours.update(*second)
    assert torch.equal(keys, torch.cat([stored_keys(first[0], ours.key_offset), second[0]], 2))
    assert torch.equal(values, torch.cat([stored(first[1]), second[1]], 2))


def test_without_exact_prefill_every_call_sees_what_is_stored() -> None:
    keys, values = draw(torch.Generator().manual_seed(0), 1, 40)
    ours = layer(exact_prefill=False)
    got = ours.update(keys, values)
    assert torch.equal(got[0], stored_keys(keys, keys.mean(2, keepdim=True)))
    assert torch.equal(got[1], stored(values))


def test_short_calls_are_integers_only_for_our_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = layer()
    ours.update(*draw(generator, 1, 4))
    assert isinstance(ours.update(*draw(generator, 1, 1))[0], Tensor)
    ours.config._attn_implementation = "qquant_sdpa"
    assert isinstance(ours.update(*draw(generator, 1, 1))[0], QuantizedStates)
    assert isinstance(ours.update(*draw(generator, 1, 17))[0], Tensor)


def test_quantized_states_are_a_tensor_to_everyone_else() -> None:
    x = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    states: Any = QuantizedStates(*kv_ops.encode(x), dtype=torch.float32)
    assert states.shape == x.shape
    assert torch.equal(torch.matmul(x, states.transpose(2, 3)), x @ stored(x).mT)
    assert torch.equal(states[:, :, 1:], stored(x)[:, :, 1:])
    assert torch.equal(torch.nn.functional.pad(states, (0, 3)), torch.nn.functional.pad(stored(x), (0, 3)))
    assert states.size(-1) == 16


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128])
def test_hadamard_is_orthogonal(dim: int) -> None:
    matrix = hadamard(dim)
    # Entries are sums of up to dim products of float32 numbers near 1 / sqrt(dim).
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), rtol=0, atol=dim * 2.0**-24)


def test_rotated_keys_come_back_within_the_bound_of_their_rotation() -> None:
    keys, values = draw(torch.Generator().manual_seed(0), 1, 40)
    ours = layer(key_rotation="hadamard")
    ours.update(keys, values)
    rotated = (keys - keys.mean(2, keepdim=True)) @ hadamard(DIM)
    # Rotating back keeps the length of the error vector; each of its entries was at most half a step.
    bound = (0.5 + 2**-8) * quantize_cache_v(rotated)[1].float() * DIM**0.5
    assert ours.keys is not None
    assert ((ours.keys - keys).norm(dim=-1, keepdim=True) <= bound).all()


def test_layer_past_is_what_qwen_documented() -> None:
    keys, values = draw(torch.Generator().manual_seed(0), 2, 7)
    ours = layer()
    ours.update(keys, values)
    assert ours.key_offset is not None
    for got, exact in zip(ours.layer_past, (keys - ours.key_offset, values), strict=True):
        for part, expected in zip(got, quantize_cache_v(exact), strict=True):
            assert torch.equal(part, expected)


def test_bytes_per_token_of_qwen_7b_are_0_516_of_bfloat16() -> None:
    cache: Any = Int8KVCache(
        config(hidden_size=4096, num_attention_heads=32, num_key_value_heads=32, num_hidden_layers=32, head_dim=128)
    )
    states = torch.zeros(1, 32, 64, 128, dtype=torch.bfloat16)
    for index in range(32):
        cache.update(states, states, index)
    # Beside the tokens, one float32 offset of the keys per head and channel, whatever the length.
    offsets = 32 * 32 * 128 * 4
    assert cache.nbytes == cache.nbytes_used == 64 * 270_336 + offsets
    assert round(270_336 / 524_288, 3) == 0.516
    parts = [part for held in cache.layers for past in held.layer_past for part in past]
    parts += [held.key_offset for held in cache.layers]
    assert cache.nbytes == sum(part.untyped_storage().nbytes() for part in parts)


def test_reset_frees_the_storage_and_the_next_call_may_have_another_batch() -> None:
    generator, cache = torch.Generator().manual_seed(0), cache_of(config())
    cache.update(*draw(generator, 3, 9), 0)
    cache.reset()
    assert cache.nbytes == 0
    assert cache.get_seq_length() == 0
    cache.update(*draw(generator, 1, 5), 0)
    assert cache.get_seq_length() == 5


def test_offloaded_layers_come_back_unchanged() -> None:
    ours = layer()
    keys, values = draw(torch.Generator().manual_seed(0), 1, 9)
    ours.update(keys, values)
    ours.offload()
    ours.prefetch()
    assert ours.keys is not None
    assert torch.equal(ours.keys, stored_keys(keys, ours.key_offset))


def test_offloading_moves_codes_and_numbers_together() -> None:
    ours = layer()
    ours.update(*draw(torch.Generator().manual_seed(0), 1, 9))
    ours.device = torch.device("meta")
    ours.prefetch()
    stores = (ours.key_store, ours.value_store)
    assert {part.device.type for s in stores for part in (s.codes, s.scale, s.zero)} == {"meta"}


def test_methods_on_an_empty_layer_do_nothing() -> None:
    ours = layer()
    ours.crop(-1)
    ours.crop(0)
    ours.reorder_cache(torch.tensor([0]))
    ours.batch_repeat_interleave(2)
    ours.batch_select_indices(torch.tensor([0]))
    ours.offload()
    ours.prefetch()
    ours.reset()
    assert ours.keys is None
    assert ours.values is None
    assert (ours.nbytes, ours.nbytes_used, ours.get_max_length(), ours.get_mask_sizes(3)) == (0, 0, -1, (3, 0))


def test_the_cache_can_be_made_before_the_first_token() -> None:
    cache = Int8KVCache(config(), reserve=100)
    cache.early_initialization(2, HEADS, DIM, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    cache.update(*draw(torch.Generator().manual_seed(0), 2, 9), 0)
    assert cache.get_seq_length() == 9


def test_a_copy_is_independent() -> None:
    generator, cache = torch.Generator().manual_seed(0), cache_of(config())
    cache.update(*draw(generator, 1, 9), 0)
    twin = copy.deepcopy(cache)
    cache.update(*draw(generator, 1, 1), 0)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (10, 9)


def test_keys_and_values_may_differ_in_head_size() -> None:
    cache = cache_of(config())
    keys, values = torch.randn(1, 2, 9, 24), torch.randn(1, 2, 9, 16)
    cache.update(keys, values, 0)
    assert cache.layers[0].keys.shape == keys.shape
    assert cache.layers[0].values.shape == values.shape


def test_sliding_models_get_sliding_layers() -> None:
    mistral = Int8KVCache(MistralConfig(num_hidden_layers=2, sliding_window=32))
    assert [type(one) for one in mistral.layers] == [Int8SlidingLayer] * 2
    assert mistral.is_sliding == [True, True]
    mixed = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=32, max_window_layers=1)
    assert [type(one) for one in Int8KVCache(mixed).layers] == [Int8Layer, Int8SlidingLayer]


def test_layers_with_a_fixed_state_keep_transformers_own_cache() -> None:
    settings = Qwen3NextConfig(num_hidden_layers=4)
    kinds = [type(one).__name__ for one in Int8KVCache(settings).layers]
    assert kinds == ["LinearAttentionLayer"] * 3 + ["Int8Layer"]
    assert len(kinds) == len(DynamicCache(config=settings).layers)


def test_a_layer_type_that_cannot_be_cached_is_named() -> None:
    odd = config()
    odd.layer_types = ["full_attention", "hybrid"]
    with pytest.raises(BadModelError, match="'hybrid'"):
        Int8KVCache(odd)


@pytest.mark.parametrize(
    ("option", "value"),
    [("key_rotation", "fold"), ("scheme", "channel"), ("value_bits", 3)],
    ids=["rotation", "scheme", "bits"],
)
def test_an_unknown_option_value_is_named(option: str, value: str) -> None:
    with pytest.raises(UsageError, match=repr(value)):
        cache_of(config(), **{option: value})


def test_eager_attention_is_left_alone_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    eager = config(attn_implementation="eager")
    telling.said.clear()
    with caplog.at_level("WARNING", logger="qquant"):
        Int8KVCache(eager)
        Int8KVCache(eager)
    assert eager._attn_implementation == "eager"
    assert caplog.text.count("'eager' takes no integers") == 1


def test_four_bit_values_are_within_half_a_step_of_their_group() -> None:
    keys, values = torch.randn(2, 1, 2, 9, 64, generator=torch.Generator().manual_seed(0))
    ours = layer(value_bits=4)
    ours.update(keys, values)
    groups = values.unflatten(-1, (-1, 32))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    assert ours.values is not None
    # The step is rounded up to float16, which adds at most one part in 1024.
    error = (ours.values - values).unflatten(-1, (-1, 32)).abs().amax(-1)
    assert (error <= 0.5 * (1 + 2**-9) * step).all()
    assert ours.keys is not None
    assert torch.equal(ours.keys, stored_keys(keys, ours.key_offset))


def test_four_bit_values_take_0_414_of_bfloat16() -> None:
    ours = layer(value_bits=4)
    ours.update(*torch.zeros(2, 1, 2, 64, 128, dtype=torch.bfloat16))
    tokens = 2 * 64 * ((128 + 4) + (64 + 4 * 4))
    assert ours.nbytes == tokens + 2 * 128 * 4
    assert tokens / (2 * 64 * 512) == pytest.approx(0.414, abs=0.0005)


def test_four_bit_values_live_through_every_method() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 70, 32, generator=generator)
    ours, theirs = layer(value_bits=4), DynamicLayer()
    for one in (ours, theirs):
        one.update(keys[:, :, :69], values[:, :, :69])
        one.update(keys[:, :, 69:], values[:, :, 69:])
        one.crop(-3)
        one.reorder_cache(cast(torch.LongTensor, torch.tensor([1, 0])))
        one.batch_repeat_interleave(2)
        one.batch_select_indices(torch.tensor([0, 3]))
    assert theirs.values is not None
    expected = kv_ops.decode_int4(*kv_ops.encode_int4(theirs.values), torch.float32)
    assert ours.values is not None
    assert torch.equal(ours.values, expected)


def test_four_bit_values_need_whole_groups() -> None:
    with pytest.raises(UsageError, match="multiple of 32, got 16"):
        cache_of(config(), value_bits=4)


def test_channels_far_from_zero_cost_their_neighbours_nothing() -> None:
    keys, values = draw(torch.Generator().manual_seed(0), 1, 40)
    biased = keys.clone()
    biased[..., 3] += 100
    plain, ours = layer(), layer()
    plain.update(keys, values)
    ours.update(biased, values)
    assert plain.keys is not None
    assert ours.keys is not None
    # The same codes but for float32's rounding of 100 + x, 2**-18, which can move a value over the edge of a code.
    step = quantize_cache_v(keys - keys.mean(2, keepdim=True))[1].float()
    assert ((ours.keys - biased).abs() <= (0.5 + 2**-10) * step + 2**-16).all()


def test_the_offset_of_the_keys_is_that_of_the_first_call() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = draw(generator, 2, 9), draw(generator, 2, 3)
    ours = layer()
    ours.update(*first)
    ours.update(*second)
    assert ours.key_offset is not None
    assert torch.equal(ours.key_offset, first[0].mean(2, keepdim=True))
    ours.batch_select_indices(torch.tensor([1]))
    assert torch.equal(ours.key_offset, first[0][1:].mean(2, keepdim=True))


def test_a_sliding_layer_gives_the_memory_of_a_long_prompt_back() -> None:
    ours = sliding(8, reserve=10_000)
    ours.update(*draw(torch.Generator().manual_seed(0), 1, 4000))
    assert ours.key_store.room <= 8 + 2 * SLIDING_SLACK + 64
    assert ours.nbytes < 2 * HEADS * 256 * (DIM + 4) + 1024


def test_a_sliding_layer_refuses_to_give_back_more_than_it_recorded() -> None:
    ours = sliding(16)
    ours.activate_past_recording()
    ours.update(*draw(torch.Generator().manual_seed(0), 1, 30))
    ours.crop(0)
    with pytest.raises(UsageError, match="5 is more than it has"):
        ours.crop(-5)


def test_nothing_stored_keeps_the_graph_of_the_prompt() -> None:
    keys, values = draw(torch.Generator().manual_seed(0), 1, 9)
    keys.requires_grad_()
    values.requires_grad_()
    for options in ({}, {"use_cache_kernel": False}, {"scheme": "qwen"}):
        ours = layer(**options)
        ours.update(keys, values)
        for store in (ours.key_store, ours.value_store):
            assert not any(part.requires_grad for part in (store.codes, store.scale, store.zero))
        copy.deepcopy(ours)


def test_a_copied_layer_still_belongs_to_the_model() -> None:
    ours = layer()
    assert copy.deepcopy(ours).config is ours.config


def test_a_model_may_change_its_dtype_between_calls() -> None:
    generator, ours = torch.Generator().manual_seed(0), layer()
    ours.update(*draw(generator, 1, 9))
    keys, values = draw(generator, 1, 1)
    got = ours.update(keys.bfloat16(), values.bfloat16())
    assert got[0].dtype == torch.bfloat16


def test_float64_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"got torch.float64"):
        layer().update(*torch.zeros(2, 1, 2, 3, 16, dtype=torch.float64))


def test_layer_past_of_an_empty_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="holds nothing yet"):
        layer().layer_past  # noqa: B018


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(BadModelError, match="encoder-decoder"):
        Int8KVCache(T5Config())
