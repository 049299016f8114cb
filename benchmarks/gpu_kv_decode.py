"""The KV cache's operators on a GPU, measured against what the memory can do and against torch's attention in bfloat16.

Ceilings first: a copy (bytes read plus bytes written) and a read of one gigabyte. Then each operator as GB/s of the
bytes that it must move, each input once and each output once, and as a share of the measured copy. Times are medians of
CUDA events over runs that each begin with a cache full of other data; a fast operator is repeated within a run, over
inputs that together exceed that cache.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qquant import _native, kv_ops

RUNS = 21
GIGABYTE = 10**9


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


def median_ms(run: Callable[[], object], flush: Tensor) -> dict[str, float]:
    """Median, fastest and slowest of RUNS timed calls, each after ``flush`` has filled the GPU's cache."""
    for _ in range(3):
        run()
    times = []
    for _ in range(RUNS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` as a CUDA graph, so that small kernels are timed and not their launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def rate(times: dict[str, float], moved: int, copy_gb_s: float | None = None) -> dict[str, float]:
    """Times with the rate they mean for ``moved`` bytes, and its share of the measured copy."""
    result = dict(times)
    result["gb_s"] = moved / times["median_ms"] / 1e6
    if copy_gb_s:
        result["share_of_copy"] = result["gb_s"] / copy_gb_s
    return {name: round(value, 5) for name, value in result.items()}


def ceilings(flush: Tensor) -> dict[str, Any]:
    """GB/s of a copy and of a read; the sum of 32-bit words is the read that torch does fastest."""
    source = torch.randint(0, 255, (GIGABYTE,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    words = source.view(torch.float32)
    return {
        "copy": rate(median_ms(lambda: target.copy_(source), flush), 2 * GIGABYTE),
        "read": rate(median_ms(lambda: words.amax(), flush), GIGABYTE),
    }


def random_cache(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    shape = (case.batch, case.kv_heads, case.tokens)
    codes = torch.randint(0, 256, (*shape, case.dim), dtype=torch.uint8, device="cuda")
    scale = torch.rand(shape, device="cuda").add_(0.5).mul_(4 / 255).half()
    return codes, scale, torch.rand(shape, device="cuda").mul_(30).add_(112).half()


def attention(case: Case, copy_gb_s: float, flush: Tensor) -> dict[str, Any]:
    """Our attention over Int8, checked against float32 on the first sequence, and torch's over bfloat16 if it fits."""
    query = torch.randn(case.batch, case.heads, 1, case.dim, dtype=torch.bfloat16, device="cuda")
    cache = (*random_cache(case), *random_cache(case))
    scaling = case.dim**-0.5

    def ours() -> Tensor:
        out: Tensor = kv_ops.decode_attention(query, *cache, None, scaling)
        return out

    first = [part[:1] for part in cache]
    want = kv_ops.attention_reference(query[:1].float(), *first, None, scaling)  # type: ignore[call-arg,arg-type]
    error = ((ours()[:1].float() - want).norm() / want.norm()).item()
    row: dict[str, Any] = {**case._asdict(), "relative_error": error}
    row["int8"] = rate(median_ms(graphed(ours), flush), case.int8_bytes, copy_gb_s)
    keys, values = (
        (kv_ops.dequantize(*cache[i : i + 3], torch.bfloat16) for i in (0, 3)) if fits(case) else (None, None)
    )
    if keys is None or values is None:
        row["bf16"] = "not measured: keys and values in bfloat16 do not fit beside the Int8 ones"
        return row

    def theirs() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, enable_gqa=case.heads != case.kv_heads
        )

    row["bf16"] = rate(median_ms(graphed(theirs), flush), case.bf16_bytes, copy_gb_s)
    row["speedup"] = round(row["bf16"]["median_ms"] / row["int8"]["median_ms"], 3)
    return row


def fits(case: Case) -> bool:
    return torch.cuda.mem_get_info()[0] > 1.2 * case.bf16_bytes


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
    single = graphed(lambda: kv_ops.append(*cache, one, tokens // 2))
    row["append_one_token"] = rate(median_ms(single, flush), moved // tokens, copy_gb_s)
    return row


def measure() -> dict[str, Any]:
    """Everything, in one record."""
    properties = torch.cuda.get_device_properties(0)
    flush = torch.empty(4 * max(properties.L2_cache_size, 1 << 25), dtype=torch.uint8, device="cuda")
    limits = ceilings(flush)
    copy_gb_s = limits["copy"]["gb_s"]
    print(f"{properties.name}: copy {copy_gb_s:.0f} GB/s, read {limits['read']['gb_s']:.0f} GB/s")
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
    return {
        "schema_version": 1,
        "command": shlex.join(["python", "benchmarks/gpu_kv_decode.py", *sys.argv[1:]]),
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "kernels": torch.ops.qquant.cuda_build_info(),
        "runs": RUNS,
        "ceilings": limits,
        "attention": rows,
        "codec": codecs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"measures on a CUDA device, and torch {torch.__version__} sees none")
    _native.load_torch_ops()
    [state] = [state for state in _native.status() if state.name == "qquant._C_cuda"]
    if not state.live:
        raise SystemExit(f"measures qquant._C_cuda, which is not here: {state.why}; QQUANT_CUDA=1 {_native.REBUILD}")
    record = measure()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
