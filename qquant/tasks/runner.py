"""Questions put to a model in batches: how likely each choice is, or what it generates greedily.

Any transformers model and tokenizer; text becomes ids in prompts.py. Wording and judging are the tasks' own.

A batch is padded on the right to score choices, where what follows a token cannot reach it, and on the left to
generate, both under an attention mask. A reply therefore does not depend on what else is in its batch, but for
rounding: other shapes add the same numbers in another order. Batches are cut from all questions, longest first, the
same every time.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from qquant.errors import BadModelError, NumericError
from qquant.tasks.items import Question
from qquant.tasks.prompts import Prompt, prompt_of, room_of

_MARGIN = 8
"""Tokens looked at beyond those that a stop may span: decoders treat the first ones of a text in their own way."""


@dataclass(frozen=True)
class Reply:
    """What a model made of one question."""

    logprobs_nats: tuple[float, ...] | None
    """Log-likelihood of each choice; None where text was generated."""
    output: str | None
    """What was generated, up to the first stop; None where choices were scored."""
    truncated: bool
    """The prompt lost worked examples, or its oldest tokens, for want of room."""


def batches(questions: Sequence[Question], batch_size: int) -> list[list[Question]]:
    """Cut questions into batches of like length, longest first, so that a batch too large shows at once.

    Choices and generation never share a batch. The same questions give the same batches, whatever was answered before.
    """
    ordered = sorted(questions, key=lambda question: (bool(question.choices), -_length(question)))
    result: list[list[Question]] = []
    for question in ordered:
        last = result[-1] if result else []
        if last and len(last) < batch_size and bool(last[0].choices) == bool(question.choices):
            last.append(question)
        else:
            result.append([question])
    return result


def answer(model: Any, tokenizer: Any, questions: Sequence[Question], *, batch_size: int) -> list[Reply]:
    """Put one batch of questions to a model.

    Args:
        model: a causal language model, in eval mode, on its device. Its generation config is put aside meanwhile.
        tokenizer: its own, with a chat template for questions that are messages.
        questions: all with choices, or all without.
        batch_size: rows that go through the model together; a question whose choices are several tokens long has one
            row for each of them.

    Returns:
        A reply per question, in their order.

    Raises:
        BadDataError: a prompt or a choice has no tokens, or the choices alone are longer than the model's room.
        BadModelError: the chat template refuses the messages, or a prompt has an id that the model has no row for.
        NumericError: logits that are not finite.
    """
    room = room_of(model)
    prompts = [prompt_of(tokenizer, question, room) for question in questions]
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(max(max(ids) for ids in (prompt.ids, *prompt.inputs, *prompt.continuations)) for prompt in prompts)
    if highest >= rows:
        raise BadModelError(
            f"every token of a prompt needs a row of the model, one has the id {highest} and the model {rows} rows; "
            "take the tokenizer's files from the model's own source"
        )
    with torch.inference_mode():
        if questions[0].choices:
            return _scored(model, prompts, batch_size)
        return _generated(model, tokenizer, questions, prompts)


def _length(question: Question) -> int:
    """Characters, which cost nothing to count and follow the tokens."""
    parts = (question.heading, *question.shots, question.body, *(turn["content"] for turn in question.messages))
    return sum(map(len, parts))


def _scored(model: Any, prompts: Sequence[Prompt], batch_size: int) -> list[Reply]:
    """Log-likelihoods; choices that share their input, as single tokens do, share a row of the model."""
    wanted: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for number, prompt in enumerate(prompts):
        for choice, ids in enumerate(prompt.inputs):
            wanted.setdefault(tuple(ids), []).append((number, choice))
    found: dict[tuple[int, int], float] = {}
    rows = list(wanted)
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        tails = [[prompts[number].continuations[choice] for number, choice in wanted[row]] for row in chunk]
        for row, sums in zip(chunk, _row_logprobs(model, chunk, tails), strict=True):
            found.update(zip(wanted[row], sums, strict=True))
    return [
        Reply(tuple(found[number, choice] for choice in range(len(prompt.inputs))), None, prompt.truncated)
        for number, prompt in enumerate(prompts)
    ]


def _row_logprobs(
    model: Any, rows: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """For each row the log-likelihood in nats of each of its tails, which end one token after the row does."""
    device, longest = model.device, max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    spans = [max(map(len, group)) for group in tails]
    places = sorted({at for row, span in zip(rows, spans, strict=True) for at in range(len(row) - span, len(row))})
    options: dict[str, Any] = {"attention_mask": mask, "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # Logits of a whole batch of prompts would be the largest tensor by far, and only these few are read.
        logits = model(ids, **options, logits_to_keep=torch.tensor(places, device=device)).logits
    else:
        logits = model(ids, **options).logits[:, places]
    column = {place: index for index, place in enumerate(places)}
    result = []
    for number, (row, group, span) in enumerate(zip(rows, tails, spans, strict=True)):
        first = column[len(row) - span]
        logprobs = logits[number, first : first + span].float().log_softmax(-1)  # [span, vocabulary]
        sums = [_tail_logprob(logprobs[span - len(tail) :], tail) for tail in group]
        if not all(map(math.isfinite, sums)):
            raise NumericError("the model's logits must be finite to compare choices; try --dtype float32")
        result.append(sums)
    return result


def _tail_logprob(logprobs: Tensor, tail: Sequence[int]) -> float:
    index = torch.tensor(tail, device=logprobs.device)[:, None]
    return float(logprobs.gather(1, index).double().sum())


class _Stops(StoppingCriteria):
    """Ends a row of a generation once the text behind its prompt holds one of its stops."""

    def __init__(self, tokenizer: Any, stops: Sequence[Sequence[str]], prompt_length: int) -> None:
        self._tokenizer, self._stops, self._start = tokenizer, stops, prompt_length
        # A token holds a byte at least.
        self._span = max((len(stop.encode()) for row in stops for stop in row), default=0) + _MARGIN

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """[rows] bool."""
        tails = input_ids[:, max(self._start, input_ids.shape[1] - self._span) :].tolist()
        texts = [_text(self._tokenizer, tail) if stops else "" for tail, stops in zip(tails, self._stops, strict=True)]
        done = [any(stop in text for stop in stops) for text, stops in zip(texts, self._stops, strict=True)]
        return torch.tensor(done, device=input_ids.device)


class _Finite(LogitsProcessor):
    """Ends a generation whose logits are not finite: greedily decoded, NaN would be a token like any other."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """``scores`` as they are."""
        if not torch.isfinite(scores.amax(-1)).all():  # NaN where any of them is; -inf marks what is not to be chosen
            raise NumericError("the model's logits must be finite to choose a token; try --dtype float32")
        return scores


def _generated(model: Any, tokenizer: Any, questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[Reply]:
    """Greedy generation, each row up to its own stop and length."""
    ends = _end_ids(model, tokenizer, chat=bool(questions[0].messages))
    # A stop that is a special token would never be seen in the text, which is decoded without them.
    special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    added = getattr(tokenizer, "added_tokens_decoder", {})  # some are special only there
    special |= {str(token): number for number, token in added.items() if token.special}
    ends |= {special[stop] for stop in questions[0].stops if stop in special}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = torch.tensor([[pad] * (longest - len(p.ids)) + p.ids for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=model.device)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(prompt.new_tokens for prompt in prompts),
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    stops = _Stops(tokenizer, [question.stops for question in questions], longest)
    with _own_settings_aside(model):
        rows = model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stops]),
            logits_processor=LogitsProcessorList([_Finite()]),
        )
    replies = []
    for question, prompt, row in zip(questions, prompts, rows[:, longest:].tolist(), strict=True):
        new = row[: prompt.new_tokens]
        new = new[: next((at for at, token in enumerate(new) if token in ends), len(new))]
        text = _behind(tokenizer, prompt.ids[-1], new)
        cut = min((at for stop in question.stops if (at := text.find(stop)) >= 0), default=len(text))
        replies.append(Reply(None, text[:cut], prompt.truncated))
    return replies


def _end_ids(model: Any, tokenizer: Any, *, chat: bool) -> set[int]:
    """Tokens that end an answer: the model's own, else or in a chat also the tokenizer's, and Qwen v1's of a turn."""
    named = model.generation_config.eos_token_id
    listed = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(token, int) for token in listed):
        raise BadModelError(
            f"eos_token_id in generation_config.json must be an id or a list of ids, got {named!r}; mend it"
        )
    ends = set(listed)
    if tokenizer.eos_token_id is not None and (chat or not ends):
        ends.add(tokenizer.eos_token_id)
    if hasattr(tokenizer, "im_start_id"):
        ends |= {tokenizer.eod_id} | ({tokenizer.im_start_id, tokenizer.im_end_id} if chat else set())
    return ends


@contextmanager
def _own_settings_aside(model: Any) -> Iterator[None]:
    """Without the model's generation config, which would add its repetition penalty and the like to a greedy answer."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _behind(tokenizer: Any, last: int, new: Sequence[int]) -> str:
    """The text of new tokens as it follows the prompt's last one; some decoders drop a space that begins a text."""
    before, whole = _text(tokenizer, [last]), _text(tokenizer, [last, *new])
    return whole[len(before) :] if whole.startswith(before) else _text(tokenizer, new)
