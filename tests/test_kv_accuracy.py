"""What the Int8 cache costs: scored at once as if decoded, schemes put on and taken off, layers, needles."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from qquant import kv_attention, kv_errors, kv_needle, kv_ops
from qquant.accuracy import evaluate, kl_divergence, logits_fn
from qquant.errors import BadModelError, NumericError
from qquant.kv_accuracy import measure_kv_cache
from qquant.kv_cache_quant import Int8KVCache, enable_kv_quant
from qquant.kv_report import KVCacheCost, KVModel, SchemeName
from qquant.kv_schemes import (
    automatic_scheme,
    cached_logits_fn,
    check_cacheable,
    last_logits,
    scheme_on,
    schemes_for,
)
from tests.conftest import VOCAB, Factory

CPU = torch.device("cpu")
WINDOW = 96


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.eval()
    return model


def plant_outliers(model: PreTrainedModel, factor: float) -> None:
    """Multiply one rotary pair of every key head and divide the queries': the model stays what it was."""
    with torch.no_grad():
        for layer in model.get_submodule("model.layers").children():
            attention: Any = layer.self_attn
            half = attention.head_dim // 2
            for linear, scale in ((attention.k_proj, factor), (attention.q_proj, 1 / factor)):
                rows = torch.arange(linear.out_features) % half == 1
                linear.weight[rows] *= scale
                if linear.bias is not None:
                    linear.bias[rows] *= scale


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (4 * WINDOW + 1,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(tiny_qwen2: Path) -> PreTrainedModel:
    return load(tiny_qwen2)


@pytest.fixture(scope="module")
def sharp(checkpoint: Factory) -> PreTrainedModel:
    """Weights so large that attention chooses, as a trained model's does, with outliers in its keys."""
    model = load(checkpoint("qwen2", initializer_range=0.2))
    plant_outliers(model, 32.0)
    return model


@pytest.fixture(scope="module")
def cost(sharp: PreTrainedModel, ids: Tensor) -> KVCacheCost:
    return measure_kv_cache({"sharp": sharp}, ids, CPU, window=WINDOW, max_tokens=2 * WINDOW, seed=0)


def decode(model: PreTrainedModel, ids: Tensor, cache: Int8KVCache, prompt: int) -> Tensor:
    """Logits after every token that is fed alone, behind a prompt that is fed together."""
    last_logits(model, CPU, ids[None, :prompt], 1, cache, prompt=0)
    return torch.cat([last_logits(model, CPU, token.view(1, 1), 1, cache)[0] for token in ids[prompt:]])


@pytest.mark.parametrize("name", ["none", "hadamard", "fold"])
def test_what_follows_the_prompt_at_once_is_every_token_decoded_through_the_cache(
    tiny_qwen2: Path, ids: Tensor, name: SchemeName
) -> None:
    model = load(tiny_qwen2, torch.float64)
    with scheme_on(model, name) as make_cache, torch.inference_mode():
        whole, exact = (
            last_logits(model, CPU, ids[None, :40], 32, cache, prompt=8)[0]
            for cache in (make_cache(use_cache_kernel=False), None)
        )
        cache = make_cache(use_cache_kernel=False)
        # Without our attention in front, keys and values are dequantized and attended to in float64, too.
        kv_attention.release(model.config)
        steps = decode(model, ids[:40], cache, 8)
    # Float64 rounds at 1e-16, far from where it could move an 8-bit code: both ways quantize to the same codes, and
    # logits near 1 differ by a few hundred roundings at most. The cache itself costs a million times more.
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-12)
    assert (whole - exact).abs().max() > 1e-6


def test_integer_attention_adds_nothing_to_what_one_call_shows(sharp: PreTrainedModel, ids: Tensor) -> None:
    with scheme_on(sharp, "none") as make_cache, torch.inference_mode():
        plain = partial(make_cache, use_cache_kernel=False)  # compiled kernels have tolerances of their own
        whole, exact = (last_logits(sharp, CPU, ids[None, :40], 32, cache, prompt=8)[0] for cache in (plain(), None))
        steps = decode(sharp, ids[:40], plain(), 8)
    log_exact, log_whole, log_steps = (torch.log_softmax(logits, -1) for logits in (exact, whole, steps))
    # Float32 sums in another order move a key by 1e-6 of a step's 4e-3: one code in some thousand turns over. That is
    # an error in one value of a thousand where quantizing put one into each, so a thousandth in KL; ten times that.
    assert kl_divergence(log_whole, log_steps).mean() < 0.01 * kl_divergence(log_exact, log_whole).mean()


@pytest.mark.parametrize("keep", [1, 5, 24, 25, 40])
def test_logits_are_the_last_ones_however_the_sequence_is_cut(model: PreTrainedModel, ids: Tensor, keep: int) -> None:
    with scheme_on(model, "none") as make_cache, torch.inference_mode():
        every = last_logits(model, CPU, ids[None, :40], 40, make_cache(), prompt=16)
        some = last_logits(model, CPU, ids[None, :40], keep, make_cache(), prompt=16)
    # The output projection of fewer rows may sum in another order.
    torch.testing.assert_close(some, every[:, -keep:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["published", "none", "hadamard", "fold"])
def test_a_scheme_is_taken_off_wholly_even_after_an_error(sharp: PreTrainedModel, name: SchemeName) -> None:
    before = {key: value.clone() for key, value in sharp.state_dict().items()}
    attention = sharp.config._attn_implementation

    def fail() -> None:
        with scheme_on(sharp, name) as make_cache:
            make_cache()
            changed = any(not torch.equal(value, before[key]) for key, value in sharp.state_dict().items())
            assert changed == (name == "fold")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(value, before[key]) for key, value in sharp.state_dict().items())
    assert sharp.config._attn_implementation == attention


@pytest.mark.parametrize(("family", "auto"), [("qwen2", "fold"), ("gpt2", "hadamard")])
def test_the_automatic_scheme_is_what_the_switch_takes(
    checkpoint: Factory, sharp: PreTrainedModel, family: str, auto: str
) -> None:
    if family == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        model: PreTrainedModel = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=VOCAB))
    else:
        model = load(checkpoint("qwen2", initializer_range=0.2))
        plant_outliers(model, 32.0)
    assert automatic_scheme(model) == auto
    assert ("fold" in schemes_for(model)) == (auto == "fold")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    enable_kv_quant(model, key_transform="auto")
    arguments: dict[str, Any] = {}
    prepare: Any = model._prepare_cache_for_generation
    prepare(GenerationConfig(), arguments, None, 1, 8)
    found = "hadamard" if arguments["past_key_values"].layers[0].key_rotation == "hadamard" else "none"
    if any(not torch.equal(value, before[key]) for key, value in model.state_dict().items()):
        found = "fold"
    assert found == auto


def test_a_model_that_cannot_be_cached_is_refused_in_the_caches_words() -> None:
    from transformers import Qwen2Config

    config = Qwen2Config(num_hidden_layers=2)
    config.layer_types = ["full_attention", "hybrid"]
    with pytest.raises(BadModelError, match="'hybrid'"):
        check_cacheable(config)


def test_measuring_leaves_the_model_as_it_was(model: PreTrainedModel, ids: Tensor) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attention = model.config._attn_implementation
    measure_kv_cache({"m": model}, ids, CPU, window=WINDOW, max_tokens=1, seed=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config._attn_implementation == attention


def test_the_same_seed_gives_the_same_record(sharp: PreTrainedModel, cost: KVCacheCost, ids: Tensor) -> None:
    again = measure_kv_cache({"sharp": sharp}, ids, CPU, window=WINDOW, max_tokens=2 * WINDOW, seed=0)
    assert again == cost


def schemes(model: KVModel) -> dict[str, float]:
    found: dict[str, float] = {}
    for scheme in model.schemes:
        assert scheme.accuracy is not None
        assert scheme.accuracy.kl_mean_nats is not None
        found[scheme.name] = scheme.accuracy.kl_mean_nats
    return found


def test_folding_is_chosen_where_keys_have_outliers(cost: KVCacheCost) -> None:
    kl = schemes(cost.models[0])
    assert kl["published"] > kl["none"] > kl["hadamard"] > kl["fold"] > 0
    assert (cost.models[0].chosen, cost.models[0].automatic, cost.models[0].rival) == ("fold", "fold", "hadamard")
    assert cost.models[0].lead_nats == pytest.approx(kl["hadamard"] - kl["fold"], rel=1e-4)


def test_schemes_are_scored_by_the_ordinary_evaluation(sharp: PreTrainedModel, cost: KVCacheCost, ids: Tensor) -> None:
    with scheme_on(sharp, "hadamard") as make_cache:
        base, rest = evaluate(
            logits_fn(sharp, CPU),
            {"x": cached_logits_fn(sharp, CPU, make_cache)},
            ids[: 2 * WINDOW + 1],
            seq_len=WINDOW,
            stride=WINDOW,
        )
    assert base is not None
    assert cost.models[0].exact.perplexity == base.perplexity
    assert schemes(cost.models[0])["hadamard"] == rest["x"].kl_mean_nats
    assert cost.windows == 2


def test_bytes_are_codes_and_ranges_of_all_layers(cost: KVCacheCost) -> None:
    # 2 layers, keys and values, 2 heads of 16 channels; float16 scale and zero, or float32 as the states are.
    vectors = 2 * 2 * 2
    means = 2 * 2 * 16 * 4 / WINDOW  # of the keys, once per layer
    for scheme in cost.models[0].schemes:
        held = vectors * (16 + 2 * 4) if scheme.name == "published" else vectors * (16 + 2 * 2) + means
        assert scheme.bytes_per_token == held
        assert scheme.share_of_bfloat16 == held / (vectors * 16 * 2)


def test_ranges_double_and_add_up_to_all_predictions(cost: KVCacheCost) -> None:
    assert [(row.first_tokens, row.last_tokens) for row in cost.ranges] == [(1, 64), (65, 96)]
    assert sum(row.tokens for row in cost.ranges) == 2 * WINDOW
    mean = sum(row.tokens * math.log(row.exact.perplexity) for row in cost.ranges) / (2 * WINDOW)
    assert mean == pytest.approx(cost.models[0].exact.nll_mean_nats, rel=1e-9)
    kl = sum(row.tokens * (row.chosen.kl_mean_nats or 0) for row in cost.ranges) / (2 * WINDOW)
    # The evaluation keeps the values of single tokens in float32.
    assert kl == pytest.approx(schemes(cost.models[0])["fold"], rel=1e-6)
    assert all(row.exact.kl_mean_nats is None and row.published is not None for row in cost.ranges)


def test_a_published_scheme_that_breaks_down_is_left_out_and_said(
    model: PreTrainedModel, ids: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    with torch.no_grad():
        attention.v_proj.weight.zero_()
        attention.v_proj.bias.zero_()  # a constant head divides by zero in that scheme
    found = measure_kv_cache({"m": model}, ids, CPU, window=WINDOW, max_tokens=WINDOW, seed=0)
    assert [scheme.name for scheme in found.models[0].schemes if scheme.accuracy is None] == ["published"]
    assert all(row.published is None for row in found.ranges)
    assert "not finite" in caplog.text


def test_a_damaged_model_is_refused(model: PreTrainedModel, ids: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("nan")
    with pytest.raises(NumericError, match="baseline"):
        measure_kv_cache({"m": model}, ids, CPU, window=WINDOW, max_tokens=WINDOW, seed=0)


def test_all_models_get_schemes_and_the_first_the_rest(tiny_qwen2: Path, ids: Tensor) -> None:
    models = {"a": load(tiny_qwen2), "b": load(tiny_qwen2)}
    steps: list[str] = []
    found = measure_kv_cache(
        models, ids, CPU, window=WINDOW, max_tokens=WINDOW, seed=0, tell=lambda what, done, total: steps.append(what)
    )
    first, second = found.models
    assert (first.label, second.label) == ("a", "b")
    assert first.schemes == second.schemes
    assert {"KV cache of a", "KV cache of b", "keys and values of a", "needles in a"} == set(steps)


def test_decoding_through_the_kernels_is_where_one_call_says_it_is(cost: KVCacheCost) -> None:
    assert cost.decoded.tokens == WINDOW - WINDOW // 2
    # The kernels' own rounding comes on top; were decoding to see other keys or values, it would be far off.
    assert cost.decoded.kl_mean_nats == pytest.approx(cost.decoded.at_once_kl_mean_nats, rel=0.2)


class TestLayers:
    """Errors and peaks of what passes through the cache."""

    def test_errors_and_outliers_are_those_of_the_keys_themselves(
        self, sharp: PreTrainedModel, cost: KVCacheCost, ids: Tensor
    ) -> None:
        from transformers import DynamicCache

        cache = DynamicCache(config=sharp.config)
        with torch.inference_mode():
            sharp(input_ids=ids[None, :WINDOW], past_key_values=cache)
            keys: Any = getattr(cache.layers[1], "keys")  # noqa: B009
            found = kv_errors.layer_states(
                sharp, [ids[:WINDOW]], CPU, lambda: Int8KVCache(sharp.config, exact_prefill=True)
            )[1]
        kv_attention.release(sharp.config)
        computed, stored, _ = found
        centred = keys - keys.mean(2, keepdim=True)
        error = kv_ops.decode(*kv_ops.encode(centred), torch.float32) - centred
        # Sums of float64 here, of float32 there.
        assert stored.relative_error == pytest.approx((error.norm() / keys.norm()).item(), rel=1e-4)
        by_channel = error.norm(dim=2) / centred.norm(dim=2)
        assert stored.channel_error == pytest.approx(by_channel.square().mean().sqrt().item(), rel=1e-4)
        for states, peaks in ((keys, computed), (centred, stored.peaks)):
            largest = states.abs().amax(2)[0]  # [H, D]
            ratio = (largest.amax(1) / largest.median(1).values).max().item()
            assert peaks.outlier_ratio == pytest.approx(ratio, rel=1e-5)
            assert peaks.largest == pytest.approx(largest.flatten().tolist(), rel=1e-3)  # stored with four digits
            assert (peaks.heads, peaks.channels_per_peak) == (2, 1)

    def test_folding_flattens_outliers_and_helps_the_other_channels(self, cost: KVCacheCost) -> None:
        for layer in cost.layers:
            assert layer.folded_keys is not None
            # The planted factor of 32 is gone but for a power of two's rounding and the model's own outliers.
            assert layer.folded_keys.peaks.outlier_ratio < layer.keys.peaks.outlier_ratio / 8
            assert layer.folded_keys.channel_error < layer.keys.channel_error / 4

    def test_layers_are_those_of_the_cache_in_order(self, cost: KVCacheCost) -> None:
        assert [layer.layer for layer in cost.layers] == [0, 1]
        assert cost.layer_tokens == 2 * WINDOW

    def test_many_channels_share_a_peak(self, monkeypatch: pytest.MonkeyPatch, sharp: PreTrainedModel) -> None:
        monkeypatch.setattr(kv_errors, "MAX_PEAKS", 8)
        window = torch.arange(3, 20)
        found = kv_errors.layer_states(sharp, [window], CPU, lambda: Int8KVCache(sharp.config))
        kv_attention.release(sharp.config)
        assert (len(found[0][0].largest), found[0][0].channels_per_peak) == (8, 4)


class TestNeedles:
    """A model that copies, a model that does not, and one that cannot see far back."""

    @staticmethod
    def copying(reach: int | None = None) -> kv_needle.BatchLogitsFn:
        """Ranks first what followed the last occurrence of the latest two tokens, if it is within reach."""

        def logits(contexts: Tensor, keep: int) -> Tensor:
            rows, length = contexts.shape
            found = torch.zeros(rows, keep, 4000)
            for row in range(rows):
                for place in range(keep):
                    end = length - keep + place
                    for old in range(end - 1, 0 if reach is None else end - reach, -1):
                        if torch.equal(contexts[row, old - 1 : old + 1], contexts[row, end - 1 : end + 1]):
                            found[row, place, contexts[row, old + 1]] = 9.0
                            break
            return found

        return logits

    @pytest.fixture
    def text(self) -> Tensor:
        return torch.randperm(4000, generator=torch.Generator().manual_seed(0))[:300]

    @pytest.fixture
    def few(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kv_needle, "TRIALS", 2)

    @pytest.mark.usefixtures("few")
    def test_a_model_that_copies_finds_every_needle_and_none_where_there_is_none(self, text: Tensor) -> None:
        rows = kv_needle.measure_needles(self.copying(), self.copying(), text, longest=128, seed=0)
        assert [(row.length_tokens, row.depth_percent) for row in rows] == [
            (length, depth) for length in (64, 128) for depth in (0, 25, 50, 75, 100)
        ]
        assert all((row.exact.hit_rate, row.int8.hit_rate, row.agreement) == (1, 1, 1) for row in rows)
        assert all(row.absent.hit_rate == 0 for row in rows)
        assert all(row.absent.logprob_mean_nats < row.exact.logprob_mean_nats < 0 for row in rows)

    @pytest.mark.usefixtures("few")
    def test_a_cache_that_forgets_loses_the_needles_that_are_far_back(self, text: Tensor) -> None:
        rows = kv_needle.measure_needles(self.copying(), self.copying(reach=40), text, longest=128, seed=0)
        deep = {(row.length_tokens, row.depth_percent): (row.int8.hit_rate, row.agreement) for row in rows}
        assert deep[128, 0] == (0, 0)
        assert deep[128, 100] == (1, 1)

    @pytest.mark.usefixtures("few")
    def test_every_context_has_its_length_its_needle_and_its_question(self, text: Tensor) -> None:
        seen: list[Tensor] = []

        def watch(contexts: Tensor, keep: int) -> Tensor:
            seen.append(contexts)
            return torch.zeros(len(contexts), keep, 4000)

        kv_needle.measure_needles(watch, watch, text, longest=64, seed=3)
        absent, *planted = seen
        assert all(contexts.shape == (2, 64) for contexts in seen)
        question = kv_needle.CUE + kv_needle.ANSWER - 1
        for depth, contexts in zip((0, 0, 25, 25, 50, 50, 75, 75, 100, 100), planted, strict=True):
            place = (64 - question - kv_needle.CUE - kv_needle.ANSWER) * depth // 100
            assert torch.equal(contexts[:, place : place + question], contexts[:, -question:])
            assert torch.equal(contexts[:, -question:], absent[:, -question:])
        # The text holds every token once, so a needle that is not planted is nowhere.
        assert all(len(row.unique()) == 64 for row in absent)

    def test_a_window_without_room_has_no_needles(self, text: Tensor) -> None:
        assert kv_needle.measure_needles(self.copying(), self.copying(), text, longest=63, seed=0) == ()

    def test_a_text_hardly_longer_than_the_window_is_enough(self, text: Tensor) -> None:
        def blank(contexts: Tensor, keep: int) -> Tensor:
            return torch.zeros(len(contexts), keep, 4000)

        assert len(kv_needle.measure_needles(blank, blank, text[:65], longest=64, seed=0)) == 5
