"""How a folder appears: built beside its target, forced to disk, and put in place by one rename, or not at all.

What goes into the folder, and which existing folder may be replaced by it, is the caller's to say.
"""

from __future__ import annotations

import os
import shutil
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
        _sync_folder(staging)
        refuse_existing(out, kind, overwrite=overwrite)
        if out.exists():
            _exchange(staging, out)
        else:
            staging.rename(out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # someone else's file is in it by now
                folder.rmdir()
        raise


def _exchange(staging: Path, out: Path) -> None:
    """Put ``staging`` in the place of ``out``; the old folder comes back if that fails."""
    retired = out.parent / f".{out.name}.replaced-{os.getpid()}"
    out.rename(retired)
    try:
        staging.rename(out)
    except BaseException:
        retired.rename(out)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
