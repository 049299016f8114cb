"""The vocabulary of the original Qwen (v1) over tiktoken: rank files, special tokens, text and conversations to ids.

What transformers wants of a tokenizer (batches, padding, files of a folder, chat templates) is in tokenization.py.
Which turns of a history still fit into a prompt, and where a generated answer ends, is context.py's.
"""

from __future__ import annotations

import binascii
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

from tiktoken import Encoding

from qquant.errors import BadModelError, UsageError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
"""In the order of their ids, the first of which follows the last rank."""

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is cut before its bytes are merged: the pattern of tiktoken's cl100k, but each digit on its own."""

MAX_SPACES = 500_000
"""Longest run of white space given to tiktoken at once. For ``\\s+(?!\\S)`` its regex engine remembers one entry per
character of a run; it holds 1,000,000 and then panics (tiktoken 0.14: 999,998 pass). Half of that leaves room. Nothing
else in the pattern fills that stack, and shorter runs are never cut: their ids are tiktoken's own."""
_LONG_RUN = re.compile(rf"(?<!\s)\s{{{MAX_SPACES + 1},}}")

_NO_TOKEN = b"\xff"
"""What an id without a token decodes to: a byte that is never part of UTF-8, so that ``errors`` decides about it."""

DEFAULT_SYSTEM = "You are a helpful assistant."
"""The system prompt of Qwen's chat models, and of its calibration, where none is given."""

SpecialNames = Literal["all"] | Collection[str]

_ALL_SPECIAL = frozenset(SPECIAL_TOKENS)
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
_MARK = "\udfff"
"""Breaks up a special token in a message while a template is rendered. A lone surrogate is in no text that has an
encoding; tiktoken reads one as U+FFFD."""


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """The tokens of a rank file and their ranks, in the file's order.

    Args:
        path: a file with one ``base64(token bytes) SPACE rank`` per line.

    Raises:
        BadModelError: the file cannot be read, a line has another form, or a token appears twice.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise BadModelError(f"the vocabulary {path} must be a readable file: {error.strerror}") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        try:
            encoded, rank = line.split(b" ")
            token = binascii.a2b_base64(encoded, strict_mode=True)
        except ValueError:
            token, rank = b"", b""
        # 9 digits: tiktoken's ids are 32 bits wide.
        if not token or not rank.isdigit() or len(rank) > 9:
            raise BadModelError(
                f"a line of a rank file is base64(token), one space and a rank: line {number} of {path} is "
                f"{line[:60]!r}; fetch the file again"
            )
        ranks[token] = int(rank)
        if len(ranks) != number:
            raise BadModelError(f"a rank file names a token once: line {number} of {path} repeats {token!r}; fix it")
    return ranks


def rank_file(ranks: Iterable[tuple[bytes, int]]) -> bytes:
    """The rank file that ``read_ranks`` reads back as these tokens and ranks."""
    return b"".join(b"%b %d\n" % (binascii.b2a_base64(token, newline=False), rank) for token, rank in ranks)


class Vocabulary:
    """Ranks, the special tokens behind them, and perhaps extra ranks behind those. Never changes; threads may share it.

    Args:
        ranks: rank file of the vocabulary. Any number of ranks will do; Qwen's own has 151643.
        extra: rank file of tokens to add, with ids from the one after ``<|extra_204|>`` on; ids may be left out.

    Raises:
        BadModelError: a file is missing or malformed, a rank or a single byte is missing, or an extra token is not new.
    """

    def __init__(self, ranks: str | Path, extra: str | Path | None = None) -> None:
        self.ranks = read_ranks(ranks)
        """Token bytes -> id of the vocabulary proper: 0, 1, 2, ..."""
        _require_whole(self.ranks, ranks)
        self.special = {name: len(self.ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        """Name -> id of the 208 special tokens."""
        self.extra_ranks = {} if extra is None else read_ranks(extra)
        """Token bytes -> id of the tokens added."""
        if extra is not None:
            _require_new(self.extra_ranks, extra, self.ranks, first=len(self.ranks) + len(self.special))
        self.encoding = Encoding(
            "Qwen", pat_str=PATTERN, mergeable_ranks=self.ranks | self.extra_ranks, special_tokens=self.special
        )
        """tiktoken's view of all of it."""
        self._special_names = {index: name for name, index in self.special.items()}
        self._extra_ids = frozenset(self.extra_ranks.values())

    def __len__(self) -> int:
        """One more than the largest id."""
        return self.encoding.n_vocab

    def id_of(self, token: str | bytes) -> int | None:
        """Id of a token, given as bytes, as a special token's name or as text that is one token; else None."""
        if isinstance(token, str):
            if token in self.special:
                return self.special[token]
            token = token.encode("utf-8", "replace")
        return self.ranks.get(token, self.extra_ranks.get(token))

    def token_of(self, index: int) -> str | bytes:
        """Token of an id: the name of a special one, else bytes.

        Raises:
            UsageError: the id has no token, like the rows that a model is padded with.
        """
        if index in self._special_names:
            return self._special_names[index]
        if not self._has_token(index):
            raise UsageError(f"an id must have a token, {index} has none; the last one here is {len(self) - 1}")
        return self.encoding.decode_single_token_bytes(index)

    def encode(self, text: str, allowed_special: SpecialNames, disallowed_special: SpecialNames = ()) -> list[int]:
        """The ids of a text, which is brought to NFC first.

        Args:
            text: any text.
            allowed_special: special tokens that are parsed where the text spells them. With an empty set a text cannot
                inject one: what it spells is encoded as ordinary text.
            disallowed_special: texts that must not appear; "all" for every special token that is not allowed.

        Raises:
            UsageError: a disallowed text appears, or an allowed special token is unknown.
        """
        text = unicodedata.normalize("NFC", text)
        allowed = _ALL_SPECIAL if allowed_special == "all" else frozenset(allowed_special)
        if not allowed <= _ALL_SPECIAL:
            unknown = sorted(allowed - _ALL_SPECIAL)
            raise UsageError(
                f'allowed_special is "all" or some of the special tokens, got {unknown}; correct the names'
            )
        for name in _ALL_SPECIAL - allowed if disallowed_special == "all" else disallowed_special:
            if name in text:
                raise UsageError(
                    f"the text must not hold a disallowed special token, it holds {name}; remove it, or leave it out "
                    "of disallowed_special to encode it as ordinary text"
                )
        ids: list[int] = []
        for part in _tractable(text):
            # tiktoken copies the set at every call, which costs more than a short text; all names begin like this.
            if allowed and "<|" in part:
                ids += self.encoding.encode(part, allowed_special=allowed, disallowed_special=())
            else:
                ids += self.encoding.encode_ordinary(part)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> bytes:
        """The bytes of ids, which need not be UTF-8.

        Args:
            ids: 0 or more. One without a token counts as a byte that is not UTF-8.
            skip_special: leave out special tokens and ids without a token.

        Raises:
            UsageError: an id is negative.
        """
        if len(ids) and min(ids) < 0:
            raise UsageError(f"ids are 0 or more, got {min(ids)}; where -100 masks a label, take it out first")
        if skip_special:
            ids = [i for i in ids if i < len(self.ranks) or i in self._extra_ids]
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError):  # an id without a token, or one of more than 32 bits
            single = self.encoding.decode_single_token_bytes
            return b"".join(single(i) if self._has_token(i) else _NO_TOKEN for i in ids)

    def _has_token(self, index: int) -> bool:
        return 0 <= index < len(self.ranks) + len(self.special) or index in self._extra_ids

    def encode_turn(self, role: str, content: str | None, allowed_special: SpecialNames = ()) -> list[int]:
        """The ChatML ids of one message: ``<|im_start|>role``, line feed, ``content<|im_end|>``.

        Role and content are encoded each on its own and as ordinary text, so a message cannot inject a turn.

        Args:
            role: "system", "user" or "assistant".
            content: what is said; None for the header alone, up to where content would begin.
            allowed_special: special tokens that are parsed in the content.
        """
        start, end = (self.special[name] for name in SPECIAL_TOKENS[1:3])
        header = [start, *self.encode(role, ()), *self.encode("\n", ())]
        return header if content is None else [*header, *self.encode(content, allowed_special), end]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        allowed_special: SpecialNames = (),
        header: bool = False,
        open_end: bool = False,
    ) -> list[int]:
        """The ChatML ids of a conversation: ``encode_turn`` of each message, and a line feed after each.

        A default system message goes first where the conversation brings none.

        Args:
            messages: each with ``role`` and ``content``.
            allowed_special: special tokens that are parsed in contents.
            header: end with the header of the assistant's turn.
            open_end: leave the last message without its end.

        Raises:
            UsageError: there is no message, or one has no role or content of text.
        """
        require_text(messages)
        line_feed = self.encode("\n", ())
        turns = [(message["role"], message["content"]) for message in messages]
        if turns[0][0] != "system":
            turns.insert(0, ("system", DEFAULT_SYSTEM))
        ids = []
        for role, content in turns:
            ids += [*self.encode_turn(role, content, allowed_special), *line_feed]
        if open_end:
            del ids[-1 - len(line_feed) :]
        return [*ids, *self.encode_turn("assistant", None)] if header else ids

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of a text rendered from ``defused`` messages: the special tokens left in it are the template's."""
        ids = []
        for part in _SPECIAL.split(text):
            ids += [self.special[part]] if part in self.special else self.encode(part.replace(_MARK, ""), ())
        return ids


def defused(value: object) -> object:
    """A copy of nested lists and dicts in which no string spells a special token: a mark breaks each up."""
    if isinstance(value, str):
        return _SPECIAL.sub(lambda match: match[0][0] + _MARK + match[0][1:], value.replace(_MARK, "\ufffd"))
    if isinstance(value, Mapping):
        return {key: defused(item) for key, item in value.items()}
    return [defused(item) for item in value] if isinstance(value, list | tuple) else value


def require_text(messages: Sequence[object]) -> None:
    """Refuse a conversation that is not one or more messages whose role and content are text.

    Raises:
        UsageError: it is not.
    """
    if not messages:
        raise UsageError("a conversation has at least one message, got none; give the user's")
    for message in messages:
        fields = [message.get(key) for key in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise UsageError(f"every message has role and content as text, got {message!r}; give both as str")


def _require_whole(ranks: Mapping[bytes, int], path: str | Path) -> None:
    """Ranks 0, 1, 2, ... in this order, and every single byte a token: no text may be without ids."""
    for expected, rank in enumerate(ranks.values()):
        if rank != expected:
            raise BadModelError(
                f"ranks count up from 0 line by line: line {expected + 1} of {path} has {rank}, not {expected}; fetch "
                "the file again"
            )
    missing = [value for value in range(256) if bytes([value]) not in ranks]
    if missing:
        raise BadModelError(
            f"a vocabulary holds all 256 single bytes, {path} lacks {len(missing)}, the first {missing[0]:#04x}; fetch "
            "the file again"
        )


def _require_new(extra: Mapping[bytes, int], path: str | Path, base: Mapping[bytes, int], *, first: int) -> None:
    taken: set[int] = set()
    for number, (token, index) in enumerate(extra.items(), start=1):
        if token in base or index < first or index in taken:
            raise BadModelError(
                f"an extra vocabulary brings new tokens with new ids from {first} on: line {number} of {path} has "
                f"{token!r} with id {index}; drop tokens that exist and number the rest anew"
            )
        taken.add(index)


def _tractable(text: str) -> Iterator[str]:
    """A text whole, unless a run of white space in it would overflow tiktoken's stack; then cut inside the run."""
    if len(text) <= MAX_SPACES:
        yield text
        return
    cuts = [i for run in _LONG_RUN.finditer(text) for i in range(run.start() + MAX_SPACES, run.end(), MAX_SPACES)]
    for start, end in pairwise([0, *cuts, len(text)]):
        yield text[start:end]
