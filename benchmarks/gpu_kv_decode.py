"""The KV cache's operators on a GPU, measured against what the memory can do and against torch's attention in bfloat16.

Ceilings first: a copy (bytes read plus bytes written) and a read of one gigabyte. Then each operator as GB/s of the
bytes that it must move, each input once and each output once, and as a share of the measured copy. Times are medians of
CUDA events over replays of a graph that each begin with a cache full of other data; a graph goes through several copies
of a small input, because its launch takes as long as a fast operator.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.on_gpu import (
    MOST_COPIES,
    ceilings,
    copies_of,
    flush_buffer,
    graphed,
    median_ms,
    new_record,
    rate,
    require_kernels,
    write_record,
)
from qquant import kv_ops


class Case(NamedTuple):
    """One decode step's attention in one layer."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    dim: int

    @property
    def int8_bytes(self) -> int:
        """Codes, scales and zeros of keys and values, query and result in bfloat16."""
        return 2 * self.batch * self.kv_heads * self.tokens * (self.dim + 4) + 4 * self.batch * self.heads * self.dim

    @property
    def bf16_bytes(self) -> int:
        """The same with keys and values in bfloat16."""
        return 4 * self.batch * self.kv_heads * self.tokens * self.dim + 4 * self.batch * self.heads * self.dim


CASES = [
    Case("Qwen-7B, batch 64, 8192 tokens", 64, 32, 32, 8192, 128),
    Case("Qwen-7B, batch 8, 4096 tokens", 8, 32, 32, 4096, 128),
    Case("Qwen-7B, batch 1, 8192 tokens", 1, 32, 32, 8192, 128),
    Case("Qwen-1.8B, batch 64, 8192 tokens", 64, 16, 16, 8192, 128),
    Case("Qwen2.5-7B, batch 64, 8192 tokens", 64, 28, 4, 8192, 128),
    Case("Qwen2.5-7B, batch 1, 32768 tokens", 1, 28, 4, 32768, 128),
    Case("Qwen2.5-0.5B, batch 64, 8192 tokens", 64, 14, 2, 8192, 64),
    Case("Qwen2.5-0.5B, batch 1, 2048 tokens", 1, 14, 2, 2048, 64),
    Case("Phi-2 head of 80, batch 16, 4096 tokens", 16, 32, 32, 4096, 80),
    Case("head of 256, batch 16, 4096 tokens", 16, 16, 8, 4096, 256),
]


def random_cache(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    shape = (case.batch, case.kv_heads, case.tokens)
    codes = torch.randint(0, 256, (*shape, case.dim), dtype=torch.uint8, device="cuda")
    scale = torch.rand(shape, device="cuda").add_(0.5).mul_(4 / 255).half()
    return codes, scale, torch.rand(shape, device="cuda").mul_(30).add_(112).half()


def attention(case: Case, copy_gb_s: float, flush: Tensor) -> dict[str, Any]:
    """Our attention over Int8, checked against float32 on the first sequence, and torch's over bfloat16 if it fits."""
    query = torch.randn(case.batch, case.heads, 1, case.dim, dtype=torch.bfloat16, device="cuda")
    caches = [(*random_cache(case), *random_cache(case)) for _ in range(copies_of(case.int8_bytes))]
    scaling, copies = case.dim**-0.5, len(caches)

    def ours(cache: tuple[Tensor, ...]) -> Tensor:
        out: Tensor = kv_ops.decode_attention(query, *cache, None, scaling)
        return out

    first = [part[:1] for part in caches[0]]
    want = kv_ops.attention_reference(query[:1].float(), *first, None, scaling)  # type: ignore[call-arg,arg-type]
    error = ((ours(caches[0])[:1].float() - want).norm() / want.norm()).item()
    row: dict[str, Any] = {**case._asdict(), "copies": copies, "relative_error": error}
    times = median_ms(graphed(lambda: [ours(cache) for cache in caches]), flush)
    row["int8"] = rate(times, case.int8_bytes, copy_gb_s, calls=copies)
    if torch.cuda.mem_get_info()[0] < 1.2 * copies * case.bf16_bytes:
        row["bf16"] = "not measured: keys and values in bfloat16 do not fit beside the Int8 ones"
        return row
    plain = [[kv_ops.dequantize(*cache[i : i + 3], torch.bfloat16) for i in (0, 3)] for cache in caches]

    def theirs(keys: Tensor, values: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, enable_gqa=case.heads != case.kv_heads
        )

    times = median_ms(graphed(lambda: [theirs(*states) for states in plain]), flush)
    row["bf16"] = rate(times, case.bf16_bytes, copy_gb_s, calls=copies)
    row["speedup"] = round(row["bf16"]["median_ms"] / row["int8"]["median_ms"], 3)
    return row


def codec(dtype: torch.dtype, copy_gb_s: float, flush: Tensor) -> dict[str, Any]:
    """Quantize-append of a long prompt and of one token, and dequantize, in one dtype; head size 128."""
    batch, heads, tokens, dim = 8, 32, 4096, 128
    states = torch.randn(batch, heads, tokens, dim, dtype=dtype, device="cuda")
    cache = random_cache(Case("", batch, heads, heads, tokens, dim))
    vectors = batch * heads * tokens
    moved = vectors * (dim * dtype.itemsize + dim + 4)
    row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "shape": [batch, heads, tokens, dim]}
    append = graphed(lambda: kv_ops.append(*cache, states, 0))
    row["append"] = rate(median_ms(append, flush), moved, copy_gb_s)
    dequantize = graphed(lambda: kv_ops.dequantize(*cache, dtype))
    row["dequantize"] = rate(median_ms(dequantize, flush), moved, copy_gb_s)
    one = states[:, :, :1].contiguous()
    places = range(0, tokens, tokens // MOST_COPIES)
    single = graphed(lambda: [kv_ops.append(*cache, one, place) for place in places])
    row["append_one_token"] = rate(median_ms(single, flush), moved // tokens, copy_gb_s, calls=len(places))
    return row


def measure() -> dict[str, Any]:
    """Everything, in one record."""
    flush = flush_buffer()
    record = new_record("gpu_kv_decode.py", ceilings(flush))
    copy_gb_s = record["ceilings"]["copy"]["gb_s"]
    rows = []
    for case in CASES:
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 1.3 * case.int8_bytes:
            rows.append({**case._asdict(), "int8": "not measured: does not fit this GPU"})
            continue
        row = attention(case, copy_gb_s, flush)
        rows.append(row)
        other = f"{row['bf16']['median_ms']:8.3f}" if isinstance(row["bf16"], dict) else "not measured"
        ours = row["int8"]
        print(f"{case.name:42s} int8 {ours['median_ms']:8.3f} ms {ours['share_of_copy']:5.0%} of copy  bf16 {other} ms")
    codecs = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        torch.cuda.empty_cache()
        codecs.append(codec(dtype, copy_gb_s, flush))
        for name in ("append", "dequantize"):
            print(f"{name} {codecs[-1]['dtype']}: {codecs[-1][name]['share_of_copy']:.0%} of copy")
    return {**record, "attention": rows, "codec": codecs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    require_kernels()
    write_record(args.out, measure())


if __name__ == "__main__":
    main()
