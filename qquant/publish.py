"""How a folder appears: built beside its target, forced to disk, and put in place by one rename, or not at all.

What goes into the folder, and which existing folder may be replaced by it, is the caller's to say.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qquant.errors import UsageError


@dataclass(frozen=True)
class Kind:
    """A kind of folder that a command makes."""

    name: str
    """As an error names it: "a report folder"."""
    recognizes: Callable[[Path], bool]
    """Whether an existing folder with something in it is of this kind, so that --overwrite may replace it."""


REPORT_FOLDER = Kind("a report folder", lambda folder: (folder / "report.json").exists())


def refuse_existing(out: Path, kind: Kind, *, overwrite: bool) -> None:
    """Only a folder of the same kind (or an empty one) is ever replaced, and only if asked for.

    Raises:
        UsageError: ``out`` cannot become a new folder.
    """
    if not out.exists() and not out.is_symlink():
        nearest = next(folder for folder in out.absolute().parents if folder.exists() or folder.is_symlink())
        if not nearest.is_dir():
            raise UsageError(f"the output must be a folder that can be made, and {nearest} on its way is a file")
        return
    if not overwrite:
        raise UsageError(f"the output must not exist yet, {out} does; choose another or pass --overwrite")
    if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not kind.recognizes(out)):
        raise UsageError(f"--overwrite replaces {kind.name}, {out} is not one; choose another output")


@contextmanager
def published(out: Path, kind: Kind, *, overwrite: bool) -> Iterator[Path]:
    """A staging folder beside ``out`` that becomes ``out`` in one rename when the block ends without an error.

    Raises:
        UsageError: ``out`` exists and ``overwrite`` is False, or is not a folder of this kind.
    """
    refuse_existing(out, kind, overwrite=overwrite)
    out = out.absolute()
    made = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        yield staging
        sync_folder(staging)
        refuse_existing(out, kind, overwrite=overwrite)
        put_in_place(staging, out, aside=out.parent / f".{out.name}.replaced-{os.getpid()}")
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # someone else's file is in it by now
                folder.rmdir()
        raise


def put_in_place(new: Path, out: Path, *, aside: Path) -> None:
    """Let the folder ``new`` become ``out``; an ``out`` that is there is removed. Waits until it is on the disk.

    Where the system can exchange two folders in one step (Linux, most file systems), there is always a whole one at
    ``out``. Elsewhere the old one is moved ``aside`` first, and comes back if the new one cannot take its place.
    """
    if not out.exists():
        new.rename(out)
        sync(out.parent)
        return
    if not _exchanged(new, out):
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
        try:
            new.rename(out)
        except BaseException:
            aside.rename(out)
            raise
    sync(out.parent)
    for old in (new, aside):
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(new: Path, out: Path) -> bool:
    """Whether the two folders could change their names in one step."""
    if sys.platform != "linux" or (renameat2 := getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)) is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(new), here, os.fsencode(out), exchange) == 0)


def sync_folder(folder: Path) -> None:
    """Wait until the files directly in a folder, and their names, are on the disk."""
    for path in [*folder.iterdir(), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Wait until one file, or the names in one folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
