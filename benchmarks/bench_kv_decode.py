"""CPU kernels of the Int8 KV cache against torch on the same cache in bfloat16, in turns within one process.

One thread, thread CPU time, median over calls. Layers take turns, so that a cache comes from memory and not from the
last-level cache. How fast one thread reads memory is probed before and after each row. Our caches are those of
TokenStore, whose large storages are advised to use pages of 2 MB; torch's bfloat16 caches are ordinary torch tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qquant import _native, kv_ops
from qquant.kv_store import TokenStore

HEADS = {128: ((32, 32), (32, 8), (28, 4)), 64: ((16, 16), (14, 2))}
"""Head size -> (query heads, KV heads): groups of 1, 4 and 7."""
TOKENS = (512, 1024, 2048, 4096, 8192)
BATCHES = (1, 4, 16)
QUICK = (
    (1, 32, 32, 4096, 128),
    (1, 32, 8, 4096, 128),
    (1, 28, 4, 4096, 128),
    (1, 14, 2, 4096, 64),
    (16, 16, 16, 512, 64),
)
PREFILL = (1, 32, 2048, 128)

CACHES = 4  # last-level caches' worth of codes that layers of one row hold together
STRETCH = 256  # tokens of random states
CALLS = 25
SECONDS = 4.0  # for one contestant of one row, after three calls


@dataclass(frozen=True, kw_only=True)
class Decode:
    """One shape of decode attention, one new token per sequence."""

    batch: int
    query_heads: int
    kv_heads: int
    tokens: int
    head_size: int
    ours_ms: float
    torch_sdpa_ms: float
    torch_matmul_ms: float
    ratio: float
    """Torch's faster way over ours."""
    gb_per_s: float
    """Codes, scales and zeros over our time."""
    share_of_read_bandwidth: float


@dataclass(frozen=True, kw_only=True)
class Store:
    """Quantizing or dequantizing a prompt's states of one layer."""

    name: str
    dtype: str
    ours_ms: float
    reference_ms: float
    gb_per_s: float
    """States, codes, scales and zeros, each counted once, over our time."""


def take_turns(contestants: list[Callable[[], Any]]) -> list[float]:
    """Median thread CPU milliseconds of each, one call of each after the other."""
    for contestant in contestants:
        contestant()
    times: list[list[float]] = [[] for _ in contestants]
    for call in range(CALLS):
        for contestant, spent in zip(contestants, times, strict=True):
            if call >= 3 and sum(spent) > SECONDS:
                continue
            began = time.thread_time()
            contestant()
            spent.append(time.thread_time() - began)
    return [1e3 * statistics.median(spent) for spent in times]


def read_bandwidth(host: Any) -> float:
    found: float = host.read_bandwidth(1 << 28, 0.1)
    return found


def a_cache(batch: int, heads: int, tokens: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero as a model's cache holds them: one stretch of random states again and again."""
    store = TokenStore(torch.empty(()).expand(batch, heads, tokens, size))
    stretch = torch.randn(batch, heads, min(tokens, STRETCH), size, dtype=torch.bfloat16)
    while store.tokens < tokens:
        store.append(stretch[:, :, : tokens - store.tokens])
    return store.last(tokens)


def bench_decode(host: Any, batch: int, query_heads: int, kv_heads: int, tokens: int, size: int) -> Decode:
    codes_bytes = 2 * batch * kv_heads * tokens * size
    layers = max(1, -(-CACHES * max(host.last_level_cache_bytes(), 1 << 25) // codes_bytes))
    quantized = [
        (*a_cache(batch, kv_heads, tokens, size), *a_cache(batch, kv_heads, tokens, size)) for _ in range(layers)
    ]
    plain = [
        (kv_ops.dequantize(*layer[:3], torch.bfloat16), kv_ops.dequantize(*layer[3:], torch.bfloat16))
        for layer in quantized
    ]
    query = torch.randn(batch, query_heads, 1, size).bfloat16()
    rows = query.view(batch, kv_heads, query_heads // kv_heads, size)
    ours, sdpa, matmul = cycle(quantized), cycle(plain), cycle(plain)
    scaling = size**-0.5

    def by_sdpa() -> Tensor:
        keys, values = next(sdpa)
        found: Tensor = scaled_dot_product_attention(query, keys, values, enable_gqa=query_heads != kv_heads)
        return found

    def by_matmul() -> Tensor:
        keys, values = next(matmul)
        weights: Tensor = ((rows @ keys.mT) * scaling).softmax(-1)
        found: Tensor = weights @ values
        return found

    before = read_bandwidth(host)
    times = take_turns(
        [lambda: kv_ops.decode_attention(query, *next(ours), None, scaling), by_sdpa, by_matmul],
    )
    bandwidth = (before + read_bandwidth(host)) / 2
    rate = 1e-6 * 2 * batch * kv_heads * tokens * (size + 4) / times[0]
    return Decode(
        batch=batch,
        query_heads=query_heads,
        kv_heads=kv_heads,
        tokens=tokens,
        head_size=size,
        ours_ms=times[0],
        torch_sdpa_ms=times[1],
        torch_matmul_ms=times[2],
        ratio=min(times[1:]) / times[0],
        gb_per_s=rate,
        share_of_read_bandwidth=rate / bandwidth,
    )


def bench_store(dtype: torch.dtype) -> list[Store]:
    batch, heads, tokens, size = PREFILL
    layers = [torch.randn(PREFILL).to(dtype) for _ in range(6)]
    codes, scale, zero = a_cache(batch, heads, 2 * tokens, size)
    states, half = cycle(layers), [x.narrow(2, 0, tokens) for x in (codes, scale, zero)]
    append = take_turns(
        [
            lambda: kv_ops.append(codes, scale, zero, next(states), 0),
            lambda: kv_ops.append_reference(codes, scale, zero, next(states), tokens),
        ]
    )
    dequantize = take_turns(
        [lambda: kv_ops.dequantize(*half, dtype), lambda: kv_ops.dequantize_reference(half[0], half[1], half[2], dtype)]
    )
    moved = batch * heads * tokens * (size * dtype.itemsize + size + 4)
    return [
        Store(
            name=name,
            dtype=str(dtype).removeprefix("torch."),
            ours_ms=times[0],
            reference_ms=times[1],
            gb_per_s=1e-6 * moved / times[0],
        )
        for name, times in (("append", append), ("dequantize", dequantize))
    ]


def all_shapes() -> list[tuple[int, int, int, int, int]]:
    return [
        (batch, *heads, tokens, size)
        for size, choices in HEADS.items()
        for heads in choices
        for batch in BATCHES
        for tokens in TOKENS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="five shapes instead of all")
    parser.add_argument("--batch", type=int, help="only this batch")
    parser.add_argument("--tokens", type=int, help="only this many tokens")
    parser.add_argument("--head-size", type=int, help="only this head size")
    args = parser.parse_args()
    host = _native.host()
    if host is None or not hasattr(torch.ops.qquant, "cpu_kernel_info"):
        sys.exit("the compiled modules _host and _C are needed; build them with: " + _native.REBUILD)

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shapes = [
        (batch, query_heads, kv_heads, tokens, size)
        for batch, query_heads, kv_heads, tokens, size in (QUICK if args.quick else all_shapes())
        if args.batch in (None, batch) and args.tokens in (None, tokens) and args.head_size in (None, size)
    ]
    decode, store = [], []
    print("| B | Hq | H | T | D | ours ms | torch SDPA ms | torch matmul ms | ratio | GB/s | share of read bandwidth |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for shape in shapes:
        row = bench_decode(host, *shape)
        decode.append(row)
        cells = [*map(str, shape), f"{row.ours_ms:.3f}", f"{row.torch_sdpa_ms:.2f}", f"{row.torch_matmul_ms:.2f}"]
        cells += [f"{row.ratio:.1f}", f"{row.gb_per_s:.1f}", f"{row.share_of_read_bandwidth:.0%}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    print("\n| operator | dtype | ours ms | reference ms | GB/s |\n|---|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        for kept in bench_store(dtype):
            store.append(kept)
            print(
                f"| {kept.name} | {kept.dtype} | {kept.ours_ms:.2f} | {kept.reference_ms:.1f} | {kept.gb_per_s:.1f} |"
            )
    command = f"python benchmarks/bench_kv_decode.py {shlex.join(sys.argv[1:])}"
    print(f"\nMade by: `{command}`")
    if args.out is not None:
        record = {
            "command": command,
            "kernels": torch.ops.qquant.cpu_kernel_info(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "last_level_cache_bytes": host.last_level_cache_bytes(),
            "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
            "decode": [asdict(row) for row in decode],
            "store": [asdict(kept) for kept in store],
        }
        args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
