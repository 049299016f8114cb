"""Sample answers: what each model writes after the same prompts, token by token, and where it leaves the baseline.

Prompts, greedy continuations and their tokens as text live here; their record and its Markdown are answer_report.py's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qquant.answer_report import Answer, Answers, AnswerToken, ModelAnswer
from qquant.errors import BadDataError, NumericError, UsageError
from qquant.measure import StepFn, step_fn
from qquant.telling import OnProgress, unheard

_SHOWN_CHARACTERS = 600
"""Of a prompt's end: some hundred tokens; the record of a longer one would hold pages of text."""
_HALF_A_CHARACTER = "\ufffd"
"""What tokenizers decode bytes to that are not, or not yet, a character."""


def cut_prompts(ids: Tensor, *, count: int, prompt_tokens: int) -> tuple[Tensor, ...]:
    """Cut prompts out of a text at evenly spaced places that do not overlap, the first at its start.

    Args:
        ids: [tokens] int64, the text. Read, never written.
        count: prompts, at least 1.
        prompt_tokens: length of each, at least 1.

    Returns:
        ``count`` tensors [prompt_tokens] int64.

    Raises:
        UsageError: one of the counts is below 1.
        BadDataError: the text is too short for so many.
    """
    if min(count, prompt_tokens) < 1:
        raise UsageError(f"count and prompt_tokens must be at least 1, got {count} and {prompt_tokens}")
    if len(ids) < count * prompt_tokens:
        raise BadDataError(
            f"{count} prompts of {prompt_tokens} tokens need a text of {count * prompt_tokens} tokens, got {len(ids)}; "
            "ask for fewer or shorter ones, or give a longer text"
        )
    starts = [len(ids) * number // count for number in range(count)]
    return tuple(ids[start : start + prompt_tokens] for start in starts)


def sample_answers(
    models: Mapping[str, Any],
    tokenizer: Any,
    prompts: Sequence[Tensor],
    *,
    new_tokens: int,
    device: torch.device,
    on_progress: OnProgress = unheard,
) -> Answers:
    """Let every model continue every prompt greedily, one sequence at a time.

    Args:
        models: label -> transformers causal language model on ``device``; the first is the baseline.
        tokenizer: of all of them.
        prompts: [tokens] int64 each, at least 1 token; with the answer no longer than the models were made for.
        new_tokens: the most tokens of one answer; the model's end-of-text token ends it earlier and is its last.
        device: where the models are.
        on_progress: told after every answer.

    Raises:
        UsageError: no models, no prompts, an empty one, or ``new_tokens`` below 1.
        NumericError: a model's logits are not finite.
    """
    if not models or not prompts or not all(len(prompt) for prompt in prompts) or new_tokens < 1:
        raise UsageError(
            "sample answers need a model, a prompt, a token in each prompt and new_tokens of at least 1, got "
            f"{len(models)} models, prompts of {[len(prompt) for prompt in prompts]} tokens, new_tokens {new_tokens}"
        )
    samples: list[Answer] = []
    total = len(prompts) * len(models)
    for prompt in prompts:
        answers: dict[str, list[int]] = {}
        rows: list[ModelAnswer] = []
        for label, model in models.items():
            on_progress("sample answers", len(samples) * len(models) + len(rows), total)
            ends = _end_ids(model, tokenizer)
            ids, logprobs = _continue(step_fn(model), prompt.to(device), new_tokens, ends, label)
            answers[label] = ids
            pieces = _pieces(tokenizer, prompt.tolist(), ids)
            tokens = [AnswerToken(text=text, logprob_nats=value) for text, value in zip(pieces, logprobs, strict=True)]
            theirs = next(iter(answers.values()))
            rows.append(
                ModelAnswer(label=label, tokens=tuple(tokens), same_tokens=_same(theirs, ids) if rows else None)
            )
        samples.append(Answer(prompt=_shown(tokenizer, prompt), prompt_tokens=len(prompt), models=tuple(rows)))
    on_progress("sample answers", total, total)
    return Answers(new_tokens=new_tokens, samples=tuple(samples))


def _continue(
    step: StepFn, prompt: Tensor, new_tokens: int, ends: frozenset[int], label: str
) -> tuple[list[int], list[float]]:
    """The likeliest token again and again: ids, and ln p of each. Of equally likely ones the smallest id is taken."""
    ids: list[int] = []
    logprobs: list[float] = []
    with torch.inference_mode():
        logits, cache = step(prompt[None], None)
        while True:
            log_p = torch.log_softmax(logits[0].float(), dim=-1)
            best = log_p.argmax()
            if not bool(torch.isfinite(log_p.amin())):  # one bad logit makes some log-probability NaN or -inf
                raise NumericError(
                    f"{label} returned a logit that is not finite after {len(prompt) + len(ids)} tokens; the model "
                    "is damaged, or its dtype overflows: try bfloat16 or float32"
                )
            ids.append(int(best))
            logprobs.append(min(0.0, log_p[best].item()))
            if len(ids) == new_tokens or ids[-1] in ends:
                return ids, logprobs
            logits, cache = step(best.reshape(1, 1), cache)


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: the generation config's, the tokenizer's, and ChatML's end of a turn."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [*(named if isinstance(named, list) else [named]), getattr(tokenizer, "eos_token_id", None)]
    # A Qwen v1 tokenizer has no end-of-text token; its chat ends a turn by a stop word.
    found.append(getattr(tokenizer, "im_end_id", None))
    return frozenset(index for index in found if isinstance(index, int))


def _same(theirs: Sequence[int], ours: Sequence[int]) -> int:
    """Tokens before the first that differs, or that only one of the two answers has."""
    pairs = zip(theirs, ours, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(theirs), len(ours)))


def _pieces(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[str]:
    """What each token adds to the text of prompt and answer; a character belongs to the token that completes it.

    The pieces together are that text from where the prompt's own ends. The answer is not decoded alone, because some
    tokenizers leave out a space at the beginning.
    """
    whole = _text(tokenizer, [*prompt, *answer])
    ends: list[int] = []
    for count in range(len(answer) + 1):
        begun = _text(tokenizer, [*prompt, *answer[:count]]).rstrip(_HALF_A_CHARACTER)
        ends.append(max(_common_length(begun, whole), *ends[-1:], 0))
    ends[-1] = len(whole)
    return [whole[begin:end] for begin, end in itertools.pairwise(ends)]


def _common_length(one: str, other: str) -> int:
    """Characters before the first that differs."""
    if other.startswith(one):
        return len(one)
    return next(place for place, (a, b) in enumerate(zip(one, f"{other}\0", strict=False)) if a != b)


def _shown(tokenizer: Any, prompt: Tensor) -> str:
    """The end of a prompt; a character that it leaves unfinished is the answer's."""
    text = _text(tokenizer, prompt.tolist()).rstrip(_HALF_A_CHARACTER)
    return text if len(text) <= _SHOWN_CHARACTERS else f"…{text[-_SHOWN_CHARACTERS:]}"


def _text(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
