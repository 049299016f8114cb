"""The record of a prediction of memory, and the part of a report's Markdown drawn from it.

Pydantic models only, as in results.py, which holds one of these. How the bytes come about is footprint.py's.
"""

from __future__ import annotations

from typing import Literal

from qquant.records import Footprint, KVKind, Precision, Strict

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
    device_bytes: int | None
    """Of the stated card."""
    cells: tuple[PlanCell, ...]
    limits: tuple[PlanLimit, ...]
    quantizing: tuple[PlanQuantizing, ...]
    tensor_parallel: tuple[PlanTensorParallel, ...]
