"""Keys of a model's JSON files that name code to run: where they are found, when they are refused, and what is left.

Whoever opens a folder may allow them, and they are then left out and said once; nothing here or elsewhere follows one.
Reading the files is json_files.py's and model_folder.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from qquant.errors import BadModelError
from qquant.telling import say_once

QWEN = "qwen"
"""Model type of the original Qwen (v1). ``auto_map`` is a part of its format; our own classes stand for its code."""

_CODE = frozenset(("auto_map", "trust_remote_code", "kernel_config", "use_kernels"))
# Names of kernels that transformers may fetch from a hub; and what remote code of any kind is called by.
_CODE_PARTS = ("attn_implementation", "experts_implementation")
_CODE_BEGINNING = "custom_"
# Lists of other files that transformers would read in place of those that were looked at.
_ELSEWHERE = frozenset(("configuration_files", "fast_tokenizer_files"))

_ignored: ContextVar[bool] = ContextVar("qquant_ignore_code", default=False)


@contextmanager
def ignoring_code(wanted: bool = True) -> Iterator[None]:
    """While it is open, keys that name code are left out of what is read, and not refused; no code is run either way.

    Args:
        wanted: False changes nothing, so that an option can be handed on as it is.
    """
    before = _ignored.set(wanted or _ignored.get())
    try:
        yield
    finally:
        _ignored.reset(before)


def code_ignored() -> bool:
    """Whether ``ignoring_code`` is open here."""
    return _ignored.get()


def check_code(content: Mapping[str, Any], where: str, *, model_type: object) -> dict[str, Any]:
    """Refuse keys that name code, at any depth, or leave them out where ``ignoring_code`` is open.

    Args:
        content: a JSON object. Read, never written.
        where: its file, for messages.
        model_type: of the folder's config.json; the original Qwen's ``auto_map`` is no reason to refuse.

    Returns:
        The same without them.

    Raises:
        BadModelError: naming the key.
    """
    for key in _named(content, lambda name, value: name in _ELSEWHERE and bool(value)):
        raise BadModelError(
            f"{key} in {where} names other files to be read in place of the usual ones, and only the usual ones are "
            "checked; remove the key"
        )
    kept = {"auto_map"} & content.keys() if model_type == QWEN else set()
    found = [key for key in _named(content, names_code) if key not in kept]
    if found and not code_ignored():
        raise BadModelError(
            f"{found[0]} in {where} names code to run, and no code of a model is run here; look at it, then give "
            "--ignore-code (in Python: qquant.ignoring_code()) to go on without, with the class that is known here"
        )
    if found:
        names = ", ".join(dict.fromkeys(key.rpartition(".")[2] for key in found))
        say_once(f"{where} names code ({names}), which was left out; the classes known here are used")
    clean = without_code(content)
    return {key: clean.get(key, content[key]) for key in content if key in clean or key in kept}


def without_code(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys but for those that name code, at any depth."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return without_code(value)
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in content.items() if not is_code_key(key)}


def names_code(key: str, value: Any) -> bool:
    """Whether a key with this value would have somebody run code: flags that are off and counts do not."""
    if not is_code_key(key) or not value:
        return False
    # "_attn_implementation_autoset": true, which older versions wrote, names nothing.
    return key in _CODE or not isinstance(value, bool | int | float)


def is_code_key(key: str) -> bool:
    """Whether a key may name code, whatever its value."""
    return key in _CODE or key.startswith(_CODE_BEGINNING) or any(part in key for part in _CODE_PARTS)


def _named(content: Any, chosen: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of the keys for which ``chosen(key, value)`` holds."""
    if isinstance(content, dict):
        for key, value in content.items():
            if chosen(key, value):
                yield f"{path}{key}"[:200]
            yield from _named(value, chosen, f"{path}{key}.")
    elif isinstance(content, list):
        for value in content:
            yield from _named(value, chosen, path)
