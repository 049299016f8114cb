"""Questions as token ids: what a model reads, what of it is a choice, and what goes first where there is no room.

Nothing here runs a model: that is runner.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from qquant.chat_templates import apply_template
from qquant.errors import BadDataError, BadModelError
from qquant.tasks.items import Question


class Prompt(NamedTuple):
    """A question as token ids."""

    ids: list[int]
    """Up to where the model goes on."""
    inputs: list[list[int]]
    """For each choice all that the model reads: the prompt and the choice but for its last token."""
    continuations: list[list[int]]
    """For each choice the tokens whose likelihoods are added up, at least one; they end one after ``inputs``."""
    truncated: bool
    new_tokens: int
    """That may be generated at most; 0 with choices."""


def room_of(model: Any) -> int | None:
    """Tokens, prompt and answer together, that a model was made for; None where its config does not say."""
    config = model.config.get_text_config()
    named = [getattr(config, name, None) for name in ("max_position_embeddings", "seq_length", "n_positions")]
    return max((int(number) for number in named if number), default=None)


def prompt_of(tokenizer: Any, question: Question, room: int | None) -> Prompt:
    """A question as token ids, with as many of its worked examples as there is room for, the last ones.

    With no example left and still too long, the oldest tokens go. An answer may take half of the room at least.

    Args:
        tokenizer: the model's.
        question: what is asked.
        room: see ``room_of``.
    """
    drops = range(_examples(question) + 1)
    if room is None:
        return _encoded(tokenizer, question, 0, question.max_new_tokens)
    # A prompt is given what the answer leaves, and half of the room where the answer would leave less.
    limit = max(room - question.max_new_tokens, (room + 1) // 2)
    for dropped in drops:
        prompt = _encoded(tokenizer, question, dropped, min(question.max_new_tokens, room - limit))
        over = max(map(len, prompt.inputs), default=len(prompt.ids)) - limit
        if over <= 0:
            return prompt
    if over >= len(prompt.ids):
        raise BadDataError(
            f"the choices of {question.id} are longer than the model's room, {room} tokens; leave it out"
        )
    cut = [ids[over:] for ids in prompt.inputs]
    return prompt._replace(ids=prompt.ids[over:], inputs=cut, truncated=True)


def _examples(question: Question) -> int:
    """Worked examples that could be dropped."""
    if question.messages:
        return sum(turn["role"] == "user" for turn in question.messages) - 1
    return len(question.shots)


def _encoded(tokenizer: Any, question: Question, dropped: int, new_tokens: int) -> Prompt:
    if question.messages:
        ids = _chat_ids(tokenizer, question, dropped)
        tails = [_ids(tokenizer, choice) for choice in question.choices]
        wholes = [ids + tail for tail in tails]
    else:
        text = question.heading + "".join(question.shots[dropped:]) + question.body
        first = _first_ids(tokenizer)
        # White space at the end belongs to the token of the word after it.
        kept = text.rstrip() if question.choices else text
        ids = first + _ids(tokenizer, kept)
        wholes = [first + _ids(tokenizer, text + choice) for choice in question.choices]
    if not ids:
        raise BadDataError(f"the prompt of {question.id} has no tokens; leave the item out")
    # Where a choice's beginning melts into the prompt's last token, all choices are scored from before that token.
    split = min((_common(ids, whole) for whole in wholes), default=len(ids))
    if any(len(whole) == split for whole in wholes) or not split:
        raise BadDataError(f"a choice of {question.id} has no tokens of its own behind the prompt; leave the item out")
    inputs, continuations = [whole[:-1] for whole in wholes], [whole[split:] for whole in wholes]
    return Prompt(ids, inputs, continuations, dropped > 0, new_tokens)


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return list(ids)


def _first_ids(tokenizer: Any) -> list[int]:
    """The token that a tokenizer puts before every text, if it has such a rule (Llama's has, Qwen's has not)."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    start = getattr(tokenizer, "bos_token_id", None)
    return [start] if start is not None and list(ids[:1]) == [start] else []


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(left), len(right)))


def _chat_ids(tokenizer: Any, question: Question, dropped: int) -> list[int]:
    """The chat template's ids of a question's messages without the oldest ``dropped`` examples."""
    system = [turn for turn in question.messages if turn["role"] == "system"]
    turns = [turn for turn in question.messages if turn["role"] != "system"][2 * dropped :]
    try:
        ids: list[int] = apply_template(
            tokenizer,
            [dict(turn) for turn in (*system, *turns)],
            add_generation_prompt=True,
            return_dict=False,
            sanitize_control_tokens=True,  # a message cannot begin or end a turn
            enable_thinking=False,  # templates that know it then ask for the answer at once
        )
    except BadModelError:
        raise
    except Exception as error:  # a template is a program of the model's folder: it may fail in any way
        reason = " ".join(str(error).split())[:200]
        raise BadModelError(f"the chat template refuses {question.id}: {reason}; use --style base") from error
    return list(ids)
