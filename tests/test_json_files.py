"""JSON that any two readers could take for different things, or that has no end, is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qquant.errors import BadModelError
from qquant.json_files import parse_json, read_json, write_json

BAD = {
    "empty": (b"", "Expecting value"),
    "a key twice": (b'{"a": {"b": 1, "b": 2}}', "'b'"),
    "NaN": (b'{"a": [NaN]}', "'a' must be a number that JSON has, got NaN"),
    "infinite": (b'{"a": -Infinity}', "got -Infinity"),
    "larger than any float": (b'{"a": 1e999}', "got 1e999"),
    "too many digits": (b'{"a": %s}' % (b"9" * 5000), "digits"),
    "half a character": (b'{"a": "\\ud800"}', "surrogates"),
    "half a character in a key": (b'{"\\uDFFF": 1}', "surrogates"),
    "a mark": (b"\xef\xbb\xbf{}", "BOM"),
    "another encoding": ("{}".encode("utf-16"), "utf-8"),
    "too deep": (b'{"a":' * 40 + b"1" + b"}" * 40, "too deep"),
    "far too deep": (b"[" * 100_000, "too deep"),
}


@pytest.mark.parametrize(("data", "words"), list(BAD.values()), ids=list(BAD))
def test_what_readers_differ_on_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_json(data)
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(BadModelError, match=r"x\.json is not JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "content", [{"a": "你好 😀", "n": 10**30, "x": 0.5}, {"a": [[[[1]]]]}, {}, {"a": {"b": {}}, "c": [None, True]}]
)
def test_what_is_written_is_read(tmp_path: Path, content: dict[str, object]) -> None:
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content


def test_a_pair_of_surrogates_is_a_character() -> None:
    assert parse_json(b'"\\ud83d\\ude00"') == "😀"


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait for ever
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "device.json").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "device"):
        with pytest.raises(BadModelError, match="must be a file"):
            read_json(tmp_path / f"{name}.json")
    with pytest.raises(BadModelError, match=r"must hold absent\.json"):
        read_json(tmp_path / "absent.json")


def test_a_file_without_an_end_is_read_to_a_limit(tmp_path: Path) -> None:
    with (tmp_path / "x.json").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(BadModelError, match="at most 32 MiB"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"'])
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(BadModelError, match="must hold a JSON object"):
        read_json(tmp_path / "x.json")
