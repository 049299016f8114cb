"""Checkpoints that somebody made to harm whoever opens them: how each is made from a sound one.

A maker changes a folder and is told of a file that its payload would write, the canary. What is expected is beside it.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from qquant.shards import INDEX_NAME as INDEX_NAME
from qquant.shards import SINGLE_NAME as SINGLE_NAME

Maker = Callable[[Path, Path], object]
FIRST = "model-00001-of-00003.safetensors"
CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")


class _Payload:
    """Writes the canary when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({self.canary!r}, 'w').write('ran')",)


def put(name: str, text: str | bytes) -> Maker:
    """A file in place of what is there."""

    def make(folder: Path, canary: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return make


def code(*names: str) -> Maker:
    """Files of Python that write the canary."""

    def make(folder: Path, canary: Path) -> None:
        for name in names:
            put(name, f"open({str(canary)!r}, 'w').write('ran')\nclass Config: pass\n")(folder, canary)

    return make


def pickled(*names: str, alone: bool = True) -> Maker:
    """Pickles that write the canary, beside the weights or in their place."""

    def make(folder: Path, canary: Path) -> None:
        for name in names:
            (folder / name).write_bytes(pickle.dumps(_Payload(canary)))
        if alone:
            (folder / SINGLE_NAME).unlink(missing_ok=True)

    return make


def keys(name: str, way: str = "", **changes: Any) -> Maker:
    """Other keys in a JSON file, or in an object of it; with code beside that they might name."""

    def make(folder: Path, canary: Path) -> None:
        code("code.py", "custom_generate/generate.py")(folder, canary)
        content = json.loads((folder / name).read_text())
        (content.setdefault(way, {}) if way else content).update(changes)
        (folder / name).write_text(json.dumps(content))

    return make


def text_of(name: str, change: Callable[[str], str | bytes]) -> Maker:
    """A JSON file's text, changed."""
    return lambda folder, canary: put(name, change((folder / name).read_text()))(folder, canary)


def ended(name: str, end: str) -> Maker:
    """A JSON object with another end in place of its last brace."""
    return text_of(name, lambda text: text.rstrip()[:-1] + end)


def pipe(name: str) -> Maker:
    """A pipe, which nobody ever writes to."""

    def make(folder: Path, canary: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).parent.mkdir(exist_ok=True)
        os.mkfifo(folder / name)

    return make


def link(name: str, target: str) -> Maker:
    """A link to something else; ``{out}`` is a folder beside the model with a copy of the weights."""

    def make(folder: Path, canary: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target.format(out=canary.parent / "outside"))

    return make


def subfolder(name: str) -> Maker:
    """A folder where a file should be."""

    def make(folder: Path, canary: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return make


def index(name: str | None = None, change: Callable[[dict[str, Any]], object] | None = None) -> Maker:
    """Three shards whose index names something else for the tensors of the first; ``{out}`` as in ``link``."""

    def make(folder: Path, canary: Path) -> None:
        shards(folder)
        content = json.loads((folder / INDEX_NAME).read_text())
        if name is not None:
            other = name.format(out=canary.parent / "outside")
            content["weight_map"] = {t: other if f == FIRST else f for t, f in content["weight_map"].items()}
        if change is not None:
            change(content)
        (folder / INDEX_NAME).write_text(json.dumps(content))

    return make


def shards(folder: Path) -> None:
    tensors = load_file(folder / SINGLE_NAME)
    (folder / SINGLE_NAME).unlink()
    places: dict[str, str] = {}
    for number in range(3):
        name = f"model-{number + 1:05d}-of-00003.safetensors"
        part = dict(list(tensors.items())[number::3])
        save_file(part, folder / name, {"format": "pt"})
        places |= dict.fromkeys(part, name)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def after_shards(maker: Maker) -> Maker:
    """The same to a model in three files."""

    def make(folder: Path, canary: Path) -> None:
        shards(folder)
        maker(folder, canary)

    return make


def header(text: bytes | object, data: bytes = b"", length: int | None = None) -> Maker:
    """A weight file with this header."""
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return put(SINGLE_NAME, (len(raw) if length is None else length).to_bytes(8, "little") + raw + data)


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def sparse(name: str, size: int) -> Maker:
    """A file of that size which takes no space."""

    def make(folder: Path, canary: Path) -> None:
        with (folder / name).open("r+b" if (folder / name).exists() else "wb") as stream:
            stream.truncate(size)

    return make


def zipped(folder: Path, canary: Path) -> None:
    """A zip of zeros, as torch saves weights, under the name of safe ones."""
    with zipfile.ZipFile(folder / SINGLE_NAME, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Payload(canary)))
        archive.writestr("archive/data/0", bytes(1 << 24))


def both(*makers: Maker) -> Maker:
    def make(folder: Path, canary: Path) -> None:
        for maker in makers:
            maker(folder, canary)

    return make
