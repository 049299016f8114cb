"""Safetensors folders read tensor by tensor, without holding a file; writing them is shard_writer.py.

A header is never trusted: names stay inside the folder, sizes must add up before anything is allocated.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from qquant import _native
from qquant.errors import BadModelError, DiskError
from qquant.json_files import parse_json, read_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_FOREIGN = ("*.gguf", "*.ggml", "*.h5", "*.msgpack", "*.onnx", "*.npz", "*.zip")
_OTHER_FILES = {b"PK": "a zip archive, perhaps of pickles", b"\x80": "a pickle", b"GGUF": "a GGUF file"}
"""What a file that is called safetensors may be instead, by its first bytes."""
PIECE = 1 << 22
"""Values checked or computed with at once: for a whole embedding that would take several times its memory."""
_LARGEST_HEADER = 32 * 2**20  # bytes, a third of the safetensors library's limit
_MOST_MARKS = 2**21  # of JSON in a header, each some 60 bytes in memory; 120,000 tensors have as many
_MARKS = (b"{", b"[", b",", b'"')
_MOST_DIMENSIONS = 16
_LONGEST_NAME = 200  # of a file; systems take 255 bytes
_NUMBER_LIMIT = 2**60  # elements or bytes; a header that claims more is damaged, and torch counts in int64
_CHUNK = 16 * 2**20  # bytes copied at a time
_OWN_MAPPING_BYTES = 32 * 2**20
"""From here on an allocator takes fresh pages for a tensor and gives them back with it. Large pages take longer to get
where memory is full of small ones, but an output projection in them is read 1.6 times as fast, at every token."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's dtype (safetensors name) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Entry:
    """Where one stored tensor lies: absolute byte range in a file."""

    file: Path
    spec: TensorSpec
    start: int


class CheckpointReader:
    """The tensors of a model folder (one safetensors file or shards with an index), read one at a time.

    Args:
        folder: model folder.
        files: files in it to read, whatever an index says; None: those that a model consists of.

    Raises:
        BadModelError: no safetensors, only pickle weights, an index that points outside the folder or at a missing
            file or tensor, or a damaged header.
    """

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        """Read and check every header; no tensor is read."""
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self.files = weight_files(folder) if files is None else list(files)
        for file in self.files:
            for name, entry in _read_header(file, self.metadata).items():
                if name in self.entries:
                    raise BadModelError(f"each tensor must be stored once, {name} is in more than one file of {folder}")
                self.entries[name] = entry
        index = folder / INDEX_NAME
        if files is not None or self.files == [folder / SINGLE_NAME] or not index.exists():
            return
        for name, file_name in _weight_map(index).items():
            if name not in self.entries or self.entries[name].file != folder / file_name:
                raise BadModelError(f"the index of {folder} says that {file_name} holds {name}, and it does not")

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return self._entry(name).spec

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own, on the CPU."""
        entry = self._entry(name)
        if entry.spec.nbytes == 0:
            return torch.empty(entry.spec.shape, dtype=DTYPES[entry.spec.dtype], device="cpu")
        buffer = torch.empty(entry.spec.nbytes, dtype=torch.uint8, device="cpu")
        host = _native.host()
        if host is not None and buffer.nbytes >= _OWN_MAPPING_BYTES:
            host.prefer_large_pages(buffer.data_ptr(), buffer.nbytes)
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            _read_fully(stream, bytes_of(buffer), entry)
        return buffer.view(DTYPES[entry.spec.dtype]).reshape(entry.spec.shape)

    def has_rows(self, name: str) -> bool:
        """Whether ``rows`` of a tensor can be read."""
        return True

    def rows(self, name: str, places: Sequence[int]) -> Tensor:
        """Some rows of a matrix, in the order asked for and in memory of their own, on the CPU."""
        entry = self._entry(name)
        count, *rest = entry.spec.shape
        assert all(0 <= place < count for place in places), f"{name} has {count} rows"
        size = entry.spec.nbytes // max(1, count)
        buffer = torch.empty(len(places), size, dtype=torch.uint8, device="cpu")
        with entry.file.open("rb", buffering=0) as stream:
            for place, row in zip(places, buffer, strict=True):
                stream.seek(entry.start + place * size)
                _read_fully(stream, bytes_of(row), entry)
        return buffer.view(DTYPES[entry.spec.dtype]).reshape(len(places), *rest)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's values piece by piece, flattened: memory stays at one piece whatever the size."""
        entry = self._entry(name)
        dtype = DTYPES[entry.spec.dtype]
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            left = entry.spec.nbytes
            while left:
                buffer = torch.empty(min(left, _CHUNK), dtype=torch.uint8, device="cpu")
                _read_fully(stream, bytes_of(buffer), entry)
                left -= buffer.numel()
                yield buffer.view(dtype)

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise BadModelError(f"tensor {name} is missing from {self.folder}; get the model again")
        return self.entries[name]


def read_ahead(entries: Iterable[Entry]) -> None:
    """Have the system bring tensors into its cache of files, in the background and in no memory of ours.

    A hint and no more: where the system has no such call or refuses it, nothing happens.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    wanted = list(entries)

    def advise() -> None:
        for file in {entry.file for entry in wanted}:
            with suppress(OSError), file.open("rb") as stream:
                for entry in wanted:
                    if entry.file == file:
                        os.posix_fadvise(stream.fileno(), entry.start, entry.spec.nbytes, os.POSIX_FADV_WILLNEED)

    # The call itself waits where more is asked for than the disk's queue takes.
    threading.Thread(target=advise, daemon=True).start()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder in a fixed order; see ``CheckpointReader`` for what is refused."""
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        for name in names:
            if not _inside(folder, name):
                raise BadModelError(
                    f"an index may only name files inside the model folder, {folder} names {name[:_LONGEST_NAME]!r}"
                )
            if not (folder / name).is_file():
                raise BadModelError(f"the index of {folder} names {name}, which is not there; download it again")
            if not name.endswith(".safetensors"):
                raise BadModelError(
                    f"weights must be safetensors, the index of {folder} names {name}; other kinds of files can run "
                    "code when opened, convert them first in an environment you trust"
                )
        if len({name.casefold() for name in names}) != len(names):
            raise BadModelError(
                f"the index of {folder} names files that differ only in case, which some systems take for one; "
                "rename them"
            )
        if single.is_file() and names != [SINGLE_NAME]:
            raise BadModelError(
                f"{folder} holds both {SINGLE_NAME} and an index of other files, and readers differ on which counts; "
                "remove the one that does not belong"
            )
        return [folder / name for name in names]
    others = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        if not _inside(folder, others[0].name):
            raise BadModelError(
                f"weights must lie inside the model folder, {others[0]} is a link out of it; put the file itself there"
            )
        return others
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles and not others:
        raise BadModelError(
            f"weights must be safetensors, {folder} has pickle files ({pickles[0]}), which can run code when opened; "
            "convert them first with safetensors' own converter, in an environment you trust"
        )
    foreign = sorted(path.name for pattern in _FOREIGN for path in folder.glob(pattern))
    if foreign and not others:
        raise BadModelError(f"weights must be safetensors, {folder} has {foreign[0]}; get the model in that format")
    found = [path.name for path in others] or "none"
    raise BadModelError(f"a model folder must hold {SINGLE_NAME} or {INDEX_NAME}; safetensors in {folder}: {found}")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = read_json(index)["weight_map"]
    except (BadModelError, KeyError) as error:
        raise BadModelError(f"{index} must be JSON with a weight_map, got {type(error).__name__}: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadModelError(f"the weight_map of {index} must map tensor names to file names")
    return weight_map


def _inside(folder: Path, name: str) -> bool:
    path = PurePosixPath(name)
    if len(name) > _LONGEST_NAME or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        return False
    home, target = folder.resolve(), (folder / name).resolve()
    # A hub cache keeps a model's files as links to a neighbouring folder of blobs; those are the one exception.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return target.is_relative_to(home) or target.is_relative_to(blobs)


def _read_header(file: Path, metadata: dict[str, str]) -> dict[str, Entry]:
    """Every entry of one file, checked as the safetensors library does: nothing overlaps, nothing is left over."""
    if not file.is_file():  # opening a pipe would wait for ever
        raise BadModelError(f"{file} must be a file, and it is a folder, a pipe or a device; get the model again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _LARGEST_HEADER):
            other = next((f" ({kind})" for begin, kind in _OTHER_FILES.items() if prefix.startswith(begin)), "")
            raise BadModelError(
                f"{file} is not a whole safetensors file{other}: its header does not fit its {size} bytes"
            )
        text = stream.read(length)
    try:
        if not text.startswith(b"{"):  # as the library has it; JSON would allow white space
            raise ValueError("it does not begin with an object")
        if sum(map(text.count, _MARKS)) > _MOST_MARKS:
            raise ValueError("it lists more than any model has")
        header = parse_json(text)
    except ValueError as error:
        raise BadModelError(f"{file} has a damaged safetensors header: {error}") from error
    notes = header.pop("__metadata__", None) if isinstance(header, dict) else ""
    notes = {} if notes is None else notes
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise BadModelError(f"{file} has a damaged safetensors header: not an object, or metadata that is not text")
    metadata.update(notes)
    places = {name: _place(file, name, value) for name, value in header.items()}
    entries, end_before = {}, 0
    for name, (start, end, spec) in sorted(places.items(), key=lambda item: item[1][:2]):
        if start != end_before or end - start != spec.nbytes or 8 + length + end > size:
            raise BadModelError(f"{name} in {file} does not fit the file: it is truncated or damaged, get it again")
        entries[name] = Entry(file, spec, 8 + length + start)
        end_before = end
    if 8 + length + end_before != size:
        raise BadModelError(f"{file} holds bytes that belong to no tensor; it is damaged, get it again")
    return entries


def _place(file: Path, name: str, value: Any) -> tuple[int, int, TensorSpec]:
    """First byte, end and spec of one header entry."""

    def counts(key: str) -> list[int]:
        numbers = value[key]
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < _NUMBER_LIMIT for n in numbers):
            raise ValueError(f"{key} must be a list of counts")
        return numbers

    try:
        dtype, shape, (start, end) = str(value["dtype"]), tuple(counts("shape")), counts("data_offsets")
        if len(shape) > _MOST_DIMENSIONS or math.prod(n for n in shape if n) >= _NUMBER_LIMIT:
            raise ValueError("shape is larger than any memory")
    except (KeyError, TypeError, ValueError) as error:
        raise BadModelError(f"{file} has a damaged entry for {name}: {error}") from error
    if dtype not in DTYPES:
        raise BadModelError(f"{name} in {file} has dtype {dtype[:20]}; known: {', '.join(DTYPES)}")
    return start, end, TensorSpec(dtype, shape)


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, shared, not copied."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array)


def _read_fully(stream: RawIOBase, view: memoryview, entry: Entry) -> None:
    while len(view):
        count = stream.readinto(view)
        if not count:
            raise DiskError(f"{entry.file} ended early: it changed while it was read; the same command reads it again")
        view = view[count:]
