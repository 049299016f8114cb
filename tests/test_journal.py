"""A journal keeps finished pieces over the end of a process, and refuses to mix two runs."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import pytest

from qquant.errors import BadDataError, DiskError, StoppedError, UsageError
from qquant.journal import Journal, journal_of, resumable

RUN = {"model": "abc", "limit": 50}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return journal_of(tmp_path / "report")


def test_it_lies_beside_the_result(tmp_path: Path) -> None:
    assert journal_of(tmp_path / "r" / "report") == tmp_path / "r" / "report.unfinished.jsonl"


def test_it_lies_beside_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report").mkdir()
    monkeypatch.chdir(tmp_path / "report")
    assert journal_of(Path(".")) == tmp_path / "report.unfinished.jsonl"


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


def test_a_file_is_only_read_until_something_is_added(path: Path) -> None:
    Journal(path, RUN, resume=False).add("a", 1)
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"key": "b", "pie')  # by a run that is at work, perhaps
    before = path.read_bytes()
    assert len(Journal(path, RUN, resume=True)) == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["\n", "{}\n", '{"identity": 1}\n', "[]\n", "no\n", '{"identity": {}}\n3\n'])
def test_a_file_that_is_no_journal_is_refused(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
    with pytest.raises((BadDataError, UsageError), match=r"must be the journal|is of another"):
        Journal(path, RUN, resume=True)


@pytest.mark.parametrize(("old", "new"), [('"a"', '"c"'), ("1.25", "1.24"), ('"crc32": ', '"crc32": 1')])
def test_a_piece_that_changed_on_the_disk_is_refused(path: Path, old: str, new: str) -> None:
    Journal(path, RUN, resume=False).add("a", {"error": 1.25, "name": "größe"})
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(BadDataError, match=r"must be the journal .*checksum of '.+' differs\); put it back"):
        Journal(path, RUN, resume=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["a note of mine", '{"journal": 3', '{"mine": 1}'])
def test_a_file_of_another_kind_is_refused_and_left_alone(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
    with pytest.raises(BadDataError, match=r"must be the journal|is of another"):
        Journal(path, RUN, resume=True)
    assert path.read_text(encoding="utf-8") == content


@pytest.mark.parametrize("content", ["", '{"journal": 2, "iden', '{"journal": 2, "identity": {"a'])
def test_a_run_that_ended_within_the_first_line_begins_anew(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")
    Journal(path, RUN, resume=True).add("a", 1)
    assert Journal(path, RUN, resume=True)["a"] == 1


def test_a_file_that_was_deleted_meanwhile_is_a_journal_again(path: Path) -> None:
    journal = Journal(path, RUN, resume=False)
    journal.add("a", 1)
    path.unlink()
    journal.add("b", 2)
    again = Journal(path, RUN, resume=True)
    assert ("a" in again, again["b"]) == (False, 2)


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


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_is_at_work_has_its_journal_alone(path: Path, resume: bool) -> None:
    journal = Journal(path, RUN, resume=False)
    with resumable(journal, "cells"), pytest.raises(UsageError, match="another run is at work"):
        Journal(path, RUN, resume=resume)
    assert len(Journal(path, RUN, resume=True)) == 0


def test_what_another_run_finished_meanwhile_is_read_once_the_journal_is_ours(path: Path) -> None:
    journal = Journal(path, RUN, resume=False)
    other = Journal(path, RUN, resume=True)
    with other.alone():
        other.add("a", 1)
    assert "a" not in journal
    with journal.alone():
        assert journal["a"] == 1


def test_a_journal_that_was_deleted_as_it_was_opened_is_nobodys(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(path, RUN, resume=False)
    plain = os.open

    def late(file: Path, flags: int) -> int:
        descriptor = plain(file, flags)
        path.unlink()
        return descriptor

    monkeypatch.setattr("qquant.journal.os.open", late)
    with pytest.raises(UsageError, match="another run is at work"), journal.alone():
        pass


def test_a_run_that_failed_before_any_piece_leaves_nothing(tmp_path: Path) -> None:
    path = journal_of(tmp_path / "new" / "report")
    with pytest.raises(BadDataError, match="bad"), resumable(Journal(path, RUN, resume=False), "cells"):
        raise BadDataError("bad")
    assert not list(tmp_path.iterdir())


def test_a_run_that_failed_later_keeps_its_pieces(path: Path) -> None:
    journal = Journal(path, RUN, resume=False)
    journal.add("a", 1)
    with pytest.raises(BadDataError, match="bad"), resumable(journal, "cells"):
        raise BadDataError("bad")
    assert Journal(path, RUN, resume=True)["a"] == 1


def test_a_disk_without_room_for_the_first_line_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("qquant.journal.os.fsync", full)
    with pytest.raises(DiskError, match="No space left on device"):
        Journal(journal_of(tmp_path / "new" / "report"), RUN, resume=False)
    assert not list(tmp_path.iterdir())


def test_a_thread_can_keep_a_journal_too(path: Path) -> None:
    def run() -> None:
        journal = Journal(path, RUN, resume=False)
        with resumable(journal, "cells"):
            journal.add("a", 1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert Journal(path, RUN, resume=True)["a"] == 1
