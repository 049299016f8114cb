"""The record of measured memory and speed over a grid, and the part of a report's Markdown drawn from it.

Pydantic models only, as in results.py, which holds one of these. How a cell is measured is profile_cell.py's.
"""

from __future__ import annotations

from typing import Literal

from qquant.records import Footprint, KVKind, Precision, Strict


class CellKey(Strict):
    """Which cell of the grid."""

    label: str
    """The model's, a row of the result."""
    precision: Precision
    kv_cache: KVKind
    batch: int
    prompt_tokens: int
    new_tokens: int


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
    warmups: int
    repeats: int
    cells: tuple[ProfileCell, ...]
