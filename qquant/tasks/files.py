"""Tasks read from the files they were published as: which files are a task's, and what a row of them means.

Cells come from rows.py. Nothing here words a prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qquant.errors import BadDataError, UsageError
from qquant.tasks.items import LETTERS, Item, TaskName, TaskSet
from qquant.tasks.rows import SUFFIXES, Row, file_rows, hub_configs, hub_rows, kind_of
from qquant.text_sources import at_home

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_GENERAL = ("all", "main")
"""Configurations of hub data sets that hold all there is."""


@dataclass(frozen=True)
class _Parts:
    """How a task's files are called."""

    items: str
    """Where the items are: what the name of a folder or file begins with."""
    shots: str | None
    """Where the worked examples are; None: the task has none."""
    columns: tuple[str, ...] = ()
    """Of CSV files without a header."""


_PARTS: Mapping[TaskName, _Parts] = {
    "mmlu": _Parts("test", "dev", ("question", "a", "b", "c", "d", "answer")),
    "ceval": _Parts("val", "dev"),  # its test split was published without answers
    "cmmlu": _Parts("test", "dev"),
    "gsm8k": _Parts("test", "train"),
    "humaneval": _Parts("humaneval", None),
}
_HUB_ITEMS: Mapping[TaskName, str] = {"humaneval": "test"}


def read_task(task: TaskName, source: Path | str, *, limit: int | None = None) -> TaskSet:
    """Read a task.

    Args:
        task: which one it is.
        source: a folder as published, a file of items (which brings no worked examples), or a hub data set as
            ``owner/name`` or ``owner/name:configuration``.

            - MMLU: ``dev/SUBJECT_dev.csv`` and ``test/SUBJECT_test.csv``, no header, question, A to D, answer.
            - C-Eval: ``dev/SUBJECT_dev.csv`` and ``val/SUBJECT_val.csv`` with a header.
            - CMMLU: ``dev/SUBJECT.csv`` and ``test/SUBJECT.csv`` with a header.
            - GSM8K: ``train.jsonl`` and ``test.jsonl``, answers that end in ``#### number``.
            - HumanEval: ``HumanEval.jsonl`` or ``HumanEval.jsonl.gz``.

            JSON and JSON lines with the same names of columns do as well, with ``subject`` and ``choices`` as on the
            hub. Where no folder or file is called exactly ``test``, one that begins with it is taken.
        limit: take only the first so many items of each subject, of the task where it has none; None: all.

    Raises:
        BadDataError: missing or unreadable files, or a row that is no item; names file and line.
        UsageError: a bad limit.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1 item, got {limit}")
    path, parts, digest = at_home(source), _PARTS[task], _Digest()
    shots: list[tuple[str | None, Row]] = []
    if path.is_dir():
        found = _files(path, parts.items)
        examples = _files(path, parts.shots, optional=True) if parts.shots else []
        rows = _read(path, found, parts, digest)
        shots = _read(path, examples, parts, digest)
    elif path.exists():
        rows = _read(path.parent, [path], parts, digest)
    elif isinstance(source, str) and _HUB_ID.fullmatch(source):
        name, _, config = source.partition(":")
        wanted = _HUB_ITEMS.get(task, parts.items)
        configs: Sequence[str | None] = [config] if config else _configs(name)
        rows = _from_hub(name, configs, wanted, digest)
        shots = _from_hub(name, configs, parts.shots, digest) if parts.shots else []
    else:
        raise BadDataError(f"the data of {task} must exist, and there is no folder or file {path}; check the path")
    items = _items(task, rows, limit)
    if not items:
        raise BadDataError(f"{source} has no items of {task}; check the files")
    by_group: dict[str | None, list[Item]] = {}
    for item in _items(task, shots, None):
        by_group.setdefault(item.group, []).append(item)
    return TaskSet(task, items, {group: tuple(found) for group, found in by_group.items()}, digest.text())


class _Digest:
    """sha256 over the names and contents of what is read: lines as ``sha256sum`` writes them, by name."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, content: bytes) -> None:
        self._lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")

    def text(self) -> str:
        # Names of files need not be text: os.fsencode gives the bytes that they are.
        ordered = sorted(map(os.fsencode, self._lines), key=lambda line: line.split(b"  ", 1)[1])
        return hashlib.sha256(b"".join(ordered)).hexdigest()


def _files(folder: Path, part: str, *, optional: bool = False) -> list[Path]:
    """The data files of a part of a task: all in the folder of its name, or one that is called so itself."""

    def called(path: Path) -> str:
        return (path.name if path.is_dir() else path.name.split(".")[0]).lower()

    known = [path for path in sorted(folder.iterdir()) if path.is_dir() or kind_of(path) in SUFFIXES]
    found = [path for path in known if called(path) == part.lower()]
    if not found:
        found = [path for path in known if called(path).startswith(part.lower())]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise BadDataError(
            f"{folder} must have one folder or file called {part}, it has {names}; give as TASK=PATH a folder with one "
            "of them"
        )
    if not found and optional:
        return []
    if not found:
        there = ", ".join(path.name for path in known[:8]) or "no data"
        raise BadDataError(f"{folder} must have a folder or file called {part}, it has {there}; check the layout")
    if not found[0].is_dir():
        return found
    # A link that leads nowhere stays here: it is a file that was meant to be read, and reading says what is wrong.
    files = [path for path in sorted(found[0].iterdir()) if not path.is_dir() and kind_of(path) in SUFFIXES]
    if not files and not optional:
        raise BadDataError(f"{found[0]} must hold {', '.join(SUFFIXES)} files, it holds none; check the layout")
    return files


def _read(root: Path, files: Iterable[Path], parts: _Parts, digest: _Digest) -> list[tuple[str | None, Row]]:
    """(subject that the file's name says, row) of files."""
    rows: list[tuple[str | None, Row]] = []
    for path in files:
        if path.exists() and not path.is_file():  # a pipe or a device might never end
            raise BadDataError(f"{path}: must be a file, and it is none; check the path")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BadDataError(
                f"{path}: the file must be readable, got: {error.strerror or error}; check it"
            ) from error
        digest.add(path.relative_to(root).as_posix(), content)
        rows += [(_subject(path), row) for row in file_rows(path, content, columns=parts.columns)]
    return rows


def _subject(path: Path) -> str | None:
    """What a file's name says its subject is."""
    stem = path.name.split(".")[0]
    return re.sub(r"(^|_)(dev|val|test|train)$", "", stem) or None


def _configs(dataset: str) -> list[str]:
    names = hub_configs(dataset)
    return next(([name] for name in _GENERAL if name in names), names)


def _from_hub(dataset: str, configs: Sequence[str | None], split: str, digest: _Digest) -> list[tuple[str | None, Row]]:
    """(configuration as the subject, row) of one split of a hub data set."""
    rows: list[tuple[str | None, Row]] = []
    for config in configs:
        found = hub_rows(dataset, config, split)
        content = json.dumps([row.cells for row in found], ensure_ascii=False, sort_keys=True, default=str)
        digest.add(f"{dataset}/{config or ''}/{split}", content.encode())
        subject = None if config in _GENERAL else config
        rows += [(subject, row) for row in found]
    return rows


def _items(task: TaskName, rows: Iterable[tuple[str | None, Row]], limit: int | None) -> tuple[Item, ...]:
    items: list[Item] = []
    counts: dict[str | None, int] = {}
    names: set[str] = set()
    for subject, row in rows:
        group = None
        if task not in ("gsm8k", "humaneval"):
            group = str(row.cells["subject"]) if row.cells.get("subject") else subject
        number = counts.get(group, 0)
        counts[group] = number + 1
        if limit is not None and number >= limit:
            continue
        item = _item(task, row, group, f"{group}/{number}" if group else str(number))
        _refuse_no_text(row, item)
        if item.id in names:
            raise BadDataError(f"{row.where}: an item's name must come once, {item.id} came before; drop one")
        names.add(item.id)
        items.append(item)
    return tuple(items)


def _refuse_no_text(row: Row, item: Item) -> None:
    """Refuse halves of characters, which JSON can write and no tokenizer reads, and names of more than one line."""
    for text in (item.question, *item.choices, *item.extra.values()):
        if any(unicodedata.category(character) == "Cs" for character in text):
            raise BadDataError(f"{row.where}: texts must be whole characters, got half of one; mend the row")
    for name in (item.id, item.group or ""):
        if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in name):
            raise BadDataError(f"{row.where}: the name of a subject or an item must be one line, got {name!r}; mend it")


def _item(task: TaskName, row: Row, group: str | None, name: str) -> Item:
    if task == "humaneval":
        named = {key: _cell(row, key) for key in ("task_id", "prompt", "test", "entry_point")}
        return Item(named.pop("task_id"), None, named["prompt"], (), "", named)
    question = _cell(row, "question")
    if task == "gsm8k":
        worked = _cell(row, "answer")
        return Item(name, None, question, (), _number(row, worked), {"answer": worked})
    choices = row.cells.get("choices")
    if choices is None:
        choices = [_cell(row, letter.lower(), empty=True) for letter in LETTERS]
    if not isinstance(choices, list) or len(choices) != len(LETTERS) or not all(isinstance(c, str) for c in choices):
        raise BadDataError(f"{row.where}: choices must be {len(LETTERS)} texts, got {str(choices)[:60]}; mend the row")
    return Item(name, group, question, tuple(choices), _letter(row), {})


def _cell(row: Row, name: str, *, empty: bool = False) -> str:
    value: Any = row.cells.get(name)
    if not isinstance(value, str) or not (empty or value.strip()):
        got = f"has {sorted(row.cells)}" if name not in row.cells else f"got {value!r}"
        raise BadDataError(f"{row.where}: {name!r} must be a text that is not empty, {got}; mend the row")
    return value


def _letter(row: Row) -> str:
    """The right choice, published as a letter or as its number from 0."""
    answer: Any = row.cells.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(LETTERS):
        return LETTERS[answer]
    if isinstance(answer, str) and len(letter := answer.strip()) == 1 and letter in LETTERS:
        return letter
    raise BadDataError(
        f"{row.where}: 'answer' must be one of A, B, C and D, got {answer!r}; mend the row "
        "(C-Eval's test split was published without answers: take val)"
    )


def _number(row: Row, worked: str) -> str:
    """The number that a worked answer ends in, without thousands separators."""
    _, mark, number = worked.rpartition("####")
    number = number.strip().replace(",", "")
    if not mark or not re.fullmatch(r"[-+]?\d+(\.\d+)?", number):
        raise BadDataError(f"{row.where}: 'answer' must end in '#### number', got {worked[-40:]!r}; mend the row")
    return number
