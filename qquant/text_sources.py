"""Reading calibration data: files and data sets become documents, each still text or turns of a chat.

Standard library and errors.py only. No tokens, no drawing and no torch here: that is calibrate.py, the one reader.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO, cast

from qquant.errors import BadDataError, QquantError

Kind = Literal["text", "conversations", "messages", "pairs"]

BLOCK_CHARS = 1 << 20
"""Characters handed on at once. A tokenizer needs many times its text in memory."""

_KINDS: tuple[Kind, ...] = ("conversations", "messages", "text")
_PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
"""Fields of a prompt and what answers it, by the names that published data sets give them."""
# A line break after a visible character and before a word: the pre-tokenizers of GPT-2, Llama 3 and Qwen all split
# there whatever follows, so cutting at it changes no id. Greedy: the last such place.
_SAFE_CUT = re.compile(r".*\S\n(?=\w)", re.DOTALL)
_NEEDED = "'text', 'conversations', 'messages', or a prompt and its answer ('prompt' and 'response', for example)"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class Document:
    """One text or conversation, before tokenization."""

    where: str
    """File and line, for messages."""
    kind: Kind
    value: Any
    """kind text: an iterable of str, to be read once, that joined are the text; else the list of turns, checked: Qwen's
    for conversations, OpenAI's for messages and for pairs, which are a prompt and its answer."""


def read_documents(source: str | Path) -> Iterator[Document]:
    """Yield the documents of a source, by what its name says it is; texts of nothing but white space are left out.

    Raises:
        BadDataError: the source is missing or unreadable, or an item has not what it needs; names file and line.
    """
    path = at_home(source)
    name = str(source) if len(str(source)) <= 200 else str(source)[:200] + "..."
    # os.path and not Path: a name too long for the system is a missing file too, not an OSError.
    if os.path.isdir(path):
        raise BadDataError(f"calibration data must be one file, and {name} is a folder; give a file inside it")
    if not os.path.exists(path):
        if isinstance(source, str) and _HUB_ID.fullmatch(source) and not _suffix(path):
            dataset, _, config = source.partition(":")
            return _items(_dataset_rows(f"{source} (no file of that name, so a hub id)", dataset, config or None))
        raise BadDataError(f"calibration data must exist, and there is no file {name}; check the path")
    if _suffix(path) == ".parquet":
        return _items(_dataset_rows(str(source), "parquet", None, data_files=str(path)))
    if _suffix(path) in (".json", ".jsonl", ".ndjson"):
        return _items(_json_rows(path))
    return _plain(path)


def as_text(document: Document) -> Document:
    """What was said, without who said it: the contents of all turns, each on a line of its own.

    Raises:
        BadDataError: a turn whose content is not a text.
    """
    if document.kind == "text":
        return document
    name = "value" if document.kind == "conversations" else "content"
    lines = [_text(turn.get(name), f"{document.where}, turn {n}", name) for n, turn in enumerate(document.value, 1)]
    return Document(document.where, "text", ["\n".join(lines)])


def as_messages(document: Document) -> Document:
    """A conversation or a pair as OpenAI's messages; texts and messages as they are."""
    if document.kind == "pairs":
        return Document(document.where, "messages", document.value)
    if document.kind != "conversations":
        return document
    turns = [{"role": turn["from"], "content": turn["value"]} for turn in document.value]
    return Document(document.where, "messages", turns)


def blocks(pieces: Iterable[str]) -> Iterator[str]:
    """Regroup a text into blocks of about BLOCK_CHARS, cut where no token crosses; a shorter text stays whole."""
    held = ""
    for piece in pieces:
        held += piece
        if len(held) <= BLOCK_CHARS:
            continue
        match = _SAFE_CUT.match(held)
        cut = match.end() if match else 0
        if not cut and len(held) > 4 * BLOCK_CHARS:  # a text without lines: a space belongs to the word after it
            cut = max(held.rfind(" "), 0) or len(held)
        if cut:
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def at_home(path: Path | str, error: type[QquantError] = BadDataError) -> Path:
    """A path with a ``~`` at its beginning followed; raises ``error`` where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise error(f"the ~ of {path} must stand for a home folder, and there is none; write the path") from None


def one_line(error: BaseException) -> str:
    """Fold a foreign error's text into one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def _suffix(path: Path) -> str:
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def _plain(path: Path) -> Iterator[Document]:
    """A text file is one document; its pieces are read as they are asked for."""
    pieces = _pieces(path)
    head = next(pieces, "")
    if head.strip():
        yield Document(str(path), "text", chain([head], pieces))


def _pieces(path: Path) -> Iterator[str]:
    with _opened(path) as stream:
        while piece := stream.read(BLOCK_CHARS):
            yield piece


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Open a text file, packed or not; every way of being unreadable becomes one line that names the file."""
    try:
        with _binary(path) as binary, io.TextIOWrapper(cast(io.BufferedReader, binary), "utf-8-sig") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path}{_bad_line(path)}: text must be UTF-8 ({error.reason}); convert the file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadDataError(f"{path}: .gz must be a whole gzip file ({one_line(error)}); pack it again") from error
    except OSError as error:
        raise BadDataError(f"{path}: the file must be readable, got: {error.strerror or error}; check it") from error


def _binary(path: Path) -> io.BufferedReader | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _bad_line(path: Path) -> str:
    """Find the line that is not UTF-8, which the decoder, reading ahead, cannot tell."""
    with _binary(path) as binary:
        for number, line in enumerate(binary, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f", line {number}, byte {error.start + 1}"
    return ""


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, item) of a JSON list, or of one JSON object per line."""
    with _opened(path) as stream:
        first = " "
        while first.isspace():
            first = stream.read(1)
        stream.seek(0)
        if first == "[":
            for number, item in enumerate(_parse(stream.read(), path, 1), 1):
                yield f"{path}, item {number}", item
            return
        for number, line in enumerate(stream, 1):
            if not line.isspace():
                yield f"{path}, line {number}", _parse(line, path, number)


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise BadDataError(f"{at}: not JSON ({error.msg}); write one object per line, or one list of them") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists a thousand deep
        raise BadDataError(f"{path}, line {line}: JSON that cannot be read ({one_line(error)}); drop it") from error


def _dataset_rows(source: str, name: str, config: str | None, **kwargs: Any) -> Iterator[tuple[str, Any]]:
    """Yield (where, row) of the train split of a parquet file or a hub data set."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise BadDataError(
            f"{source}: reading it needs the package datasets; run pip install 'qquant[data]', or give text or JSON"
        ) from error
    try:
        for number, row in enumerate(load_dataset(name, config, split="train", streaming=True, **kwargs), 1):
            yield f"{source}, row {number}", row
    except Exception as error:  # network, permission, format: each backend has its own kinds
        raise BadDataError(f"{source}: datasets cannot read it ({one_line(error)}); check the name") from error


def _items(rows: Iterable[tuple[str, Any]]) -> Iterator[Document]:
    """Check the items and turn them into documents; the first item decides which field all of them need."""
    field: Kind | None = None
    pair = ("", "")
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise BadDataError(f'{where}: an item must be an object, got {type(row).__name__}; write {{"text": ...}}')
        if field is None:
            field = next((name for name in _KINDS if name in row), None)
            pair = next((names for names in _PAIRS if row.keys() >= set(names)), pair)
            field = field or ("pairs" if pair[0] else None)
        if field is None or not row.keys() >= set(pair if field == "pairs" else (field,)):
            named = " and ".join(map(repr, pair)) if field == "pairs" else repr(field)
            needed = f"{named}, as the first item has" if field else _NEEDED
            raise BadDataError(f"{where}: an item needs {needed}, got {sorted(map(str, row))[:8]}; add it or drop it")
        if field == "pairs":
            yield Document(where, field, _pair(row, pair, where))
            continue
        value = row[field]
        if field != "text":
            yield Document(where, field, _turns(value, field, where))
        elif _text(value, where, "text").strip():
            yield Document(where, field, [value[at : at + BLOCK_CHARS] for at in range(0, len(value), BLOCK_CHARS)])


def _pair(row: Mapping[str, Any], names: tuple[str, str], where: str) -> list[Mapping[str, Any]]:
    """A prompt and its answer as messages; what Alpaca calls ``input`` belongs to the instruction above it."""
    prompt, answer = (_text(row[name], where, name) for name in names)
    more = row.get("input") if names[0] == "instruction" else None
    if more is not None and _text(more, where, "input"):
        prompt = f"{prompt}\n{more}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _turns(value: Any, field: Kind, where: str) -> list[Mapping[str, Any]]:
    """Check the turns of a conversation."""
    who, what = ("from", "value") if field == "conversations" else ("role", "content")
    if not isinstance(value, list) or not value:
        raise BadDataError(f"{where}: {field!r} must be a list of turns, got {str(value)[:40]!r}; drop the item")
    for number, turn in enumerate(value, 1):
        at = f"{where}, turn {number}"
        if not isinstance(turn, Mapping) or who not in turn or not ({what, "tool_calls"} & turn.keys()):
            got = sorted(map(str, turn)) if isinstance(turn, Mapping) else type(turn).__name__
            raise BadDataError(f"{at}: a turn needs {who!r} and {what!r}, got {got}; add what is missing")
        if field == "conversations":
            if turn["from"] not in ("user", "assistant"):
                raise BadDataError(
                    f"{at}: 'from' must be 'user' or 'assistant', got {turn['from']!r}; rename it, and leave out "
                    "system turns (the default system prompt is added) or write the data as 'messages'"
                )
            _text(turn.get("value"), at, "value")
    return value


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise BadDataError(f"{where}: {name!r} must be a string, got {type(value).__name__}; write text there")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadDataError(f"{where}: {name!r} holds half a character ({error.reason}); write it whole") from error
    return value
