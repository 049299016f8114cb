"""Safetensors folders, tensor by tensor: read one without holding a file, write one whose tensors arrive late.

The reader never trusts a header: names stay inside the folder, sizes must add up before anything is allocated. The
writer lays out every shard beforehand, so disk space is taken at the start and no tensor waits in memory.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from qquant import _native
from qquant.errors import BadModelError, DoesNotFitError

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
PIECE = 1 << 22
"""Values checked or computed with at once: for a whole embedding that would take several times its memory."""
_LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
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
            _read_fully(stream, _bytes_of(buffer), entry)
        return buffer.view(DTYPES[entry.spec.dtype]).reshape(entry.spec.shape)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's values piece by piece, flattened: memory stays at one piece whatever the size."""
        entry = self._entry(name)
        dtype = DTYPES[entry.spec.dtype]
        with entry.file.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            left = entry.spec.nbytes
            while left:
                buffer = torch.empty(min(left, _CHUNK), dtype=torch.uint8, device="cpu")
                _read_fully(stream, _bytes_of(buffer), entry)
                left -= buffer.numel()
                yield buffer.view(dtype)

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise BadModelError(f"tensor {name} is missing from {self.folder}; get the model again")
        return self.entries[name]


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor Inf, without a second tensor of its size."""
    if tensor.numel() == 0:
        return True
    # The extremes of anything that holds NaN are NaN, see torch.aminmax; 20 times as fast as isfinite().all().
    low, high = tensor.detach().aminmax()
    return bool(low.isfinite() & high.isfinite())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder in a fixed order; see ``CheckpointReader`` for what is refused."""
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        for name in names:
            _refuse_outside(folder, name)
            if not (folder / name).is_file():
                raise BadModelError(f"the index of {folder} names {name}, which is not there; download it again")
        if single.is_file() and names != [SINGLE_NAME]:
            raise BadModelError(
                f"{folder} holds both {SINGLE_NAME} and an index of other files, and readers differ on which counts; "
                "remove the one that does not belong"
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    others = sorted(folder.glob("*.safetensors"))
    if len(others) == 1:
        return others
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles and not others:
        raise BadModelError(
            f"weights must be safetensors, {folder} has pickle files ({pickles[0]}), which can run code when opened; "
            "convert them first with safetensors' own converter, in an environment you trust"
        )
    found = [path.name for path in others] or "none"
    raise BadModelError(f"a model folder must hold {SINGLE_NAME} or {INDEX_NAME}; safetensors in {folder}: {found}")


class ShardWriter:
    """Writes a safetensors checkpoint whose tensors become known one after the other, in any order.

    Every file is created at its final size with its header at once; ``write`` fills in one tensor's bytes.

    Args:
        folder: existing folder to write into.
        plan: every tensor that will be written, in the order in which they are laid out.
        max_shard_bytes: a new shard begins before one grows past this.

    Raises:
        DoesNotFitError: less disk space is free than the plan needs.
    """

    def __init__(self, folder: Path, plan: Mapping[str, TensorSpec], *, max_shard_bytes: int) -> None:
        """Create all shards; the disk space is taken from here on."""
        total = sum(spec.nbytes for spec in plan.values())
        free = shutil.disk_usage(folder).free
        if total + 2**20 * 16 > free:
            raise DoesNotFitError(
                f"the checkpoint needs {total / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free at {folder}; "
                "free some space or choose another --out"
            )
        self._folder = folder
        self._pending = dict(plan)
        self._places: dict[str, tuple[str, int]] = {}
        shards = _split(plan, max_shard_bytes)
        names = [SINGLE_NAME]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for file_name, tensors in zip(names, shards, strict=True):
            self._create(file_name, {name: plan[name] for name in tensors})
        if len(shards) > 1:
            weight_map = {name: self._places[name][0] for name in plan}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor; dtype and shape must be the planned ones."""
        planned = self._pending[name]
        got = TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        assert got == planned, f"{name}: planned {planned}, got {got}"
        self.write_chunks(name, [tensor.detach().cpu().contiguous().reshape(-1)])

    def write_chunks(self, name: str, chunks: Iterator[Tensor] | Sequence[Tensor]) -> None:
        """Write one tensor from flattened pieces."""
        spec = self._pending.pop(name)
        file_name, start = self._places[name]
        written = 0
        with (self._folder / file_name).open("r+b", buffering=0) as stream:
            stream.seek(start)
            for chunk in chunks:
                data = _bytes_of(chunk)
                while len(data):
                    count = stream.write(data)
                    data = data[count:]
                    written += count
        assert written == spec.nbytes, f"{name}: {written} bytes of {spec.nbytes}"

    def close(self) -> None:
        """Check that every planned tensor was written and force all files to disk."""
        assert not self._pending, f"never written: {sorted(self._pending)}"
        for file_name in {file_name for file_name, _ in self._places.values()}:
            with (self._folder / file_name).open("rb") as stream:
                os.fsync(stream.fileno())

    def _create(self, file_name: str, tensors: Mapping[str, TensorSpec]) -> None:
        text, starts = _header(tensors)
        for name in tensors:
            self._places[name] = (file_name, 8 + len(text) + starts[name])
        offset = sum(spec.nbytes for spec in tensors.values())
        with (self._folder / file_name).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.flush()
            if hasattr(os, "posix_fallocate") and offset:
                os.posix_fallocate(stream.fileno(), 8 + len(text), offset)
            else:  # macOS has no such call; the file then gets its size, but not yet its blocks
                stream.truncate(8 + len(text) + offset)


def written_bytes(plan: Mapping[str, TensorSpec], *, max_shard_bytes: int) -> int:
    """Bytes of all weight files that a ``ShardWriter`` makes of a plan, headers included."""
    shards = ({name: plan[name] for name in names} for names in _split(plan, max_shard_bytes))
    return sum(8 + len(_header(shard)[0]) for shard in shards) + sum(spec.nbytes for spec in plan.values())


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


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadModelError(f"{index} must be JSON with a weight_map, got {type(error).__name__}: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise BadModelError(f"the weight_map of {index} must map tensor names to file names")
    return weight_map


def _refuse_outside(folder: Path, name: str) -> None:
    path = PurePosixPath(name)
    if not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name:
        home, target = folder.resolve(), (folder / name).resolve()
        # A hub cache keeps a model's files as links to a neighbouring folder of blobs; those are the one exception.
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if target.is_relative_to(home) or target.is_relative_to(blobs):
            return
    raise BadModelError(f"an index may only name files inside the model folder, {folder} names {name!r}")


def _read_header(file: Path, metadata: dict[str, str]) -> dict[str, Entry]:
    """Every entry of one file, checked as the safetensors library does: nothing overlaps, nothing is left over."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise BadModelError(f"{file} is not a whole safetensors file: its header does not fit its {size} bytes")
        text = stream.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise BadModelError(f"{file} has a damaged safetensors header: {error}") from error
    notes = header.pop("__metadata__", None) or {} if isinstance(header, dict) else None
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
        if math.prod(n for n in shape if n) >= _NUMBER_LIMIT:
            raise ValueError("shape is larger than any memory")
    except (KeyError, TypeError, ValueError) as error:
        raise BadModelError(f"{file} has a damaged entry for {name}: {error}") from error
    if dtype not in DTYPES:
        raise BadModelError(f"{name} in {file} has dtype {dtype[:20]}; known: {', '.join(DTYPES)}")
    return start, end, TensorSpec(dtype, shape)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name appears twice")
    return content


def _bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes, shared, not copied."""
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array)


def _read_fully(stream: RawIOBase, view: memoryview, entry: Entry) -> None:
    while len(view):
        count = stream.readinto(view)
        if not count:
            raise BadModelError(f"{entry.file} ended early; it changed while it was read")
        view = view[count:]
