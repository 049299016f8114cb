"""Which implementation multiplies a packed linear, for how many tokens, and why: one table and the wish of the user.

Rows are tried in order of their tokens; those of the best instruction set that has any are the ones that count. What
the implementations do lives in linear.py, linear_ops.py and linear_torch.py; no tensor is touched here.
"""

from __future__ import annotations

import re
import sys
from enum import StrEnum
from functools import cache
from typing import Any, Final, Literal, NamedTuple

import torch

from qquant import _native
from qquant.errors import UsageError


class Kernel(StrEnum):
    """What may multiply a packed linear; plain strings are accepted wherever one is asked for."""

    AUTO = "auto"
    """By the table: ours, torch's where ours is not built, else the reference."""
    REFERENCE = "reference"
    """Always unpack, dequantize in float32 and multiply: what everything else is compared with."""
    KERNEL = "kernel"
    """Ours, or an error that says why not."""
    TORCH = "torch"
    """torch's own packed kernels, or an error that says why not."""


class Implementation(StrEnum):
    """How a product is computed."""

    REFERENCE = "reference"
    PANELS = "panels"
    """``panel_linear`` with activations as they are."""
    TILE = "tile"
    """``panel_linear`` with -1 activation bits: tiles of bfloat16 weights."""
    INT8 = "int8"
    """``panel_linear`` with 8 activation bits."""
    DENSE = "dense"
    """``panel_weights``, then torch's matmul."""
    TORCH_INT4PACK = "torch int4pack"
    TORCH_INT8PACK = "torch int8pack"


NEED_PANELS = frozenset((Implementation.PANELS, Implementation.TILE, Implementation.INT8, Implementation.DENSE))
"""Those that read a weight in panels; the others read what the checkpoint stores."""

ACTIVATION_BITS = {Implementation.PANELS: 0, Implementation.TILE: -1, Implementation.INT8: 8}
"""How ``panel_linear`` is told which of them is meant."""

ANY = sys.maxsize
"""As many tokens as there are."""

CPU_LEVELS = ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16")
"""Instruction sets of csrc/cpu/isa.h, each with all of those before it, and one for which torch's matmul is better."""

BF16, FP16, FP32 = (torch.bfloat16,), (torch.float16,), (torch.float32,)
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
BOTH = (4, 8)

_ROUNDED_BITS: Final = 8
"""Of activations that are rounded; others would need kernels of their own."""


class Row(NamedTuple):
    """One line of the table."""

    device: str
    at_least: str
    """Instruction set: of ``CPU_LEVELS``, or sm_80 and the like."""
    dtypes: tuple[torch.dtype, ...]
    """Of the activations."""
    bits: tuple[int, ...]
    tokens: int
    """Up to so many."""
    implementation: Implementation
    why: str


_FEW = "each weight is read once and never dequantized"
_MANY = "weights rounded to bfloat16 once, tile by tile in cache, at the rate of bfloat16 products"
_NOT_MEASURED = "not measured"

OURS: tuple[Row, ...] = (
    # Integer sums end with each group: tiles overtake them at some 32 tokens where groups are small, at some 96 where
    # they are of 128 columns (docs/linear.md).
    Row("cpu", "avx512_bf16", BF16, BOTH, 32, Implementation.PANELS, _FEW),
    Row("cpu", "avx512_bf16", BF16, BOTH, ANY, Implementation.TILE, _MANY),
    # AMX multiplies matrices 8 times as fast as the vectors that the tile kernel uses.
    Row("cpu", "amx_bf16", BF16, BOTH, 15, Implementation.PANELS, f"{_FEW}; {_NOT_MEASURED}"),
    Row("cpu", "amx_bf16", BF16, BOTH, ANY, Implementation.DENSE, f"torch's matmul uses AMX; {_NOT_MEASURED}"),
    # Without bfloat16 instructions there is nothing faster to hand many tokens to.
    Row("cpu", "avx2", BF16, BOTH, ANY, Implementation.PANELS, "no bfloat16 instructions: 8-bit products for all"),
    # bfloat16 tiles would round float32 and float16; torch's float16 matmul on a CPU is slower than its float32 one.
    Row("cpu", "avx2", FP16 + FP32, BOTH, ANY, Implementation.PANELS, "16 or 24 bits of activations by 8-bit products"),
    Row("cpu", "portable", FLOATS, BOTH, 15, Implementation.PANELS, f"no codes are dequantized; {_NOT_MEASURED}"),
    Row("cpu", "portable", FLOATS, BOTH, ANY, Implementation.DENSE, f"torch's matmul is tuned; {_NOT_MEASURED}"),
    Row("cuda", "sm_80", HALVES, BOTH, 64, Implementation.PANELS, f"bound by the reading of codes; {_NOT_MEASURED}"),
    Row("cuda", "sm_80", HALVES, BOTH, ANY, Implementation.DENSE, f"bound by cuBLAS's products; {_NOT_MEASURED}"),
    Row("cuda", "sm_80", FP32, BOTH, ANY, Implementation.DENSE, f"float32 products are cuBLAS's; {_NOT_MEASURED}"),
)
"""Kernels of csrc/, where they are built."""

TORCH: tuple[Row, ...] = (
    # 0.26 ms for each further token against 0.12 of a dense matmul make up for the unpacking at some 340 tokens; 128
    # is twice what was measured (docs/linear.md).
    Row("cpu", "avx512", BF16, (4,), 128, Implementation.TORCH_INT4PACK, "80 times as fast as unpacking at 1 token"),
    # At 128 tokens it takes a third of what unpacking takes, at 1 token half of a bfloat16 matmul.
    Row("cpu", "avx2", BF16, (8,), 128, Implementation.TORCH_INT8PACK, "half the time of bfloat16 at 1 token"),
    Row("cuda", "sm_80", BF16, (4,), 64, Implementation.TORCH_INT4PACK, f"no dequantized copy; {_NOT_MEASURED}"),
)
"""torch's packed kernels, for layers that they can read."""


class Step(NamedTuple):
    """A stretch of token counts, up to ``tokens``, and what serves it."""

    tokens: int
    implementation: Implementation
    why: str


class Place(NamedTuple):
    """Where a layer runs."""

    device: str
    """Type of the device."""
    instruction_set: str
    """That our kernels use; for a CPU without them, the one that torch uses."""
    torch_set: str
    """That torch's kernels use."""
    missing: str
    """Why our kernels are not there; empty where they are."""


def place_of(device: torch.device) -> Place:
    """What runs on a device: its instruction set, and whether our kernels are there."""
    return _place_of(device.type, device.index if device.type == "cuda" else None)


@cache
def _place_of(kind: str, index: int | None) -> Place:
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability(index)
        level = f"sm_{major}{minor}"
        return Place(kind, level, level, _missing("qquant._C_cuda", "CUDA"))
    if kind != "cpu":
        return Place(kind, "", "", f"there are none for {kind}")
    torch_set = {"AVX2": "avx2", "AVX512": "avx512"}.get(torch.backends.cpu.get_cpu_capability(), "portable")
    missing = _missing("qquant._C", "CPU")
    found = None if missing else re.search(r"panel_linear: (\w+)", _native.describe("qquant._C"))
    level = torch_set if found is None else found[1]
    if level == "avx512_bf16" and torch.cpu._is_amx_tile_supported():
        level = "amx_bf16"
    return Place(kind, level, torch_set, missing)


def _missing(module: str, key: str) -> str:
    """Why a device has none of our kernels for linears; empty if it has."""
    _native.load_torch_ops()
    # linear_ops.py declares the operator; whoever asks has imported it.
    if torch._C._dispatch_has_kernel_for_dispatch_key("qquant::panel_linear", key):
        return ""
    why = next(status.why for status in _native.status() if status.name == module)
    return f"{module}: {why or 'built before it had kernels for linears; build it again'}"


def _rank(level: str) -> int:
    return CPU_LEVELS.index(level) if level in CPU_LEVELS else int(level.removeprefix("sm_") or 0)


def _matching(table: tuple[Row, ...], device: str, level: str, dtype: torch.dtype, bits: int) -> tuple[Step, ...]:
    rows = [row for row in table if row.device == device and dtype in row.dtypes and bits in row.bits]
    reached = [_rank(row.at_least) for row in rows if _rank(row.at_least) <= _rank(level)]
    best = [row for row in rows if reached and _rank(row.at_least) == max(reached)]
    return tuple(Step(row.tokens, row.implementation, row.why) for row in best)


def steps_of(
    place: Place,
    *,
    dtype: torch.dtype,
    bits: int,
    kernel: Kernel | str = Kernel.AUTO,
    activation_bits: int | None = None,
    torch_obstacle: str = "",
) -> tuple[Step, ...]:
    """What serves a layer, in order of tokens; the last step serves all that are left.

    Args:
        place: where it runs.
        dtype: of its activations.
        bits: of its codes.
        kernel: what the user wants.
        activation_bits: 8 rounds activations to 8 bits, which changes results; None leaves them as they are.
        torch_obstacle: why torch's kernels cannot read this layer; empty if they can.

    Raises:
        UsageError: the wish cannot be met here.
    """
    wish = wished(kernel)
    name = str(dtype).removeprefix("torch.")
    ours = () if place.missing else _matching(OURS, place.device, place.instruction_set, dtype, bits)
    theirs = () if torch_obstacle else _matching(TORCH, place.device, place.torch_set, dtype, bits)
    if check_activation_bits(activation_bits) is not None:
        why = _why_not_int8(place, wish, ours, f"{bits} bits and {name} on {place.device}")
        if why:
            raise UsageError(f"activation_bits 8 needs our CPU kernels, {why}; leave activation_bits out")
        return (Step(ANY, Implementation.INT8, "8-bit activations were asked for"),)
    if wish is Kernel.REFERENCE:
        return (Step(ANY, Implementation.REFERENCE, "asked for"),)
    if wish is Kernel.TORCH:
        if not theirs:
            why = torch_obstacle or f"it has none for {bits} bits and {name} on {_label(place)}"
            raise UsageError(f"kernel 'torch' needs a layer that torch's packed kernels serve, {why}; choose 'auto'")
        return (Step(ANY, theirs[-1].implementation, "asked for"),)
    if ours:
        return ours
    reason = place.missing or f"no kernel serves {bits} bits with {name} on {_label(place)}"
    if wish is Kernel.KERNEL:
        raise UsageError(f"kernel 'kernel' needs our kernels for linears, {reason}; choose 'auto'")
    return (*theirs, Step(ANY, Implementation.REFERENCE, reason))


def wished(kernel: Kernel | str) -> Kernel:
    """The member that a plain string names; raises UsageError for any other."""
    try:
        return Kernel(kernel)
    except ValueError:
        raise UsageError(f"kernel must be one of {', '.join(Kernel)}, got {kernel!r}") from None


def check_activation_bits(bits: Any) -> Literal[8] | None:
    """The bits as they came; raises UsageError unless activations can be rounded to them, or are to be left alone."""
    if bits is None:
        return None
    if type(bits) is int and bits == _ROUNDED_BITS:
        return _ROUNDED_BITS
    rule = f"activation_bits must be {_ROUNDED_BITS}, or left out for activations as they are"
    raise UsageError(f"{rule}, got {bits!r}")


def _why_not_int8(place: Place, wish: Kernel, ours: tuple[Step, ...], case: str) -> str:
    if wish in (Kernel.REFERENCE, Kernel.TORCH):
        return f"and kernel {wish.value!r} is not one"
    if place.device != "cpu":
        return f"and this layer is on {place.device}"
    return "" if ours else place.missing or f"and there is none for {case}"


_NAMES = {
    "portable": "portable",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 VNNI",
    "amx_bf16": "AVX-512 VNNI",
}


def _label(place: Place) -> str:
    level = f" ({_NAMES.get(place.instruction_set, place.instruction_set)})" if place.instruction_set else ""
    return f"{'CPU' if place.device == 'cpu' else place.device}{level}"


def described(steps: tuple[Step, ...], place: Place) -> str:
    """A line for people: which implementation from how many tokens on, and why."""
    level = _NAMES.get(place.instruction_set, place.instruction_set)
    names = {
        Implementation.REFERENCE: "reference (dequantize, multiply)",
        Implementation.PANELS: f"{level} kernel",
        Implementation.TILE: "bf16 tiles",
        Implementation.INT8: f"{level} kernel on 8-bit activations",
        Implementation.DENSE: "dequantize, torch's matmul",
        Implementation.TORCH_INT4PACK: "torch's int4pack",
        Implementation.TORCH_INT8PACK: "torch's int8pack",
    }
    parts, first = [], 1
    for step in steps:
        reach = f" to {step.tokens} tokens" if step.tokens < ANY else f" from {first}" if first > 1 else ""
        parts.append(f"{names[step.implementation]}{reach} ({step.why})")
        first = step.tokens + 1
    return ", ".join(parts)
