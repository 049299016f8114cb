"""The operators of packed linears: products with panels, their weights unpacked, words moved in and out of them.

Of each there are the schema, the reference and the fake. The references are plain torch, run on every device, and are
what the kernels of csrc/ must meet. Importing this file loads those kernels where they are built. Which of them runs
when is linear_kernels.py; no module lives here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qquant import _native

PANEL_ROWS = 16
"""Output features whose words lie side by side."""

BLOCK_COLUMNS = 128
"""Input features that share one step of the fixed point that activations are written in; a group's last may be less."""

LIMITS = {8: 127, 16: 127 * 256 + 127, 24: (127 * 256 + 127) * 256 + 127}
"""Largest magnitude of an activation in 8, 16 or 24 bits of fixed point: balanced base-256 digits of -127..127."""


def fill_panels(out: Tensor, rows: Tensor) -> None:
    """Write [S, N] as panels [ceil(N / 16), S, 16] into ``out``, features that N lacks being 0.

    Any dtype; ``from_panels`` undoes it.
    """
    count = rows.shape[1]
    whole = count // PANEL_ROWS
    out[:whole].copy_(rows[:, : whole * PANEL_ROWS].unflatten(1, (whole, PANEL_ROWS)).transpose(0, 1))
    if count % PANEL_ROWS:
        out[whole].zero_()
        out[whole, :, : count % PANEL_ROWS] = rows[:, whole * PANEL_ROWS :]


def from_panels(panels: Tensor, rows: int) -> Tensor:
    """Undo ``fill_panels``: [P, S, 16] to [S, rows], a fresh tensor."""
    words: Tensor = panels.transpose(0, 1).flatten(1)[:, :rows].contiguous()
    return words


def gathered_words(words: Tensor, columns: Tensor, bits: int) -> Tensor:
    """Words whose codes are chosen column by column from others.

    Args:
        words: [S, N] int32, 32 / bits codes each, lowest bits first. Read, never written.
        columns: [C] integer, which code each place gets, -1 for a zero. C fills whole words.
        bits: 4 or 8.

    Returns:
        [C * bits / 32, N] int32.
    """
    per = 32 // bits
    if columns.numel():
        low, high = (int(end) for end in columns.aminmax())
        last = words.shape[0] * per - 1
        torch._check(low >= -1 and high <= last, lambda: f"columns must be -1..{last}, got {low}..{high}")
    found = torch.zeros(columns.numel() // per, words.shape[1], dtype=torch.int32, device=words.device)
    for position in range(per):
        source = columns[position::per].long()
        field = words.index_select(0, source.clamp(min=0) // per)
        field >>= (source.clamp(min=0) % per * bits).int()[:, None]
        field &= torch.where(source < 0, 0, 2**bits - 1).int()[:, None]
        found |= field.bitwise_left_shift_(position * bits)
    return found


def to_panels_reference(out: Tensor, words: Tensor, columns: Tensor | None, bits: int) -> None:
    """Move the words of a checkpoint's matrix into panels, columns in another order where that is asked for.

    Args:
        out: [ceil(N / 16), T, 16] int32, contiguous. Written in full, features that N lacks being 0.
        words: [S, N] int32, row s holding the s-th word of every output feature, as ``qweight`` does. Read, never
            written.
        columns: [T * 32 / bits] int32, the column of ``words`` for each of the panels, -1 for codes of 0; None: they
            are the same, and T = S.
        bits: 4 or 8.
    """
    _check_to_panels(out, words, columns, bits)
    fill_panels(out, words if columns is None else gathered_words(words, columns, bits))


def to_words_reference(panels: Tensor, columns: Tensor | None, rows: int, bits: int) -> Tensor:
    """Undo ``to_panels_reference``.

    Args:
        panels: [P, T, 16] int32. Read, never written.
        columns: [C] int32, the column of the panels for each of the result, -1 for codes of 0, C filling whole words;
            None: they are the same.
        rows: output features, which the panels just hold.
        bits: 4 or 8.

    Returns:
        [S, rows] int32, with S = C * bits / 32, or T.
    """
    _check_to_words(panels, columns, rows, bits)
    words = from_panels(panels, rows)
    return words if columns is None else gathered_words(words, columns, bits)


def codes_of(words: Tensor, bits: int) -> Tensor:
    """Codes of panels: [P, S, 16] int32 to [P * 16, S * 32 / bits] uint8, a row per output feature."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    codes = (words[..., None] >> shifts) & (2**bits - 1)  # [P, S, 16, codes of a word]
    found: Tensor = codes.to(torch.uint8).transpose(1, 2).flatten(2).flatten(0, 1)
    return found


def _group_of_column(columns: int, group_size: int, device: torch.device) -> Tensor:
    return torch.arange(columns, device=device) // group_size


def weights_reference(
    words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, zero: int, dtype: torch.dtype
) -> Tensor:
    """The real weights of panels, computed in float32: ``scale * (code - zero)``.

    Args:
        words: [P, S, 16] int32.
        scales: [P, G, 16] float16 or float32.
        zeros: [P, G, 16] uint8, or None: ``zero`` everywhere.
        bits: 4 or 8.
        group_size: columns of a group, a multiple of 32 / bits; the last group may be shorter.
        zero: the one zero, where ``zeros`` is None.
        dtype: of the result, rounded to once.

    Returns:
        [P * 16, S * 32 / bits]: columns in the order of the panels, rows that pad the last panel included.
    """
    codes = codes_of(words, bits)
    group = _group_of_column(codes.shape[1], group_size, words.device)
    scale = scales.float().transpose(1, 2).flatten(0, 1)[:, group]
    offset = zero if zeros is None else zeros.float().transpose(1, 2).flatten(0, 1)[:, group]
    return (scale * (codes.float() - offset)).to(dtype)


def linear_reference(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    widths: list[int],
    bits: int,
    group_size: int,
    zero: int,
    activation_bits: int,
) -> list[Tensor]:
    """``x @ W.T + bias`` for one or more linears that share an input, in float32, rounded once to x's dtype.

    Args:
        x: [..., K] float32, float16 or bfloat16, any strides. Read, never written.
        words: [P, S, 16] int32, the panels of one linear after those of another.
        scales: [P, G, 16] float16 or float32.
        zeros: [P, G, 16] uint8, or None: ``zero`` everywhere.
        order: [S * 32 / bits] int32, which column of x each column of the panels multiplies, -1 for none; None: they
            are the same, and K = S * 32 / bits.
        bias: [P * 16] float32, or None.
        widths: output features of each linear, each beginning at a panel of its own.
        bits: 4 or 8.
        group_size: columns of a group, a multiple of 32 / bits; the last group may be shorter.
        zero: the one zero, where ``zeros`` is None.
        activation_bits: 0: x is used as it is. Kernels may write it as fixed point of 16 bits (24 for float32), one
            step per token and 128 columns of a group. 8: x is rounded to that many bits so, which changes the result.
            -1: x is used as it is, each weight rounded to bfloat16, for many tokens (see docs/panels.md).

    Returns:
        [..., width] for each width, contiguous, in x's dtype.
    """
    check_linear(x, words, scales, zeros, order, bias, widths, bits, group_size, activation_bits)
    weight = weights_reference(words, scales, zeros, bits, group_size, zero, torch.float32)
    values = x.reshape(-1, x.shape[-1]).float()
    if order is not None:
        place = order.long()
        values = values[:, place.clamp(min=0)].masked_fill(place < 0, 0.0)
    if activation_bits == 8:
        values = rounded_activations(values, group_size)
    product = values @ weight.T
    if bias is not None:
        product = product + bias
    found, row = [], 0
    for width in widths:
        found.append(product[:, row : row + width].to(x.dtype).reshape(*x.shape[:-1], width).contiguous())
        row += -(-width // PANEL_ROWS) * PANEL_ROWS
    return found


def rounded_activations(values: Tensor, group_size: int) -> Tensor:
    """Activations as 8 bits hold them: one step per row and 128 columns of a group, to the nearest of -127..127 steps.

    Args:
        values: [M, K] float32, columns in the order of the panels.
        group_size: columns of a group.

    Returns:
        [M, K] float32; rows of a block that is not finite are NaN there.
    """
    column = torch.arange(values.shape[1], device=values.device)
    per_group = -(-group_size // BLOCK_COLUMNS)
    block = column // group_size * per_group + column % group_size // BLOCK_COLUMNS
    count = int(block[-1]) + 1 if block.numel() else 0
    largest = values.new_zeros(values.shape[0], count)
    largest.scatter_reduce_(1, block.expand_as(values), values.abs(), "amax")
    step = (largest / LIMITS[8])[:, block]
    rounded = torch.where(step > 0, (values / step).round(), 0.0).clamp(-LIMITS[8], LIMITS[8]) * step
    return torch.where(step.isfinite(), rounded, torch.nan)


def check_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    widths: list[int],
    bits: int,
    group_size: int,
    activation_bits: int,
) -> None:
    """Refuse tensors that do not belong together; the kernels check the same."""
    torch._check(bits in (4, 8), lambda: f"bits must be 4 or 8, got {bits}")
    torch._check(
        words.dim() == 3 and words.shape[2] == PANEL_ROWS and words.dtype == torch.int32,
        lambda: f"words must be [P, S, {PANEL_ROWS}] int32, got {list(words.shape)} {words.dtype}",
    )
    per = 32 // bits
    panels, columns = words.shape[0], words.shape[1] * per
    torch._check(
        group_size > 0 and group_size % per == 0,
        lambda: f"group_size must be a multiple of {per} for {bits} bits, got {group_size}",
    )
    groups = -(-columns // group_size)
    torch._check(
        scales.shape == (panels, groups, PANEL_ROWS) and scales.dtype in (torch.float16, torch.float32),
        lambda: (
            f"scales must be [{panels}, {groups}, {PANEL_ROWS}] float16 or float32, "
            f"got {list(scales.shape)} {scales.dtype}"
        ),
    )
    if zeros is not None:
        torch._check(
            zeros.shape == scales.shape and zeros.dtype == torch.uint8,
            lambda: f"zeros must be {list(scales.shape)} uint8, got {list(zeros.shape)} {zeros.dtype}",
        )
    features = x.shape[-1] if x.dim() else 0
    if order is None:
        torch._check(features == columns, lambda: f"x must end in {columns} features, got {features}")
    else:
        torch._check(
            order.shape == (columns,) and order.dtype == torch.int32,
            lambda: f"order must be [{columns}] int32, got {list(order.shape)} {order.dtype}",
        )
    if bias is not None:
        torch._check(
            bias.shape == (panels * PANEL_ROWS,) and bias.dtype == torch.float32,
            lambda: f"bias must be [{panels * PANEL_ROWS}] float32, got {list(bias.shape)} {bias.dtype}",
        )
    held = sum(-(-width // PANEL_ROWS) for width in widths)
    torch._check(
        held == panels and min(widths, default=0) > 0,
        lambda: f"outputs of {widths} features need {held} panels, got {panels}",
    )
    torch._check(activation_bits in (-1, 0, 8), lambda: f"activation_bits must be -1, 0 or 8, got {activation_bits}")


def _check_columns(columns: Tensor, bits: int) -> None:
    torch._check(
        columns.dim() == 1 and columns.dtype == torch.int32 and columns.numel() % (32 // bits) == 0,
        lambda: (
            f"columns must be int32 and fill whole words of {32 // bits} codes, "
            f"got {list(columns.shape)} {columns.dtype}"
        ),
    )


def _check_to_panels(out: Tensor, words: Tensor, columns: Tensor | None, bits: int) -> None:
    torch._check(bits in (4, 8), lambda: f"bits must be 4 or 8, got {bits}")
    torch._check(
        words.dim() == 2 and words.dtype == torch.int32,
        lambda: f"words must be [S, N] int32, got {list(words.shape)} {words.dtype}",
    )
    if columns is not None:
        _check_columns(columns, bits)
    steps = words.shape[0] if columns is None else columns.numel() * bits // 32
    panels = -(-words.shape[1] // PANEL_ROWS)
    torch._check(
        out.shape == (panels, steps, PANEL_ROWS) and out.dtype == torch.int32 and out.is_contiguous(),
        lambda: (
            f"out must be [{panels}, {steps}, {PANEL_ROWS}] int32 and contiguous, "
            f"got {list(out.shape)} {out.dtype} with strides {list(out.stride())}"
        ),
    )


def _check_to_words(panels: Tensor, columns: Tensor | None, rows: int, bits: int) -> None:
    torch._check(bits in (4, 8), lambda: f"bits must be 4 or 8, got {bits}")
    torch._check(
        panels.dim() == 3 and panels.shape[2] == PANEL_ROWS and panels.dtype == torch.int32,
        lambda: f"panels must be [P, T, {PANEL_ROWS}] int32, got {list(panels.shape)} {panels.dtype}",
    )
    if columns is not None:
        _check_columns(columns, bits)
    torch._check(
        rows >= 0 and -(-rows // PANEL_ROWS) == panels.shape[0],
        lambda: f"rows must fill {panels.shape[0]} panels of {PANEL_ROWS}, got {rows}",
    )


def _linear_fake(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    order: Tensor | None,
    bias: Tensor | None,
    widths: list[int],
    bits: int,
    group_size: int,
    zero: int,
    activation_bits: int,
) -> list[Tensor]:
    check_linear(x, words, scales, zeros, order, bias, widths, bits, group_size, activation_bits)
    return [x.new_empty(*x.shape[:-1], width) for width in widths]


def _weights_fake(
    words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, zero: int, dtype: torch.dtype
) -> Tensor:
    return words.new_empty(words.shape[0] * PANEL_ROWS, words.shape[1] * (32 // bits), dtype=dtype)


def _to_words_fake(panels: Tensor, columns: Tensor | None, rows: int, bits: int) -> Tensor:
    _check_to_words(panels, columns, rows, bits)
    return panels.new_empty(panels.shape[1] if columns is None else columns.numel() * bits // 32, rows)


_library = torch.library.Library("qquant", "FRAGMENT")
_library.define(
    "panel_linear(Tensor x, Tensor words, Tensor scales, Tensor? zeros, Tensor? order, Tensor? bias, "
    "int[] widths, int bits, int group_size, int zero, int activation_bits) -> Tensor[]"
)
_library.define(
    "panel_weights(Tensor words, Tensor scales, Tensor? zeros, int bits, int group_size, int zero, ScalarType dtype) "
    "-> Tensor"
)
_library.define("words_to_panels(Tensor(a!) out, Tensor words, Tensor? columns, int bits) -> ()")
_library.define("panels_to_words(Tensor panels, Tensor? columns, int rows, int bits) -> Tensor")
for _name, _reference, _fake in (
    ("panel_linear", linear_reference, _linear_fake),
    ("panel_weights", weights_reference, _weights_fake),
    ("words_to_panels", to_panels_reference, _check_to_panels),
    ("panels_to_words", to_words_reference, _to_words_fake),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qquant::{_name}", _fake, lib=_library)

panel_linear = torch.ops.qquant.panel_linear.default
"""``linear_reference`` by the fastest kernel that is live for the tensors' device."""
panel_weights = torch.ops.qquant.panel_weights.default
"""``weights_reference`` likewise."""
words_to_panels = torch.ops.qquant.words_to_panels.default
"""``to_panels_reference`` likewise."""
panels_to_words = torch.ops.qquant.panels_to_words.default
"""``to_words_reference`` likewise."""

_native.load_torch_ops()
