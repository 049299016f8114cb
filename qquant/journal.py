"""What a long run has finished so far, on disk after every piece, so that a later run goes on where this one ended.

One JSON line per piece, behind a first line that says what the run is. Nothing here knows what a piece holds.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from qquant.errors import BadDataError, StoppedError, UsageError


class Journal:
    """Finished pieces by key; ``add`` returns once the piece is on the disk.

    A line that was cut off by the end of the process is dropped; its piece is simply not finished.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        """Open or begin a journal.

        Args:
            path: the file; see ``journal_of``.
            identity: JSON values on which the pieces depend: model hashes, options, data. Compared key by key.
            resume: go on with what is there; without a file, begin all the same.

        Raises:
            UsageError: there is a journal and ``resume`` is off, or it is of another run.
            BadDataError: the file is no journal.
        """
        self._path = path
        self._pieces: dict[str, Any] = {}
        mine = json.loads(json.dumps(identity))
        if path.exists():
            if not resume:
                raise UsageError(
                    f"an earlier run left unfinished work in {path}; go on with --resume, or delete that file"
                )
            self._read(mine)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"journal": 1, "identity": mine}, mode="x")

    def __contains__(self, key: str) -> bool:
        return key in self._pieces

    def __getitem__(self, key: str) -> Any:
        return self._pieces[key]

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, key: str, piece: Any) -> None:
        """Keep one finished piece, a JSON value, and wait until it is on the disk."""
        self._append({"key": key, "piece": piece}, mode="a")
        self._pieces[key] = json.loads(json.dumps(piece))

    def remove(self) -> None:
        """Delete the file: the run is done and its result is published."""
        self._path.unlink()

    def _append(self, line: Mapping[str, Any], *, mode: str) -> None:
        with self._path.open(mode, encoding="utf-8") as stream:
            stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self, mine: dict[str, Any]) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:  # the process ended within the first line
            os.truncate(self._path, 0)
            self._append({"journal": 1, "identity": mine}, mode="a")
            return
        try:
            head, *lines = [json.loads(line) for line in whole.splitlines()]
            theirs = head["identity"]
            keys = {*mine, *theirs.keys()}
            self._pieces = {line["key"]: line["piece"] for line in lines}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadDataError(f"{self._path} is no journal of an unfinished run; delete it: {error}") from error
        differing = sorted(key for key in keys if mine.get(key) != theirs.get(key))
        if differing:
            shown = "; ".join(f"{key} was {theirs.get(key)!r} and is {mine.get(key)!r}" for key in differing)
            raise UsageError(
                f"--resume goes on with the same run only, and {self._path} is of another: {shown}; "
                "delete that file to begin anew"
            )
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))


@contextmanager
def kept(path: Path | None, identity: Mapping[str, Any], *, resume: bool, pieces: str) -> Iterator[Journal | None]:
    """A journal for the time of a run, with ``resumable`` around it; None for a run that keeps nothing."""
    if path is None:
        yield None
        return
    journal = Journal(path, identity, resume=resume)
    with resumable(journal, pieces):
        yield journal


def journal_of(out: Path) -> Path:
    """Where the journal of a run lies whose result will be the folder ``out``."""
    return out.with_name(f"{out.name}.unfinished.jsonl")


@contextmanager
def resumable(journal: Journal, pieces: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into ``StoppedError``, which says how many ``pieces`` are saved and how to go on."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedError(
            f"stopped; {len(journal)} finished {pieces} are saved; the same command with --resume goes on"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
