"""Perplexity by length: the numbers are a slow direct computation's, and what was switched goes back.

Tiny random models: a Qwen v1 one trained, so to say, at 16 tokens, and other families that have nothing to switch.
"""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qquant import long_context
from qquant.errors import BadDataError, BadModelError, NumericError, UsageError
from qquant.long_context import (
    check_lengths,
    measure_long_context,
    parse_lengths,
    setting_on,
    settings_of,
    token_losses,
)
from qquant.long_report import LongContext, LongDifference, LongPoint, SettingName
from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.modeling import register_qwen
from tests.conftest import Factory
from tests.make_qwen_v1 import make_qwen_v1

CPU = torch.device("cpu")
TRAINED = 16
LENGTHS = (8, 16, 32, 64)
FLAGS: dict[SettingName, tuple[bool, bool]] = {
    "plain": (False, False),
    "ntk": (True, False),
    "ntk_logn": (True, True),
    "logn": (False, True),
}

TOLERANCE = 1e-4
"""Nats per token. Logits below 10 are sums of 64 products in another order: 64 * 10 * 2**-24 is 4e-5, and log_softmax
in float32 instead of float64 adds a few units of 10 * 2**-24."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen v1 checkpoint with both switches off. Never write to it."""
    register_qwen()
    target = tmp_path_factory.mktemp("qwen") / "tiny-v1"
    return make_qwen_v1(target, seq_length=TRAINED, use_dynamic_ntk=False, use_logn_attn=False)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Two windows of 64, and a rest that no whole window covers."""
    return torch.randint(300, (150,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def found(folder: Path, ids: Tensor) -> LongContext:
    """One measurement that several tests look at."""
    return measure_long_context({"v1": lambda: load(folder)}, ids, CPU, lengths=LENGTHS)


def load(folder: Path, **flags: bool) -> Any:
    """A checkpoint in memory, with switches set as config.json would have set them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    vars(model.config).update(flags)
    return model


def directly(model: Any, ids: Tensor, length: int) -> Tensor:
    """[tokens] float64: whole windows, all logits at once, float64 from there."""
    losses = []
    with torch.inference_mode():
        for begin in range(0, len(ids) - 1, length):
            logits = model(input_ids=ids[None, begin : begin + length], use_cache=False).logits[0].double()
            log_q = torch.log_softmax(logits, -1)
            losses.append(-log_q.gather(1, ids[begin + 1 : begin + length + 1, None])[:, 0])
    return torch.cat(losses)


def point_of(found: LongContext, setting: SettingName, length: int, *, model: int = 0) -> LongPoint:
    row = next(row for row in found.models[model].rows if row.setting == setting)
    return next(point for point in row.points if point.length_tokens == length)


@pytest.mark.parametrize("setting", list(FLAGS))
@pytest.mark.parametrize("length", LENGTHS)
def test_the_table_is_what_a_slow_direct_computation_gives(
    folder: Path, ids: Tensor, found: LongContext, setting: SettingName, length: int
) -> None:
    ntk, logn = FLAGS[setting]
    model = load(folder, use_dynamic_ntk=ntk, use_logn_attn=logn)
    expected = directly(model, ids[:129], length)
    point = point_of(found, setting, length)
    assert point.whole.tokens == 128
    assert abs(point.whole.nll_mean_nats - expected.mean().item()) < TOLERANCE
    assert point.whole.perplexity == math.exp(point.whole.nll_mean_nats)
    # Half of the shortest window at the end of each longest one: the same 8 tokens at every length.
    last = torch.cat((expected[60:64], expected[124:128]))
    assert point.tail.tokens == 8
    assert abs(point.tail.nll_mean_nats - last.mean().item()) < TOLERANCE


def test_differences_are_those_of_single_tokens(folder: Path, ids: Tensor, found: LongContext) -> None:
    both = [directly(load(folder, use_dynamic_ntk=ntk), ids[:129], 64) for ntk in (True, False)]
    difference = both[0] - both[1]
    given = point_of(found, "ntk", 64).whole.to_plain
    assert given is not None
    assert abs(given.mean_nats - difference.mean().item()) < 2 * TOLERANCE
    assert given.stderr_nats == pytest.approx(difference.std().item() / math.sqrt(128), abs=2 * TOLERANCE)
    assert point_of(found, "plain", 64).whole.to_plain is None
    assert point_of(found, "ntk", 64).whole.to_baseline is None


def test_switches_change_nothing_up_to_the_trained_length_and_something_beyond(found: LongContext) -> None:
    for length in LENGTHS:
        values = {point_of(found, setting, length).whole.nll_mean_nats for setting in FLAGS}
        assert len(values) == (1 if length <= TRAINED else len(FLAGS))


@pytest.mark.parametrize("length", [length for length in LENGTHS if length <= TRAINED])
def test_up_to_the_trained_length_switches_move_no_bit_so_it_is_measured_once(
    folder: Path, ids: Tensor, length: int
) -> None:
    plain = directly(load(folder), ids[:129], length)
    for ntk, logn in FLAGS.values():
        assert torch.equal(directly(load(folder, use_dynamic_ntk=ntk, use_logn_attn=logn), ids[:129], length), plain)
    model, windows = load(folder), []
    model.register_forward_hook(lambda *_: windows.append(1))
    found = measure_long_context({"v1": lambda: model}, ids, CPU, lengths=(length, 64))
    assert len(windows) == 128 // length + len(FLAGS) * 2
    for row in found.models[0].rows[1:]:
        assert row.points[0].whole.nll_mean_nats == found.models[0].rows[0].points[0].whole.nll_mean_nats
        assert row.points[0].whole.to_plain == LongDifference(mean_nats=0, stderr_nats=0)


def test_rows_and_lengths_are_those_asked_for(found: LongContext) -> None:
    (model,) = found.models
    assert (model.label, model.made_for_tokens) == ("v1", TRAINED)
    assert [row.setting for row in model.rows] == list(FLAGS)
    assert {tuple(point.length_tokens for point in row.points) for row in model.rows} == {LENGTHS}
    assert (found.lengths_tokens, found.windows, found.tail_tokens) == (LENGTHS, 2, 4)


@pytest.mark.parametrize("rows", [1, 5, 64], ids=["single", "uneven", "whole"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_chunks_of_logits_give_what_all_at_once_give(
    checkpoint: Factory, ids: Tensor, monkeypatch: pytest.MonkeyPatch, family: str, rows: int
) -> None:
    model = load(checkpoint(family))
    monkeypatch.setattr(long_context, "_CHUNK_ELEMENTS", rows * model.config.vocab_size)
    losses = token_losses(model, ids[:65], CPU, length=32)
    torch.testing.assert_close(losses, directly(model, ids[:65], 32), atol=TOLERANCE, rtol=0)


def test_what_a_model_does_to_its_logits_is_done_to_chunks_too(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,  # small, so that it cannot be missed
    )
    model: Any = Gemma2ForCausalLM(config).eval()
    monkeypatch.setattr(long_context, "_CHUNK_ELEMENTS", 7 * 300)
    losses = token_losses(model, ids[:33], CPU, length=32)
    torch.testing.assert_close(losses, directly(model, ids[:33], 32), atol=TOLERANCE, rtol=0)
    assert losses.max() < math.log(300) + 1  # what a cap of 0.5 allows


def test_a_backbone_runs_once_per_window_and_is_itself_afterwards(
    folder: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = load(folder), []
    model.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(long_context, "_CHUNK_ELEMENTS", 3 * model.config.vocab_size)
    token_losses(model, ids[:65], CPU, length=32)
    assert len(calls) == 2
    assert "forward" not in vars(model.transformer)


def test_a_backbone_is_itself_after_an_error_and_keeps_a_forward_it_was_given(folder: Path, ids: Tensor) -> None:
    model = load(folder)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no head today")

    own = model.transformer.forward
    model.transformer.forward = own  # as a library that wraps modules does
    model.lm_head.forward = broken
    with pytest.raises(RuntimeError, match="no head today"):
        token_losses(model, ids[:33], CPU, length=32)
    assert vars(model.transformer)["forward"] is own


class Plain(nn.Module):
    """A language model that gives all its logits or none."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(model_type="plain")
        self.table = nn.Embedding(300, 300)

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table(input_ids))


def test_a_model_that_cannot_leave_logits_out_is_measured_too(ids: Tensor) -> None:
    model = Plain()
    torch.testing.assert_close(
        token_losses(model, ids[:33], CPU, length=16), directly(model, ids[:33], 16), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("setting", list(FLAGS))
def test_a_setting_is_taken_off_again_also_after_an_error(setting: SettingName) -> None:
    model = SimpleNamespace(config=QWenConfig(use_dynamic_ntk=True, use_logn_attn=False))
    with setting_on(model, setting):
        assert (model.config.use_dynamic_ntk, model.config.use_logn_attn) == FLAGS[setting]
    with pytest.raises(RuntimeError, match="amid"), setting_on(model, setting):
        raise RuntimeError("amid")
    assert (model.config.use_dynamic_ntk, model.config.use_logn_attn) == (True, False)


def test_a_measurement_leaves_the_model_as_it_was_also_when_it_fails(folder: Path, ids: Tensor) -> None:
    model = load(folder, use_dynamic_ntk=True)
    measure_long_context({"v1": lambda: model}, ids, CPU, lengths=(16, 32))
    assert (model.config.use_dynamic_ntk, model.config.use_logn_attn) == (True, False)
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(NumericError, match="v1, plain, 16 tokens"):
        measure_long_context({"v1": lambda: model}, ids, CPU, lengths=(16, 32))
    assert (model.config.use_dynamic_ntk, model.config.use_logn_attn) == (True, False)


def test_another_family_has_one_row_and_may_go_beyond_its_positions(checkpoint: Factory) -> None:
    model = load(checkpoint("llama", max_position_embeddings=32))
    ids = torch.randint(300, (130,), generator=torch.Generator().manual_seed(1))
    found = measure_long_context({"llama": lambda: model}, ids, CPU, lengths=(32, 64))
    assert settings_of(model) == ("as_configured",)
    assert [row.setting for row in found.models[0].rows] == ["as_configured"]
    assert found.models[0].made_for_tokens == 32
    expected = directly(model, ids[:129], 64).mean().item()
    assert abs(point_of(found, "as_configured", 64).whole.nll_mean_nats - expected) < TOLERANCE


def test_a_table_of_positions_that_ends_is_refused(ids: Tensor) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()
    with pytest.raises(BadModelError, match="no positions for 64 tokens"):
        measure_long_context({"gpt2": lambda: model}, ids, CPU, lengths=(32, 64))


def test_a_candidate_is_compared_with_the_baseline_in_the_same_setting(folder: Path, ids: Tensor) -> None:
    def rounded() -> Any:
        return load(folder).bfloat16().float()

    loaders = {"v1": lambda: load(folder), "same": lambda: load(folder), "rounded": rounded}
    found = measure_long_context(loaders, ids, CPU, lengths=(16, 32))
    same, other = (point_of(found, "ntk", 32, model=number).whole for number in (1, 2))
    assert same.to_baseline is not None
    assert (same.to_baseline.mean_nats, same.to_baseline.stderr_nats) == (0, 0)
    assert other.to_baseline is not None
    base = point_of(found, "ntk", 32).whole
    assert other.to_baseline.mean_nats == pytest.approx(other.nll_mean_nats - base.nll_mean_nats, abs=1e-12)
    assert other.to_baseline.mean_nats != 0


def test_one_model_is_in_memory_at_a_time(folder: Path, ids: Tensor) -> None:
    alive: list[weakref.ref[Any]] = []

    def once() -> Any:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        model = load(folder)
        alive.append(weakref.ref(model))
        return model

    measure_long_context({"a": once, "b": once}, ids, CPU, lengths=(16,))
    assert len(alive) == 2


def test_a_candidate_of_another_vocabulary_is_refused(checkpoint: Factory, ids: Tensor) -> None:
    loaders = {"a": lambda: load(checkpoint("qwen2")), "b": lambda: load(checkpoint("qwen2", vocab_size=400))}
    with pytest.raises(BadModelError, match="b predicts 400 tokens and the baseline 320"):
        measure_long_context(loaders, ids, CPU, lengths=(16,))


def test_a_text_shorter_than_the_longest_window_is_refused(ids: Tensor) -> None:
    with pytest.raises(BadDataError, match="more than 64 tokens"):
        measure_long_context({}, ids[:64], CPU, lengths=(16, 64))


def test_lengths_come_sorted_and_once() -> None:
    assert parse_lengths("64, 8,16,16") == (8, 16, 64)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", "commas between them"),
        ("8,,16", "commas between them"),
        ("8;16", "commas between them"),
        ("1e3", "commas between them"),
        ("-8", "commas between them"),
        ("²", "commas between them"),  # a digit for str.isdigit and none for int
        ("0,8", "each 2 or more"),
        ("1", "each 2 or more"),
        ("8,12", r"each length must divide the longest \(12\).* and 8 does not; give powers of two"),
    ],
)
def test_lengths_that_cannot_be_followed_are_refused(typed: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_lengths(typed)


def test_no_lengths_are_refused() -> None:
    with pytest.raises(UsageError):
        check_lengths(())


def test_progress_counts_windows_up_to_their_number(folder: Path, ids: Tensor) -> None:
    told: list[tuple[str, int, int]] = []
    measure_long_context({"v1": lambda: load(folder)}, ids, CPU, lengths=(32, 64), tell=lambda *said: told.append(said))
    assert told[0] == ("loading v1", 0, 1)
    assert told[-1] == ("v1, + logn, 64 tokens", 24, 24)  # 4 settings of 4 and 2 windows
    assert [done for _, done, _ in told[1:]] == sorted(done for _, done, _ in told[1:])
