"""A conversation with the original Qwen (v1) as ids: the prompt that goes in, and the answer in what comes out.

Pure functions of a tokenizer and text. What generates is chat.py, text to ids tokenization.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from qquant.errors import UsageError
from qquant.models.qwen.vocabulary import SPECIAL_TOKENS, Vocabulary

ChatFormat = Literal["chatml", "raw"]
History = Sequence[tuple[str, str]]
"""Turns, oldest first: (query, answer)."""

MAX_WINDOW_SIZE = 6144
"""Tokens of system prompt and history, where no generation config says another number."""


def make_context(
    tokenizer: Any,
    query: str,
    history: History | None = None,
    system: str = "",
    max_window_size: int = MAX_WINDOW_SIZE,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """The prompt that asks ``query`` after ``history``, as text and as ids.

    In ChatML, roles and contents are encoded one by one with special tokens as ordinary text, so that no message can
    end its turn or begin another. Turns are taken newest first, as long as system prompt and turns together stay
    *below* ``max_window_size`` tokens; the first that does not fit ends that. The query and the header of the answer
    are not counted, and the system prompt is never cut.

    Args:
        tokenizer: a ``QWenTokenizer``.
        query: what the user says now.
        history: earlier turns. Read, never written.
        system: the system prompt; "" is an empty one.
        max_window_size: tokens.
        chat_format: "chatml", or "raw": the query alone, with special tokens in it parsed, no history and no system.

    Returns:
        raw_text: the prompt as it reads, contents verbatim.
        context_tokens: its ids.

    Raises:
        UsageError: another format, a query, system prompt or turn that is not text, or a tokenizer of another family.

    Source: Qwen's README, "Batch inference"; the rule of the window as its code has it.
    """
    if _known(chat_format) == "chatml":
        text, ids, _ = windowed_context(tokenizer, query, history, system, max_window_size)
        return text, ids
    _require_texts(tokenizer, query, system)
    return query, tokenizer.encode(query)


def windowed_context(
    tokenizer: Any, query: str, history: History | None, system: str, max_window_size: int
) -> tuple[str, list[int], int]:
    """The ChatML prompt of ``make_context``, whose arguments and errors these are, and how many turns are in it.

    Returns:
        raw_text, context_tokens, and the number of turns kept, the newest ones.
    """
    _require_texts(tokenizer, query, system)
    turns = checked_turns(history)
    line_feed = _plain_ids(tokenizer, "\n")
    system_text, system_ids = _message(tokenizer, "system", system)
    kept, kept_text, kept_ids = 0, "", list[int]()
    for asked, answered in reversed(turns):
        user_text, user_ids = _message(tokenizer, "user", asked)
        answer_text, answer_ids = _message(tokenizer, "assistant", answered)
        turn = [*line_feed, *user_ids, *line_feed, *answer_ids]
        if len(system_ids) + len(turn) + len(kept_ids) >= max_window_size:
            break
        kept, kept_text, kept_ids = kept + 1, f"\n{user_text}\n{answer_text}{kept_text}", turn + kept_ids
    query_text, query_ids = _message(tokenizer, "user", query)
    header_text, header_ids = _message(tokenizer, "assistant", None)
    return (
        f"{system_text}{kept_text}\n{query_text}\n{header_text}",
        [*system_ids, *kept_ids, *line_feed, *query_ids, *line_feed, *header_ids],
        kept,
    )


def get_stop_words_ids(chat_format: str, tokenizer: Any) -> list[list[int]]:
    """The sequences of ids that end an answer: the markers of ChatML, or "Human:" and the end of the document in raw.

    Raises:
        UsageError: another format.
    """
    require_own(tokenizer)
    if _known(chat_format) == "raw":
        return [_plain_ids(tokenizer, "Human:"), [tokenizer.eod_id]]
    return [[tokenizer.im_end_id], [tokenizer.im_start_id]]


def decode_tokens(
    tokens: Tensor | Sequence[int],
    tokenizer: Any,
    raw_text_len: int,
    context_length: int,
    chat_format: str,
    verbose: bool = False,
    return_end_reason: bool = False,
    errors: str = "replace",
) -> str | tuple[str, str]:
    """The answer in a generated sequence: what follows the prompt, up to the first end marker, stripped.

    In ChatML ``<|im_start|>``, ``<|im_end|>`` and the end of the document end it, in raw the end of the document. An
    answer without any of them was cut and is whole: no token of it is dropped. The prompt is counted in tokens, so text
    that decodes to other characters than went in shifts nothing.

    Args:
        tokens: [L] prompt and answer without left padding. Read, never written.
        tokenizer: a ``QWenTokenizer``.
        raw_text_len: characters of the prompt. Not used; callers of the published function pass it.
        context_length: tokens of the prompt.
        chat_format: "chatml" or "raw".
        verbose: not used either; nothing is printed here.
        return_end_reason: also return why it ended.
        errors: what becomes of bytes that are no UTF-8: "replace", "ignore" or "strict".

    Returns:
        The text; with ``return_end_reason`` also "Gen '<|im_end|>'" or another marker, or "Gen length N" for an answer
        of N tokens without one.

    Raises:
        UsageError: another format.
    """
    generated = (tokens.tolist() if isinstance(tokens, Tensor) else list(tokens))[context_length:]
    text, reason = split_answer(generated, tokenizer, chat_format, errors)
    return (text, reason) if return_end_reason else text


def split_answer(
    generated: Sequence[int], tokenizer: Any, chat_format: str, errors: str = "replace"
) -> tuple[str, str]:
    """What ``decode_tokens`` returns, text and reason, of the generated ids alone."""
    markers = {tokenizer.eod_id}
    if _known(chat_format) == "chatml":
        markers |= {tokenizer.im_start_id, tokenizer.im_end_id}
    reason = f"Gen length {len(generated)}"
    for position, token in enumerate(generated):
        if token in markers:
            generated, reason = generated[:position], f"Gen {tokenizer.decode([token])!r}"
            break
    return tokenizer.decode(generated, errors=errors).strip(), reason


def checked_turns(history: History | None) -> list[tuple[str, str]]:
    """A copy of a history; raises UsageError where a turn is not two texts."""
    turns = [tuple(turn) if isinstance(turn, list | tuple) else (turn,) for turn in history or ()]
    for turn in turns:
        if len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise UsageError(f"a history is a list of (query, answer), two texts each, got a turn {turn!r:.100}")
    return [(asked, answered) for asked, answered in turns]


def _message(tokenizer: Any, role: str, content: str | None) -> tuple[str, list[int]]:
    """One message as text and ids, from its start marker to its end marker; for content None its header only."""
    _, start, end = SPECIAL_TOKENS[:3]
    text = f"{start}{role}\n" + ("" if content is None else f"{content}{end}")
    return text, tokenizer.vocabulary.encode_turn(role, content)


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    """The ids of text in which nothing is a special token."""
    ids: list[int] = tokenizer.vocabulary.encode(text, ())
    return ids


def _known(chat_format: str) -> str:
    if chat_format not in get_args(ChatFormat):
        raise UsageError(f"chat_format must be one of {', '.join(get_args(ChatFormat))}, got {chat_format!r}")
    return chat_format


def _require_texts(tokenizer: Any, query: object, system: object) -> None:
    require_own(tokenizer)
    if not isinstance(query, str) or not isinstance(system, str):
        raise UsageError(f"query and system must be text, got {type(query).__name__} and {type(system).__name__}")


def require_own(tokenizer: Any) -> None:
    """Refuse the tokenizer of another family, or of the folder's own code; raises UsageError."""
    if not isinstance(getattr(tokenizer, "vocabulary", None), Vocabulary):
        raise UsageError(
            f"a Qwen v1 chat needs a QWenTokenizer, got {type(tokenizer).__name__}; load it from the model's "
            "folder with AutoTokenizer after qquant.register()"
        )
