"""Text and chats to token ids: a text block by block, Qwen's ChatML, the tokenizer's own chat template.

The tokenizer is handed in. Reading files is text_sources.py; what is cut and drawn from the ids is calibrate.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qquant.chat_templates import apply_template
from qquant.errors import BadDataError, BadModelError
from qquant.models.qwen.vocabulary import DEFAULT_SYSTEM
from qquant.text_sources import Document, Kind, as_messages, as_text, blocks, one_line
from qquant.tokenizer_check import Tokenizer

_PLACE = "qquant puts the text here"
"""Stands for a text while the chat template is applied to it."""


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def as_wished(documents: Iterable[Document], tokenizer: Tokenizer, chat_template: bool | None) -> Iterator[Document]:
    """Make documents what they are to be coded as: texts, conversations or messages, never pairs.

    Args:
        documents: of one source.
        tokenizer: of the model.
        chat_template: True: all chats and pairs through the template; False: all of them as plain text; None: pairs
            through the template if there is one, and else as plain text, chats as they come.

    Raises:
        BadDataError: a turn that holds no text and is to become one.
    """
    for document in documents:
        if chat_template is False:
            yield as_text(document)
        elif chat_template:
            yield as_messages(document)
        elif document.kind == "pairs":
            yield as_messages(document) if has_template(tokenizer) else as_text(document)
        else:
            yield document


class Coder:
    """Turns documents of one kind into ids with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, kind: Kind, *, framed: bool = False) -> None:
        """Begin with a tokenizer.

        Args:
            tokenizer: of the model.
            kind: of all documents; pairs are messages, or text, by now.
            framed: every sample of text is put into the chat template, as a user's message that is to be answered.
        """
        self._tokenizer = tokenizer
        self._ignored = self._mark("<|endoftext|>") if kind == "conversations" else None
        self._before, self._after = self._frame_of_text() if framed and kind == "text" else ([], [])
        self._framed = bool(self._before or self._after)
        self.templated = kind == "messages" or self._framed
        """Whether the chat template is used."""

    @property
    def frame_tokens(self) -> int:
        """Tokens that the chat template puts around a sample of text; 0: there is none."""
        return len(self._before) + len(self._after)

    def framed(self, ids: Tensor) -> Tensor:
        """A sample's ids [T] with what the chat template puts around them."""
        if not self._framed:
            return ids
        return torch.cat([torch.tensor(self._before, dtype=ids.dtype), ids, torch.tensor(self._after, dtype=ids.dtype)])

    def counted(self, ids: Tensor) -> Tensor:
        """Tell which ids count in the Hessian: all but the end-of-text id of Qwen conversations."""
        return torch.ones_like(ids, dtype=torch.bool) if self._ignored is None else ids != self._ignored

    def join(self, documents: Iterable[Document]) -> Iterator[list[int]]:
        """Yield the ids of all documents; texts are parted by the end-of-text id, chats end with their own marks."""
        eos = getattr(self._tokenizer, "eos_token_id", None)
        for index, document in enumerate(documents):
            if index and document.kind == "text" and eos is not None:
                yield [eos]
            yield from self.parts(document)

    def parts(self, document: Document) -> Iterator[list[int]]:
        """Yield the ids of one document, a text block by block."""
        if document.kind == "conversations":
            yield self._chatml(document)
        elif document.kind == "messages":
            yield self._templated(document)
        else:
            yield [] if self._framed else self._bos
            for block in blocks(document.value):
                yield self._encode(block)

    @cached_property
    def _bos(self) -> list[int]:
        """The begin-of-text id, if this tokenizer starts a text with it."""
        bos = getattr(self._tokenizer, "bos_token_id", None)
        empty = list(self._tokenizer.encode("", add_special_tokens=True, verbose=False))
        return [bos] if bos is not None and empty[:1] == [bos] else []

    def _encode(self, text: str) -> list[int]:
        # verbose: no "longer than the model's maximum"; the ids are cut to size afterwards.
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _mark(self, token: str) -> int | None:
        """The id of a special token, or None if the tokenizer knows it only as ordinary text."""
        ids = self._encode(token)
        unknown = ids[:1] == [getattr(self._tokenizer, "unk_token_id", None)]
        if len(ids) != 1 or (unknown and str(getattr(self._tokenizer, "unk_token", "")) != token):
            return None
        return ids[0]

    @cached_property
    def _frame(self) -> tuple[int, int, list[int]] | None:
        """The ids of turn start, turn end and line break."""
        start, end = self._mark("<|im_start|>"), self._mark("<|im_end|>")
        return None if start is None or end is None else (start, end, self._encode("\n"))

    def _chatml(self, document: Document) -> list[int]:
        """Lay out a conversation as Qwen does for its own calibration: every turn ends with a line break.

        Not ``Vocabulary.encode_chat``: this serves any tokenizer that has the two marks, Qwen2's among them.

        Source: QwenLM/Qwen, run_gptq.py.
        """
        if self._frame is None:
            raise BadDataError(
                f"{document.where}: Qwen conversations need a tokenizer with <|im_start|> and <|im_end|>, and this one "
                "lacks them; give plain text, or 'messages' if the tokenizer has a chat template"
            )
        start, end, newline = self._frame
        turns = [("system", DEFAULT_SYSTEM), *((turn["from"], turn["value"]) for turn in document.value)]
        if turns[1][0] != "user":
            del turns[1]
        ids: list[int] = []
        for role, value in turns:
            ids += [start, *self._encode(role), *newline, *self._encode(value), end, *newline]
        return ids

    def _frame_of_text(self) -> tuple[list[int], list[int]]:
        """The ids before and after a user's message and the beginning of its answer."""
        messages = [{"role": "user", "content": _PLACE}]
        shown = self._applied(messages, "plain text", tokenize=False, add_generation_prompt=True)
        before, found, after = str(shown).partition(_PLACE)
        if not found or _PLACE in after:
            raise BadDataError(
                "text can be put into a chat template that shows a user's message once, and this model's does not; "
                "leave out --chat-template"
            )
        return self._encode(before), self._encode(after)

    def _templated(self, document: Document) -> list[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise BadDataError(
                f"{document.where}: 'messages' need a tokenizer with a chat template, and this one has none; give "
                "plain text, or Qwen's 'conversations' if the tokenizer has <|im_start|>"
            )
        options = {"return_dict": False, "tokenizer_kwargs": {"verbose": False}}
        return list(self._applied(document.value, document.where, tokenize=True, **options))

    def _applied(self, messages: Any, where: str, **options: Any) -> Any:
        try:
            return apply_template(self._tokenizer, messages, **options)
        except BadModelError:
            raise
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise BadDataError(
                f"{where}: the chat template refuses the messages: {one_line(error)}; change or drop them"
            ) from error
