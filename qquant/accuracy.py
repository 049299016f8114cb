"""How far a candidate model's predictions are from its baseline's, token by token over one text.

Perplexity, KL divergence and top-1 agreement come out of one pass. Nothing here loads a model, reads a file,
tokenizes or prints: a model is a function from token ids to logits.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qquant.errors import BadDataError, BadModelError, NumericError, UsageError
from qquant.journal import Journal

LogitsFn = Callable[[Tensor, int], Tensor]
"""(window [seq] int64, keep) -> [keep, vocab] logits that follow each of the window's last ``keep`` tokens."""

ProgressFn = Callable[[int, int], None]
"""Called after every window with (tokens scored so far, tokens to score)."""

_CHUNK_ELEMENTS = 2**22
"""Logits widened to float32 at a time: 16 MiB in each of some ten temporaries, 27 tokens of a 152k vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """What one model scored. The comparing fields are None where there was no baseline, or it is the baseline."""

    tokens: int
    """Tokens that were predicted and scored: every token of the text but the first, each once."""
    nll_mean_nats: float
    """Mean negative log-likelihood of the text's tokens."""
    perplexity: float
    """exp(nll_mean_nats)."""
    nll_difference_nats: float | None = None
    """Mean of (candidate - baseline) over tokens; its exp is the ratio of the perplexities."""
    nll_difference_stderr_nats: float | None = None
    """Standard error of that mean, from the per-token differences; None for a single token."""
    kl_mean_nats: float | None = None
    """Mean over tokens of KL(baseline || candidate)."""
    kl_p99_nats: float | None = None
    """Smallest of the per-token values that at least 99 % of the tokens do not exceed; exact, not interpolated."""
    kl_max_nats: float | None = None
    """Largest per-token value."""
    top1_agreement: float | None = None
    """Share of tokens where both models rank the same token first, 0 to 1."""


class Window(NamedTuple):
    """One forward pass: feed ``ids[begin : end - 1]``, score the predictions of ``ids[first:end]``."""

    begin: int
    first: int
    end: int


@dataclass
class _Tally:
    """Per-token results of one model, filled window by window; a token never written stays NaN."""

    nll: Tensor
    """[tokens] float64, nats."""
    kl: Tensor
    """[tokens] float32, nats; stays NaN for a baseline."""
    agreed: Tensor
    """[tokens] bool: the likeliest token is the baseline's."""

    def piece(self, place: slice) -> dict[str, Any]:
        """What was found at some tokens, as JSON values that are read back exactly."""
        return {
            "nll": self.nll[place].tolist(),
            "kl": None if self.kl[place].isnan().any() else self.kl[place].tolist(),
            "agreed": self.agreed[place].int().tolist(),
        }

    def put(self, place: slice, piece: Mapping[str, Any]) -> None:
        """Write such a piece back."""
        self.nll[place] = torch.tensor(piece["nll"], dtype=torch.float64)
        if piece["kl"] is not None:
            self.kl[place] = torch.tensor(piece["kl"])
        self.agreed[place] = torch.tensor(piece["agreed"], dtype=torch.bool)


def logits_fn(model: Any, device: torch.device) -> LogitsFn:
    """A transformers causal language model on ``device`` as a ``LogitsFn``; no KV cache, no padding."""
    # With it the output projection skips the tokens that are only context; not every model knows the option.
    partial = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(window: Tensor, keep: int) -> Tensor:
        options = {"logits_to_keep": keep} if partial else {}
        found: Tensor = model(input_ids=window[None].to(device), use_cache=False, **options).logits
        return found[0, -keep:]

    return logits


def windows(tokens: int, *, seq_len: int, stride: int) -> Iterator[Window]:
    """Cut a text so that every token after the first is scored exactly once.

    Every window feeds ``seq_len`` tokens (fewer only if the text is shorter). The first scores all its predictions,
    each later one the ``stride`` last, so that a token is predicted from at least ``seq_len - stride + 1`` tokens
    once the text is that old. The last window reaches back to stay full and scores what is left.

    Args:
        tokens: length of the text.
        seq_len: tokens fed per window, at least 1.
        stride: new tokens scored per window, 1 to ``seq_len``.

    Raises:
        UsageError: seq_len or stride is out of range.
    """
    if seq_len < 1:
        raise UsageError(f"seq_len must be at least 1, got {seq_len}")
    if not 1 <= stride <= seq_len:
        raise UsageError(f"stride must be between 1 and seq_len ({seq_len}), got {stride}: a larger one skips tokens")
    first = 1
    while first < tokens:
        end = min(tokens, first + (seq_len if first == 1 else stride))
        yield Window(max(0, end - 1 - seq_len), first, end)
        first = end


def evaluate(
    baseline: LogitsFn | None,
    candidates: Mapping[str, LogitsFn],
    ids: Tensor,
    *,
    seq_len: int,
    stride: int,
    progress: ProgressFn | None = None,
    finished: Journal | None = None,
) -> tuple[Accuracy | None, dict[str, Accuracy]]:
    """Score a baseline and its candidates on one text in one pass; the baseline runs once per window.

    Log-probabilities are float32, a few tokens at a time; everything summed over tokens is float64.

    Args:
        baseline: the model that the candidates are compared with, or None for perplexity alone.
        candidates: label -> model.
        ids: [tokens] int64, the text. Read, never written.
        seq_len: tokens fed per window.
        stride: tokens scored per window; see ``windows``.
        progress: told after every window how many tokens are done.
        finished: windows of an earlier run, which are not scored again; those that are scored are added.

    Returns:
        The baseline's own accuracy (None without one) and each candidate's, by label.

    Raises:
        BadDataError: the text has fewer than two tokens.
        BadModelError: a model returned logits of another shape than the baseline's.
        NumericError: a model returned a logit that is not finite.
    """
    if ids.ndim != 1 or ids.numel() < 2:
        raise BadDataError(f"a text to evaluate is one row of at least 2 tokens, got shape {list(ids.shape)}")
    count = ids.numel() - 1
    reference = _new_tally(count)
    tallies = {label: _new_tally(count) for label in candidates}
    both = [reference, *tallies.values()] if baseline is not None else [*tallies.values()]
    with torch.inference_mode():
        for window in windows(ids.numel(), seq_len=seq_len, stride=stride):
            key, place = f"window {window.first}", slice(window.first - 1, window.end - 1)
            if finished is not None and key in finished:
                for tally, piece in zip(both, finished[key], strict=True):
                    tally.put(place, piece)
                continue  # it takes no time, and would spoil the pace that the time left is reckoned by
            fed, keep = ids[window.begin : window.end - 1], window.end - window.first
            targets = ids[window.first : window.end]
            theirs = None
            if baseline is not None:
                theirs = _checked(baseline(fed, keep), keep, None, "the baseline")
                _score_window(theirs, None, targets, window.first - 1, reference, "the baseline")
            for label, model in candidates.items():
                ours = _checked(model(fed, keep), keep, theirs, label)
                _score_window(ours, theirs, targets, window.first - 1, tallies[label], label)
            if finished is not None:
                finished.add(key, [tally.piece(place) for tally in both])
            if progress is not None:
                progress(window.end - 1, count)
    if baseline is None:
        return None, {label: _summarize(tally, None) for label, tally in tallies.items()}
    return _summarize(reference, None), {label: _summarize(tally, reference) for label, tally in tallies.items()}


def log_probs(ours: Tensor, theirs: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Log-probabilities a few tokens at a time, so that what is float32 of them stays small.

    Args:
        ours: [tokens, vocab] logits. Read, never written.
        theirs: the same of the model to compare with, or None.

    Yields:
        Which tokens, ours [rows, vocab] and theirs (or None) on the device of ours, both float32.
    """
    size = max(1, _CHUNK_ELEMENTS // ours.shape[1])
    for begin in range(0, ours.shape[0], size):
        rows = slice(begin, min(begin + size, ours.shape[0]))
        log_q = torch.log_softmax(ours[rows].float(), dim=-1)
        log_p = None if theirs is None else torch.log_softmax(theirs[rows].float().to(log_q.device), dim=-1)
        yield rows, log_q, log_p


def token_nll(log_q: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood [rows] float64, on the CPU, of targets [rows] under log-probabilities [rows, vocab]."""
    return -log_q.gather(1, targets[:, None].to(log_q.device))[:, 0].double().cpu()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, never below zero.

    The sum runs over p (log p - log q) + (q - p). The second part adds up to nothing for exact probabilities, and
    for rounded ones it cancels the rounding of the two normalizers to first order: a row is off by less than 1e-7,
    where the textbook sum is off by up to 1e-6 and can be far below zero.

    Args:
        log_p: [rows, vocab] float32 natural log-probabilities. Read, never written.
        log_q: [rows, vocab] float32, the same. Read, never written.

    Returns:
        [rows] float64, nats.
    """
    p, q = log_p.exp(), log_q.exp()
    return (p * (log_p - log_q) + (q - p)).sum(-1, dtype=torch.float64).clamp_(min=0)


def _new_tally(count: int) -> _Tally:
    nll, kl = torch.full((count,), math.nan, dtype=torch.float64), torch.full((count,), math.nan)
    return _Tally(nll, kl, torch.zeros(count, dtype=torch.bool))


def _checked(logits: Tensor, keep: int, baseline: Tensor | None, label: str) -> Tensor:
    """Refuse logits that cannot be compared row by row and column by column."""
    if logits.ndim != 2 or logits.shape[0] != keep:
        raise BadModelError(f"{label} must return [{keep}, vocab] logits, got {list(logits.shape)}")
    if baseline is not None and logits.shape != baseline.shape:
        raise BadModelError(
            f"{label} predicts {logits.shape[1]} tokens and the baseline {baseline.shape[1]}: "
            "a candidate must have its baseline's vocabulary"
        )
    return logits


def _score_window(ours: Tensor, theirs: Tensor | None, targets: Tensor, offset: int, tally: _Tally, label: str) -> None:
    """Write one window's per-token results into ``tally`` from place ``offset`` on; modifies ``tally`` only."""
    # Theirs are finite: the baseline's own pass over these tokens has proved it.
    for rows, log_q, log_p in log_probs(ours, theirs):
        place = slice(offset + rows.start, offset + rows.stop)
        _refuse_infinite(log_q, label, place)
        tally.nll[place] = token_nll(log_q, targets[rows])
        if log_p is not None:
            tally.kl[place] = kl_divergence(log_p, log_q).float().cpu()
            tally.agreed[place] = (log_p.argmax(-1) == log_q.argmax(-1)).cpu()


def _refuse_infinite(log_q: Tensor, label: str, place: slice) -> None:
    """Raise NumericError that says whose log-probabilities [rows, vocab] are of no use, and where."""
    # One bad logit makes some log-probability NaN or -inf; amin shows either without a mask as large as the logits.
    if not math.isfinite(log_q.amin().item()):
        raise NumericError(
            f"{label} returned a logit that is not finite for tokens {place.start + 1} to {place.stop} of the text; "
            "the model is damaged, or its dtype overflows: try bfloat16 or float32"
        )


def _summarize(tally: _Tally, baseline: _Tally | None) -> Accuracy:
    """Fold per-token results into means, in float64."""
    count = tally.nll.numel()
    mean = tally.nll.mean().item()
    if not mean < 700:  # exp overflows float64 soon after; a model this bad has no perplexity to speak of
        raise NumericError(f"the mean negative log-likelihood must be a number below 700 nats, got {mean:.6g}")
    if baseline is None:
        return Accuracy(tokens=count, nll_mean_nats=mean, perplexity=math.exp(mean))
    difference = tally.nll - baseline.nll
    return Accuracy(
        tokens=count,
        nll_mean_nats=mean,
        perplexity=math.exp(mean),
        nll_difference_nats=difference.mean().item(),
        nll_difference_stderr_nats=difference.std().item() / math.sqrt(count) if count > 1 else None,
        kl_mean_nats=tally.kl.mean(dtype=torch.float64).item(),
        kl_p99_nats=tally.kl.kthvalue(-(-99 * count // 100)).values.item(),
        kl_max_nats=tally.kl.max().item(),
        top1_agreement=int(tally.agreed.sum()) / count,
    )
