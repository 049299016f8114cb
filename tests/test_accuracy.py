"""The metrics against a float64 reference that scores one token at a time from its own context, and their edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qquant import accuracy
from qquant.accuracy import LogitsFn, evaluate, kl_divergence, windows
from qquant.errors import BadDataError, BadModelError, NumericError, UsageError

VOCAB = 37


def running_model(seed: int, *, noise: float = 0.0) -> LogitsFn:
    """A model whose logits depend on everything it is fed, so that a wrong context shows in every number."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
    table += noise * torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))

    def logits(window: Tensor, keep: int) -> Tensor:
        return (3 * torch.cumsum(table[window], dim=0) / (1 + torch.arange(len(window)))[:, None] ** 0.5)[-keep:]

    return logits


def text(tokens: int) -> Tensor:
    return torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(1))


def context_of(token: int, tokens: int, seq_len: int, stride: int) -> int:
    """First token of the context that predicts ``token``, by the rule of docs/evaluation.md said once more."""
    if token <= seq_len:
        end = min(tokens, seq_len + 1)
    else:
        end = min(tokens, seq_len + 1 + stride * math.ceil((token - seq_len) / stride))
    return max(0, end - 1 - seq_len)


def reference(baseline: LogitsFn, candidate: LogitsFn, ids: Tensor, seq_len: int, stride: int) -> dict[str, float]:
    """Every token on its own, in float64."""
    rows = []
    for token in range(1, len(ids)):
        begin = context_of(token, len(ids), seq_len, stride)
        p = baseline(ids[begin:token], 1)[0].double().log_softmax(0)
        q = candidate(ids[begin:token], 1)[0].double().log_softmax(0)
        rows.append([-p[ids[token]], -q[ids[token]], (p.exp() * (p - q)).sum(), p.argmax() == q.argmax()])
    table = torch.tensor(rows, dtype=torch.float64)
    ours, theirs, kl, agree = table[:, 1], table[:, 0], table[:, 2], table[:, 3]
    return {
        "nll_mean_nats": ours.mean().item(),
        "perplexity": ours.mean().exp().item(),
        "nll_difference_nats": (ours - theirs).mean().item(),
        "nll_difference_stderr_nats": (ours - theirs).std().item() / math.sqrt(len(rows)),
        "kl_mean_nats": kl.mean().item(),
        "kl_p99_nats": sorted(kl.tolist())[math.ceil(0.99 * len(rows)) - 1],
        "kl_max_nats": kl.max().item(),
        "top1_agreement": agree.mean().item(),
    }


SHAPES = {
    "half_stride": (150, 16, 8),
    "odd_stride": (151, 17, 5),
    "stride_one": (40, 8, 1),
    "no_overlap": (130, 16, 16),
    "text_shorter_than_window": (11, 16, 8),
    "text_of_one_window": (17, 16, 8),
    "one_token_over": (18, 16, 8),
    "window_of_one": (23, 1, 1),
}


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    found: tuple[int, int, int] = request.param
    return found


def test_every_token_after_the_first_is_scored_exactly_once(shape: tuple[int, int, int]) -> None:
    tokens, seq_len, stride = shape
    scored = [token for w in windows(tokens, seq_len=seq_len, stride=stride) for token in range(w.first, w.end)]
    assert scored == list(range(1, tokens))


def test_every_length_and_stride_scores_each_token_once() -> None:
    for tokens in range(2, 24):
        for seq_len in range(1, 10):
            for stride in range(1, seq_len + 1):
                cut = list(windows(tokens, seq_len=seq_len, stride=stride))
                assert [t for w in cut for t in range(w.first, w.end)] == list(range(1, tokens))
                assert all(w.end - 1 - w.begin == min(seq_len, tokens - 1) for w in cut)


def test_a_token_sees_at_least_seq_len_minus_stride_plus_one_tokens(shape: tuple[int, int, int]) -> None:
    tokens, seq_len, stride = shape
    for window in windows(tokens, seq_len=seq_len, stride=stride):
        assert window.begin == 0 or window.first - window.begin >= seq_len - stride + 1


def test_metrics_equal_the_token_by_token_reference(shape: tuple[int, int, int]) -> None:
    tokens, seq_len, stride = shape
    ids, baseline, candidate = text(tokens), running_model(0), running_model(2, noise=0.2)
    _, result = evaluate(baseline, {"c": candidate}, ids, seq_len=seq_len, stride=stride)
    assert result["c"].tokens == tokens - 1
    for name, expected in reference(baseline, candidate, ids, seq_len, stride).items():
        # float32 log-probabilities of logits near 30: about 1e-6 relative
        assert getattr(result["c"], name) == pytest.approx(expected, rel=2e-5, abs=1e-7), name


def test_small_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    models = running_model(0), {"c": running_model(2, noise=0.2)}
    whole = evaluate(*models, text(90), seq_len=32, stride=16)
    monkeypatch.setattr(accuracy, "_CHUNK_ELEMENTS", 3 * VOCAB)
    assert evaluate(*models, text(90), seq_len=32, stride=16) == whole


def test_identical_models_differ_by_exactly_nothing() -> None:
    base, result = evaluate(running_model(0), {"same": running_model(0)}, text(100), seq_len=16, stride=8)
    same = result["same"]
    assert base is not None
    assert same.perplexity == base.perplexity
    assert (same.kl_mean_nats, same.kl_max_nats, same.nll_difference_nats, same.top1_agreement) == (0, 0, 0, 1)


def test_the_baseline_runs_once_per_window() -> None:
    calls = []
    model = running_model(0)

    def counted(window: Tensor, keep: int) -> Tensor:
        calls.append(keep)
        return model(window, keep)

    evaluate(counted, {"a": model, "b": model, "c": model}, text(100), seq_len=16, stride=8)
    assert len(calls) == len(list(windows(100, seq_len=16, stride=8)))
    assert sum(calls) == 99


def test_without_a_baseline_there_is_perplexity_and_nothing_to_compare() -> None:
    base, result = evaluate(None, {"c": running_model(0)}, text(50), seq_len=16, stride=8)
    assert base is None
    assert result["c"].perplexity > 1
    assert result["c"].kl_mean_nats is None
    assert result["c"].top1_agreement is None


def test_the_baselines_own_numbers_do_not_depend_on_candidates() -> None:
    alone, _ = evaluate(running_model(0), {}, text(50), seq_len=16, stride=8)
    beside, _ = evaluate(running_model(0), {"c": running_model(5, noise=1)}, text(50), seq_len=16, stride=8)
    assert alone == beside


def test_a_uniform_model_has_the_vocabulary_as_its_perplexity() -> None:
    _, result = evaluate(None, {"flat": lambda window, keep: torch.zeros(keep, VOCAB)}, text(50), seq_len=16, stride=16)
    assert result["flat"].perplexity == pytest.approx(VOCAB)


def test_the_paired_difference_explains_the_ratio_of_perplexities() -> None:
    base, result = evaluate(running_model(0), {"c": running_model(2, noise=0.3)}, text(80), seq_len=16, stride=8)
    assert base is not None
    assert result["c"].nll_difference_nats is not None
    assert math.exp(result["c"].nll_difference_nats) == pytest.approx(result["c"].perplexity / base.perplexity)


def test_a_single_scored_token_has_no_standard_error() -> None:
    _, result = evaluate(running_model(0), {"c": running_model(1, noise=1)}, text(2), seq_len=4, stride=2)
    assert result["c"].tokens == 1
    assert result["c"].nll_difference_stderr_nats is None


def test_progress_ends_at_the_number_of_scored_tokens() -> None:
    seen: list[tuple[int, int]] = []
    evaluate(None, {"c": running_model(0)}, text(50), seq_len=16, stride=8, progress=lambda *at: seen.append(at))
    assert seen == sorted(seen)
    assert seen[-1] == (49, 49)


def test_kl_of_nearly_equal_rows_is_right_where_the_textbook_sum_is_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5000, generator=generator)
    other = logits + 1e-5 * torch.randn(64, 5000, generator=generator)
    p, q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    ours = kl_divergence(logits.log_softmax(-1), other.log_softmax(-1))
    single_p, single_q = logits.log_softmax(-1), other.log_softmax(-1)
    textbook = (single_p.exp() * (single_p - single_q)).sum(-1, dtype=torch.float64)
    assert (ours - expected).abs().max() < 1e-7
    assert (ours - expected).abs().max() < 0.1 * (textbook - expected).abs().max()


def test_kl_is_finite_where_both_probabilities_vanish() -> None:
    p = torch.tensor([[0.0, -200.0, -300.0]]).log_softmax(-1)
    q = torch.tensor([[0.0, -300.0, -200.0]]).log_softmax(-1)
    assert kl_divergence(p, q).item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus_inf"])
def test_a_logit_that_is_not_finite_is_refused_by_model_and_place(bad: float) -> None:
    def broken(window: Tensor, keep: int) -> Tensor:
        logits = torch.zeros(keep, VOCAB)
        logits[-1, 3] = bad
        return logits

    with pytest.raises(NumericError, match=r"int4 returned .* not finite .* 1 to 16"):
        evaluate(running_model(0), {"int4": broken}, text(50), seq_len=16, stride=8)


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(BadModelError, match="must have its baseline's vocabulary"):
        evaluate(running_model(0), {"c": lambda w, keep: torch.zeros(keep, 5)}, text(20), seq_len=8, stride=4)


def test_a_model_that_returns_too_few_rows_is_refused() -> None:
    with pytest.raises(BadModelError, match=r"must return \[8, vocab\]"):
        evaluate(None, {"c": lambda w, keep: torch.zeros(keep - 1, VOCAB)}, text(20), seq_len=8, stride=4)


@pytest.mark.parametrize(("seq_len", "stride"), [(0, 1), (8, 0), (8, 9), (8, -1)])
def test_a_stride_that_would_skip_tokens_is_refused(seq_len: int, stride: int) -> None:
    with pytest.raises(UsageError):
        list(windows(20, seq_len=seq_len, stride=stride))


def test_a_text_of_one_token_has_nothing_to_score() -> None:
    with pytest.raises(BadDataError):
        evaluate(None, {"c": running_model(0)}, text(1), seq_len=8, stride=4)


def test_a_model_beyond_perplexity_is_a_numeric_error() -> None:
    def certain_and_wrong(window: Tensor, keep: int) -> Tensor:
        logits = torch.zeros(keep, VOCAB)
        logits[:, 0] = 1e5
        return logits

    with pytest.raises(NumericError, match="700 nats"):
        evaluate(None, {"c": certain_and_wrong}, torch.ones(20, dtype=torch.int64), seq_len=8, stride=4)


def test_half_precision_logits_are_widened_before_the_softmax() -> None:
    exact = running_model(0)

    def rounded(window: Tensor, keep: int) -> Tensor:
        return exact(window, keep).bfloat16()

    def widened(window: Tensor, keep: int) -> Tensor:
        return exact(window, keep).bfloat16().float()

    _, result = evaluate(widened, {"c": rounded}, text(60), seq_len=16, stride=8)
    assert result["c"].kl_max_nats == 0
