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
    seq_len: int
    device_bytes: int
    """On the device that computes: one block, its Hessians and the activations that pass through it."""
    ram_bytes: int
    """In the machine's memory when a GPU computes; on a CPU device_bytes comes on top."""
    disk_bytes: int
    """The written folder's weights."""


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
    stated = "" if plan.device_bytes is None else f" The {where} has {_gib(plan.device_bytes)} GiB."
    runtime = (
        "The runtime is this package on today's transformers."
        if plan.runtime == "qquant"
        else "The runtime is the original code of 2023, which held two caches at its peak."
    )
    return [
        "## Memory of a generation",
        f"{plan.model}: {plan.parameters:,} parameters, packed in groups of {plan.group_size}. {runtime}{stated} "
        "Predicted, nothing was run. In GiB (2^30 bytes).",
        _cells_table(plan),
        _peaks_note(plan),
        *_limits_section(plan),
        *_quantizing_section(plan),
        *_parallel_section(plan),
    ]


def _cells_table(plan: Plan) -> str:
    fits = plan.device_bytes is not None
    head = ["weights", "KV", "batch", "prompt + new", "weights", "cache", "rest", "loading", "peak"]
    body = []
    for cell in plan.cells:
        parts = cell.footprint
        rest = parts.activations_bytes + parts.overhead_bytes
        sizes = (parts.weights_bytes, parts.cache_bytes, rest, cell.loading_peak_bytes, parts.peak_bytes)
        row = [cell.precision, cell.kv_cache, str(cell.batch), f"{cell.prompt_tokens} + {cell.new_tokens}"]
        row += [_gib(size) for size in sizes]
        body.append(row + ([_yes(cell.fits)] if fits else []))
    return table([*head, "fits"] if fits else head, body)


def _peaks_note(plan: Plan) -> str:
    if plan.device == "cpu":
        return "Peaks leave out what Python and torch hold before the model is there, about 0.4 GiB, which fits counts."
    return "Peaks are what torch's allocator hands out; the CUDA context, about 0.5 GiB, is on top, and fits counts it."


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
    body = [
        (f"int{row.bits}", str(row.group_size), _gib(row.device_bytes), _gib(row.ram_bytes), _gib(row.disk_bytes))
        for row in plan.quantizing
    ]
    head = ("weights", "group", "device", "RAM beside a GPU", "disk")
    said = (
        f"From disk, one block at a time, {first.samples} samples of {first.seq_len} tokens. On a CPU the device is "
        "the RAM. Python and torch come on top."
    )
    return ["## Quantizing it", said, table(head, body)]


def _parallel_section(plan: Plan) -> list[str]:
    if not plan.tensor_parallel:
        return []
    body = [(str(row.ranks), row.precision, _yes(row.fits), row.reason or "") for row in plan.tensor_parallel]
    said = "Whether every matrix can be cut over so many cards without cutting a head or a group."
    return ["## Tensor parallel", said, table(("cards", "weights", "divides", "first that does not"), body)]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def _yes(value: bool | None) -> str:
    return "yes" if value else "no"
