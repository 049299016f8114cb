"""A journal keeps finished pieces over the end of a process, and refuses to mix two runs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from qquant.errors import BadDataError, StoppedError, UsageError
from qquant.journal import Journal, journal_of, resumable

RUN = {"model": "abc", "limit": 50}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return journal_of(tmp_path / "report")


def test_it_lies_beside_the_result(tmp_path: Path) -> None:
    assert journal_of(tmp_path / "r" / "report") == tmp_path / "r" / "report.unfinished.jsonl"


def test_what_was_added_is_there_for_the_next_run(path: Path) -> None:
    first = Journal(path, RUN, resume=False)
    first.add("a", {"score": 0.5})
    first.add("b", ["é", None])
    second = Journal(path, RUN, resume=True)
    assert (len(second), second["a"], second["b"]) == (2, {"score": 0.5}, ["é", None])
    assert "c" not in second


def test_a_piece_is_the_same_whether_it_was_just_added_or_read_again(path: Path) -> None:
    journal = Journal(path, RUN, resume=False)
    journal.add("a", (1, 2))
    assert journal["a"] == Journal(path, RUN, resume=True)["a"] == [1, 2]


def test_resuming_without_a_journal_begins_one(path: Path) -> None:
    assert len(Journal(path, RUN, resume=True)) == 0
    assert path.exists()


def test_an_earlier_run_is_not_overwritten_unasked(path: Path) -> None:
    Journal(path, RUN, resume=False)
    with pytest.raises(UsageError, match="--resume"):
        Journal(path, RUN, resume=False)


@pytest.mark.parametrize("other", [{"model": "abd", "limit": 50}, {"model": "abc"}], ids=["changed", "missing"])
def test_another_run_is_refused_by_the_keys_that_differ(path: Path, other: dict[str, object]) -> None:
    Journal(path, RUN, resume=False)
    with pytest.raises(UsageError, match=r"model was 'abc' and is 'abd'|limit was 50 and is None"):
        Journal(path, other, resume=True)


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_line_that_was_cut_off_is_dropped_and_can_be_added_again(path: Path, cut: int) -> None:
    journal = Journal(path, RUN, resume=False)
    journal.add("a", 1)
    journal.add("b", "a piece of some length")
    os.truncate(path, path.stat().st_size - cut)
    again = Journal(path, RUN, resume=True)
    assert "a" in again
    assert "b" not in again
    again.add("b", 2)
    assert Journal(path, RUN, resume=True)["b"] == 2


@pytest.mark.parametrize("content", ["\n", "{}\n", '{"identity": 1}\n', "[]\n", "no\n", '{"identity": {}}\n3\n'])
def test_a_file_that_is_no_journal_is_refused(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
    with pytest.raises((BadDataError, UsageError), match=r"no journal"):
        Journal(path, RUN, resume=True)


@pytest.mark.parametrize("content", ["", '{"journal": 1, "iden'], ids=["empty", "cut"])
def test_a_run_that_ended_within_the_first_line_begins_anew(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
    Journal(path, RUN, resume=True).add("a", 1)
    assert Journal(path, RUN, resume=True)["a"] == 1


def test_nothing_is_left_once_it_is_removed(path: Path) -> None:
    Journal(path, RUN, resume=False).remove()
    assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "term"])
def test_a_stopped_run_says_what_is_saved_and_how_to_go_on(path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM)
    journal = Journal(path, RUN, resume=False)
    journal.add("a", 1)
    with pytest.raises(StoppedError, match=r"1 finished cells.*--resume") as stopped, resumable(journal, "cells"):
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) == before
