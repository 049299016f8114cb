"""A run that may be cut off at any moment: what is finished lies on disk, and the same command goes on from there.

Beside the output ``out`` stands ``out.unfinished`` with a journal, the folder that will become ``out``, and shelves of
tensors. What a piece of work is, and what a shelf holds, is for the room that does the work to say.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from qquant.errors import (
    BadDataError,
    BadModelError,
    DamagedWorkError,
    DoesNotFitError,
    NumericError,
    StoppedError,
    UnprovenError,
    UsageError,
)
from qquant.identity import sha256
from qquant.journal import Journal, alone, unfinished_beside
from qquant.publish import Kind, put_in_place, refuse_existing, sync, sync_folder
from qquant.ranks import ALONE, Ranks
from qquant.run import Run, Shelf
from qquant.shard_writer import CheckedTensors, ShardWriter, damaged, our_own
from qquant.shards import TensorSpec

_log = logging.getLogger("qquant")

_JOURNAL = "journal.jsonl"
_RESULT = "result"
_SEALED = "sealed"
_MOST_TRIES = 16
MEASURING = "measured"
"""The part of a run in which is measured what it will do."""
_WRITTEN = "written for "
"""In front of a piece's key: the checksums of the result's tensors that it stands for."""
_SHELF = "shelf: "
"""In front of a shelf's name: the key that says whether it has been made, and not dropped since."""
_AGAIN = "the same command"
_OF_THE_INPUT = (BadModelError, BadDataError, NumericError)
"""What the same run would meet again, and another cannot use what is finished."""
_OF_THE_WORK = (DamagedWorkError, UnprovenError)
"""But not these: a file may be put back, and a proof may fail by a bit that flipped in memory."""


class AnotherTry(Exception):
    """No error: a run has served its end, unpublished, and another try for the same output comes next."""


class UnfinishedRun(Run):
    """A run with a folder of its own; made by ``going_on``."""

    def __init__(
        self, out: Path, folder: Path, kind: Kind, journal: Journal | None, ranks: Ranks, *, overwrite: bool
    ) -> None:
        """See ``going_on``; ``journal`` is the writer's alone."""
        super().__init__(ranks)
        self.folder = folder
        self.result = self.folder / _RESULT
        self.writer: ShardWriter | None = None
        """Of the result's tensors; what it wrote is on the disk before a piece counts as finished."""
        self._out, self._kind, self._overwrite, self._journal = out, kind, overwrite, journal
        mine = dict(journal.items()) if journal is not None else None
        self._pieces = ranks.json(mine)
        if ranks.writer:
            self.result.mkdir(exist_ok=True)
            sync(self.folder)
            sync(self.folder.parent)
        ranks.barrier()

    @property
    def lasting(self) -> bool:
        """Whether what is kept here is there after the end of the process."""
        return True

    def keep(self, key: str, piece: Any) -> None:
        """Keep a finished piece on the disk, behind what was written of the result; None: it is unfinished again."""
        if self._journal is not None:
            if self.writer is not None:
                self.writer.sync()
                if written := self.writer.take_checksums():
                    self._journal.add(f"{_WRITTEN}{key}", written)
            self._journal.add(key, piece)
        self._pieces[key] = piece

    def may_stop(self) -> None:
        """Raise StoppedError if a stop was asked for on any rank: all that is worth keeping is kept."""
        if self.ranks.any(self.stop_asked):
            raise StoppedError(f"stopped; what is finished is saved in {self.folder}, and {_AGAIN} goes on from there")

    def shelf(self, name: str, specs: Mapping[str, TensorSpec]) -> Shelf:
        """The shelf of that name, a folder with one safetensors file; every rank writes and reads it.

        Raises:
            DamagedWorkError: it was made before, and is not there or damaged.
        """
        if name not in self._shelves:
            folder, key = self.folder / name, f"{_SHELF}{name}"
            kept, anew = bool(self.finished(key)), _anew(self.folder)
            with self.ranks.agreed(), our_own(folder, anew):
                if self.ranks.writer:
                    folder.mkdir(exist_ok=True)
                    self._shelves[name] = CheckedTensors(folder, specs, anew=anew, kept=kept)
                    sync_folder(folder)
                    sync(self.folder)
            if not kept:
                self.keep(key, True)
            if not self.ranks.writer:
                self._shelves[name] = CheckedTensors(folder, specs, anew=anew, kept=True)
        return self._shelves[name]

    def drop(self, name: str) -> None:
        """Give up a shelf and its space, when every rank is done with it."""
        self.ranks.barrier()
        self._shelves.pop(name, None)
        if self.finished(key := f"{_SHELF}{name}"):
            self.keep(key, False)
        if self.ranks.writer and (self.folder / name).is_dir():
            shutil.rmtree(self.folder / name)

    def begin_result(self, plan: Mapping[str, TensorSpec], *, max_shard_bytes: int) -> None:
        """Take the disk space of the result's tensors, or go on in its files, before any piece is kept.

        Raises:
            DoesNotFitError: the disk has too little of it.
            DamagedWorkError: pieces are finished, and a file is not there, or not as it was written.
        """
        anew = _anew(self.folder) if self._pieces else None
        with self.ranks.agreed():
            if self.ranks.writer:
                self.writer = ShardWriter(self.result, plan, max_shard_bytes=max_shard_bytes, going_on=True, anew=anew)
                for key, piece in self._pieces.items():
                    if piece is not None and (written := self.finished(f"{_WRITTEN}{key}")):
                        self.writer.compare(written, _anew(self.folder))
                sync_folder(self.result)
                sync(self.folder)

    def refuse_full_disk(self, needed: int) -> None:
        """Raise DoesNotFitError if all that the run will write does not fit beside what it has written already."""
        taken = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.folder).free
        if needed - taken > free:
            raise DoesNotFitError(
                f"the result and the work on it take {needed / 1e9:.2f} GB of disk, {(free + taken) / 1e9:.2f} GB are "
                f"free at {self.folder.parent}; free some space or choose another output"
            )

    def own_result(self) -> AbstractContextManager[None]:
        """Around reading the result before it is published, see ``shard_writer.our_own``."""
        return our_own(self.result, _anew(self.folder))

    @property
    def sealed(self) -> bool:
        """Whether the result is complete, and may be in place already."""
        return self.finished(_SEALED) is not None

    def publish(self) -> None:
        """Put the result in place by one rename, and remove the run's folder. The result must be complete.

        Raises:
            UsageError: ``out`` has become something that may not be replaced.
            DamagedWorkError: an earlier process completed the result, and it is not as it was.
        """
        if self.ranks.writer:
            if not self.sealed:
                sync_folder(self.result)
                self.keep(_SEALED, _seal_of(self.result))
            elif not _carries(self._out, self.finished(_SEALED)):
                self._refuse_damaged_result()
            if not _carries(self._out, self.finished(_SEALED)):
                refuse_existing(self._out, self._kind, overwrite=self._overwrite)
                put_in_place(self.result, self._out, aside=self.folder / "replaced")
            self._take(_tries(self._out))
            self._empty()
            # Last, since a command that is to tidy up measures first where this is not there any more.
            self._take([work_folder(self._out, MEASURING)])
            self.remove()
        self.ranks.barrier()

    def _refuse_damaged_result(self) -> None:
        manifests = [self.result / name for name in self.finished(_SEALED) or {}]
        for manifest in manifests:
            for name, digest in json.loads(manifest.read_text(encoding="utf-8"))["files"].items():
                if not (file := self.result / name).is_file() or sha256(file) != digest:
                    raise damaged(f"{file} is missing or damaged", _anew(self.folder))

    def _take(self, parts: Iterable[Path]) -> None:
        """Move what other parts of the work for the same output left into this run's folder, to be removed with it."""
        for folder in parts:
            if folder != self.folder and (folder / _JOURNAL).is_file():
                with suppress(UsageError), alone(folder / _JOURNAL):  # one that is at work looks after itself
                    shutil.rmtree(self.folder / folder.name, ignore_errors=True)
                    folder.rename(self.folder / folder.name)

    def remove(self) -> None:
        """Remove the run's folder, the journal last: without one the rest would be nobody's."""
        if self._journal is not None:
            self._empty()
            self._journal.remove()
            with suppress(OSError):  # not there, or someone else's file is in it by now
                self.folder.rmdir()

    def _empty(self) -> None:
        """Remove all but the journal."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _JOURNAL:
                path.unlink()


def would_come_again(error: BaseException) -> bool:
    """Whether the model, the data or its numbers would cause an error in the same run again, so that it is given up."""
    return isinstance(error, _OF_THE_INPUT) and not isinstance(error, _OF_THE_WORK)


def work_folder(out: Path, part: int | str = 0) -> Path:
    """Where a run keeps its work whose result will be ``out``, or one of several parts of that work."""
    return unfinished_beside(out, f"-{part}" if part else "")


def refuse_output(out: Path, kind: Kind, *, overwrite: bool) -> None:
    """As ``refuse_existing``, but for an output that is complete and whose run only had no time to tidy up."""
    parts = [*_tries(out), work_folder(out, MEASURING)]
    if not any(_carries(out, _sealed(folder)) for folder in parts):
        for folder in parts if out.exists() else ():
            with suppress(OSError):  # not there, or not empty: all that a run may leave that was killed as it tidied up
                folder.rmdir()
        refuse_existing(out, kind, overwrite=overwrite)


def _anew(folder: Path) -> str:
    return f"delete {folder}"


def _tries(out: Path) -> Iterator[Path]:
    """The folders of all tries for an output; what is measured before them has its own."""
    return (work_folder(out, number) for number in range(_MOST_TRIES))


@contextmanager
def going_on(
    out: Path, kind: Kind, identity: Mapping[str, Any], *, overwrite: bool, ranks: Ranks = ALONE, part: int | str = 0
) -> Iterator[UnfinishedRun]:
    """The run whose result will be ``out``: a new one, or the one that was cut off.

    While it lasts SIGINT and SIGTERM let the piece of work at hand be finished and end in StoppedError; a second signal
    ends at once. If it ends before anything is finished, or by an error that the model, the data or its numbers would
    cause again, nothing is left of it; everything is left if files of its own are damaged.

    Args:
        out: folder to make, by ``UnfinishedRun.publish``.
        kind: of ``out``, see ``published``.
        identity: JSON values on which the result depends; the writer's counts.
        overwrite: replace an existing folder of this kind.
        ranks: the processes that do the run together.
        part: of the work for ``out``, where there are several: the number of a try, or ``MEASURING``. What is left of
            all of them goes when one is published.

    Raises:
        UsageError: ``out`` may not be made, another run is at work on it, what was cut off was another run, or its
            result was put in place and taken away.
        StoppedError: a stop was asked for.
    """
    out, folder = out.absolute(), work_folder(out.absolute(), part)
    if not ranks.writer:
        with ranks.agreed():
            pass  # the writer looks whether there can be a run
        with _listening(UnfinishedRun(out, folder, kind, None, ranks, overwrite=overwrite)) as run:
            yield run
        return
    with ExitStack() as held:
        with ranks.agreed():
            journal = held.enter_context(_opened(out, folder, kind, identity, overwrite=overwrite))
        run = UnfinishedRun(out, folder, kind, journal, ranks, overwrite=overwrite)
        if len(journal):
            _log.warning("going on with the run in %s", folder)
        try:
            with _listening(run):
                yield run
        except BaseException as error:
            hopeless = would_come_again(error)
            if hopeless or not len(journal):
                run.remove()
            elif not isinstance(error, (DamagedWorkError, StoppedError, AnotherTry)):
                _log.warning("what is finished is kept in %s; %s goes on from there", folder, _AGAIN)
            raise


@contextmanager
def _opened(out: Path, folder: Path, kind: Kind, identity: Mapping[str, Any], *, overwrite: bool) -> Iterator[Journal]:
    """The journal of a run that may begin or go on; meanwhile no other run has it."""
    refuse_output(out, kind, overwrite=overwrite)
    if (folder / _RESULT).is_dir() and not Journal.begun(folder / _JOURNAL):
        raise damaged(f"{folder / _JOURNAL} is missing or damaged", _anew(folder))
    if folder.exists() and not (folder / _JOURNAL).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"a run keeps its unfinished work in {folder}, and that is something else; move it away")
    measuring = work_folder(out, MEASURING)
    for other in _tries(out) if folder == measuring else [measuring]:
        if (other / _JOURNAL).is_file():
            with alone(other / _JOURNAL):
                pass  # nobody measures for an output that another makes, nor the other way round
    journal = Journal(folder / _JOURNAL, identity, resume=True, again=_AGAIN, anew=_anew(folder))
    with journal.alone():
        seal = dict(journal.items()).get(_SEALED)
        if seal is not None and not (_carries(out, seal) or _carries(folder / _RESULT, seal)):
            if (folder / _RESULT).is_dir():
                raise damaged(f"{', '.join(seal)} in {folder / _RESULT} is not", _anew(folder))
            raise UsageError(
                f"the run in {folder} has put its result in place, and it is not at {out} any more; {_anew(folder)} to "
                "begin anew"
            )
        yield journal


@contextmanager
def _listening(run: UnfinishedRun) -> Iterator[UnfinishedRun]:
    """SIGINT and SIGTERM ask the run to stop; the second time they end it."""

    def ask(number: int, frame: FrameType | None) -> None:
        if run.stop_asked:
            raise KeyboardInterrupt
        run.stop_asked = True
        _log.warning("stopping as soon as the work at hand is finished and saved; once more stops at once")

    listening = threading.current_thread() is threading.main_thread()  # no other thread may listen to signals
    before = [(number, signal.signal(number, ask)) for number in (signal.SIGINT, signal.SIGTERM) if listening]
    try:
        yield run
    except KeyboardInterrupt:
        saved = f"what is finished is saved in {run.folder}, and {_AGAIN} goes on from there"
        raise StoppedError(f"stopped; {saved if any(run.items()) else 'nothing was finished yet'}") from None
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _seal_of(result: Path) -> dict[str, str]:
    """What tells a complete result from every other folder: its manifest, which names the sha256 of all files."""
    return {path.name: sha256(path) for path in sorted(result.glob("manifest.json"))}


def _carries(folder: Path, seal: Mapping[str, str] | None) -> bool:
    """Whether a folder, the result or what was published, is the one that was sealed."""
    named = (seal or {}).items()
    return bool(named) and all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in named)


def _sealed(folder: Path) -> Mapping[str, str] | None:
    """The seal in the journal of a run that nobody may be at work on; None without one."""
    with suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        last = json.loads((folder / _JOURNAL).read_text(encoding="utf-8").splitlines()[-1])
        if last["key"] == _SEALED:
            return dict(last["piece"])
    return None
