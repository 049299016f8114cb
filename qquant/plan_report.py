"""The record of a prediction of memory, and the part of a report's Markdown drawn from it.

Pydantic models only, as in results.py, which holds one of these. How the bytes come about is footprint.py's.
"""

from __future__ import annotations

from typing import Literal

from qquant.records import Footprint, KVKind, Precision, Strict, table

Runtime = Literal["qquant", "qwen-2023"]
"""Whose memory: ours on today's transformers, or the original code's, which held two caches at the peak."""


class PlanCell(Strict):
    """One combination."""

    precision: Precision
    kv_cache: KVKind
    batch: int
    prompt_tokens: int
    new_tokens: int
    footprint: Footprint
    loading_peak_bytes: int
    fits: bool | None
    """On the stated card; None where none was stated."""


class PlanLimit(Strict):
    """The largest that fits the stated card."""

    precision: Precision
    kv_cache: KVKind
    largest_batch: int
    """At the plan's largest length; 0: not even one sequence."""
    largest_tokens: int
    """At the plan's smallest batch, prompt and answer together; 0: not even one token."""
    beyond_model: bool
    """``largest_tokens`` is more than the model's positions."""


class PlanQuantizing(Strict):
    """What making the checkpoint takes."""

    bits: int
    group_size: int
    samples: int
    seq_len_tokens: int
    """Of each sample, at most."""
    method: str = "gptq"
    """Plans made before this was kept were for that."""
    device_bytes: int
    """On the device that computes, the activations of all samples included."""
    least_bytes: int | None = None
    """The same with these on the disk; None in plans made before that was possible."""
    ram_bytes: int
    """In the machine's memory when a GPU computes; on a CPU device_bytes is all."""
    disk_bytes: int
    """The written folder's weights, and what lies beside them until it is complete."""


class PlanTensorParallel(Strict):
    """Whether the quantized matrices can be cut over this many devices without cutting a group."""

    ranks: int
    precision: Precision
    fits: bool
    reason: str | None
    """The first thing that does not divide."""


class Plan(Strict):
    """What ``qquant plan`` predicts."""

    model: str
    parameters: int
    positions: int | None = None
    """Tokens that the model was made for; None: its configuration does not say."""
    runtime: Runtime
    group_size: int
    device: Literal["cpu", "cuda"] = "cuda"
    device_bytes: int | None
    """Of the stated card, or of the machine's memory for a CPU."""
    cells: tuple[PlanCell, ...]
    limits: tuple[PlanLimit, ...]
    quantizing: tuple[PlanQuantizing, ...]
    tensor_parallel: tuple[PlanTensorParallel, ...]


_TITLES = {"cuda": "card", "cpu": "CPU"}


def plan_sections(plan: Plan) -> list[str]:
    """The Markdown of a plan."""
    where = _TITLES[plan.device]
    stated = "" if plan.device_bytes is None else f" The {where} has {_in_its_unit(plan.device_bytes)}."
    runtime = (
        "The runtime is this package on today's transformers."
        if plan.runtime == "qquant"
        else "The runtime is the original code of 2023, which held two caches at its peak."
    )
    unit = _unit_of([max(cell.footprint.peak_bytes, cell.loading_peak_bytes) for cell in plan.cells])
    return [
        "## Memory of a generation",
        f"{plan.model}: {plan.parameters:,} parameters, packed in groups of {plan.group_size}. {runtime}{stated} "
        f"Predicted, nothing was run. {_SAID[unit]}",
        _cells_table(plan, unit),
        _peaks_note(plan),
        *_positions_note(plan),
        *_limits_section(plan),
        *_quantizing_section(plan),
        *_parallel_section(plan),
    ]


def _cells_table(plan: Plan, unit: int) -> str:
    fits = plan.device_bytes is not None
    head = ["weights", "KV", "batch", "prompt + new", "weights", "cache", "rest", "loading", "peak"]
    body = []
    for cell in plan.cells:
        parts = cell.footprint
        rest = parts.activations_bytes + parts.overhead_bytes
        sizes = (parts.weights_bytes, parts.cache_bytes, rest, cell.loading_peak_bytes, parts.peak_bytes)
        row = [cell.precision, cell.kv_cache, str(cell.batch), f"{cell.prompt_tokens} + {cell.new_tokens}"]
        row += [_in(unit, size) for size in sizes]
        body.append(row + ([_yes(cell.fits)] if fits else []))
    return table([*head, "fits"] if fits else head, body)


def _peaks_note(plan: Plan) -> str:
    if plan.device == "cpu":
        return "Peaks leave out what Python and torch hold before the model is there, about 0.4 GiB, which fits counts."
    return "Peaks are what torch's allocator hands out; the CUDA context, about 0.5 GiB, is on top, and fits counts it."


def _positions_note(plan: Plan) -> list[str]:
    longest = max(cell.prompt_tokens + cell.new_tokens for cell in plan.cells)
    if plan.positions is None or longest <= plan.positions:
        return []
    return [f"**{longest:,} tokens are more than the {plan.positions:,} positions that this model was made for.**"]


def _limits_section(plan: Plan) -> list[str]:
    if not plan.limits:
        return []
    batch = min(cell.batch for cell in plan.cells)
    prompt, new = max((cell.prompt_tokens, cell.new_tokens) for cell in plan.cells)
    body = []
    for limit in plan.limits:
        beyond = " (more than the model's positions)" if limit.beyond_model else ""
        body.append((limit.precision, limit.kv_cache, str(limit.largest_batch), f"{limit.largest_tokens:,}{beyond}"))
    head = ("weights", "KV", f"largest batch at {prompt} + {new} tokens", f"longest context at batch {batch}")
    return ["## What fits", table(head, body)]


def _quantizing_section(plan: Plan) -> list[str]:
    if not plan.quantizing:
        return []
    first = plan.quantizing[0]
    unit = _unit_of([row.device_bytes for row in plan.quantizing])
    body = [
        (f"int{row.bits}", str(row.group_size), *(_in(unit, size) for size in _sizes(row, plan)))
        for row in plan.quantizing
    ]
    sizes = ("RAM", "at least", "disk") if plan.device == "cpu" else ("card", "at least", "RAM", "disk")
    head = ("weights", "group", *sizes)
    said = (
        f"From disk, one block at a time, {first.samples} samples of {first.seq_len_tokens} tokens, method "
        f"{first.method}. With less than the first figure, but at least the second, the samples' activations are kept "
        f"on the disk. Python and torch come on top. {_SAID[unit]}"
    )
    return ["## Quantizing it", said, table(head, body)]


def _parallel_section(plan: Plan) -> list[str]:
    if not plan.tensor_parallel:
        return []
    body = [(str(row.ranks), row.precision, _yes(row.fits), row.reason or "") for row in plan.tensor_parallel]
    said = (
        "Whether every matrix can be cut over so many cards without cutting a head or a group. Key and value heads "
        "that are fewer than the cards are held more than once."
    )
    return ["## Tensor parallel", said, table(("cards", "weights", "divides", "first that does not"), body)]


def _sizes(row: PlanQuantizing, plan: Plan) -> tuple[int, ...]:
    least = row.device_bytes if row.least_bytes is None else row.least_bytes
    if plan.device == "cpu":
        return row.device_bytes, least, row.disk_bytes
    return row.device_bytes, least, row.ram_bytes, row.disk_bytes


_GIB, _MIB = 2**30, 2**20
_SAID = {_GIB: "In GiB (2^30 bytes).", _MIB: "In MiB (2^20 bytes)."}


def _unit_of(sizes: list[int]) -> int:
    """MiB where GiB would leave every one of them below 1."""
    return _GIB if max(sizes) >= _GIB else _MIB


def _in(unit: int, size: int) -> str:
    return f"{size / unit:.{2 if unit == _GIB else 1}f}"


def _in_its_unit(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / _MIB:.1f} MiB"


def _yes(value: bool | None) -> str:
    return "yes" if value else "no"
