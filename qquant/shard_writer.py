"""Safetensors folders whose tensors arrive late: every file has its final size and header from the start.

So disk space is taken before anything is computed, no tensor waits in memory, and a run that was cut off can go on
in the same files. Reading is shards.py; here it is only put behind a check that a file is as we left it.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qquant.errors import BadModelError, DamagedWorkError, DoesNotFitError
from qquant.shards import DTYPE_NAMES, DTYPES, INDEX_NAME, SINGLE_NAME, CheckpointReader, TensorSpec, bytes_of

_SPARE_BYTES = 16 * 2**20
"""Left free beside what a plan takes."""
_ONE_FILE = 1 << 62  # bytes
_PIECE_BYTES = 2**22
"""Of a file that are compared at a time."""
_CRC = ".crc32"
"""Behind a tensor's name: that of its checksum, in the same file."""


class ShardWriter:
    """Writes a safetensors checkpoint whose tensors become known one after the other, in any order.

    Every file is created at its final size with its header at once; ``write`` fills in one tensor's bytes, again if it
    is called again.

    Args:
        folder: existing folder to write into.
        plan: every tensor that will be written, in the order in which they are laid out.
        max_shard_bytes: a new shard begins before one grows past this.
        going_on: keep the files of an earlier writer with the same plan, and what is in them.
        anew: where such files hold what is finished, what a user does if one of them is lost; None: it is made again.

    Raises:
        DoesNotFitError: less disk space is free than the plan needs.
        DamagedWorkError: a file that holds what is finished is not there or has another layout.
    """

    def __init__(
        self,
        folder: Path,
        plan: Mapping[str, TensorSpec],
        *,
        max_shard_bytes: int,
        going_on: bool = False,
        anew: str | None = None,
    ) -> None:
        """Create all shards; the disk space is taken from here on."""
        self._folder = folder
        self._plan = dict(plan)
        self._unwritten = set(plan)
        self._unsynced: set[str] = set()
        self._checksums: dict[str, int] = {}
        self._places: dict[str, tuple[str, int]] = {}
        shards = [{name: plan[name] for name in names} for names in _split(plan, max_shard_bytes)]
        names = [SINGLE_NAME]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        files = {name: _Layout(shard) for name, shard in zip(names, shards, strict=True)}
        for file_name, layout in files.items():
            self._places |= {name: (file_name, start) for name, start in layout.starts.items()}
        missing = [name for name in names if not (going_on and files[name].is_of(folder / name))]
        if missing and anew is not None:
            raise damaged(f"{folder / missing[0]} is missing or damaged", anew)
        needed, free = sum(files[name].size for name in missing), shutil.disk_usage(folder).free
        if missing and needed + _SPARE_BYTES > free:
            raise DoesNotFitError(
                f"the checkpoint needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free at {folder}; "
                "free some space or choose another --out"
            )
        for name in missing:
            files[name].create(folder / name)
        if len(shards) > 1:
            weight_map = {name: self._places[name][0] for name in plan}
            total = sum(spec.nbytes for spec in plan.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
            file = folder / INDEX_NAME
            if not file.is_file() or file.read_bytes() != text:
                file.write_bytes(text)

    def write(self, name: str, tensor: Tensor) -> int:
        """Write one tensor; dtype and shape must be the planned ones. Returns its CRC-32."""
        planned = self._plan[name]
        got = TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        assert got == planned, f"{name}: planned {planned}, got {got}"
        return self.write_chunks(name, [tensor.detach().cpu().contiguous().reshape(-1)])

    def write_chunks(self, name: str, chunks: Iterator[Tensor] | Sequence[Tensor]) -> int:
        """Write one tensor from flattened pieces; returns its CRC-32."""
        spec = self._plan[name]
        file_name, start = self._places[name]
        written = checksum = 0
        self._unsynced.add(file_name)
        with (self._folder / file_name).open("r+b", buffering=0) as stream:
            stream.seek(start)
            for chunk in chunks:
                data = bytes_of(chunk)
                checksum = zlib.crc32(data, checksum)
                while len(data):
                    count = stream.write(data)
                    data = data[count:]
                    written += count
        assert written == spec.nbytes, f"{name}: {written} bytes of {spec.nbytes}"
        self._unwritten.discard(name)
        self._checksums[name] = checksum
        return checksum

    def written_before(self, names: Iterable[str]) -> None:
        """Take it that an earlier writer of these files wrote these tensors."""
        self._unwritten.difference_update(names)

    def compare(self, checksums: Mapping[str, int], anew: str) -> None:
        """Raise DamagedWorkError if a tensor that an earlier writer of these files wrote is not as it was written.

        Args:
            checksums: as that writer gave them.
            anew: what a user does then.
        """
        for name, expected in checksums.items():
            file_name, start = self._places[name]
            found, left = 0, self._plan[name].nbytes
            with (self._folder / file_name).open("rb") as stream:
                stream.seek(start)
                while left and (data := stream.read(min(left, _PIECE_BYTES))):
                    found, left = zlib.crc32(data, found), left - len(data)
            if found != expected:
                raise damaged(f"{self._folder / file_name} is damaged (the checksum of {name} differs)", anew)

    def take_checksums(self) -> dict[str, int]:
        """The CRC-32 of every tensor that was written since this was asked last."""
        taken, self._checksums = self._checksums, {}
        return taken

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        for file_name in sorted(self._unsynced):
            with (self._folder / file_name).open("rb") as stream:
                os.fsync(stream.fileno())
        self._unsynced.clear()

    def close(self) -> None:
        """Check that every planned tensor was written and force all files to disk."""
        assert not self._unwritten, f"never written: {sorted(self._unwritten)}"
        self.sync()


class CheckedTensors:
    """A folder with one file of tensors that are written and read in turns, by several processes, and later ones.

    Each has a checksum beside it, which whoever did not write the tensor himself compares once.

    Args:
        folder: existing folder.
        specs: every tensor.
        anew: what a user does where the file is damaged.
        kept: whether the file has been made before and holds what is finished.

    Raises:
        DoesNotFitError: as ``ShardWriter``.
        DamagedWorkError: as ``ShardWriter``.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], *, anew: str, kept: bool) -> None:
        """Open the file, or make it."""
        plan = {**specs, **{f"{name}{_CRC}": TensorSpec("I64", ()) for name in specs}}
        lost = anew if kept else None
        self._writer = ShardWriter(folder, plan, max_shard_bytes=_ONE_FILE, going_on=True, anew=lost)
        self._reader, self._folder, self._anew = CheckpointReader(folder), folder, anew
        self._sound: set[str] = set()

    def write(self, name: str, tensor: Tensor) -> None:
        """Keep one tensor, or replace it."""
        self._writer.write(f"{name}{_CRC}", torch.tensor(self._writer.write(name, tensor)))
        self._sound.add(name)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU; DamagedWorkError if it is not what was written."""
        with our_own(self._folder, self._anew):
            tensor = self._reader.read(name)
            if name not in self._sound:
                if not torch.equal(_checksum(tensor), self._reader.read(f"{name}{_CRC}")):
                    raise BadModelError(f"the checksum of {name} differs")
                self._sound.add(name)
        return tensor

    def expect(self, name: str, tensor: Tensor) -> None:
        """Raise DamagedWorkError if a tensor is not this one: the file is of another moment than the journal."""
        if not torch.equal(self.read(name), tensor):
            raise damaged(f"{self._folder} is of another moment than the journal beside it", self._anew)

    def sync(self) -> None:
        """Wait until everything written here is on the disk."""
        self._writer.sync()


@contextmanager
def our_own(folder: Path, anew: str) -> Iterator[None]:
    """Around reading a folder that we wrote: what is bad in it was damaged since.

    Raises:
        DamagedWorkError: in the place of BadModelError; ``anew`` says what a user does.
    """
    try:
        yield
    except BadModelError as error:
        raise damaged(f"{folder} is damaged ({error})", anew) from error


def damaged(what: str, anew: str) -> DamagedWorkError:
    """The error of a run whose own files are not as it left them: what is wrong, and what a user does then."""
    return DamagedWorkError(f"what is finished must stay as it was written, and {what}; {anew} to begin anew")


def _checksum(tensor: Tensor) -> Tensor:
    return torch.tensor(zlib.crc32(bytes_of(tensor.detach().cpu().contiguous().reshape(-1))))


class _Layout:
    """One file: its header, and where each tensor begins."""

    def __init__(self, tensors: Mapping[str, TensorSpec]) -> None:
        text, starts = _header(tensors)
        self.head = len(text).to_bytes(8, "little") + text
        self.starts = {name: len(self.head) + start for name, start in starts.items()}
        self.size = len(self.head) + sum(spec.nbytes for spec in tensors.values())

    def is_of(self, file: Path) -> bool:
        """Whether a file is there, whole, with this layout."""
        if not file.is_file() or file.stat().st_size != self.size:
            return False
        with file.open("rb") as stream:
            return stream.read(len(self.head)) == self.head

    def create(self, file: Path) -> None:
        """Take the file's disk space, then write its header: a file with both is whole."""
        with file.open("wb") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, self.size)
            else:  # macOS has no such call; the file then gets its size, but not yet its blocks
                stream.truncate(self.size)
            stream.write(self.head)


def written_bytes(plan: Mapping[str, TensorSpec], *, max_shard_bytes: int) -> int:
    """Bytes of all weight files that a ``ShardWriter`` makes of a plan, headers included."""
    return sum(_Layout({name: plan[name] for name in names}).size for names in _split(plan, max_shard_bytes))


def _header(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The JSON in front of a file's tensors, and where each begins behind it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    offset = 0
    for name, spec in tensors.items():
        starts[name] = offset
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8), starts


def _split(plan: Mapping[str, TensorSpec], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in plan.items():
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    # safetensors wants wider elements first inside a file, so that every tensor is aligned to its element size.
    return [sorted(shard, key=lambda name: -DTYPES[plan[name].dtype].itemsize) for shard in shards]
