"""The numbers of one packed linear, read in pieces: groups, zeros, scales and codes.

That its tensors are there and fit together has been seen before, by names.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qquant.checks.findings import Finding, problem, warning
from qquant.finite import all_finite
from qquant.packing import in_order, period, unpack_codes, unpack_zeros
from qquant.shards import CheckpointReader

_AGAIN = "get the checkpoint again, or quantize the model again"
_FLOAT16 = torch.finfo(torch.float16)
_FAR = 4096.0
"""A scale so many times its layer's median is named: outliers of trained weights stay far below, a flipped bit of an
exponent does not."""
_BLANK_WORDS = 64
"""Words of zeros in a row from here on are a hole: the chance that so many codes lie at one end of the grid is nil."""
_SAMPLE = 1 << 16
"""Words looked at for the mean code of a layer."""


@dataclass(frozen=True)
class PackedLinear:
    """A packed linear whose tensors fit together."""

    name: str
    rows: int
    """Input features, K."""
    columns: int
    """Output features, N."""
    bits: int
    group_size: int
    """Rows of a group: K itself where the keys say -1."""
    sym: bool
    desc_act: bool
    version: int
    """Of the zeros, by ``checkpoint_format``."""

    @property
    def groups(self) -> int:
        """G."""
        return -(-self.rows // self.group_size)


def packed_values(reader: CheckpointReader, linear: PackedLinear) -> Iterator[Finding]:
    """Everything about the numbers of a linear. Memory is that of its scales, zeros and one piece of its codes."""
    name = linear.name
    g_idx = in_order(linear.rows, linear.group_size, "cpu")
    if f"{name}.g_idx" in reader.entries:
        g_idx = reader.read(f"{name}.g_idx")
    scales = reader.read(f"{name}.scales").to(torch.float32)
    zeros = unpack_zeros(reader.read(f"{name}.qzeros"), linear.bits, linear.columns, linear.version)
    broken = list(_groups(linear, g_idx))
    yield from broken
    yield from _zeros(linear, zeros)
    yield from _scales(linear, scales, zeros)
    yield from _holes(reader, linear, zeros)
    if not any(finding.level == "problem" for finding in broken):
        yield from _lost(reader, linear, g_idx, scales, zeros)


def mean_step(reader: CheckpointReader, linear: PackedLinear) -> float:
    """How far codes lie from their zeros in the mean, in steps, over the first rows: about 0 for trained weights."""
    block = next(_row_blocks(reader, linear, _SAMPLE))
    codes = unpack_codes(block, linear.bits).to(torch.float32)
    g_idx = in_order(linear.rows, linear.group_size, "cpu")
    if f"{linear.name}.g_idx" in reader.entries:
        g_idx = reader.read(f"{linear.name}.g_idx").clamp(0, linear.groups - 1)
    zeros = unpack_zeros(reader.read(f"{linear.name}.qzeros"), linear.bits, linear.columns, linear.version)
    return float((codes - zeros[g_idx[: codes.shape[0]].long()]).mean())


def _groups(linear: PackedLinear, g_idx: Tensor) -> Iterator[Finding]:
    """g_idx: [K] int32; each group as often as it has rows, in order unless desc_act says otherwise."""
    subject, groups = f"{linear.name}.g_idx", linear.groups
    low, high = (int(end) for end in g_idx.aminmax())
    if low < 0 or high >= groups:
        yield problem("groups", subject, f"must name groups 0..{groups - 1}, got {low}..{high}; {_AGAIN}")
        return
    found = torch.bincount(g_idx.long(), minlength=groups)
    expected = torch.bincount(in_order(linear.rows, linear.group_size, "cpu").long(), minlength=groups)
    if not torch.equal(found, expected):
        group = int((found != expected).nonzero()[0])
        text = f"each group must have {int(expected[group])} rows, group {group} has {int(found[group])}; {_AGAIN}"
        yield problem("groups", subject, text)
    elif not linear.desc_act and not torch.equal(g_idx, in_order(linear.rows, linear.group_size, "cpu")):
        yield problem(
            "groups", subject, "is in act-order, and fast kernels trust desc_act, which says false; set it to true"
        )  # fmt: skip


def _zeros(linear: PackedLinear, zeros: Tensor) -> Iterator[Finding]:
    """zeros: [G, N] int32, decoded as the keys say."""
    subject, middle = f"{linear.name}.qzeros", 2 ** (linear.bits - 1)
    if not linear.sym:
        if linear.version == 1 and bool((zeros == 0).any()):
            yield warning(
                "zeros", subject, "has zeros at level 0, which v1 cannot store and readers decode as 0 or as "
                f"{2**linear.bits}; checkpoint_format gptq_v2 can hold them",
            )  # fmt: skip
        return
    low, high = (int(end) for end in zeros.aminmax())
    if low == high == middle:
        return
    if low == high == middle + (1 if linear.version == 1 else -1):
        other = "gptq_v2" if linear.version == 1 else "gptq"
        yield problem(
            "zeros", subject, f"has the symmetric zeros of another version than checkpoint_format says, so that "
            f"every weight is off by one step; set it to {other}",
        )  # fmt: skip
    else:
        text = f"symmetric zeros must all be {middle}, got {low}..{high}; set sym to false if they are meant"
        yield problem("zeros", subject, text)


def _scales(linear: PackedLinear, scales: Tensor, zeros: Tensor) -> Iterator[Finding]:
    """scales: [G, N] float32 copies; negative ones are legitimate."""
    subject = f"{linear.name}.scales"
    if not all_finite(scales):
        yield problem("scales", subject, f"scales must be finite, got NaN or Inf; {_AGAIN}")
        return
    size = scales.abs()
    reach = float((size * torch.maximum(zeros, 2**linear.bits - 1 - zeros)).max())
    if reach > _FLOAT16.max:
        text = f"weights must fit float16, in which readers compute; the largest scale reaches {reach:.3g}; {_AGAIN}"
        yield problem("scales", subject, text)
    largest, middle = float(size.max()), float(size.median())
    if largest > _FAR * middle > 0:
        text = f"the largest is {largest / middle:.0f} times the median: perhaps damaged; compare with the original"
        yield warning("scales", subject, text)


def _holes(reader: CheckpointReader, linear: PackedLinear, zeros: Tensor) -> Iterator[Finding]:
    """Words that nobody wrote, and a tensor that says the same everywhere."""
    subject = f"{linear.name}.qweight"
    low, high, hole = 2**31, -(2**31), 0
    for chunk in reader.chunks(subject):
        least, most = (int(end) for end in chunk.aminmax())
        low, high = min(low, least), max(high, most)
        if least <= 0 <= most and not hole:
            hole = _longest_blank(chunk)
    if low == high:
        only = unpack_codes(torch.full((period(linear.bits)[1], 1), low, dtype=torch.int32), linear.bits)
        if bool((only == only[0]).all()) and bool((zeros == int(only[0])).all()):
            yield warning("codes", subject, "all weights are zero; fine only if the original's are")
        else:
            yield problem("codes", subject, f"all codes are the same, so the layer was never written; {_AGAIN}")
    elif hole >= _BLANK_WORDS and int(zeros.min()) > 0:
        text = f"{hole} words in a row are zero, as where a write was cut off; {_AGAIN}"
        yield problem("codes", subject, text)


def _longest_blank(words: Tensor) -> int:
    """How many words in a row are zero: [n] int32."""
    blank = words == 0
    if int(blank.count_nonzero()) < _BLANK_WORDS:
        return 0
    written = (~blank).nonzero().flatten()
    ends = torch.cat([torch.tensor([-1]), written, torch.tensor([words.numel()])])
    return int(ends.diff().max()) - 1


def _lost(
    reader: CheckpointReader, linear: PackedLinear, g_idx: Tensor, scales: Tensor, zeros: Tensor
) -> Iterator[Finding]:
    """Weights behind scales that are too small to hold them; groups of zeros may have any scale."""
    subject = f"{linear.name}.scales"
    half = reader.spec(subject).dtype == "F16"
    # Below this the rounding of a float16 scale itself moves the grid's far end by half a step.
    least = 2.0 ** (linear.bits - 25) if half else 0.0
    faint = (scales.abs() < least) | (scales == 0)
    columns = faint.any(0).nonzero().flatten()
    if not len(columns):
        return
    used, start = torch.zeros_like(faint), 0
    for block in _row_blocks(reader, linear, _SAMPLE):
        codes = unpack_codes(block[:, columns].contiguous(), linear.bits)
        group = g_idx[start : start + codes.shape[0]].long()
        start += codes.shape[0]
        for one in group.unique():
            here = codes[group == one] != zeros[one, columns]
            used[one, columns] |= here.any(0)
    if bool((used & (scales == 0)).any()):
        text = f"scales must not be zero where codes differ from the zero: weights are lost; {_AGAIN}"
        yield problem("scales", subject, text)
    elif bool((used & faint).any()):
        yield warning(
            "scales", subject, f"has float16 scales under {least:.1e}, whose rounding moves weights by half a step; "
            "leave such a layer alone",
        )  # fmt: skip


def _row_blocks(reader: CheckpointReader, linear: PackedLinear, words: int) -> Iterator[Tensor]:
    """Qweight in whole rows, about so many words at a time: [r, N] int32, r a multiple of what a set of codes takes."""
    step = period(linear.bits)[1] * linear.columns
    size = max(1, words // step) * step
    rest = torch.empty(0, dtype=torch.int32)
    for chunk in reader.chunks(f"{linear.name}.qweight"):
        rest = torch.cat([rest, chunk])
        whole = len(rest) // step * step
        for start in range(0, whole, size):
            yield rest[start : min(start + size, whole)].reshape(-1, linear.columns)
        rest = rest[whole:]
