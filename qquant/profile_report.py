"""The record of measured memory and speed over a grid, and the part of a report's Markdown drawn from it.

Pydantic models only, as in results.py, which holds one of these. How a cell is measured is profile_cell.py's.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal

from qquant.records import NOT_MEASURED, Footprint, KVKind, Precision, Strict, shown, table

_GIBI = 2**30
_PLAIN = ("fp32", "bf16", "fp16")
"""Caches that are kept as the model computes them."""
_MEMORY_WORDS = (
    "can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc", "unable to allocate",
    "thread creation failed",
)  # fmt: skip
"""Of messages that memory ran out, in lower case: torch's CPU allocator, oneDNN, CUDA, C++, numpy, OpenMP."""


class CellKey(Strict):
    """Which cell of the grid."""

    label: str
    """The model's, a row of the result."""
    precision: Precision
    kv_cache: KVKind
    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def name(self) -> str:
        """All of it in one short line; no two cells of a grid share it."""
        shape = f"batch {self.batch}, {self.prompt_tokens} + {self.new_tokens} tokens"
        return f"{self.label} {self.precision}, {self.kv_cache} cache, {shape}"


class CellRequest(Strict):
    """All that a process needs to measure one cell: what the grid sends and the cell's process reads."""

    key: CellKey
    folder: str | None
    """Of the model; None for random weights."""
    config: dict[str, Any] | None
    """What config.json would hold, for random weights; None for a folder."""
    compute_dtype: Literal["float32", "bfloat16", "float16"]
    group_size: int
    """Of random int8 and int4 weights."""
    device: str
    threads: int | None
    seed: int
    warmups: int
    repeats: int
    memory_limit_bytes: int | None
    """Of the device; on a CPU of the process. None: what is free."""
    ignore_code: bool = False
    """Open a folder whose files name code, without it."""


class CellMemory(Strict):
    """Memory of one cell, which ran in a process of its own."""

    tensor_bytes: int
    """Parameters and buffers of the model."""
    cache_bytes: int | None
    """The KV cache after the last token."""
    rss_before_bytes: int | None
    """Resident before the model was made: interpreter and libraries."""
    rss_loaded_bytes: int | None
    """Resident once the model was there and before it was run."""
    rss_peak_loading_bytes: int | None
    rss_peak_bytes: int | None
    """The most while it generated."""
    allocator_peak_bytes: int | None
    """The most that torch's CUDA allocator handed out; None on a CPU."""
    allocator_reserved_bytes: int | None
    device_peak_bytes: int | None
    """The most in use on the whole device, as nvidia-smi shows it, other processes included; None on a CPU."""


class CellSpeed(Strict):
    """Speed of one cell; every tuple has one entry per repetition, in order, warm-ups left out."""

    first_token_seconds: tuple[float, ...]
    """From the call to the first token: the prefill and one sampling."""
    decode_seconds: tuple[float, ...]
    """From the first token to the last."""
    prefill_tokens_per_second: float
    """batch * prompt_tokens by the median of first_token_seconds."""
    decode_tokens_per_second: float | None
    """batch * (new_tokens - 1) by the median of decode_seconds; None for a single new token."""
    token_p50_seconds: float | None
    """Median over all single decoding steps of all repetitions."""
    token_p95_seconds: float | None


class ProfileCell(Strict):
    """One cell of the grid: measured, or why not."""

    key: CellKey
    status: Literal["ok", "out-of-memory", "failed"]
    reason: str | None
    """One line, for every status but ok."""
    memory: CellMemory | None
    speed: CellSpeed | None
    predicted: Footprint | None
    """What the planner says this cell needs on this device; None where it has no formula for it."""
    measured_peak_bytes: int | None
    """What ``predicted.peak_bytes`` is to be held against: on CUDA the allocator's peak, on a CPU the largest resident
    set less what the process held before the model."""


class Profile(Strict):
    """What ``qquant profile`` measured."""

    device_memory_bytes: int | None
    """Of the device; of the machine's memory on a CPU."""
    memory_limit_bytes: int | None = None
    """What a cell was allowed to take where that was stated; None: what was free."""
    random_weights: tuple[str, ...] = ()
    """Labels of the models whose weights are random."""
    warmups: int
    repeats: int
    cells: tuple[ProfileCell, ...]


def out_of_memory_line(text: str) -> str | None:
    """The first line of a message, or of what a process wrote before it ended, that says memory ran out."""
    return next((line.strip() for line in text.splitlines() if any(w in line.lower() for w in _MEMORY_WORDS)), None)


def profile_sections(profile: Profile) -> list[str]:
    """The Markdown of a profile."""
    labels = list(dict.fromkeys(cell.key.label for cell in profile.cells))
    limit = (
        ""
        if profile.memory_limit_bytes is None
        else f", of which a cell may take {_gib(profile.memory_limit_bytes, 1)} GiB"
    )
    parts = [
        "## Memory and speed",
        f"Every cell ran in a process of its own, on a device with {_gib(profile.device_memory_bytes, 1)} GiB{limit}: "
        f"one greedy generation for its memory, {profile.warmups} to warm up, {profile.repeats} for the times. Figures "
        "are medians, with the least and the most of all repetitions in brackets. Peak memory leaves out what the "
        "process held before the model: on a CPU it is resident memory, on a GPU what torch's allocator handed out. "
        "1 GiB is 2^30 bytes.",
    ]
    parts += _by_precision(profile.cells)
    for label in labels:
        cells = [cell for cell in profile.cells if cell.key.label == label]
        said = " (random weights at its shapes)" if label in profile.random_weights else ""
        parts += [f"### {label}{said}", _grid(cells), *_reasons(cells), *_memory(cells)]
    return parts


def deviation(cell: ProfileCell) -> float | None:
    """Predicted by measured peak, less one; None where either is missing."""
    if cell.predicted is None or not cell.measured_peak_bytes:
        return None
    return cell.predicted.peak_bytes / cell.measured_peak_bytes - 1


def _by_precision(cells: Sequence[ProfileCell]) -> list[str]:
    """The short table as Qwen's README has it: one generation per precision, at the longest answer and least batch."""
    plain = [cell for cell in cells if cell.key.kv_cache in _PLAIN] or list(cells)
    if not plain:
        return []
    batch = min(cell.key.batch for cell in plain)
    prompt = min(cell.key.prompt_tokens for cell in plain)
    new = max(cell.key.new_tokens for cell in plain)
    chosen = [c for c in plain if (c.key.batch, c.key.prompt_tokens, c.key.new_tokens) == (batch, prompt, new)]
    body = [[cell.key.label, cell.key.precision, _overall(cell), _peak(cell)] for cell in chosen]
    said = f"Generating {new} tokens from {prompt}, batch {batch}; speed counts new tokens over the whole time."
    return [said, table(("model", "precision", "speed (tokens/s)", "peak memory (GiB)"), body)]


def _overall(cell: ProfileCell) -> str:
    if cell.speed is None:
        return _why_not(cell)
    pairs = zip(cell.speed.first_token_seconds, cell.speed.decode_seconds, strict=True)
    return f"{cell.key.batch * cell.key.new_tokens / statistics.median(a + b for a, b in pairs):.2f}"


def _grid(cells: Sequence[ProfileCell]) -> str:
    head = (
        *_KEY_HEAD, "first token (ms)", "prefill (tokens/s)", "decode (tokens/s)", "token p50 (ms)", "p95 (ms)",
        "peak (GiB)", "predicted (GiB)", "deviation",
    )  # fmt: skip
    return table(head, [[*_key(cell), *_speeds(cell), _peak(cell), *_prediction(cell)] for cell in cells])


def _speeds(cell: ProfileCell) -> list[str]:
    speed, key = cell.speed, cell.key
    if speed is None:
        return [_why_not(cell), "-", "-", "-", "-"]
    decoded = [key.batch * (key.new_tokens - 1) / seconds for seconds in speed.decode_seconds if seconds > 0]
    return [
        _spread([1e3 * seconds for seconds in speed.first_token_seconds], ".1f"),
        shown(speed.prefill_tokens_per_second, ".1f"),
        "-" if speed.decode_tokens_per_second is None else _spread(decoded, ".2f"),
        "-" if speed.token_p50_seconds is None else f"{1e3 * speed.token_p50_seconds:.2f}",
        "-" if speed.token_p95_seconds is None else f"{1e3 * speed.token_p95_seconds:.2f}",
    ]


def _spread(values: Sequence[float], spec: str) -> str:
    middle = format(statistics.median(values), spec)
    return middle if len(values) == 1 else f"{middle} ({min(values):{spec}} to {max(values):{spec}})"


def _prediction(cell: ProfileCell) -> list[str]:
    if cell.predicted is None:
        return ["not predicted", "-"]
    found = deviation(cell)
    return [_gib(cell.predicted.peak_bytes), "-" if found is None else f"{100 * found:+.1f} %"]


_KEY_HEAD = ("precision", "KV", "batch", "prompt", "new")
_METERS = {
    "tensor_bytes": "tensors",
    "cache_bytes": "cache",
    "rss_before_bytes": "RSS before",
    "rss_loaded_bytes": "RSS loaded",
    "rss_peak_loading_bytes": "RSS peak, loading",
    "rss_peak_bytes": "RSS peak, generating",
    "allocator_peak_bytes": "allocator peak",
    "allocator_reserved_bytes": "allocator reserved",
    "device_peak_bytes": "whole device",
}


def _memory(cells: Sequence[ProfileCell]) -> list[str]:
    """Every meter that there is on this device, in GiB; cells without figures are left out."""
    measured = [(cell, dict(cell.memory)) for cell in cells if cell.memory]
    read = [name for name in CellMemory.model_fields if any(values[name] is not None for _, values in measured)]
    body = [[*_key(cell), *[_gib(values[name]) for name in read]] for cell, values in measured]
    head = (*_KEY_HEAD, *[_METERS[name] for name in read])
    return ["Where the memory is, in GiB:", table(head, body)] if measured else []


def _reasons(cells: Sequence[ProfileCell]) -> list[str]:
    """Why cells have no figures, each reason once."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        if cell.status != "ok":
            found.setdefault(f"{_why_not(cell)}: {cell.reason}", []).append(cell.key.name)
    return ["\n".join(f"- {reason} ({'; '.join(names)})" for reason, names in found.items())] if found else []


def _key(cell: ProfileCell) -> list[str]:
    key = cell.key
    return [key.precision, key.kv_cache, str(key.batch), str(key.prompt_tokens), str(key.new_tokens)]


def _peak(cell: ProfileCell) -> str:
    return _gib(cell.measured_peak_bytes) if cell.status == "ok" else _why_not(cell)


def _why_not(cell: ProfileCell) -> str:
    return {"ok": NOT_MEASURED, "out-of-memory": "OOM", "failed": "failed"}[cell.status]


def _gib(value: int | None, digits: int = 3) -> str:
    return NOT_MEASURED if value is None else f"{value / _GIBI:.{digits}f}"
