"""What a long run has finished so far, on disk after every piece, so that a later run goes on where this one ended.

One JSON line per piece, with its checksum, behind a first line that says what the run is. Nothing here knows what a
piece holds.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from qquant.errors import BadDataError, DiskError, StoppedError, UsageError

_VERSION = 2
_BEGINNING = b'{"journal": %d, "identity": ' % _VERSION
"""Of every journal: what may be cut off and begun anew."""
_SHOWN = 100
"""Characters of a value in a message."""


class Journal:
    """Finished pieces by key; ``add`` returns once the piece is on the disk.

    A line that was cut off by the end of the process is dropped; its piece is simply not finished.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        *,
        resume: bool,
        again: str = "--resume",
        anew: str = "delete that file",
    ) -> None:
        """Open or begin a journal.

        Args:
            path: the file; see ``journal_of``.
            identity: JSON values on which the pieces depend: model hashes, options, data. Compared key by key.
            resume: go on with what is there; without a file, begin all the same.
            again: what a user goes on with, for messages.
            anew: what a user does to begin from scratch, for messages.

        Raises:
            UsageError: there is a journal and ``resume`` is off, it is of another run, or a run is at work on it.
            BadDataError: the file is no journal, or damaged.
            DiskError: it cannot be written.
        """
        self._path, self._again, self._anew = path, again, anew
        self._pieces: dict[str, Any] = {}
        self._whole_bytes: int | None = None  # to be cut to before anything is added; None: nothing is to be cut
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.touch(exist_ok=False)
            made = True
        except FileExistsError:
            made = False
        except FileNotFoundError:  # the folder was there, and the run that it was of has just ended
            raise _taken(path) from None
        with alone(path):
            self._begin(made=made, resume=resume)

    def _begin(self, *, made: bool, resume: bool) -> None:
        path = self._path
        try:
            if not made and not resume:
                raise UsageError(
                    f"an earlier run left unfinished work in {path}; go on with {self._again}, or {self._anew}"
                )
            if made and path.stat().st_size == 0:  # else another run was here since
                self._append(self._head(), mode="w")
            else:
                self._read(self._identity)
        except DiskError:
            with suppress(OSError):  # the first error is the one to tell
                self.remove()
            raise

    @staticmethod
    def begun(path: Path) -> bool:
        """Whether a file is there with more than a first line that was cut off."""
        return path.is_file() and b"\n" in path.read_bytes()

    def __contains__(self, key: str) -> bool:
        return key in self._pieces

    def __getitem__(self, key: str) -> Any:
        return self._pieces[key]

    def __len__(self) -> int:
        return len(self._pieces)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Keys and pieces, in the order in which the keys came first."""
        yield from self._pieces.items()

    def add(self, key: str, piece: Any) -> None:
        """Keep one finished piece, a JSON value, and wait until it is on the disk; DiskError where it cannot be."""
        if self._whole_bytes:
            os.truncate(self._path, self._whole_bytes)
        elif self._whole_bytes == 0 or not self._path.exists():  # someone may have deleted it under us
            self._append(self._head(), mode="w")
        self._whole_bytes = None
        line = {"key": key, "piece": piece}
        self._append({**line, "crc32": checksum(line)}, mode="a")
        self._pieces[key] = json.loads(json.dumps(piece))

    def remove(self) -> None:
        """Delete the file, and the folders that were made for it and hold nothing else."""
        with suppress(FileNotFoundError):
            self._path.unlink()
        for folder in self._made:
            with suppress(OSError):  # there is something else in it by now
                folder.rmdir()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep all other runs off the file, and read it again: another one may have been at work on it since.

        Raises:
            UsageError: a run is at work on it, or it has become another run's.
        """
        with alone(self._path):
            self._read(self._identity)
            yield

    def _head(self) -> dict[str, Any]:
        head = {"journal": _VERSION, "identity": self._identity}
        return {**head, "crc32": checksum(head)}

    def _append(self, line: Mapping[str, Any], *, mode: str) -> None:
        try:
            with self._path.open(mode, encoding="utf-8") as stream:
                stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise DiskError(
                f"{self._path} keeps what is finished and cannot be written: {error.strerror or error}; "
                f"mend that, and go on with {self._again}"
            ) from error

    def _read(self, mine: dict[str, Any]) -> None:
        self._pieces, self._whole_bytes = {}, None
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if not whole and content[: len(_BEGINNING)] == _BEGINNING[: len(content)]:
            self._whole_bytes = 0  # the process ended within the first line
            return
        try:
            head, *lines = [json.loads(line) for line in whole.splitlines()]
            if head["journal"] != _VERSION:
                raise ValueError(f"its version is {head['journal']!r}")
            theirs = head["identity"]
            keys = {*mine, *theirs.keys()}
            for line in (head, *lines):
                if line.pop("crc32") != checksum(line):
                    raise ValueError(f"the checksum of {line.get('key', 'its first line')!r} differs")
            self._pieces = {line["key"]: line["piece"] for line in lines}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadDataError(
                f"{self._path} must be the journal of an unfinished run as it was written, and is not ({error}); put "
                f"it back, or {self._anew} to begin anew"
            ) from error
        differing = sorted(key for key in keys if mine.get(key) != theirs.get(key))
        if differing:
            shown = "; ".join(f"{key} was {_cut(theirs.get(key))} and is {_cut(mine.get(key))}" for key in differing)
            raise UsageError(
                f"{self._again} goes on with the same run only, and {self._path} is of another: {shown}; "
                f"{self._anew} to begin anew"
            )
        if len(whole) < len(content):
            self._whole_bytes = len(whole)


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def checksum(line: Mapping[str, Any]) -> int:
    """The CRC-32 that a line of a journal carries of everything else in it."""
    return zlib.crc32(json.dumps(line, ensure_ascii=False).encode())


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
    return unfinished_beside(out, ".jsonl")


def unfinished_beside(out: Path, ending: str) -> Path:
    """The name beside ``out`` under which unfinished work on it is kept."""
    place = out if out.name else out.absolute()  # the current folder has a name only then
    return place.with_name(f"{place.name}.unfinished{ending}")


@contextmanager
def resumable(journal: Journal, pieces: str) -> Iterator[None]:
    """Keep other runs off a journal, and turn Ctrl-C and SIGTERM into ``StoppedError``.

    It says how many ``pieces`` are saved and how to go on. A journal without any piece is deleted when the run ends by
    an error: there is nothing to go on with, and the next run need not be told of it.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    listening = threading.current_thread() is threading.main_thread()  # no other thread may listen to signals
    before = signal.signal(signal.SIGTERM, stop) if listening else None
    try:
        with journal.alone():
            try:
                yield
            except BaseException:
                if not len(journal):
                    journal.remove()
                raise
    except KeyboardInterrupt:
        raise StoppedError(
            f"stopped; {len(journal)} finished {pieces} are saved; the same command with --resume goes on"
        ) from None
    finally:
        if listening:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Keep all runs off a journal; raises UsageError where one is at work on it."""
    lock = _alone(path)
    try:
        yield
    finally:
        os.close(lock)


def _alone(path: Path) -> int:
    """A descriptor of a journal that no other process holds in this way; the end of a process gives it back.

    Raises:
        UsageError: another one holds it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:  # it was there, and that run has just ended
        raise _taken(path) from None
    try:
        import fcntl  # not on Windows
    except ImportError:
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise _taken(path) from None
    except OSError:
        pass  # a file system without locks
    if not _is_still(path, descriptor):
        os.close(descriptor)
        raise _taken(path)
    return descriptor


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether an open file is what has that name now: a run that ends deletes it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _taken(path: Path) -> UsageError:
    return UsageError(f"another run is at work on {path}; wait for its end, or choose another output")
