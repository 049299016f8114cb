"""The identity of a model's folder: one hash over its configuration and weights, one over its tokenizer.

Nothing here opens a tensor. That the bytes are right is for whoever made them to prove.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
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


def sha256(path: Path) -> str:
    """Hex digest of one file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256(files: Sequence[Path], on_bytes: Callable[[int, int], None]) -> str:
    lines = (f"{digest}  {name}\n" for name, digest in files_sha256(files, on_bytes).items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def files_sha256(
    files: Sequence[Path], on_bytes: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, str]:
    """Hex digest of each file by its name.

    Args:
        files: to be read, none of one name.
        on_bytes: told the bytes read so far, and of how many.
    """
    total, done, found = sum(path.stat().st_size for path in files), 0, {}
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                done += len(chunk)
                on_bytes(done, total)
        found[path.name] = digest.hexdigest()
    return found


@cache
def package_sha256() -> str:
    """sha256 over the names and contents of this package's own sources, as this process first finds them."""
    home = Path(__file__).parent
    files = sorted(path for pattern in ("*.py", "csrc/**/*.*") for path in home.rglob(pattern) if path.is_file())
    lines = (f"{sha256(path)}  {path.relative_to(home).as_posix()}\n" for path in dict.fromkeys(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
