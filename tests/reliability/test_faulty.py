"""The battery itself: no file of an output is written past the calls that it counts; faults are what they are named."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.reliability.conftest import Job
from tests.reliability.faulty import Fault, install
from tests.reliability.record import Record
from tests.reliability.runs import Launcher

ROW = "the battery itself"


def test_every_file_of_the_output_was_written_by_calls_that_are_counted(job: Callable[..., Job], outcome: Any) -> None:
    whole = job("llama", "gptq")
    written = {call.file for call in whole.calls if call.operation in ("write", "sendfile")}
    ends = {re.sub(r"\d+", "N", name) for name in whole.whole}
    assert ends <= {file.rpartition("/")[2] for file in written}
    outcome("files written by counted calls", len(whole.whole))


def _writes(room: Path) -> None:
    """In a process of its own: ten bytes a call; the third call fails after five, and every one from the sixth on."""
    install(room, [Fault("half-ENOSPC", 3), Fault("EIO+", 6)])
    file = room / "file"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)  # the first call
    os.write(descriptor, b"0123456789")
    with pytest.raises(OSError) as full:
        os.write(descriptor, b"0123456789")
    assert full.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"012345678901234"
    (room / "other").mkdir()
    with file.open("ab", buffering=0) as stream:  # the fifth
        with pytest.raises(OSError) as broken:
            stream.write(b"0")
        assert broken.value.errno == errno.EIO
    with pytest.raises(OSError):
        file.unlink()
    (room.parent / "outside").write_text("nobody counts this")


def test_faults_happen_at_their_call_and_nowhere_else(launcher: Launcher, room: Path, outcome: Any) -> None:
    launcher.call(_writes, room)
    assert (room.parent / "outside").exists()
    outcome("faults as named", 2)


def report(test: str, when: str, outcome: str, outcomes: dict[str, int]) -> Any:
    """One phase of a test as pytest reports it."""
    properties = [("row", "a row"), ("does", "What it does."), ("outcomes", outcomes)]
    state = {"failed": outcome == "failed", "skipped": outcome == "skipped", "passed": outcome == "passed"}
    return SimpleNamespace(nodeid=test, when=when, duration=0.4, user_properties=properties, **state)


def test_the_record_counts_what_passed_and_names_what_failed() -> None:
    record = Record()
    for when in ("setup", "call", "teardown"):
        record.add(report("t.py::good", when, "passed", {"same bytes": 3, "refused": 2}))
        record.add(report("t.py::bad", when, "failed" if when == "call" else "passed", {"same bytes": 7}))
    page = record.page()
    assert "| a row | 2 | 5 | 2 × refused; 3 × same bytes | 1 | 2 |" in page
    assert "| all | 2 | 5 | | 1 | 2 |" in page
    assert "- **a row**: What it does." in page
    assert "- `t.py::bad`" in page
    assert "Only a part ran" not in page
    record.part = True
    assert "Only a part ran" in record.page()
