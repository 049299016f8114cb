"""The tables of Qwen's README as data: memory and speed, the quantized KV cache, accuracy by precision.

Other people's measurements, on the hardware that stands beside each; nothing here was measured by this project, and
nothing here computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qquant.records import KVKind, Precision

_A100, _TWO_A100 = "A100-SXM4-80G", "2x A100-SXM4-80G"
SPEED_HARDWARE = "PyTorch 2.0.1, CUDA 11.8, FlashAttention 2"
KV_HARDWARE = "A100-80G, PyTorch 2.0.1, CUDA 11.4"

Table = Literal["speed-memory", "kv-batch", "kv-length"]
"""The README's table of quantized models, and its two of the quantized KV cache: by batch, and by length."""


@dataclass(frozen=True, kw_only=True)
class PublishedCell:
    """One memory figure."""

    table: Table
    model: str
    """As ``models.sizes`` names it."""
    precision: Precision
    kv_cache: KVKind
    batch: int
    prompt_tokens: int
    """As the README's last wording has it: one token of context."""
    new_tokens: int
    memory_gib: float | None
    """Printed as GB, but divided by 2**30; None: out of memory."""
    tokens_per_second: float | None
    """Over tokens encoded and generated; None where the table has no speed."""
    hardware: str
    encoded_tokens: int | None = None
    """Tokens of the prompt where earlier wordings of the README and the model cards say that the figure was taken while
    encoding so many, not while generating them; None: as stated."""


@dataclass(frozen=True, kw_only=True)
class PublishedScore:
    """One accuracy figure of a chat model, BF16 or GPTQ."""

    model: str
    precision: Precision
    task: str
    score_percent: float


def _speed_memory() -> tuple[PublishedCell, ...]:
    measured: dict[str, tuple[tuple[float, float], ...]] = {
        "qwen-1.8b": ((54.09, 4.23), (55.56, 3.48), (71.07, 2.91)),
        "qwen-7b": ((40.93, 16.99), (37.47, 11.20), (50.09, 8.21)),
        "qwen-14b": ((32.22, 30.15), (29.28, 18.81), (38.72, 13.01)),
        "qwen-72b": ((8.48, 144.69), (9.05, 81.27), (11.32, 48.86)),
    }
    precisions: tuple[Precision, ...] = ("bf16", "int8", "int4")
    return tuple(
        PublishedCell(
            table="speed-memory",
            model=model,
            precision=precision,
            kv_cache="bf16",
            batch=1,
            prompt_tokens=1,
            new_tokens=2048,
            memory_gib=memory,
            tokens_per_second=speed,
            hardware=f"{_TWO_A100 if memory > 80 else _A100}, {SPEED_HARDWARE}",
            encoded_tokens=2048 if model in ("qwen-7b", "qwen-14b") else None,
        )
        for model, row in measured.items()
        for precision, (speed, memory) in zip(precisions, row, strict=True)
    )


def _kv_tables() -> tuple[PublishedCell, ...]:
    batches = (1, 4, 16, 32, 64, 100)
    lengths = (512, 1024, 2048, 4096, 8192)
    by_batch: dict[KVKind, tuple[float | None, ...]] = {
        "bf16": (16.3, 24.1, 31.7, 48.7, None, None),
        "int8": (15.5, 17.2, 22.3, 30.2, 48.2, 72.4),
    }
    by_length: dict[KVKind, tuple[float | None, ...]] = {
        "bf16": (15.2, 16.3, 17.6, 19.5, 23.2),
        "int8": (15.0, 15.5, 15.8, 16.6, 17.6),
    }

    def cell(table: Table, kind: KVKind, batch: int, new_tokens: int, memory: float | None) -> PublishedCell:
        return PublishedCell(
            table=table,
            model="qwen-7b",
            precision="bf16",
            kv_cache=kind,
            batch=batch,
            prompt_tokens=1,
            new_tokens=new_tokens,
            memory_gib=memory,
            tokens_per_second=None,
            hardware=KV_HARDWARE,
        )

    first = [cell("kv-batch", k, b, 1024, m) for k, row in by_batch.items() for b, m in zip(batches, row, strict=True)]
    second = [cell("kv-length", k, 1, n, m) for k, row in by_length.items() for n, m in zip(lengths, row, strict=True)]
    # The tables share their cell of batch 1 and 1024 tokens; it counts in both, as printed.
    return (*first, *second)


def _accuracy() -> tuple[PublishedScore, ...]:
    tasks = ("mmlu", "ceval", "gsm8k", "humaneval")
    measured: dict[str, dict[Precision, tuple[float, ...]]] = {
        "qwen-1.8b-chat": {
            "bf16": (43.3, 55.6, 33.7, 26.2),
            "int8": (43.1, 55.8, 33.0, 27.4),
            "int4": (42.9, 52.8, 31.2, 25.0),
        },
        "qwen-7b-chat": {
            "bf16": (55.8, 59.7, 50.3, 37.2),
            "int8": (55.4, 59.4, 48.3, 34.8),
            "int4": (55.1, 59.2, 49.7, 29.9),
        },
        "qwen-14b-chat": {
            "bf16": (64.6, 69.8, 60.1, 43.9),
            "int8": (63.6, 68.6, 60.0, 48.2),
            "int4": (63.3, 69.0, 59.8, 45.7),
        },
        "qwen-72b-chat": {
            "bf16": (74.4, 80.1, 76.4, 64.6),
            "int8": (73.5, 80.1, 73.5, 62.2),
            "int4": (73.4, 80.1, 75.3, 61.6),
        },
    }
    return tuple(
        PublishedScore(model=model, precision=precision, task=task, score_percent=score)
        for model, rows in measured.items()
        for precision, row in rows.items()
        for task, score in zip(tasks, row, strict=True)
    )


SPEED_MEMORY: tuple[PublishedCell, ...] = _speed_memory()
"""Twelve cells: chat models that generate 2048 tokens."""
KV_CACHE: tuple[PublishedCell, ...] = _kv_tables()
"""Twenty-two cells: Qwen-7B BF16 with and without a quantized cache; two of them ran out of memory."""
ACCURACY: tuple[PublishedScore, ...] = _accuracy()
"""Zero-shot; C-Eval on its validation set."""
