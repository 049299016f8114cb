"""What a journal takes for a piece, and the folders it makes; how it is read again is test_journal.py's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from qquant.journal import Journal


@pytest.mark.parametrize("number", [math.nan, math.inf], ids=str)
def test_a_number_that_json_has_not_is_refused_and_leaves_no_line(tmp_path: Path, number: float) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {"run": 1}, resume=False)
    journal.add("a", [0.5])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        journal.add("b", [number])
    assert "b" not in journal
    assert path.read_bytes() == before
    assert Journal(path, {"run": 1}, resume=True)["a"] == [0.5]


def test_missing_folders_are_made_and_taken_away_with_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deeper" / "journal.jsonl"
    journal = Journal(path, {"run": 1}, resume=False)
    journal.add("a", 1)
    assert Journal(path, {"run": 1}, resume=True)["a"] == 1
    journal.remove()
    assert not list(tmp_path.iterdir())


def test_folders_with_something_else_in_them_stay(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.jsonl"
    journal = Journal(path, {"run": 1}, resume=False)
    (path.parent / "report").mkdir()
    journal.remove()
    assert [file.name for file in path.parent.iterdir()] == ["report"]
