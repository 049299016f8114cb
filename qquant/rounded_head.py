"""The output projection of a quantized model in 8 bits, made after loading because somebody asked for it.

With a large vocabulary a 16-bit projection is most of what a token reads. A head is rounded and put in its place here;
its arithmetic is linear.py's, and whoever loads or evaluates a model passes the wish on.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from qquant.affine import choose_qparams, quantize
from qquant.dense_linear import DenseLinear
from qquant.errors import UsageError
from qquant.linear import QuantLinear
from qquant.linear_kernels import Implementation, Kernel, described, place_of
from qquant.linear_ops import fill_panels
from qquant.packed_weight import PackedWeight
from qquant.packing import pack_codes, packable
from qquant.panels import ROWS, PanelForm, make_room

HEAD_BITS = 8
"""The only width: less costs more than it saves where every logit passes through one matrix."""

_GROUP = 128
_SMALLEST_GROUP = 32
"""Below this a scale of 16 bits is a large part of its group, and a row has one scale instead."""
_CHUNK_WEIGHTS = 1 << 20
"""Rounded at a time: 4 MB in float32, and a few times that on the way."""


class RoundedHead(QuantLinear):
    """An output projection that was rounded in memory; no checkpoint holds it, so none is written of it."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        _refuse_saving()


def check_head_bits(bits: int | None) -> None:
    """Raise UsageError unless a head can be rounded to these bits, or is to be left alone."""
    if bits not in (None, HEAD_BITS):
        raise UsageError(f"head_bits must be {HEAD_BITS}, or left out for the stored output projection, got {bits!r}")


def round_head(model: Any, *, bits: int = HEAD_BITS, kernel: Kernel | str = Kernel.AUTO) -> str:
    """Put the output projection of a quantized model, rounded to nearest, in its own place.

    Groups of 128 columns (of a divisor of the row where 128 is none) have one float16 scale each, and codes lie around
    zero. An embedding that shares the weight keeps it as it is; otherwise the memory of the weight is given back.
    Activations stay exact. From then on the model can neither be saved nor asked for its state dict.

    Args:
        model: a causal language model with packed linears. Modified in place.
        bits: 8.
        kernel: what may multiply, as for the packed linears.

    Returns:
        A line to print: what the projection is now, and what runs it.

    Raises:
        UsageError: other bits, a model that is not quantized or has no projection of its own that can be rounded, or a
            kernel that is not there, even for ``auto``: without one a rounded head is slower than the stored one. The
            model is then as it was.
        NumericError: weights too large for float16 scales.
    """
    check_head_bits(bits)
    head = _head_of(model)
    name = next((path for path, module in model.named_modules() if module is head), "the output projection")
    # What inference mode makes could not be changed outside of it.
    with torch.inference_mode(False), torch.no_grad():
        rounded = _rounded(head, kernel)
        try:
            steps = rounded.prepare(head.weight.dtype)
        except UsageError as error:
            raise UsageError(f"{name} cannot be rounded to {bits} bits here: {error}") from error
    slow = next((step for step in steps if step.implementation is Implementation.REFERENCE), None)
    if slow is not None and rounded.kernel is not Kernel.REFERENCE:
        raise UsageError(
            f"{name} cannot be rounded to {bits} bits here: all of it would be dequantized for every token, "
            f"{slow.why}; leave head_bits out, or choose kernel 'reference'"
        )
    model.set_output_embeddings(rounded.train(head.training))
    # Called before anything is written; the state dict alone would be asked for behind config.json.
    model.save_pretrained = _refuse_saving
    size = "row" if rounded.group_size == rounded.in_features else f"g{rounded.group_size}"
    return f"{name} rounded as asked for, int{bits} {size}: {described(steps, place_of(rounded.device))}"


def _head_of(model: Any) -> nn.Linear:
    """The projection to round; raises UsageError where there is none."""
    rule = "head_bits rounds the output projection of a model whose other linears are packed"
    head = model.get_output_embeddings()
    if isinstance(head, PackedWeight):
        raise UsageError(f"{rule}, and this model's projection is in {head.bits} bits already; leave head_bits out")
    if not any(isinstance(module, PackedWeight) for module in model.modules()):
        raise UsageError(f"{rule}, and this model is not quantized; leave head_bits out")
    # A class, a hook or a forward of its own does something else than multiply.
    plain = type(head) in (nn.Linear, DenseLinear) and "forward" not in vars(head)
    if not plain or head._forward_hooks or head._forward_pre_hooks or head.weight.is_meta:
        found = "none" if head is None else type(head).__name__ + (" with hooks, or weights elsewhere" if plain else "")
        raise UsageError(f"{rule}, a plain linear on one device, and this model has {found}; leave head_bits out")
    if not packable(head.in_features, head.out_features, HEAD_BITS):
        raise UsageError(
            f"{rule}, of which both sides must be multiples of 4, got [{head.out_features}, {head.in_features}]; "
            "leave head_bits out"
        )
    linear: nn.Linear = head
    return linear


def group_of(columns: int) -> int:
    """Columns that share a scale: 128, else the largest divisor of the row below it that fills words, else the row."""
    fitting = [size for size in range(_SMALLEST_GROUP, _GROUP + 1, 4) if columns % size == 0]
    return max(fitting, default=columns)


def _rounded(head: nn.Linear, kernel: Kernel | str) -> RoundedHead:
    """The projection in panels, a few rows at a time: no float32 copy of the whole is ever there."""
    weight, bias = head.weight, head.bias
    rows, columns = weight.shape
    size = group_of(columns)
    dtype = None if bias is None else bias.dtype
    layout: dict[str, Any] = {"bits": HEAD_BITS, "group_size": size, "bias": dtype, "device": "meta"}
    layer = RoundedHead(columns, rows, kernel=kernel, **layout)
    middle = 2 ** (HEAD_BITS - 1)
    panels, words = -(-rows // ROWS), columns * HEAD_BITS // 32
    form = PanelForm(panels, words, columns // size, size, middle, torch.float16, bias is not None)
    room = make_room(form, weight.device)
    step = max(1, _CHUNK_WEIGHTS // (columns * ROWS))
    for first in range(0, panels, step):
        codes, scales = _codes(weight[first * ROWS : (first + step) * ROWS], size)
        fill_panels(room.words[first : first + step], pack_codes(codes.T, HEAD_BITS))
        fill_panels(room.scales[first : first + step], scales.T)
    if room.bias is not None:
        fill_panels(room.bias.view(-1, 1, ROWS), bias[None])
    layer._hold(form, room)
    return layer


def _codes(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[rows, columns] floating -> codes of that shape, uint8, and scales [rows, groups], float16."""
    grouped = weight.unflatten(-1, (-1, size)).float()
    scale, zero = choose_qparams(grouped, bits=HEAD_BITS, sym=True)
    codes = quantize(grouped, scale[..., None], zero[..., None], HEAD_BITS)
    return codes.flatten(1).to(torch.uint8), scale.half()


def _refuse_saving(*_: Any, **__: Any) -> NoReturn:
    raise UsageError(
        "a model whose output projection was rounded in memory is no checkpoint, and saving it would drop the stored "
        "projection; load it again without head_bits to save it"
    )
