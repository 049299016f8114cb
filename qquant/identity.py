"""The identity of a model's folder: one hash over its configuration and weights, one over its tokenizer.

Nothing here opens a tensor. That the bytes are right is for whoever made them to prove.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

_CHUNK = 1 << 24
_TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "generation_config.json",
)  # fmt: skip


def model_sha256(folder: Path, on_bytes: Callable[[int, int], None] = lambda done, total: None) -> str:
    r"""sha256 over the names and contents of config.json and of every ``*.safetensors`` file directly in a folder.

    What is hashed is the text of ``sha256sum``: a line ``<hex digest>  <file name>\n`` for each file, by name, so that
    ``sha256sum config.json *.safetensors | sha256sum`` gives the same under a C locale.

    Args:
        folder: of a model. Read, never written.
        on_bytes: told the bytes read so far, and of how many.
    """
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")], key=lambda path: path.name.encode())
    return _sha256(files, on_bytes)


def tokenizer_sha256(folder: Path) -> str:
    """The same over the files that decide which ids a text becomes, and how an answer ends."""
    found = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    return _sha256(sorted(found, key=lambda path: path.name.encode()), lambda done, total: None)


def _sha256(files: Sequence[Path], on_bytes: Callable[[int, int], None]) -> str:
    total = sum(path.stat().st_size for path in files)
    done, lines = 0, []
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                on_bytes(done, total)
        lines.append(f"{digest.hexdigest()}  {path.name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
