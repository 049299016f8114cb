"""JSON of a model folder, read strictly with an error that names the file, and written so that people can read it.

Two readers must never see two things in one file, and no file may cost more than its size: what is ambiguous, endless
or larger than any honest file is refused. What the keys mean is for the room that asks.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qquant.errors import BadModelError

_LARGEST_FILE = 32 * 2**20  # bytes; the index of a model with 100,000 tensors has 10 MB
_DEEPEST = 32  # objects and lists inside one another; honest files have 6


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; raises BadModelError if it is absent, something else, or not plain, see ``parse_json``."""
    if not path.exists():
        raise BadModelError(f"a model folder must hold {path.name}, {path.parent} does not")
    if not path.is_file():  # opening a pipe would wait for ever
        raise BadModelError(f"{path} must be a file, and it is a folder, a pipe or a device; get the model again")
    with path.open("rb") as stream:
        data = stream.read(_LARGEST_FILE + 1)
    if len(data) > _LARGEST_FILE:
        raise BadModelError(f"{path} must have at most {_LARGEST_FILE >> 20} MiB to be read; get the model again")
    try:
        content = parse_json(data)
    except ValueError as error:
        raise BadModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadModelError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def parse_json(data: bytes) -> Any:
    """What UTF-8 bytes say as JSON, where it is the same for every reader.

    Raises:
        ValueError: no JSON, a key twice in one object, NaN or an infinity, a number of more digits than Python takes,
            text that is no Unicode, or values more than 32 deep.
    """
    odd: list[_NoNumber] = []

    def no_number(text: str) -> _NoNumber:
        odd.append(_NoNumber(text))
        return odd[-1]

    def finite(text: str) -> float | _NoNumber:
        number = float(text)
        return number if math.isfinite(number) else no_number(text)

    try:
        content = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_repeats,
            parse_constant=no_number,
            parse_float=finite,
        )
    except RecursionError:
        raise ValueError("its objects and lists lie too deep inside one another") from None
    _check_depth([content])
    if odd or b"\\ud" in data or b"\\uD" in data:
        _check_leaves(content)
    return content


def write_json(path: Path, content: Any) -> None:
    """Readable JSON with a newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class _NoNumber:
    """Stands where a number should be, until the key that has it is known."""

    def __init__(self, text: str) -> None:
        self.text = text[:40]


def _check_depth(content: Any) -> None:
    """Level by level: a walk that calls itself could not go as deep as JSON does."""
    level = [content]
    for _ in range(_DEEPEST + 1):
        lists = (value.values() if isinstance(value, dict) else value for value in level)
        level = [item for values in lists for item in values if isinstance(item, dict | list) and item]
        if not level:
            return
    raise ValueError("its objects and lists lie too deep inside one another")


def _check_leaves(content: Any, key: str = "it") -> None:
    """Numbers and text, of something that is not deep."""
    if isinstance(content, _NoNumber):
        raise ValueError(f"{key[:80]!r} must be a number that JSON has, got {content.text}")
    if isinstance(content, str):
        content.encode()  # fails at half a surrogate pair; UnicodeEncodeError is a ValueError
    if isinstance(content, dict):
        for name, value in content.items():
            _check_leaves(name)
            _check_leaves(value, name)
    if isinstance(content, list):
        for value in content:
            _check_leaves(value, key)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"a name appears twice: {twice[:80]!r}")
    return content
