"""Our safetensors reader and writer against the safetensors library, and against files that lie."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qquant import shards
from qquant.errors import BadModelError, DamagedWorkError, DiskError, DoesNotFitError, QquantError
from qquant.shard_writer import CheckedTensors, ShardWriter
from qquant.shards import DTYPE_NAMES, DTYPES, INDEX_NAME, SINGLE_NAME, CheckpointReader, TensorSpec

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "empty": (0, 3),
    "vector": (5,),
    "matrix": (3, 7),
    "cube": (2, 1, 4),
}


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    values = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def every_kind() -> dict[str, Tensor]:
    return {
        f"{name}.{kind}": tensor_of(dtype, shape) for name, dtype in DTYPES.items() for kind, shape in SHAPES.items()
    }


def plan_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(folder: Path, tensors: Mapping[str, Tensor], limit: int = 1 << 40) -> Path:
    writer = ShardWriter(folder, plan_of(tensors), max_shard_bytes=limit)
    for name in sorted(tensors, reverse=True):  # any order will do
        writer.write(name, tensors[name])
    writer.close()
    return folder


def raw_file(folder: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with whatever header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / SINGLE_NAME).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reader_returns_what_the_library_wrote(tmp_path: Path) -> None:
    tensors = every_kind()
    save_file(tensors, tmp_path / SINGLE_NAME, metadata={"format": "pt", "by": "a test"})
    reader = CheckpointReader(tmp_path)
    assert reader.metadata == {"format": "pt", "by": "a test"}
    assert set(reader.entries) == set(tensors)
    for name, tensor in tensors.items():
        assert reader.spec(name) == TensorSpec(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))
        assert reader.read(name).dtype == tensor.dtype
        assert torch.equal(reader.read(name), tensor)


@pytest.mark.parametrize("limit", [1 << 40, 300, 1], ids=["one file", "a few", "one each"])
def test_library_returns_what_the_writer_wrote(tmp_path: Path, limit: int) -> None:
    tensors = every_kind()
    write(tmp_path, tensors, limit)
    found: dict[str, Tensor] = {}
    for file in shards.weight_files(tmp_path):
        found |= load_file(file)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(CheckpointReader(tmp_path).read(name), tensor)


def test_a_file_that_is_named_is_read_whatever_else_lies_there(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(4), "b": torch.zeros(4)}, limit=1)
    save_file({"mine": torch.ones(3)}, tmp_path / "other.safetensors")
    reader = CheckpointReader(tmp_path, [tmp_path / "other.safetensors"])
    assert list(reader.entries) == ["mine"]
    assert torch.equal(reader.read("mine"), torch.ones(3))


def test_read_tensor_owns_its_memory(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(4)})
    reader = CheckpointReader(tmp_path)
    reader.read("a").fill_(1.0)
    assert torch.equal(reader.read("a"), torch.zeros(4))


@pytest.mark.parametrize("name", ["f32", "bf16"])
def test_rows_of_a_matrix_come_in_the_order_asked_for(tmp_path: Path, name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = {"f32": torch.randn(9, 5, generator=generator), "before": torch.zeros(3)}
    matrices["bf16"] = torch.randn(9, 7, generator=generator).to(torch.bfloat16)
    reader = CheckpointReader(write(tmp_path, matrices))
    assert reader.has_rows(name)
    assert torch.equal(reader.rows(name, [8, 0, 3, 0]), matrices[name][[8, 0, 3, 0]])
    assert reader.rows(name, []).shape == (0, matrices[name].shape[1])


def test_reading_ahead_asks_for_the_bytes_of_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, asked = CheckpointReader(write(tmp_path, every_kind())), []
    done = threading.Event()

    def advise(_: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((start, size))
        if len(asked) == len(reader.entries):
            done.set()
        raise OSError("a hint that is refused is no error")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    for entry in reader.entries.values():
        shards.read_ahead([entry])
    assert done.wait(10)
    assert sorted(asked) == sorted((entry.start, entry.spec.nbytes) for entry in reader.entries.values())


def test_where_nothing_can_be_read_ahead_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    shards.read_ahead(CheckpointReader(write(tmp_path, every_kind())).entries.values())


def test_chunks_join_to_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_CHUNK", 64)
    tensor = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    write(tmp_path, {"a": tensor, "none": torch.zeros(0)})
    reader = CheckpointReader(tmp_path)
    pieces = list(reader.chunks("a"))
    assert max(piece.nbytes for piece in pieces) == 64
    assert torch.equal(torch.cat(pieces).reshape(7, 9), tensor)
    assert list(reader.chunks("none")) == []


def test_chunked_copy_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_CHUNK", 32)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    tensors = every_kind()
    reader = CheckpointReader(write(tmp_path / "a", tensors))
    writer = ShardWriter(tmp_path / "b", plan_of(tensors), max_shard_bytes=1 << 40)
    for name in tensors:
        writer.write_chunks(name, reader.chunks(name))
    writer.close()
    assert (tmp_path / "b" / SINGLE_NAME).read_bytes() == (tmp_path / "a" / SINGLE_NAME).read_bytes()


def test_shards_follow_the_plan_and_their_limit(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}  # 40 bytes each
    write(tmp_path, tensors, limit=100)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 280
    files = [f"model-{i + 1:05d}-of-00004.safetensors" for i in range(4)]
    assert [index["weight_map"][f"t{i}"] for i in range(7)] == [files[i // 2] for i in range(7)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, INDEX_NAME]


def test_a_tensor_larger_than_the_limit_gets_a_file_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(1), "large": torch.zeros(100), "b": torch.zeros(1)}, limit=100)
    assert len(shards.weight_files(tmp_path)) == 3


def test_tensors_lie_aligned_to_their_element_size(tmp_path: Path) -> None:
    write(tmp_path, every_kind())
    for name, place in CheckpointReader(tmp_path).entries.items():
        assert place.start % DTYPES[place.spec.dtype].itemsize == 0, name


def test_files_have_their_final_size_before_any_tensor_is_written(tmp_path: Path) -> None:
    ShardWriter(tmp_path, {"a": TensorSpec("F32", (1000,))}, max_shard_bytes=1 << 40)
    before = (tmp_path / SINGLE_NAME).stat().st_size
    write(tmp_path, {"a": torch.zeros(1000)})
    assert (tmp_path / SINGLE_NAME).stat().st_size == before


def test_writer_works_where_space_cannot_be_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.posix_fallocate", raising=False)  # as on macOS
    write(tmp_path, every_kind())
    assert load_file(tmp_path / SINGLE_NAME).keys() == every_kind().keys()


def test_too_little_disk_is_known_before_a_file_is_made(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match="free"):
        ShardWriter(tmp_path, {"a": TensorSpec("F32", (2**50,))}, max_shard_bytes=1 << 40)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["missing", "longer", "another layout"])
def test_a_file_that_holds_what_is_finished_is_never_made_again(tmp_path: Path, fault: str) -> None:
    write(tmp_path, tensors := {"a": torch.ones(1000)})
    file = tmp_path / SINGLE_NAME
    file.unlink()
    if fault != "missing":
        write(tmp_path, {"b": torch.ones(1000)} if fault == "another layout" else {"a": torch.ones(1001)})
    before = file.read_bytes() if file.exists() else None
    with pytest.raises(DamagedWorkError, match=r"model\.safetensors is missing or damaged; delete it to begin anew"):
        ShardWriter(tmp_path, plan_of(tensors), max_shard_bytes=1 << 40, going_on=True, anew="delete it")
    assert (file.read_bytes() if file.exists() else None) == before


def test_an_index_that_is_right_is_not_written_again(tmp_path: Path) -> None:
    tensors, index = {f"t{i}": torch.full((10,), float(i)) for i in range(7)}, tmp_path / INDEX_NAME
    write(tmp_path, tensors, limit=100)
    right = index.read_bytes()
    for content in (right, right[:20]):
        index.write_bytes(content)
        os.utime(index, ns=(0, 0))
        ShardWriter(tmp_path, plan_of(tensors), max_shard_bytes=100, going_on=True)
        assert index.read_bytes() == right
        assert (index.stat().st_mtime_ns == 0) == (content == right)


def test_a_tensor_is_compared_with_its_checksum_by_whoever_did_not_write_it(tmp_path: Path) -> None:
    tensors = every_kind()

    def opened(*, kept: bool) -> CheckedTensors:
        return CheckedTensors(tmp_path, plan_of(tensors), anew="delete it", kept=kept)

    mine = opened(kept=False)
    for name, tensor in tensors.items():
        mine.write(name, tensor)
    other = opened(kept=True)
    for name, tensor in tensors.items():
        assert torch.equal(other.read(name), tensor)
    with (tmp_path / SINGLE_NAME).open("r+b") as stream:
        stream.seek(CheckpointReader(tmp_path).entries["F32.matrix"].start)
        stream.write(b"\x01\x02")
    with pytest.raises(DamagedWorkError, match=r"the checksum of F32\.matrix differs\); delete it to begin anew"):
        opened(kept=True).read("F32.matrix")


def test_an_unwritten_tensor_is_a_bug_of_ours(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"a": TensorSpec("F32", (1,))}, max_shard_bytes=1 << 40)
    with pytest.raises(AssertionError, match="never written"):
        writer.close()
    with pytest.raises(AssertionError, match="planned"):
        writer.write("a", torch.zeros(2))


LIES: dict[str, tuple[object, bytes]] = {
    "not json": (b"{]", b""),
    "not utf-8": (b'{"\xff": 1}', b""),
    "not an object": ([1], b""),
    "metadata is no object": ({"__metadata__": "pt"}, b""),
    "metadata is no text": ({"__metadata__": {"a": 1}}, b""),
    "nested too deep": (b"[" * 100_000, b""),
    "entry is no object": ({"a": 3}, b""),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "shape is text": ({"a": entry(shape="2")}, bytes(8)),
    "shape is a fraction": ({"a": entry(shape=[2.0])}, bytes(8)),
    "shape is true": ({"a": entry(shape=[True, 2])}, bytes(8)),
    "negative shape": ({"a": entry(shape=[-1, -2])}, bytes(8)),
    "shape overflows": ({"a": entry(shape=[2**31, 2**33])}, bytes(8)),
    "overflow hidden by a zero": ({"a": entry(shape=[2**59, 2**59, 0], offsets=[0, 0])}, b""),
    "infinite shape": (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', bytes(8)),
    "three offsets": ({"a": entry(offsets=[0, 4, 8])}, bytes(8)),
    "offsets the wrong way": ({"a": entry(offsets=[8, 0])}, bytes(8)),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, bytes(8)),
    "offsets past the end": ({"a": entry(offsets=[8, 16])}, bytes(8)),
    "size and shape differ": ({"a": entry(shape=[3])}, bytes(8)),
    "truncated": ({"a": entry()}, bytes(7)),
    "bytes left over": ({"a": entry()}, bytes(9)),
    "a hole": ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)),
    "the same bytes twice": ({"a": entry(), "b": entry()}, bytes(8)),
    "a name twice": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
        bytes(16),
    ),
    "unknown dtype": ({"a": entry(dtype="F8_E4M3", shape=[8])}, bytes(8)),
    "dtype is no text": ({"a": entry(dtype=["F32"])}, bytes(8)),
}


@pytest.mark.parametrize(("header", "data"), list(LIES.values()), ids=list(LIES))
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, data: bytes) -> None:
    raw_file(tmp_path, header, data)
    with pytest.raises(BadModelError, match=str(tmp_path)):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("length", [9, 2**20, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(BadModelError, match="not a whole safetensors file"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x02", b"\x02\0\0\0\0\0\0\0"], ids=["empty", "one byte", "no header"])
def test_a_file_without_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(content)
    with pytest.raises(BadModelError, match="not a whole safetensors file"):
        CheckpointReader(tmp_path)


def test_mutated_files_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    """300 seeded mutations: a file that we read is one that the library reads, with the same tensors."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4, dtype=torch.int8), "c": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / SINGLE_NAME, metadata={"format": "pt"})
    original = (tmp_path / SINGLE_NAME).read_bytes()
    draw = random.Random(0)
    read = 0
    for _ in range(300):
        (tmp_path / SINGLE_NAME).write_bytes(mutated(original, draw))
        try:
            reader = CheckpointReader(tmp_path)
            found = {name: reader.read(name) for name in reader.entries}
        except QquantError:
            continue
        read += 1
        expected = load_file(tmp_path / SINGLE_NAME)
        assert found.keys() == expected.keys()
        assert all(same_bytes(found[name], expected[name]) for name in found)
    assert 20 < read < 280  # the draw must meet both


def mutated(content: bytes, draw: random.Random) -> bytes:
    """One small damage: a byte, a digit of the header, a cut, an insertion, or the header's length."""
    data = bytearray(content)
    header_end = 8 + int.from_bytes(content[:8], "little")
    place = draw.randrange(8, header_end) if draw.random() < 0.5 else draw.randrange(len(data))
    kind = draw.choice(["byte", "digit", "digit", "cut", "insert", "delete", "length", "swap"])
    if kind == "byte":
        data[place] = draw.randrange(256)
    elif kind == "digit":
        digits = [i for i in range(8, header_end) if chr(data[i]).isdigit()]
        data[draw.choice(digits)] = ord(draw.choice("0123456789"))
    elif kind == "cut":
        del data[place:]
    elif kind == "insert":
        data[place:place] = draw.choice([b"9", b"-", b" ", b'"', b"\0", b"{}", b"1e9"])
    elif kind == "delete":
        del data[place]
    elif kind == "length":
        data[draw.randrange(8)] ^= 1 << draw.randrange(8)
    else:
        other = draw.randrange(8, header_end)
        data[place], data[other] = data[other], data[place]
    return bytes(data)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.numpy().tobytes() == b.numpy().tobytes()


def sharded(folder: Path) -> Path:
    folder.mkdir()
    return write(folder, {"a": torch.ones(4), "b": torch.zeros(4)}, limit=1)


FIRST = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    "name", ["../outside/x.safetensors", "/{outside}/x.safetensors", "sub/../../outside/x.safetensors", "..\\x", "x\0y"]
)
def test_an_index_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    folder = sharded(tmp_path / "model")
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / FIRST).rename(outside / "x.safetensors")
    rewrite_index(folder, lambda index: index["weight_map"].update(a=name.replace("/{outside}", str(outside))))
    with pytest.raises(BadModelError, match="inside the model folder"):
        CheckpointReader(folder)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / FIRST).rename(tmp_path / "x.safetensors")
    (folder / FIRST).symlink_to(tmp_path / "x.safetensors")
    with pytest.raises(BadModelError, match="inside the model folder"):
        CheckpointReader(folder)


def test_links_of_a_hub_cache_are_followed_to_its_blobs_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models--o--n" / "snapshots").mkdir(parents=True)
    (tmp_path / "models--o--n" / "blobs").mkdir()
    folder = sharded(tmp_path / "models--o--n" / "snapshots" / "abc")
    blob = tmp_path / "models--o--n" / "blobs" / "123"
    (folder / FIRST).rename(blob)
    (folder / FIRST).symlink_to(Path("../../blobs/123"))
    assert torch.equal(CheckpointReader(folder).read("a"), torch.ones(4))
    monkeypatch.chdir(folder)
    assert torch.equal(CheckpointReader(Path()).read("a"), torch.ones(4))
    blob.rename(tmp_path / "elsewhere")
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadModelError, match="inside the model folder"):
        CheckpointReader(folder)


def rewrite_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    change(index)
    (folder / INDEX_NAME).write_text(json.dumps(index))


INDEX_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "names a missing file": (lambda index: index["weight_map"].update(a="gone.safetensors"), "gone.safetensors"),
    "names the wrong file": (lambda index: index["weight_map"].update(b=FIRST), "holds b"),
    "names a missing tensor": (lambda index: index["weight_map"].update(c=FIRST), "holds c"),
    "names a folder": (lambda index: index["weight_map"].update(a="."), "not there"),
    "names nothing": (lambda index: index["weight_map"].clear(), "must map tensor names"),
    "has no weight map": (lambda index: index.pop("weight_map"), "weight_map"),
    "maps to a number": (lambda index: index["weight_map"].update(a=3), "must map tensor names"),
    "maps from a list": (lambda index: index.update(weight_map=["a"]), "must map tensor names"),
}


@pytest.mark.parametrize(("change", "words"), list(INDEX_FAULTS.values()), ids=list(INDEX_FAULTS))
def test_a_wrong_index_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    folder = sharded(tmp_path / "model")
    rewrite_index(folder, change)
    with pytest.raises(BadModelError, match=words):
        CheckpointReader(folder)


def test_an_index_that_is_no_json_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    (folder / INDEX_NAME).write_text("{")
    with pytest.raises(BadModelError, match="must be JSON"):
        CheckpointReader(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, folder / FIRST)
    with pytest.raises(BadModelError, match="more than one file"):
        CheckpointReader(folder)


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    save_file({"a": torch.ones(4)}, folder / SINGLE_NAME)
    with pytest.raises(BadModelError, match="holds both"):
        CheckpointReader(folder)


def test_pickle_weights_are_refused_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(BadModelError, match="can run code"):
        CheckpointReader(tmp_path)


def test_one_file_of_another_name_is_found_and_two_are_not_guessed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "gptq_model-4bit-128g.safetensors")
    assert torch.equal(CheckpointReader(tmp_path).read("a"), torch.ones(4))
    save_file({"a": torch.ones(4)}, tmp_path / "other.safetensors")
    with pytest.raises(BadModelError, match="must hold"):
        CheckpointReader(tmp_path)


def test_a_missing_tensor_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(4)})
    with pytest.raises(BadModelError, match="tensor b is missing"):
        CheckpointReader(tmp_path).read("b")


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path, {"a": torch.ones(400)}))
    with (tmp_path / SINGLE_NAME).open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(DiskError, match="ended early"):
        reader.read("a")
    with pytest.raises(DiskError, match="ended early"):
        list(reader.chunks("a"))
