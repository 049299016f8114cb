"""The native Qwen v1 model against transformers' Qwen2 at equal shapes, in turns within one process.

One thread, thread CPU time: the median over turns and the median of the ratios of neighbouring turns, which a noisy
machine moves least. Where weights come to lie moves the same product by up to 15 %, so half of the turns are run on
models built in the one order and half in the other. Both models have the same widths, no grouped heads, random weights,
SDPA and a DynamicCache. The limits are probed in the same run: how fast one thread reads memory (a decode step reads
every weight once) and how fast it multiplies matrices of the prefill's shape.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import qquant
from qquant import _native
from qquant.measure import environment, step_fn, tensor_bytes
from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.modeling import QWenLMHeadModel

SHAPES = {"width of 1.8B, 4 blocks": (2048, 5504, 16, 4), "hidden 512, 12 blocks": (512, 1408, 4, 12)}
"""Name -> hidden, MLP width, heads of 128, blocks."""
VOCABULARY = 4096
PROMPT = 512
DECODE = 16  # steps timed together
ROUNDS = 3  # of them in one turn
TURNS = 6  # for each order of building
BUFFER_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One shape and dtype; ratios are ours over theirs, below 1: ours is faster."""

    shape: str
    dtype: str
    ours_prefill_ms: float
    qwen2_prefill_ms: float
    prefill_ratio: float
    ours_decode_ms: float
    qwen2_decode_ms: float
    decode_ratio: float
    prefill_share_of_matmul_rate: float
    decode_share_of_read_bandwidth: float | None


def build(hidden: int, width: int, heads: int, blocks: int, dtype: torch.dtype, *, ours_first: bool) -> dict[str, Any]:
    """Both models, in eval mode, with random weights."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "tie_word_embeddings": False,
    }
    makers: dict[str, Callable[[], Any]] = {
        "ours": lambda: QWenLMHeadModel(QWenConfig(**shared, intermediate_size=2 * width, seq_length=8192)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shared, intermediate_size=width, num_key_value_heads=heads)),
    }
    return {label: makers[label]().to(dtype).eval() for label in list(makers)[:: 1 if ours_first else -1]}


def measure(models: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Thread CPU seconds of prefill, and of one decode step, turn by turn."""
    times: dict[str, dict[str, list[float]]] = {label: {"prefill": [], "decode": []} for label in models}
    steps = {label: step_fn(model) for label, model in models.items()}
    prompt = torch.randint(VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for turn in range(TURNS + 1):
            labels = list(models)[:: 1 if turn % 2 else -1]
            states = {}
            for label in labels:
                began = time.thread_time()
                states[label] = steps[label](prompt, None)
                times[label]["prefill"].append(time.thread_time() - began)
            for label in labels * ROUNDS:
                logits, cache = states[label]
                began = time.thread_time()
                for _ in range(DECODE):
                    logits, cache = steps[label](logits.argmax(-1, keepdim=True), cache)
                times[label]["decode"].append((time.thread_time() - began) / DECODE)
                states[label] = logits, cache
    return {
        label: {"prefill": found["prefill"][1:], "decode": found["decode"][ROUNDS:]} for label, found in times.items()
    }


def ratio(times: dict[str, dict[str, list[float]]], what: str) -> float:
    """Median over turns of ours / theirs."""
    return statistics.median(a / b for a, b in zip(times["ours"][what], times["qwen2"][what], strict=True))


def matmul_rate(hidden: int, dtype: torch.dtype) -> float:
    """Multiply-adds per second of [PROMPT, hidden] x [hidden, 4 hidden], the best of some."""
    a, b = torch.randn(PROMPT, hidden, dtype=dtype), torch.randn(4 * hidden, hidden, dtype=dtype)
    best = min(timed(lambda: a @ b.T) for _ in range(10))
    return PROMPT * hidden * 4 * hidden / best


def timed(call: Callable[[], Any]) -> float:
    """Thread CPU seconds."""
    began = time.thread_time()
    call()
    return time.thread_time() - began


def row(name: str, dtype: torch.dtype) -> Row:
    """Measure one shape in one dtype."""
    hidden, width, heads, blocks = SHAPES[name]
    rate, host = matmul_rate(hidden, dtype), _native.host()
    bandwidth = host.read_bandwidth(BUFFER_BYTES, 0.5) * 1e9 if host is not None else None
    times: dict[str, dict[str, list[float]]] = {label: {"prefill": [], "decode": []} for label in ("ours", "qwen2")}
    for ours_first in (True, False):
        models = build(hidden, width, heads, blocks, dtype, ours_first=ours_first)
        for label, found in measure(models).items():
            for what, seconds in found.items():
                times[label][what] += seconds
    middle = {label: {what: statistics.median(found[what]) for what in found} for label, found in times.items()}
    linears = blocks * (4 * hidden * hidden + 3 * hidden * width)
    # Attention over the prompt, both products, causal half not saved; the head sees the last token only.
    products = PROMPT * linears + blocks * 2 * PROMPT * PROMPT * hidden + hidden * VOCABULARY
    read = tensor_bytes(models["ours"]) - models["ours"].transformer.wte.weight.nbytes
    return Row(
        shape=name,
        dtype=str(dtype).removeprefix("torch."),
        ours_prefill_ms=1e3 * middle["ours"]["prefill"],
        qwen2_prefill_ms=1e3 * middle["qwen2"]["prefill"],
        prefill_ratio=ratio(times, "prefill"),
        ours_decode_ms=1e3 * middle["ours"]["decode"],
        qwen2_decode_ms=1e3 * middle["qwen2"]["decode"],
        decode_ratio=ratio(times, "decode"),
        prefill_share_of_matmul_rate=products / rate / middle["ours"]["prefill"],
        decode_share_of_read_bandwidth=read / bandwidth / middle["ours"]["decode"] if bandwidth else None,
    )


def main() -> None:
    """Measure every shape in both dtypes, print Markdown, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "qwen_v1.json")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| shape | dtype | prefill ms, ours / Qwen2 | ratio | decode ms, ours / Qwen2 | ratio | limits |")
    print("|---|---|---|---|---|---|---|")
    for name in SHAPES:
        for dtype in options.dtypes:
            found = row(name, getattr(torch, dtype))
            rows.append(asdict(found))
            share = found.decode_share_of_read_bandwidth
            print(
                f"| {name} | {dtype} | {found.ours_prefill_ms:.1f} / {found.qwen2_prefill_ms:.1f} "
                f"| {found.prefill_ratio:.3f} | {found.ours_decode_ms:.2f} / {found.qwen2_decode_ms:.2f} "
                f"| {found.decode_ratio:.3f} | matmul {found.prefill_share_of_matmul_rate:.0%}, "
                f"read {'not measured' if share is None else f'{share:.0%}'} |",
                flush=True,
            )
    record = {
        "command": shlex.join(["python", "benchmarks/bench_qwen_v1.py", *sys.argv[1:]]),
        "environment": asdict(environment(torch.device("cpu"), qquant_version=qquant.__version__)),
        "prompt_tokens": PROMPT,
        "turns": TURNS,
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
