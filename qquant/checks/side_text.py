"""Which strings of which files beside the weights are looked at for private text, and what is said of it.

Vocabularies, special tokens, chat templates and licences hold whatever text they hold, and are passed over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qquant.checks.findings import Finding, problem, warning
from qquant.checks.private_text import local_path, named, relative_path, secret, words_of_prose
from qquant.errors import BadModelError
from qquant.json_files import parse_json, read_json
from qquant.shards import INDEX_NAME

_VOCABULARIES = frozenset(("vocab.json", "added_tokens.json", "special_tokens_map.json", "merges.txt", "vocab.txt"))
_TEXTS = (".txt", ".csv", ".tsv", ".log", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".md", ".xml", ".jsonl", ".jinja")
_FREE = frozenset(("chat_template", "added_tokens", "added_tokens_decoder", "model"))
"""Keys under which any text may stand: templates, tokens, and the vocabulary of tokenizer.json."""
_SENTENCES = frozenset(("fallback", "fallbacks", "prediction"))
"""Keys of our own manifest, log and record of mixed precision that hold sentences of ours."""
_LARGEST_TEXT = 32 * 2**20  # bytes of a text file that are looked at
_MOST_IDS = 64
"""Whole numbers in a list of the quantization keys from here on are token ids: calibration text by another name."""


def check_text(folder: Path, metadata: Mapping[str, str], names: Collection[str]) -> Iterator[Finding]:
    """Private text in every file beside the weights, and in their metadata.

    Args:
        folder: the checkpoint's.
        metadata: of its safetensors files.
        names: of this machine and its user, which do not belong into a checkpoint.
    """
    for key, value in values_of({key: _unfolded(text) for key, text in metadata.items()}):
        yield from _judge(f"safetensors metadata: {key[:60]}", value, names, prose=True)
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        if path.name in _VOCABULARIES or path.name.startswith(("LICENSE", "NOTICE")):
            continue
        if path.suffix == ".json":
            yield from _json(path, names)
        elif path.suffix in _TEXTS:
            yield from _text(path, names)


def values_of(content: Any, path: str = "", *, all_values: bool = False) -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every string, or of everything, at any depth; names of keys count as strings."""
    if isinstance(content, dict):
        for key, value in content.items():
            here = f"{path}.{key}" if path else key
            if all_values:
                yield here, value
            else:
                yield here, key
            yield from values_of(value, here, all_values=all_values)
    elif isinstance(content, list):
        for value in content:
            yield from values_of(value, path, all_values=all_values)
    elif isinstance(content, str) and not all_values:
        yield path, content


def content_of(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is none, or none that can be read, which ``check_json`` says."""
    with suppress(BadModelError):
        return read_json(path)
    return {}


def _unfolded(text: str) -> Any:
    """What a string says as JSON, if it is JSON."""
    with suppress(ValueError):
        return parse_json(text.encode())
    return text


def _json(path: Path, names: Collection[str]) -> Iterator[Finding]:
    content = content_of(path)
    if path.name == INDEX_NAME:
        content = {"metadata": content.get("metadata")}
    looked_at = {
        key: value for key, value in content.items() if key not in _FREE and not key.endswith(("_token", "_tokens"))
    }
    for key, text in values_of(looked_at):
        prose = path.name != "tokenizer.json" and _SENTENCES.isdisjoint(key.split("."))
        yield from _judge(f"{path.name}: {key[:120]}", text, names, prose=prose)
    if path.name == "config.json":
        yield from _ids(path.name, {"quantization_config": content.get("quantization_config")})
    elif path.name == "quantize_config.json":
        yield from _ids(path.name, content)


def _ids(name: str, content: Any) -> Iterator[Finding]:
    for key, value in values_of(content, all_values=True):
        for inner in [value, *(value if isinstance(value, list) else [])]:
            numbers = inner if isinstance(inner, list) else []
            if len(numbers) >= _MOST_IDS and all(isinstance(number, int) for number in numbers):
                yield problem(
                    "private", f"{name}: {key}", f"holds {len(numbers)} token ids, somebody's text; remove it"
                )
                return


def _judge(subject: str, text: str, names: Collection[str], *, prose: bool) -> Iterator[Finding]:
    """What one string gives away. The text itself is not repeated, paths aside: reports of faults get around."""
    if kind := secret(text):
        yield problem("private", subject, f"holds {kind}; remove it, and make it invalid where it came from")
    elif path := local_path(text):
        yield problem("private", subject, f"names a path of some machine, {path[:80]}; remove it")
    elif relative_path(text):
        yield warning("private", subject, f"names a path that exists only where it was written, {text[:80]}; remove it")
    elif prose and (words := words_of_prose(text)):
        yield problem("private", subject, f"holds a text of {words} words, such as calibration data; remove it")
    elif name := named(text, names):
        yield warning("private", subject, f"names this machine or its user, {name}; remove it if it is not by chance")


def _text(path: Path, names: Collection[str]) -> Iterator[Finding]:
    """Line by line; a model card may tell of paths and hold prose."""
    say = warning if path.suffix == ".md" else problem
    with path.open("rb") as stream:
        data = stream.read(_LARGEST_TEXT + 1)
    if len(data) > _LARGEST_TEXT:
        yield warning("private", path.name, f"has over {_LARGEST_TEXT >> 20} MiB, of which no more is looked at")
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        where = f"{path.name}, line {number}"
        if kind := secret(line):
            yield problem("private", where, f"holds {kind}; remove it, and make it invalid where it came from")
        elif path.suffix != ".jinja" and (found := local_path(line)):
            yield say("private", where, f"names a path of some machine, {found[:80]}; remove it")
        elif name := named(line, names):
            yield warning("private", where, f"names this machine or its user, {name}; remove it if it is not by chance")


def check_json(folder: Path) -> Iterator[Finding]:
    """Whether every JSON file says the same to every reader."""
    for path in sorted(folder.glob("*.json")):
        if path.name in ("vocab.json", "tokenizer.json") or not path.is_file():
            continue  # large, and read by the tokenizer's own library
        try:
            read_json(path)
        except BadModelError as error:
            yield problem("json", path.name, str(error))
