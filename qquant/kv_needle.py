"""Needles at depth: whether a model still finds a phrase far back in its context when the cache is in 8 bits.

A needle is a cue and an answer, planted in a stretch of other text; the context ends with the cue, and the answer is
scored token by token. Nothing here knows a cache or a scheme: models come in as functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qquant.kv_report import KVNeedle, KVRecall

BatchLogitsFn = Callable[[Tensor, int], Tensor]
"""(ids [B, T] int64, keep) -> [B, keep, vocab] logits that follow each row's last ``keep`` tokens."""

CUE, ANSWER = 8, 8
"""Tokens of a needle that the question repeats, and that are asked for. A needle is real text: models of a few million
parameters repeat a phrase a little, and random tokens not at all."""
TRIALS = 16
"""Needles per length and depth; the same ones at every depth."""
DEPTHS = (0, 25, 50, 75, 100)
"""Percent of the text before the needle."""
SHORTEST = 64
"""Tokens; a shorter context would be little but the needle."""
_LENGTHS = 4


class _Trial(NamedTuple):
    """One stretch of text and the needle for it."""

    text: Tensor
    """[text] int64, as long as the context without a needle takes."""
    cue: Tensor
    answer: Tensor


class _Found(NamedTuple):
    """[trials, ANSWER] per answer token."""

    logprob: Tensor
    first: Tensor
    """The token that was ranked first."""


def measure_needles(
    exact: BatchLogitsFn,
    int8: BatchLogitsFn,
    ids: Tensor,
    *,
    longest: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[KVNeedle, ...]:
    """Plant needles at all depths of contexts of ``longest`` tokens, half of it, a quarter and an eighth.

    Args:
        exact: the model with keys and values as it computes them.
        int8: the same model with its cache in 8 bits.
        ids: [tokens] int64, the text that stretches and needles are drawn from; longer than ``longest``.
        longest: tokens of the longest context.
        seed: of the stretches and needles.
        progress: told after every length and depth (how many are done, how many there are).

    Returns:
        One row per length and depth; lengths below ``SHORTEST`` are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = [length for power in reversed(range(_LENGTHS)) if (length := longest >> power) >= SHORTEST]
    rows: list[KVNeedle] = []
    for length in lengths:
        trials = [_trial(ids, length, generator) for _ in range(TRIALS)]
        answers = torch.stack([trial.answer for trial in trials])
        absent = _ask(exact, [_context(trial, None) for trial in trials], answers)
        for depth in DEPTHS:
            contexts = [_context(trial, depth) for trial in trials]
            plain, ours = _ask(exact, contexts, answers), _ask(int8, contexts, answers)
            rows.append(
                KVNeedle(
                    length_tokens=length,
                    depth_percent=depth,
                    trials=TRIALS,
                    absent=_recall(absent, answers),
                    exact=_recall(plain, answers),
                    int8=_recall(ours, answers),
                    agreement=(plain.first == ours.first).double().mean().item(),
                )
            )
            progress(len(rows), len(lengths) * len(DEPTHS))
    return tuple(rows)


def _trial(ids: Tensor, length: int, generator: torch.Generator) -> _Trial:
    """A random stretch of the text, and a needle cut out of another place of it."""
    size = length - CUE - (ANSWER - 1)
    place = int(torch.randint(ids.numel() - CUE - ANSWER + 1, (), generator=generator))
    needle, rest = ids[place : place + CUE + ANSWER], torch.cat([ids[:place], ids[place + CUE + ANSWER :]])
    begin = int(torch.randint(rest.numel() - size + 1, (), generator=generator))
    return _Trial(rest[begin : begin + size], needle[:CUE], needle[CUE:])


def _context(trial: _Trial, depth: int | None) -> Tensor:
    """What is fed, of one length for all depths: the answer's last token is only predicted. None: no needle."""
    text, needle = trial.text, trial.text[:0]
    if depth is not None:
        needle = torch.cat([trial.cue, trial.answer])
        text = text[: len(text) - len(needle)]
    place = len(text) * (0 if depth is None else depth) // 100
    return torch.cat([text[:place], needle, text[place:], trial.cue, trial.answer[:-1]])


def _ask(model: BatchLogitsFn, contexts: list[Tensor], answers: Tensor) -> _Found:
    with torch.inference_mode():
        log_probs = torch.log_softmax(model(torch.stack(contexts), ANSWER).float(), dim=-1).cpu()
    return _Found(log_probs.gather(-1, answers[..., None])[..., 0], log_probs.argmax(-1))


def _recall(found: _Found, answers: Tensor) -> KVRecall:
    return KVRecall(
        logprob_mean_nats=found.logprob.double().mean().item(),
        hit_rate=(found.first == answers).double().mean().item(),
    )
