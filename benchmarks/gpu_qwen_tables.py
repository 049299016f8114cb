"""The two KV-cache tables of Qwen's README on Qwen-7B's shapes with random weights, beside the published cells.

Peak GPU memory by batch size (1024 tokens) and by length (batch 1), with the full and with the Int8 cache. Weights are
random: memory and speed do not depend on them. The cache is filled with random states up to the last few tokens and
only those are generated, because the peak of a generation is at its end; ``--generate`` decodes every token instead.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import qquant
from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.modeling import QWenLMHeadModel
from qquant.published import KV_CACHE

JOBS = [(cell.table, cell.batch, cell.new_tokens) for cell in KV_CACHE if cell.kv_cache == "bf16"]
"""(table, batch, tokens) of every row, in the README's order."""
STEPS = 24
"""Tokens that are really decoded after the cache has been filled; the first four warm up."""

SHAPES: dict[str, dict[str, Any]] = {
    "qwen-7b": {},
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": 512,
    },
}  # fmt: skip
"""What differs from Qwen-7B, which is what a configuration of this type is by itself."""


def make_model(shape: str, device: str) -> Any:
    """A random bfloat16 Qwen v1 model."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = QWenLMHeadModel(QWenConfig(**SHAPES[shape]))
    return model.to(torch.bfloat16).eval()


def fill(cache: Any, model: Any, batch: int, tokens: int) -> None:
    """Give every layer random states for ``tokens`` tokens, 256 at a time."""
    config = model.config
    for layer in range(config.num_hidden_layers):
        for begin in range(0, tokens, 256):
            size = (batch, config.num_key_value_heads, min(256, tokens - begin), config.head_dim)
            states = torch.randn(size, dtype=torch.bfloat16, device=model.device)
            cache.update(states, states, layer)


def measure(model: Any, make_cache: Callable[[], Any], batch: int, tokens: int, *, generate: bool) -> dict[str, Any]:
    """Peak GiB and median milliseconds per step of one generation, or the reason why there is none."""
    cuda = model.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    cache = None
    try:
        cache = make_cache()
        decoded = tokens if generate else min(STEPS, tokens)
        if tokens > decoded:
            fill(cache, model, batch, tokens - decoded)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        times = []
        with torch.inference_mode():
            for _ in range(decoded):
                begin = time.perf_counter()
                logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
                ids = logits[:, -1:].argmax(-1)
                ids[0, 0].item()  # waits for the device
                times.append(time.perf_counter() - begin)
    except torch.OutOfMemoryError:
        return {"peak_gib": None, "why": "out of memory"}
    finally:
        del cache
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {"peak_gib": peak, "step_ms_median": 1e3 * statistics.median(times[4:] or times)}


def published_gib(table: str, batch: int, tokens: int) -> list[float | None]:
    """What the README gives for the full and for the Int8 cache; None: out of memory."""
    row = (table, batch, tokens)
    own = [cell for cell in KV_CACHE if (cell.table, cell.batch, cell.new_tokens) == row]
    return [cell.memory_gib for kind in ("bf16", "int8") for cell in own if cell.kv_cache == kind]


def cell(found: dict[str, Any]) -> str:
    """A table cell: GiB and milliseconds, or why not."""
    if "why" in found:
        return "OOM"
    memory = "not measured" if found["peak_gib"] is None else f"{found['peak_gib']:.1f}"
    return f"{memory}, {found['step_ms_median']:.1f} ms"


def main() -> None:
    """Measure both tables, print them as Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--generate", action="store_true", help="decode every token; takes most of an hour")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "these tables need a CUDA device, and this torch sees none; --shape tiny --device cpu tries the script"
        )
    model = make_model(args.shape, args.device)
    rows = []
    for table, batch, tokens in JOBS:
        found = {}
        for name, make in (
            ("full", lambda: DynamicCache(config=model.config)),
            ("int8", lambda: qquant.Int8KVCache(model.config)),
        ):
            found[name] = measure(model, make, batch, tokens, generate=args.generate)
        published = published_gib(table, batch, tokens)
        row = {"table": table, "batch": batch, "tokens": tokens, "published_gib": published, **found}
        rows.append(row)
        theirs = ["OOM" if value is None else f"{value:.1f}" for value in published]
        print(
            f"| {table} | {batch} x {tokens} | {cell(found['full'])} | {theirs[0]} | {cell(found['int8'])} "
            f"| {theirs[1]} |",
            flush=True,
        )
        if args.out:
            device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
            content = {"device": device, "torch": torch.__version__, "shape": args.shape, "rows": rows}
            args.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
