"""Packed linears on a GPU, measured against what the memory can do and against every other way to the same product.

For the projections of six models and 1 to 1024 tokens, in bfloat16: our kernel (up to 64 tokens), our unpacking
followed by torch's product, a dense weight, and torch's packed Int4. Times are medians of CUDA graphs' replays, each
after the GPU's cache was filled with other data. A graph goes through several copies of a small weight, because its
launch takes as long as such a product. GB/s count every input and output once, and are also given as a share of the
copy measured in the same run. ``times_bf16`` compares what a loaded model runs with a dense weight;
``crossover_tokens`` says from which of the token counts on another way was faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.on_gpu import (
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
from qquant import linear_ops

TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
MOST_TOKENS = 64
"""Of our kernel."""
GROUP = 128


class Projection(NamedTuple):
    """Linears of one layer that share an input."""

    model: str
    name: str
    features: int
    widths: tuple[int, ...]

    def weight_bytes(self, bits: int) -> int:
        """Codes, and per group a float16 scale and a zero."""
        values = self.features * sum(self.widths)
        return values * bits // 8 + values // GROUP * 3

    def activation_bytes(self, tokens: int) -> int:
        """Inputs and outputs in bfloat16."""
        return 2 * tokens * (self.features + sum(self.widths))


def projections_of(model: str, hidden: int, kv: int, middle: int) -> list[Projection]:
    """The four calls of a layer."""
    return [
        Projection(model, "q, k, v", hidden, (hidden, kv, kv)),
        Projection(model, "attention output", hidden, (hidden,)),
        Projection(model, "gate, up", hidden, (middle, middle)),
        Projection(model, "down", middle, (hidden,)),
    ]


PROJECTIONS = [
    *projections_of("Qwen2.5-0.5B", 896, 128, 4864),
    *projections_of("Qwen-1.8B", 2048, 2048, 5504),
    *projections_of("Qwen-7B", 4096, 4096, 11008),
    *projections_of("Qwen2.5-7B", 3584, 512, 18944),
    *projections_of("Qwen-14B", 5120, 5120, 13696),
    *projections_of("Qwen-72B", 8192, 8192, 24576),
]


class Packed(NamedTuple):
    """Random panels of one projection."""

    words: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int

    @classmethod
    def random(cls, projection: Projection, bits: int) -> Packed:
        """Codes and zeros of any value, weights of a usual size."""
        panels, groups = sum(-(-width // 16) for width in projection.widths), projection.features // GROUP
        steps = projection.features * bits // 32
        words = torch.randint(-(2**31), 2**31 - 1, (panels, steps, 16), dtype=torch.int32, device="cuda")
        scales = torch.rand(panels, groups, 16, device="cuda").add_(0.5).mul_(0.02 * 8 / 2**bits).half()
        zeros = torch.randint(0, 2**bits, (panels, groups, 16), dtype=torch.uint8, device="cuda")
        return cls(words, scales, zeros, bits)

    def linear(self, x: Tensor, projection: Projection) -> list[Tensor]:
        """Our kernel."""
        widths = list(projection.widths)
        found: list[Tensor] = linear_ops.panel_linear(
            x, self.words, self.scales, self.zeros, None, None, widths, self.bits, GROUP, 0, 0
        )
        return found

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Our unpacking."""
        found: Tensor = linear_ops.panel_weights(self.words, self.scales, self.zeros, self.bits, GROUP, 0, dtype)
        return found


def torch_int4(projection: Projection) -> Callable[[Tensor], Tensor]:
    """Torch's packed Int4 of the same size, over random codes."""
    outputs, inner = sum(projection.widths), 8 if projection.features % 128 == 0 else 4
    codes = torch.randint(0, 255, (outputs, projection.features // 2), dtype=torch.uint8, device="cuda")
    packed = torch._convert_weight_to_int4pack(codes, inner)
    numbers = torch.rand(projection.features // GROUP, outputs, 2, dtype=torch.bfloat16, device="cuda")
    return lambda x: torch._weight_int4pack_mm(x, packed, GROUP, numbers)


class Way(NamedTuple):
    """One way to a product, over several copies of the weight so that each call reads its own from memory."""

    calls: list[Callable[[Tensor], object]]
    weight_bytes: int
    most_tokens: int | None = None
    """None: any number."""


def ways_of(projection: Projection) -> dict[str, Way]:
    """Every way to one product, and the bytes of weights that each must read."""
    copies = range(copies_of(projection.weight_bytes(4)))
    ways: dict[str, Way] = {}
    for bits in (4, 8):
        weights = [Packed.random(projection, bits) for _ in copies]
        size = projection.weight_bytes(bits)
        ways[f"int{bits}"] = Way([partial(one.linear, projection=projection) for one in weights], size, MOST_TOKENS)
        ways[f"int{bits}_unpacked"] = Way([partial(unpacked_product, packed=one) for one in weights], size)
    shape = sum(projection.widths), projection.features
    dense = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in copies]
    ways["bf16"] = Way([partial(F.linear, weight=one) for one in dense], dense[0].nbytes)
    ways["torch_int4"] = Way([torch_int4(projection) for _ in copies], projection.weight_bytes(4))
    return ways


def unpacked_product(x: Tensor, packed: Packed) -> Tensor:
    """Our unpacking, then torch's product."""
    return F.linear(x, packed.weights(x.dtype))


def relative_error(projection: Projection, x: Tensor, bits: int) -> float:
    """Of our kernel against float32, as a share of the result's size."""
    packed = Packed.random(projection, bits)
    want = x.float() @ packed.weights(torch.float32).T
    got = torch.cat(packed.linear(x, projection), dim=-1).float()
    return float((got - want).norm() / want.norm())


def measure_projection(projection: Projection, copy_gb_s: float, flush: Tensor) -> dict[str, Any]:
    """One projection at every token count."""
    torch.cuda.empty_cache()
    ways = ways_of(projection)
    copies = len(ways["bf16"].calls)
    row: dict[str, Any] = {**projection._asdict(), "group_size": GROUP, "copies": copies, "tokens": {}}
    for tokens in TOKENS:
        x = torch.randn(tokens, projection.features, dtype=torch.bfloat16, device="cuda")
        found: dict[str, Any] = {}
        for name, way in ways.items():
            if way.most_tokens is not None and tokens > way.most_tokens:
                continue
            moved = way.weight_bytes + projection.activation_bytes(tokens)
            try:
                times = median_ms(graphed(lambda calls=way.calls, x=x: [call(x) for call in calls]), flush)  # type: ignore[misc]
                found[name] = rate(times, moved, copy_gb_s, calls=len(way.calls))
            except RuntimeError as error:
                found[name] = f"not measured: {str(error).splitlines()[0]}"
        if tokens in (1, MOST_TOKENS):
            found["relative_error"] = {f"int{bits}": relative_error(projection, x, bits) for bits in (4, 8)}
        row["tokens"][tokens] = found
        print(f"{projection.model:13s} {projection.name:17s} {tokens:5d}  {summary_of(found)}", flush=True)
    row["times_bf16"] = {bits: as_served(row["tokens"], bits) for bits in ("int4", "int8")}
    row["crossover_tokens"] = {bits: crossover(row["tokens"], bits) for bits in ("int4", "int8")}
    return row


def summary_of(found: dict[str, Any]) -> str:
    """Microseconds of every way, and our share of the copy."""
    parts = [f"{name} {way['median_ms'] * 1e3:.1f} us" for name, way in found.items() if "median_ms" in way]
    if isinstance(found.get("int4"), dict):
        parts.append(f"int4 at {found['int4']['share_of_copy']:.0%} of copy")
    return "  ".join(parts)


def crossover(rows: dict[int, dict[str, Any]], bits: str) -> dict[str, int | None]:
    """The fewest tokens at which each other way was faster than our kernel, None where it never was up to its most."""

    def faster(other: str, tokens: int) -> bool:
        ours, theirs = rows[tokens].get(bits), rows[tokens][other]
        return isinstance(ours, dict) and isinstance(theirs, dict) and theirs["median_ms"] < ours["median_ms"]

    others = [f"{bits}_unpacked", "bf16", *(["torch_int4"] if bits == "int4" else [])]
    return {other: next((tokens for tokens in TOKENS if faster(other, tokens)), None) for other in others}


def as_served(rows: dict[int, dict[str, Any]], bits: str) -> dict[int, float]:
    """Tokens -> how many times as fast as dense bfloat16 what a loaded model runs is: our kernel to its most tokens."""
    found = {}
    for tokens, row in rows.items():
        ours, dense = row[bits if tokens <= MOST_TOKENS else f"{bits}_unpacked"], row["bf16"]
        if isinstance(ours, dict) and isinstance(dense, dict):
            found[tokens] = round(dense["median_ms"] / ours["median_ms"], 3)
    return found


def measure(model: str | None) -> dict[str, Any]:
    """Everything, or one model, in one record."""
    flush = flush_buffer()
    record = new_record("gpu_linear.py", ceilings(flush))
    copy_gb_s = record["ceilings"]["copy"]["gb_s"]
    wanted = [projection for projection in PROJECTIONS if model in (None, projection.model)]
    return {**record, "projections": [measure_projection(projection, copy_gb_s, flush) for projection in wanted]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    parser.add_argument("--model", choices=sorted({p.model for p in PROJECTIONS}), help="measure this model only")
    args = parser.parse_args()
    require_kernels()
    write_record(args.out, measure(args.model))


if __name__ == "__main__":
    main()
