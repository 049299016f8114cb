"""A run whose n-th call to the operating system fails, or kills it: the functions of Python that write, wrapped.

By hand: ``python -m tests.reliability.faulty --room DIR --fail kill-after:17 -- --model M --out DIR/out ...`` runs
``python -m qquant.gptq`` with the arguments behind ``--``; without ``--fail`` it prints the calls. Nothing in qquant
knows of this. What is wrapped: files opened for writing, and the functions of ``os`` in ``_WITH_PATH`` and
``_WITH_DESCRIPTOR``; what compiled code writes by itself is not seen.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_WITH_PATH = ("mkdir", "unlink", "remove", "rmdir", "truncate")
_WITH_TWO_PATHS = ("rename", "replace", "link")
_WITH_DESCRIPTOR = ("write", "pwrite", "writev", "fsync", "fdatasync", "ftruncate", "posix_fallocate", "sendfile")
_NEW_BYTES = {"open", "write", "pwrite", "writev", "posix_fallocate", "sendfile", "mkdir"}
"""What a full disk refuses; it still lets files go, and gives their space to whoever comes next."""
_WRITING = os.O_WRONLY | os.O_RDWR


class Call(NamedTuple):
    """A call that touches the folder in which the output is made."""

    operation: str
    file: str
    """Its path in that folder, with N for every number, and ``old -> new`` where something is renamed."""


class Fault(NamedTuple):
    """What happens at one call."""

    kind: str
    """``kill-before``, ``kill-half`` (of a write), ``kill-after``; ``stop``: SIGSTOP before; ``term``, ``int``: a
    signal before; ``ENOSPC``, ``EIO`` and so on: the call fails; ``half-ENOSPC``: a write writes half before;
    ``ENOSPC+``: so does every later call that needs space, ``EIO+``: every later call at all."""
    number: int
    """Of the call, from 1."""

    @classmethod
    def parse(cls, text: str) -> Fault:
        kind, _, number = text.rpartition(":")
        return cls(kind, int(number))


class Meddler:
    """Counts calls inside one folder and brings about the faults."""

    def __init__(self, room: Path, faults: Sequence[Fault], census: Path | None) -> None:
        self._room = os.path.realpath(room)
        self._faults = {fault.number: fault.kind for fault in faults}
        self._lasting: str | None = None
        self._count = 0
        self._census = None if census is None else os.open(census, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._write = os.write

    def meet(
        self,
        operation: str,
        paths: Sequence[Any],
        perform: Callable[[], Any],
        half: Callable[[], Any] | None = None,
    ) -> Any:
        """Perform one call, or what is to happen in its stead."""
        inside = [self._inside(path) for path in paths]
        if not any(inside):
            return perform()
        self._count += 1
        if self._census is not None:
            self._write(self._census, (json.dumps([operation, " -> ".join(map(str, inside))]) + "\n").encode())
        kind = self._faults.get(self._count, self._lasting)
        if kind is None:
            return perform()
        name = kind.removeprefix("half-")
        if name.endswith("+"):
            self._lasting, name = kind, name.removesuffix("+")
            if name == "ENOSPC" and operation not in _NEW_BYTES:
                return perform()
        if kind.startswith("kill"):
            if kind == "kill-half" and half is not None:
                half()
            elif kind == "kill-after":
                perform()
            os.kill(os.getpid(), signal.SIGKILL)
        if name in ("stop", "term", "int"):
            os.kill(os.getpid(), getattr(signal, f"SIG{name.upper()}"))
            return perform()
        if kind.startswith("half-") and half is not None:
            half()
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number), str(paths[0]))

    def _inside(self, path: Any) -> str | None:
        """The normalized path inside the room; None outside of it."""
        text = os.path.abspath(os.fsdecode(path))
        text = os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
        if text != self._room and not text.startswith(self._room + os.sep):
            return None
        return re.sub(r"\d+", "N", os.path.relpath(text, self._room))


class _CountedFile(io.FileIO):
    """A file whose every write to the system is a call that may fail."""

    meddler: Meddler

    def write(self, data: Any, /) -> Any:
        view = memoryview(data).cast("B")

        def some(part: memoryview) -> int | None:
            return super(_CountedFile, self).write(part)

        return self.meddler.meet(
            "write", [_path_of(self.fileno())], lambda: some(view), lambda: some(view[: len(view) // 2])
        )

    def truncate(self, size: int | None = None, /) -> int:
        cut: int = self.meddler.meet(
            "truncate", [_path_of(self.fileno())], lambda: super(_CountedFile, self).truncate(size)
        )
        return cut


def install(room: Path, faults: Sequence[Fault] = (), census: Path | None = None) -> None:
    """Wrap the functions for the rest of this process.

    Args:
        room: calls that touch what lies in it are counted.
        faults: what happens at which of them.
        census: a JSON line is added to this file for each of them, before it is performed; must lie outside.
    """
    meddler = Meddler(room, faults, census)
    for name in _WITH_PATH + _WITH_TWO_PATHS:
        setattr(os, name, _on_paths(meddler, name, getattr(os, name), 2 if name in _WITH_TWO_PATHS else 1))
    for name in _WITH_DESCRIPTOR:
        if hasattr(os, name):
            setattr(os, name, _on_descriptor(meddler, name, getattr(os, name)))
    setattr(os, "open", _on_open(meddler, os.open))  # noqa: B010  mypy forbids the assignment
    opened = _on_files(meddler, io.open)
    setattr(builtins, "open", opened)  # noqa: B010
    setattr(io, "open", opened)  # noqa: B010
    plain: Any = ctypes.CDLL.__getattr__

    def looked_up(library: Any, name: str) -> Any:
        found = plain(library, name)
        return _on_renameat2(meddler, found) if name == "renameat2" else found

    setattr(ctypes.CDLL, "__getattr__", looked_up)  # noqa: B010


def _on_paths(meddler: Meddler, name: str, plain: Callable[..., Any], count: int) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        folders = [options.get("dir_fd", options.get("src_dir_fd")), options.get("dir_fd", options.get("dst_dir_fd"))]
        places = [_beside(path, folder) for path, folder in zip(arguments[:count], folders, strict=False)]
        return meddler.meet(name, places, lambda: plain(*arguments, **options))

    return call


def _beside(path: Any, folder: int | None) -> Any:
    if isinstance(path, int):
        return _path_of(path)
    return path if folder is None else os.path.join(_path_of(folder), os.fsdecode(path))


def _on_descriptor(meddler: Meddler, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(descriptor: Any, *arguments: Any, **options: Any) -> Any:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()

        def half() -> Any:
            return plain(descriptor, arguments[0][: len(arguments[0]) // 2], *arguments[1:])

        return meddler.meet(
            name,
            [_path_of(number)],
            lambda: plain(descriptor, *arguments, **options),
            half if name in ("write", "pwrite") else None,
        )

    return call


def _on_open(meddler: Meddler, plain: Callable[..., int]) -> Callable[..., int]:
    def call(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        def perform() -> int:
            return plain(path, flags, mode, dir_fd=dir_fd)

        if not flags & _WRITING:
            return perform()
        opened: int = meddler.meet("open", [_beside(path, dir_fd)], perform)
        return opened

    return call


def _on_files(meddler: Meddler, plain: Callable[..., Any]) -> Callable[..., Any]:
    kind = type("CountedFile", (_CountedFile,), {"meddler": meddler})

    def call(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not set(mode) & set("wax+") or opener is not None or not isinstance(file, str | bytes | os.PathLike):
            return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = meddler.meet("open", [file], lambda: kind(file, mode.replace("b", "").replace("t", "")))
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

    return call


def _on_renameat2(meddler: Meddler, plain: Any) -> Any:
    """libc's function as ctypes gives it: (folder, old, folder, new, flags), -1 and errno for an error."""

    class Wrapped:
        def __setattr__(self, name: str, value: Any) -> None:
            setattr(plain, name, value)

        def __call__(self, *arguments: Any) -> Any:
            old, new = (getattr(arguments[i], "value", arguments[i]) for i in (1, 3))
            try:
                return meddler.meet("renameat2", [old, new], lambda: plain(*arguments))
            except OSError as error:
                ctypes.set_errno(error.errno or 0)
                return -1

    return Wrapped()


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")


def _main(words: list[str]) -> None:
    """Read the command line by hand: an argument parser would open files of its own."""
    split = words.index("--")
    options, arguments = words[:split], words[split + 1 :]
    pairs = list(zip(options[::2], options[1::2], strict=True))
    room = next(Path(value) for key, value in pairs if key == "--room")
    faults = [Fault.parse(value) for key, value in pairs if key == "--fail"]
    import typer

    from qquant.gptq import quantize_command

    install(room, faults, None if faults else Path("/dev/stderr"))
    sys.argv = ["gptq", *arguments]
    typer.run(quantize_command)


if __name__ == "__main__":
    _main(sys.argv[1:])
