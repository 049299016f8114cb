"""The Int8 KV cache on the original Qwen: its README's toggles, and every number against a cache of a few lines."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import qquant
from qquant import kv_attention
from qquant.kv_cache_quant import Int8KVCache, dequantize_cache_torch, quantize_cache_v
from qquant.kv_schemes import last_logits
from qquant.linear import QuantLinear
from qquant.models.qwen.modeling import QWenLMHeadModel
from qquant.models.qwen.positions import ntk_state
from tests.qwen_cases import INT8, int8_error
from tests.qwen_folders import DIM, HEADS, LONG, SEQ_LENGTH, make_qwen
from tests.test_kv_attention import flash  # noqa: F401 - a fixture

SHORT = 9
IDS = torch.randint(0, 300, (2, LONG + 40), generator=torch.Generator().manual_seed(0))

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``qwen(**changes)``: a folder made once per set of changes. Never write to it."""
    made: dict[str, Path] = {}

    def get(**changes: Any) -> Path:
        key = repr(sorted(changes.items()))
        if key not in made:
            made[key] = make_qwen(tmp_path_factory.mktemp("qwen"), **changes)
        return made[key]

    return get


def load(folder: Path, attention: str = "sdpa", **options: Any) -> Any:
    return QWenLMHeadModel.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention, **options)


def as_published(states: Tensor) -> Tensor:
    """Round trip of the formulas in section "KV-cache quantization": one range per head and call, truncated."""
    low, high = states.amin((2, 3), keepdim=True), states.amax((2, 3), keepdim=True)
    scale = (high - low) / 255
    zero = 0 - low / scale
    return scale * (((states / scale) + zero).clamp(0, 255).floor() - zero)


class Reference(DynamicCache):
    """An ordinary cache whose keys and values have gone through 8 bits; what a prompt attends to stays exact."""

    def __init__(self, config: Any, scheme: str = "token") -> None:
        super().__init__(config=config)
        self.scheme = scheme
        self.offsets: dict[int, Tensor] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if self.scheme == "qwen":
            return super().update(as_published(key_states), as_published(value_states), layer_idx)
        first = layer_idx not in self.offsets
        offset = self.offsets.setdefault(layer_idx, key_states.mean(2, keepdim=True))
        keys = dequantize_cache_torch(*quantize_cache_v(key_states - offset)) + offset
        values = dequantize_cache_torch(*quantize_cache_v(value_states))
        found = super().update(keys, values, layer_idx)
        return (key_states, value_states) if first else found


def steps(model: Any, cache: Any, prompt: int, count: int, mask: Tensor | None = None, ids: Tensor = IDS) -> Tensor:
    """Logits [B, 1 + count, vocab] of a prompt's last token and of ``count`` given tokens decoded after it."""
    mask = torch.ones(len(ids), prompt, dtype=torch.long) if mask is None else mask
    found = []
    with torch.inference_mode():
        for begin, end in [(0, prompt), *((at, at + 1) for at in range(prompt, prompt + count))]:
            mask = mask if begin == 0 else torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
            found.append(model(ids[:, begin:end], attention_mask=mask, past_key_values=cache).logits[:, -1:])
    return torch.cat(found, 1)


def left_padded(short: int, long: int) -> Tensor:
    return torch.tensor([[0] * (long - short) + [1] * short, [1] * long])


GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}


def generate(model: Any, prompt: int = SHORT, count: int = 8, mask: Tensor | None = None, **options: Any) -> Any:
    mask = torch.ones(2, prompt, dtype=torch.long) if mask is None else mask
    return model.generate(IDS[:, :prompt], attention_mask=mask, max_new_tokens=count, **GREEDY | options)


class TestToggles:
    """``use_cache_quantization`` and ``use_cache_kernel``, in config.json and at loading."""

    @pytest.mark.parametrize("auto", [False, True], ids=["class", "auto_class"])
    @pytest.mark.parametrize(
        ("flags", "int8", "kernel"),
        [
            ({}, False, None),
            ({"use_cache_quantization": True}, True, False),
            ({"use_cache_quantization": True, "use_cache_kernel": True, "use_flash_attn": False}, True, True),
            ({"use_cache_quantization": True, "use_cache_kernel": False, "use_flash_attn": True}, True, False),
            ({"use_cache_quantization": True, "use_cache_kernel": True, "use_flash_attn": "auto"}, True, True),
            ({"use_cache_quantization": False, "use_cache_kernel": True}, False, None),
        ],
        ids=["default", "quantization", "readme", "no_kernel_flash", "kernel_flash_auto", "kernel_alone"],
    )
    def test_flags_mean_the_same_in_config_json_and_at_loading(
        self, qwen: Make, registered: None, tmp_path: Path, auto: bool, flags: dict[str, Any], int8: bool, kernel: Any
    ) -> None:
        shutil.copytree(qwen(), tmp_path / "m")
        path = tmp_path / "m" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | flags))
        family = AutoModelForCausalLM if auto else QWenLMHeadModel
        for model in (family.from_pretrained(tmp_path / "m"), family.from_pretrained(qwen(), **flags)):
            cache = generate(model).past_key_values
            assert isinstance(cache, Int8KVCache) is int8
            if int8:
                assert {layer.use_cache_kernel for layer in cache.layers} == {kernel}
                assert {layer.key_rotation for layer in cache.layers} == {"none"}, "keys are folded, not rotated"
                assert model.config._attn_implementation == "qquant_sdpa"

    def test_loading_can_decline_what_config_json_asks_for(self, qwen: Make) -> None:
        folder = qwen(use_cache_quantization=True)
        assert isinstance(generate(load(folder)).past_key_values, Int8KVCache)
        declined = load(folder, use_cache_quantization=False)
        assert not isinstance(generate(declined).past_key_values, Int8KVCache)

    def test_switching_off_restores_the_model(self, qwen: Make) -> None:
        model = load(qwen())
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        plain = generate(model, LONG)
        qquant.enable_kv_quant(model)
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert {name.rpartition(".")[0] for name in changed} == {f"transformer.h.{i}.attn.c_attn" for i in (0, 1)}
        qquant.disable_kv_quant(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(generate(model, LONG).sequences, plain.sequences)

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("through", ["load_quantized", "auto_class", "config_json"])
    def test_packed_weights_and_int8_cache_work_at_once(
        self, qwen: Make, registered: None, tmp_path: Path, bits: Literal[4, 8], through: str
    ) -> None:
        model = load(qwen())
        settings = qquant.QuantizeConfig(bits=bits, group_size=32, method="rtn")
        qquant.quantize_model(model, [], settings)
        model.save_pretrained(tmp_path / "m")
        flags = {"use_cache_quantization": True, "use_cache_kernel": True}
        if through == "config_json":
            path = tmp_path / "m" / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | flags))
            flags = {}
        opened: Any = AutoModelForCausalLM.from_pretrained if through == "auto_class" else qquant.load_quantized
        switched = opened(tmp_path / "m", dtype=torch.float32, **flags)
        assert isinstance(switched.transformer.h[0].attn.c_attn, QuantLinear)
        with torch.inference_mode():  # folded into the scales, and not one bit different
            assert torch.equal(switched(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
        found, exact = (generate(one, LONG, output_logits=True) for one in (switched, model))
        assert isinstance(found.past_key_values, Int8KVCache)
        # A prompt attends to its own keys and values as they are; the token after it is the first that does not.
        assert torch.equal(found.logits[0], exact.logits[0])
        assert_close_as_int8(found.logits[1], exact.logits[1])


def assert_close_as_int8(got: Tensor, exact: Tensor) -> None:
    """The exact logits, but for what 8 bits cost."""
    assert int8_error(got, exact) < INT8


@pytest.mark.parametrize("prompt", [SHORT, SEQ_LENGTH, LONG], ids=["short", "at_seq_length", "ntk_and_logn"])
class TestAgainstReference:
    """Every step of decoding against the cache of a few lines above."""

    def test_steps_are_bit_for_bit_those_of_the_reference(self, qwen: Make, prompt: int) -> None:
        # Eager attention gets dequantized tensors, as the reference gives; then even the order of sums is the same.
        model = load(qwen(), "eager")
        ours = steps(model, Int8KVCache(model.config, use_cache_kernel=False), prompt, 20)
        assert torch.equal(ours, steps(model, Reference(model.config), prompt, 20))

    def test_padded_batches_too(self, qwen: Make, prompt: int) -> None:
        model, mask = load(qwen(), "eager"), left_padded(prompt - 4, prompt)
        ours = steps(model, Int8KVCache(model.config, use_cache_kernel=False), prompt, 20, mask)
        assert torch.equal(ours, steps(model, Reference(model.config), prompt, 20, mask))

    @pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
    @pytest.mark.parametrize("padded", [False, True], ids=["full", "left_padded"])
    def test_attention_over_integers_agrees(self, qwen: Make, prompt: int, kernel: bool, padded: bool) -> None:
        # One layer: in a second one, keys that differ by a rounding may land on neighbouring codes.
        folder = qwen(num_hidden_layers=1)
        mask = left_padded(prompt - 4, prompt) if padded else None
        model, eager = load(folder), load(folder, "eager")
        ours = steps(model, Int8KVCache(model.config, use_cache_kernel=kernel), prompt, 20, mask)
        assert kv_attention.takes_integers(model.config)
        expected = steps(eager, Reference(eager.config), prompt, 20, mask)
        # Plain torch: two float32 evaluations of one formula over the same integers, as in test_kv_attention. The
        # kernel rounds queries to 2 * 32639 steps of their largest channel: with channels up to 4 and sixteen keys of
        # size 1.2 and a bias of 8, a score moves by at most 0.5 / 32639 * 4 / sqrt(16) * 27 = 4e-4, with LogN 6e-4.
        # Each weight moves by that part of itself, and so does, at most, what attention adds to the logits.
        tolerance = 1e-3 if kernel else 1e-4
        torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * float(expected.std()))

    @pytest.mark.usefixtures("flash")
    @pytest.mark.parametrize("padded", [False, True], ids=["full", "left_padded"])
    def test_flash_attention_prefills_and_integers_decode(self, qwen: Make, prompt: int, padded: bool) -> None:
        folder, mask = qwen(num_hidden_layers=1), left_padded(prompt - 4, prompt) if padded else None
        model, eager = load(folder), load(folder, "eager")
        # Set directly: asking transformers for it would look for the package.
        model.config._attn_implementation = "flash_attention_2"
        ours = steps(model, Int8KVCache(model.config), prompt, 20, mask)
        assert model.config._attn_implementation == "qquant_flash_attention_2"
        expected = steps(eager, Reference(eager.config), prompt, 20, mask)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-3 * float(expected.std()))  # as the kernel above

    def test_the_published_scheme_is_that_of_its_formulas(self, qwen: Make, prompt: int) -> None:
        model = load(qwen(), "eager")
        cache = Int8KVCache(model.config, scheme="qwen", exact_prefill=False)
        ours, expected = (steps(model, one, prompt, 20) for one in (cache, Reference(model.config, "qwen")))
        assert torch.equal(ours, expected)
        exact = steps(model, DynamicCache(config=model.config), prompt, 20)
        assert (ours - exact).abs().max() > 0

    def test_it_costs_no_more_than_eight_bits(self, qwen: Make, prompt: int) -> None:
        model = load(qwen())
        exact = steps(model, DynamicCache(config=model.config), prompt, 20)
        qquant.enable_kv_quant(model)
        assert_close_as_int8(steps(model, Int8KVCache(model.config), prompt, 20), exact)


class TestGeneration:
    """``generate`` with the cache switched on."""

    @pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short", "ntk_and_logn"])
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
    @pytest.mark.parametrize("padded", [False, True], ids=["full", "left_padded"])
    def test_tokens_and_logits_are_the_references(
        self, qwen: Make, prompt: int, options: dict[str, Any], padded: bool
    ) -> None:
        mask = left_padded(prompt - 4, prompt) if padded else None
        model = load(qwen(), "eager")
        expected = generate(model, prompt, 20, mask, past_key_values=Reference(model.config), **options)
        qquant.enable_kv_quant(model, use_cache_kernel=False, key_transform="none")
        found = generate(model, prompt, 20, mask, **options)
        assert isinstance(found.past_key_values, Int8KVCache)
        assert torch.equal(found.sequences, expected.sequences)

    @pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short", "ntk_and_logn"])
    def test_every_logit_of_a_generation_is_the_references(self, qwen: Make, prompt: int) -> None:
        model = load(qwen(), "eager")
        expected = generate(model, prompt, 20, past_key_values=Reference(model.config), output_logits=True)
        qquant.enable_kv_quant(model, use_cache_kernel=False, key_transform="none")
        found = generate(model, prompt, 20, output_logits=True)
        assert all(torch.equal(*pair) for pair in zip(found.logits, expected.logits, strict=True))

    @pytest.mark.parametrize(
        "options",
        [
            {"num_beams": 2, "num_return_sequences": 2},
            {"do_sample": True, "num_return_sequences": 3},
            {"num_beams": 2, "do_sample": True},
        ],
        ids=["beams_returned", "samples", "sampled_beams"],
    )
    def test_rows_that_multiply_keep_their_own_stretch(self, qwen: Make, options: dict[str, Any]) -> None:
        model, mask = load(qwen(), use_cache_quantization=True, use_cache_kernel=True), left_padded(SHORT, LONG)
        torch.manual_seed(0)
        found = generate(model, LONG, 6, mask, output_logits=True, **options)
        assert isinstance(found.past_key_values, Int8KVCache)
        copies = len(found.logits[0]) // 2
        # The first step is the prompt's; every copy of a row sees what its row sees alone.
        alone = generate(model, LONG, 1, mask, output_logits=True).logits[0]
        torch.testing.assert_close(found.logits[0], alone.repeat_interleave(copies, 0), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("prompt", [SHORT, SEQ_LENGTH, LONG], ids=["short", "at_seq_length", "ntk_and_logn"])
    @pytest.mark.parametrize("drafts", ["assistant", "prompt_lookup"])
    def test_drafts_cost_no_more_than_eight_bits(self, qwen: Make, prompt: int, drafts: str) -> None:
        """Drafts that go in with the prompt count in the offset of its keys, so codes differ and logits with them."""
        model, assistant = (load(qwen(), use_cache_quantization=True) for _ in range(2))
        options: dict[str, Any] = {"max_new_tokens": 12, "output_logits": True, **GREEDY}
        options["attention_mask"] = torch.ones(1, prompt, dtype=torch.long)
        drafting = {"assistant_model": assistant} if drafts == "assistant" else {"prompt_lookup_num_tokens": 3}
        alone, found = (model.generate(IDS[:1, :prompt], **options | more) for more in ({}, drafting))
        # After two tokens that were all but equally likely, the texts go different ways.
        equal = (alone.sequences == found.sequences)[0, prompt:].int().cumprod(0).sum()
        for expected, got in list(zip(alone.logits, found.logits, strict=True))[: equal + 1]:
            assert_close_as_int8(got, expected)
        assert equal, "the first token is that of an exact prompt"

    @pytest.mark.parametrize("chunk", [10, 25], ids=["through_integers", "dequantized"])
    @pytest.mark.parametrize("padded", [False, True], ids=["full", "left_padded"])
    def test_a_prompt_in_chunks_is_stretched_as_a_whole(self, qwen: Make, chunk: int, padded: bool) -> None:
        model, mask = load(qwen()), left_padded(LONG - 4, LONG) if padded else None
        exact = generate(model, LONG, 2, mask, output_logits=True).logits
        qquant.enable_kv_quant(model)
        chunked = generate(model, LONG, 2, mask, output_logits=True, prefill_chunk_size=chunk)
        assert isinstance(chunked.past_key_values, Int8KVCache)
        assert_close_as_int8(chunked.logits[0], exact[0])

    def test_two_generations_on_one_model_keep_their_own_stretch(self, qwen: Make) -> None:
        model = load(qwen(), use_cache_quantization=True, use_cache_kernel=True)
        caches = [Int8KVCache(model.config) for _ in range(2)]
        alone = [steps(model, Int8KVCache(model.config), prompt, 3) for prompt in (SHORT, LONG)]
        with torch.inference_mode():
            for cache, prompt in zip(caches, (SHORT, LONG), strict=True):
                model(IDS[:, :prompt], past_key_values=cache)
            for step in range(3):
                for cache, prompt, expected in zip(caches, (SHORT, LONG), alone, strict=True):
                    logits = model(IDS[:, prompt + step, None], past_key_values=cache).logits
                    assert torch.equal(logits[:, 0], expected[:, 1 + step])

    def test_a_copied_cache_keeps_the_stretch_of_its_prompt(self, qwen: Make) -> None:
        model = load(qwen(), use_cache_quantization=True, use_cache_kernel=True)
        cache = Int8KVCache(model.config)
        steps(model, cache, LONG, 2, left_padded(SHORT, LONG))
        twin = copy.deepcopy(cache)
        state, copied = ntk_state(cache), ntk_state(twin)
        assert state is not None
        assert copied is not None
        assert state.inv_freq is not None
        assert copied.inv_freq is not None
        assert copied.inv_freq is not state.inv_freq
        assert torch.equal(copied.inv_freq, state.inv_freq)
        assert not torch.equal(state.inv_freq[0], state.inv_freq[1]), "each row has the stretch of its own length"
        mask = torch.cat([left_padded(SHORT, LONG), torch.ones(2, 3, dtype=torch.long)], 1)
        with torch.inference_mode():
            pair = [
                model(IDS[:, LONG + 2, None], attention_mask=mask, past_key_values=one).logits for one in (cache, twin)
            ]
        assert torch.equal(*pair)
        assert cache.get_seq_length() == LONG + 3

    def test_rows_of_a_padded_batch_are_what_they_are_alone(self, qwen: Make) -> None:
        """But for the offset of the keys, a mean that counts padding too; it moves codes, by less than their steps."""
        model = load(qwen(), use_cache_quantization=True, use_cache_kernel=True)
        together = steps(model, Int8KVCache(model.config), LONG, 10, left_padded(SHORT, LONG))
        alone = steps(model, Int8KVCache(model.config), SHORT, 10, ids=IDS[:1, LONG - SHORT :])
        assert_close_as_int8(together[:1], alone)
        assert_close_as_int8(together[1:], steps(model, Int8KVCache(model.config), LONG, 10, ids=IDS[1:]))

    def test_bfloat16_runs_and_is_close(self, qwen: Make) -> None:
        plain = generate(QWenLMHeadModel.from_pretrained(qwen(), bf16=True), LONG, 2, output_logits=True).logits
        model = QWenLMHeadModel.from_pretrained(qwen(), bf16=True, use_cache_quantization=True, use_cache_kernel=True)
        assert model.dtype == torch.bfloat16
        found = generate(model, LONG, 2, output_logits=True)
        assert isinstance(found.past_key_values, Int8KVCache)
        # A prompt is exact, and keys are folded by powers of two: not one bit of the first step is different.
        assert torch.equal(found.logits[0], plain[0])
        assert_close_as_int8(found.logits[1], plain[1])


def test_bytes_are_those_of_the_published_scheme(qwen: Make) -> None:
    """2 * heads * (D + 4) per token and layer, and one float32 offset per head for the keys."""
    model = load(qwen(), use_cache_quantization=True)
    cache = Int8KVCache(model.config)
    steps(model, cache, LONG, 1)
    assert cache.nbytes_used == 2 * 2 * ((LONG + 1) * 2 * HEADS * (DIM + 4) + HEADS * DIM * 4)


def test_a_partly_rotated_head_is_not_folded(qwen: Make) -> None:
    model = load(qwen(rotary_pct=0.5), use_cache_quantization=True)
    cache = generate(model, LONG).past_key_values
    assert {layer.key_rotation for layer in cache.layers} == {"hadamard"}


def test_what_the_cache_costs_is_measured_under_the_whole_windows_stretch(qwen: Make) -> None:
    model = load(qwen())
    exact = last_logits(model, torch.device("cpu"), IDS[:, :LONG], 8, None)
    ordinary: Any = DynamicCache(config=model.config)
    cached = last_logits(model, torch.device("cpu"), IDS[:, :LONG], 8, ordinary)
    # Nothing is quantized: the same sums in float32, in two calls instead of one.
    torch.testing.assert_close(cached, exact, atol=1e-4, rtol=0)
