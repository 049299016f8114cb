"""A decoder layer, or its two halves around attention, as one operator each, for bfloat16 and a few new tokens.

Schema, reference, fake. The references call the operators of linear_ops.py and rms_norm.py and torch's own one after
another, and the kernels of csrc/ give the same bits. Which layers compute so is decoder_step.py's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qquant import _native
from qquant.linear_ops import panel_linear
from qquant.models.qwen import positions
from qquant.plain_attention import decode_attention
from qquant.rms_norm import norm_reference

_STAGE = "Tensor {0}_words, Tensor {0}_scales, Tensor? {0}_zeros, Tensor? {0}_order, Tensor? {0}_bias, " + (
    "int {0}_bits, int {0}_group_size, int {0}_zero, int {0}_activation_bits"
)


def _stage(x: Tensor, widths: list[int], stage: tuple[object, ...]) -> list[Tensor]:
    words, scales, zeros, order, bias, *numbers = stage
    found: list[Tensor] = panel_linear(x, words, scales, zeros, order, bias, widths, *numbers)
    return found


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if cos.dtype == torch.float32:
        return positions.rotate(states.transpose(1, 2), cos, sin).transpose(1, 2).contiguous()
    low, high = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]


def inputs_reference(
    x: Tensor,
    norm: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    head_eps: float,
    *stage_and_heads: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of one new token per sequence: norm, q/k/v, norms of heads, half-rotation RoPE.

    Args:
        x: [B, 1, N] bfloat16, the residual stream. Read, never written, as all that follows.
        norm: [N] bfloat16.
        eps: of the norm.
        cos: [B or 1, 1, D] bfloat16: each product and each sum is rounded, as Llama's modules do. Or [B or 1, 1, 1,
            R / 2] float32: the first R channels are turned in float32 and rounded once, as the original Qwen does.
        sin: likewise.
        query_norm: [D] bfloat16, the norm of each head's query before it is turned; None: there is none.
        key_norm: likewise.
        head_eps: of these two.
        *stage_and_heads: words, scales, zeros, order, bias, bits, group_size, zero and activation_bits of the panels
            of q, k and v side by side, as ``panel_linear`` takes them; query heads, KV heads, D.

    Returns:
        [B, Hq, 1, D], [B, H, 1, D], [B, H, 1, D] bfloat16, contiguous.
    """
    *stage, heads, kv_heads, size = stage_and_heads
    assert isinstance(heads, int)
    assert isinstance(kv_heads, int)
    assert isinstance(size, int)
    widths = [heads * size, kv_heads * size, kv_heads * size]
    rows = _stage(norm_reference(x, norm, eps), widths, tuple(stage))
    query, key, value = (row.view(x.shape[0], row.shape[-1] // size, 1, size) for row in rows)
    if query_norm is not None:
        query = norm_reference(query, query_norm, head_eps)
    if key_norm is not None:
        key = norm_reference(key, key_norm, head_eps)
    return _rotated(query, cos, sin), _rotated(key, cos, sin), value


def output_reference(attended: Tensor, stream: Tensor, *rest: object) -> Tensor:
    """What a layer makes of its attention's result: projection, residual, norm, gated SiLU MLP, residual.

    Args:
        attended: [B, 1, Hq, D] bfloat16, or the same numbers in the same order and other axes after B.
        stream: [B, 1, N] bfloat16, the residual stream as it came to the layer.
        *rest: nine arguments of the output projection's panels; weight and eps of the norm; nine of gate and up side
            by side; nine of down; the MLP's width; whether the gate comes before up.

    Returns:
        [B, 1, N] bfloat16, contiguous.
    """
    project, (norm, eps), raised, lower = rest[:9], rest[9:11], rest[11:20], rest[20:29]
    width, gate_first = rest[29:]
    assert isinstance(norm, Tensor)
    assert isinstance(eps, float)
    assert isinstance(width, int)
    features = stream.shape[-1]
    stream = stream + _stage(attended.flatten(1)[:, None], [features], project)[0]
    first, second = _stage(norm_reference(stream, norm, eps), [width, width], raised)
    gate, up = (first, second) if gate_first else (second, first)
    return stream + _stage(F.silu(gate) * up, [features], lower)[0]


def step_reference(x: Tensor, *rest: object) -> Tensor:
    """A whole layer for one new token per sequence over a cache that has room for it.

    Args:
        x: [B, 1, N] bfloat16, the residual stream.
        *rest: arguments of ``inputs_reference`` after x; keys and values [B, H, T, D] bfloat16, whose last token is
            written here; a mask as ``decode_attention`` takes it, or None; the factor on scores; arguments of
            ``output_reference`` after the stream.

    Returns:
        [B, 1, N] bfloat16, contiguous.
    """
    inputs, (keys, values, mask, scaling), output = rest[:19], rest[19:23], rest[23:]
    assert isinstance(keys, Tensor)
    assert isinstance(values, Tensor)
    query, key, value = inputs_reference(x, *inputs)  # type: ignore[arg-type]
    keys[:, :, -1:], values[:, :, -1:] = key, value
    return output_reference(decode_attention(query, keys, values, mask, scaling), x, *output)


def _inputs_fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, size = others[-3:]
    key = x.new_empty(x.shape[0], kv_heads, 1, size)
    return x.new_empty(x.shape[0], heads, 1, size), key, torch.empty_like(key)


def _step_fake(x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _output_fake(attended: Tensor, stream: Tensor, *others: object) -> Tensor:
    return torch.empty_like(stream, memory_format=torch.contiguous_format)


_library = torch.library.Library("qquant", "FRAGMENT")
_INPUTS = (
    "Tensor norm, float eps, Tensor cos, Tensor sin, Tensor? query_norm, Tensor? key_norm, float head_eps, "
    f"{_STAGE.format('q')}, int heads, int kv_heads, int size"
)
_OUTPUT = (
    f"{_STAGE.format('o')}, Tensor next_norm, float next_eps, {_STAGE.format('g')}, {_STAGE.format('d')}, "
    "int width, bool gate_first"
)
_library.define(f"attention_inputs(Tensor x, {_INPUTS}) -> (Tensor, Tensor, Tensor)")
_library.define(f"layer_output(Tensor attended, Tensor stream, {_OUTPUT}) -> Tensor")
_library.define(
    f"layer_step(Tensor x, {_INPUTS}, Tensor(a!) keys, Tensor(b!) values, Tensor? mask, float scaling, {_OUTPUT}) "
    "-> Tensor"
)
_library.impl("attention_inputs", inputs_reference, "CompositeExplicitAutograd")
_library.impl("layer_output", output_reference, "CompositeExplicitAutograd")
_library.impl("layer_step", step_reference, "CompositeExplicitAutograd")
torch.library.register_fake("qquant::layer_step", _step_fake, lib=_library)
torch.library.register_fake("qquant::attention_inputs", _inputs_fake, lib=_library)
torch.library.register_fake("qquant::layer_output", _output_fake, lib=_library)

attention_inputs = torch.ops.qquant.attention_inputs.default
"""``inputs_reference`` by the fastest kernel that is live for the tensors' device."""
layer_output = torch.ops.qquant.layer_output.default
"""``output_reference`` likewise."""
layer_step = torch.ops.qquant.layer_step.default
"""``step_reference`` likewise."""

_native.load_torch_ops()


def kernels_are_live() -> bool:
    """Whether compiled kernels, and not the references, serve both operators on this CPU."""
    names = "attention_inputs", "layer_output", "layer_step"
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(f"qquant::{name}", "CPU") for name in names)
