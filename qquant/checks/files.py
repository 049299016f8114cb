"""What lies in a checkpoint's folder: links that lead out, pipes, pickles, code; and how its weight files are named.

Only names, kinds and first bytes are looked at here, and the headers of safetensors files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qquant.checks.findings import Finding, problem, warning
from qquant.errors import BadModelError
from qquant.json_files import read_json
from qquant.model_folder import QWEN_CODE
from qquant.shards import INDEX_NAME, CheckpointReader

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".mar")
_CODE = (
    ".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bash", ".bat", ".cmd", ".ps1", ".js",
    ".mjs", ".jar", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".ipynb", ".whl", ".egg",
)  # fmt: skip
_PROGRAMS = {b"\x7fELF": "a program", b"MZ\x90\x00": "a program", b"#!": "a script", b"\xca\xfe\xba\xbe": "a program"}
_PICKLED = tuple(bytes((0x80, protocol)) for protocol in (2, 3, 4, 5))
_ARCHIVE = b"PK\x03\x04"
_LEFT_OUT = (".git", ".cache")
"""What version control and downloads keep for themselves; uploads leave it out."""
_MOST_FILES = 100_000


def look_around(folder: Path, model_type: object) -> tuple[list[Finding], bool]:
    """Everything in a folder and below it by name and kind.

    Args:
        folder: the checkpoint's.
        model_type: of its config.json; beside an original Qwen its code is expected.

    Returns:
        The findings of "files" and "code", and whether its files can be opened without waiting for ever.
    """
    findings: list[Finding] = []
    openable, names = True, dict[str, str]()
    for count, entry in enumerate(_below(folder)):
        if count >= _MOST_FILES:
            findings.append(problem("files", folder.name, f"a checkpoint has no more than {_MOST_FILES} files"))
            break
        name = Path(entry.path).relative_to(folder).as_posix()
        if name.lower() in names:
            text = f"differs from {names[name.lower()]} only in capitals, one name on some disks; rename one"
            findings.append(warning("files", name, text))
        names[name.lower()] = name
        if entry.is_symlink() and (fault := _leads_out(folder, Path(entry.path))):
            findings.append(problem("files", name, fault))
        elif entry.is_file():
            findings += _file(name, Path(entry.path), model_type == "qwen")
        elif not entry.is_dir():
            openable = False
            kind = "a pipe, a socket or a device" if entry.stat(follow_symlinks=False).st_mode else "nothing"
            findings.append(problem("files", name, f"files of a model must be files, and it is {kind}; remove it"))
    return findings, openable


def check_shards(folder: Path, reader: CheckpointReader) -> Iterator[Finding]:
    """What the reader lets pass and others stumble over: a partial index, strays, metadata that is not there."""
    index = folder / INDEX_NAME
    if index.is_file() and len(reader.files) and reader.files != [folder / "model.safetensors"]:
        yield from _index(index, reader)
    for file in reader.files:
        if CheckpointReader(folder, [file]).metadata.get("format") != "pt":
            yield warning("shards", file.name, 'has no metadata {"format": "pt"}, and GPTQModel refuses such a file')
    for file in sorted(folder.glob("*.safetensors")):
        if file in reader.files or not file.is_file():
            continue
        try:
            CheckpointReader(folder, [file])
        except BadModelError as error:
            yield problem("shards", file.name, str(error))
        else:
            yield warning(
                "shards", file.name, "is not one of the weight files, and some readers read every such file; remove it"
            )


def _index(index: Path, reader: CheckpointReader) -> Iterator[Finding]:
    content: dict[str, Any] = read_json(index)
    for name in reader.entries.keys() - content["weight_map"].keys():
        text = "is stored and the index does not name it, so that only some readers see it; add it or remove it"
        yield problem("shards", name, text)


def _below(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Everything in a folder and its folders, in order; links are named, not followed."""
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in _LEFT_OUT:
                    waiting.append(Path(entry.path))
            else:
                yield entry


def _leads_out(folder: Path, link: Path) -> str:
    """Why a link must not be there; empty if it may."""
    home = folder.resolve()
    # A hub cache keeps a model's files as links to a neighbouring folder of blobs.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):
        return "is a link to nothing; put the file itself there, or remove the link"
    if target.is_relative_to(home) or target.is_relative_to(blobs):
        return ""
    return "is a link out of the folder, and what it shows elsewhere may be private; put the file itself there"


def _file(name: str, path: Path, qwen: bool) -> Iterator[Finding]:
    """Findings about one regular file by its name and first bytes."""
    base, suffix = path.name.lower(), path.suffix.lower()
    if not stat.S_ISREG(path.stat().st_mode):
        return
    with path.open("rb") as stream:
        start = stream.read(4)
    program = next((kind for magic, kind in _PROGRAMS.items() if start.startswith(magic)), None)
    if suffix in _PICKLES or base.endswith(_PICKLES) or (suffix != ".safetensors" and _pickled(start)):
        yield problem("files", name, "is a pickle, which can run code when it is opened; remove it")
    elif qwen and "/" not in name and path.name in QWEN_CODE:
        yield warning("code", name, "is the original Qwen's code by its name; qquant never runs it, others do: read it")
    elif suffix in _CODE or program:
        yield problem("code", name, f"a checkpoint needs no code, and this is {program or 'some'}; remove it")


def _pickled(start: bytes) -> bool:
    return start.startswith((*_PICKLED, _ARCHIVE))
