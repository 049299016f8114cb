"""The contestants of bench_linear.py: one stage of a block, its weights made at random, multiplied in every way.

A stage is what shares an input: q/k/v, o, gate/up, down. Packed ones of ours do a stage in one call, all others one
call for each linear, as they do in a model. There are so many copies of a stage, used one after the other, that they do
not stay in the last-level cache; contestants that share copies go on where the last of them ended. Beside them stands
the plain reading of memory of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.turns import Contestant, Peer, timed
from qquant import linear_ops
from qquant.linear import QuantLinear
from qquant.model_kernels import attach_kernels
from qquant.packing import in_order

GROUP = 128
STD = 0.02
_PATTERN = 1_048_583
"""Random values drawn once and repeated: a prime, so that no two rows begin alike."""

WEIGHT_ONLY, INT8_ACTIVATIONS, NOTHING = "bfloat16", "int8", "nothing"
"""The instruction whose rate a contestant is measured against; only products with int8 activations may use int8's."""

READING = "reading memory"
"""What products of few tokens are measured against: it multiplies nothing, and takes turns as they do."""
_READ_BYTES = 32 << 20


@dataclass(frozen=True)
class Stage:
    """The linears of a block that share an input."""

    model: str
    name: str
    in_features: int
    widths: tuple[int, ...]

    @property
    def weights(self) -> int:
        """Elements of all matrices."""
        return self.in_features * sum(self.widths)


@dataclass(frozen=True)
class Side:
    """A contestant's weights, ready for any number of tokens."""

    name: str
    layer_bytes: int
    """What one call reads of weights, scales and zeros."""
    limit: str
    start: Callable[[Tensor], Contestant]
    """Input [tokens, in_features] bfloat16 -> contestant."""


def stages_of(model: str, config: dict[str, Any]) -> list[Stage]:
    """The four stages of a block, from the content of a config.json."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim", hidden // heads)
    keys = size * config.get("num_key_value_heads", heads)
    old = config["model_type"] == "qwen"
    inner = config["intermediate_size"] // (2 if old else 1)  # both halves, in the original Qwen's files
    return [
        Stage(model, "q/k/v", hidden, (3 * hidden,) if old else (size * heads, keys, keys)),
        Stage(model, "o", size * heads, (hidden,)),
        Stage(model, "gate/up", hidden, (inner, inner)),
        Stage(model, "down", inner, (hidden,)),
    ]


def sides_of(stage: Stage, cache_bytes: int, gptqmodel: Peer | None, llamacpp: Peer | None) -> list[Side]:
    """Every contestant of a stage.

    Args:
        stage: the shapes.
        cache_bytes: of the last-level cache; each contestant's layers together are more than twice that.
        gptqmodel: its process, or None.
        llamacpp: likewise.
    """
    sides = [_reading(cache_bytes), _dense(stage, cache_bytes)]
    sides += [*_torch_packed(stage, cache_bytes), _onednn(stage, cache_bytes)]
    for bits in (4, 8):
        sides += [*_panels(stage, bits, cache_bytes), _automatic(stage, bits, cache_bytes)]
    if gptqmodel is not None:
        sides += _gptqmodel(stage, cache_bytes, gptqmodel)
    if llamacpp is not None:
        sides += _llamacpp(stage, cache_bytes, llamacpp)
    return sides


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in one piece of fresh memory: bits of any kind for integers, small numbers for floats."""
    found = torch.empty(shape, dtype=dtype)
    flat = found.view(-1)
    length = min(_PATTERN, flat.numel())
    if dtype.is_floating_point:
        pattern = (torch.randn(length) * STD).to(dtype)
    else:
        limits = torch.iinfo(dtype)
        pattern = torch.randint(limits.min, limits.max + 1, (length,), dtype=torch.int64).to(dtype)
    whole = flat.numel() // length * length
    flat[:whole].view(-1, length).copy_(pattern)
    flat[whole:].copy_(pattern[: flat.numel() - whole])
    return found


def _full(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, value, dtype=dtype)


def _layers(layer_bytes: int, cache_bytes: int) -> int:
    return 2 * cache_bytes // layer_bytes + 1


def _side(
    name: str, layer_bytes: int, limit: str, layers: int, multiply: Callable[[Any, int], object],
    prepare: Callable[[Tensor], Any] | None = None, calls: Iterator[int] | None = None,
) -> Side:  # fmt: skip
    """A side in this process, whose call ``multiply(input, layer)`` goes through the layers.

    ``calls`` counts those of all sides with the same layers: else one would find in the cache what another has read.
    """
    turn = count() if calls is None else calls

    def start(x: Tensor) -> Contestant:
        ready = x if prepare is None else prepare(x)
        return Contestant(name, timed(lambda: multiply(ready, next(turn) % layers)))

    return Side(name, layer_bytes, limit, start)


def _reading(cache_bytes: int) -> Side:
    """Memory that torch gives, as it gives that of weights, summed by its vectorized sum of 64-bit words."""
    words = torch.ones(_layers(_READ_BYTES, cache_bytes), _READ_BYTES // 8, dtype=torch.int64).unbind()
    return _side(READING, _READ_BYTES, NOTHING, len(words), lambda _, part: words[part].sum())


def _split(stage: Stage, columns: int, layers: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """For every layer the matrices of a stage, [width, columns] each, all in one piece of memory."""
    held = _random((layers, sum(stage.widths), columns), dtype)
    return [list(layer.split(stage.widths)) for layer in held.unbind()]


def _dense(stage: Stage, cache_bytes: int) -> Side:
    layer_bytes = 2 * stage.weights
    layers = _split(stage, stage.in_features, _layers(layer_bytes, cache_bytes), torch.bfloat16)

    def multiply(x: Tensor, layer: int) -> object:
        return [linear(x, weight) for weight in layers[layer]]

    return _side("torch bf16", layer_bytes, WEIGHT_ONLY, len(layers), multiply)


def _torch_packed(stage: Stage, cache_bytes: int) -> list[Side]:
    groups = stage.in_features // GROUP
    int4_bytes = stage.weights // 2 + groups * sum(stage.widths) * 4
    int4 = _split(stage, stage.in_features // 2, _layers(int4_bytes, cache_bytes), torch.uint8)
    grids = [_full((groups, width, 2), STD, torch.bfloat16) for width in stage.widths]
    int8_bytes = stage.weights + 2 * sum(stage.widths)
    int8 = _split(stage, stage.in_features, _layers(int8_bytes, cache_bytes), torch.int8)
    scales = [_full((width,), STD, torch.bfloat16) for width in stage.widths]
    by_int4, by_int8 = torch.ops.aten._weight_int4pack_mm_for_cpu, torch.ops.aten._weight_int8pack_mm

    def multiply_int4(x: Tensor, layer: int) -> object:
        return [by_int4(x, weight, GROUP, grid) for weight, grid in zip(int4[layer], grids, strict=True)]

    def multiply_int8(x: Tensor, layer: int) -> object:
        return [by_int8(x, weight, scale) for weight, scale in zip(int8[layer], scales, strict=True)]

    return [
        _side("torch int4pack", int4_bytes, WEIGHT_ONLY, len(int4), multiply_int4),
        _side("torch int8pack", int8_bytes, WEIGHT_ONLY, len(int8), multiply_int8),
    ]


def _onednn(stage: Stage, cache_bytes: int) -> Side:
    """Unsigned activations, quantized beforehand and not timed; a scale for each output feature, no groups."""
    layer_bytes = stage.weights + 4 * sum(stage.widths)
    layers = [
        [torch.ops.onednn.qlinear_prepack(weight, None) for weight in layer]
        for layer in _split(stage, stage.in_features, _layers(layer_bytes, cache_bytes), torch.int8)
    ]
    scales = [_full((width,), STD, torch.float32) for width in stage.widths]
    zeros = [torch.zeros(width, dtype=torch.int64) for width in stage.widths]
    qlinear = torch.ops.onednn.qlinear_pointwise

    def multiply(x: Tensor, layer: int) -> object:
        return [
            qlinear(x, STD, 128, weight, scale, zero, None, 1.0, 0, torch.bfloat16, "none", [], "")
            for weight, scale, zero in zip(layers[layer], scales, zeros, strict=True)
        ]

    def quantize(x: Tensor) -> Tensor:
        return (x.float() / STD + 128).round().clamp(0, 255).to(torch.uint8)

    return _side("oneDNN int8", layer_bytes, INT8_ACTIVATIONS, len(layers), multiply, quantize)


def _panels(stage: Stage, bits: int, cache_bytes: int) -> list[Side]:
    """Ours: the three arithmetics of the operator by themselves, on the same weights."""
    panels = sum(-(-width // linear_ops.PANEL_ROWS) for width in stage.widths)
    steps, groups = stage.in_features * bits // 32, -(-stage.in_features // GROUP)
    layer_bytes = panels * linear_ops.PANEL_ROWS * (4 * steps + 2 * groups)
    layers = _layers(layer_bytes, cache_bytes)
    words = _random((layers, panels, steps, linear_ops.PANEL_ROWS), torch.int32).unbind()
    scales = _full((layers, panels, groups, linear_ops.PANEL_ROWS), STD / 2**bits, torch.float16).unbind()
    widths, zero, calls = list(stage.widths), 2 ** (bits - 1), count()

    def multiply(activation_bits: int) -> Callable[[Tensor, int], object]:
        def call(x: Tensor, layer: int) -> object:
            return linear_ops.panel_linear(
                x, words[layer], scales[layer], None, None, None, widths, bits, GROUP, zero, activation_bits
            )

        return call

    return [
        _side(f"int{bits} exact", layer_bytes, WEIGHT_ONLY, layers, multiply(0), calls=calls),
        _side(f"int{bits} tile", layer_bytes, WEIGHT_ONLY, layers, multiply(-1), calls=calls),
        _side(f"int{bits} int8 activations", layer_bytes, INT8_ACTIVATIONS, layers, multiply(8), calls=calls),
    ]


SIBLINGS = {
    1: ("linear",),
    2: ("mlp.gate_proj", "mlp.up_proj"),
    3: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}
"""Names by which model_kernels.py knows what shares an input, in a block of type qwen2."""


def _automatic(stage: Stage, bits: int, cache_bytes: int) -> Side:
    """Ours as a loaded model has it: QuantLinear modules, siblings side by side, kernels chosen by the table."""
    groups, names = -(-stage.in_features // GROUP), SIBLINGS[len(stage.widths)]
    layer_bytes = stage.weights * bits // 8 + 2 * groups * sum(stage.widths)
    blocks = nn.ModuleList(nn.Module() for _ in range(_layers(layer_bytes, cache_bytes)))
    for block in blocks:
        for name, width in zip(names, stage.widths, strict=True):
            parent = block
            for part in name.split(".")[:-1]:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            layer = QuantLinear(stage.in_features, width, bits=bits, group_size=GROUP, device="meta")
            parent.add_module(name.rpartition(".")[2], layer)
    root: Any = nn.Module()
    root.config = SimpleNamespace(model_type="qwen2")
    root.norm = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))  # tells what is computed in
    root.model = nn.Module()
    root.model.layers = blocks
    zeros = sum((2 ** (bits - 1) - 1) << shift for shift in range(0, 32, bits))  # of version 1, which stores one less

    def fill(_: str, layer: Any) -> None:
        layer.qweight = _random(tuple(layer.qweight.shape), torch.int32)
        layer.qzeros = torch.full(layer.qzeros.shape, zeros, dtype=torch.int32)
        layer.scales = torch.full(layer.scales.shape, STD / 2**bits, dtype=torch.float16)
        layer.g_idx = in_order(stage.in_features, GROUP, torch.device("cpu"))

    attach_kernels(root, fill)
    layers = [[block.get_submodule(name) for name in names] for block in blocks]

    def multiply(x: Tensor, layer: int) -> object:
        return [module(x) for module in layers[layer]]

    with torch.inference_mode():
        for number in range(len(layers)):  # a module chooses its kernel at its first call
            multiply(torch.ones(1, stage.in_features, dtype=torch.bfloat16), number)
    return _side(f"int{bits} auto", layer_bytes, WEIGHT_ONLY, len(layers), multiply)


def _gptqmodel(stage: Stage, cache_bytes: int, peer: Peer) -> list[Side]:
    answer = peer.ask(
        do="build", in_features=stage.in_features, widths=stage.widths, group_size=GROUP, cache_bytes=cache_bytes
    )

    def side(name: str, layer_bytes: int) -> Side:
        def start(x: Tensor) -> Contestant:
            peer.ask(do="input", tokens=x.shape[0])
            label = f"gptqmodel {name}"
            return Contestant(label, lambda calls: float(peer.ask(do="run", kernel=name, calls=calls)["cpu_s"]))

        return Side(f"gptqmodel {name}", layer_bytes, WEIGHT_ONLY, start)

    return [side(name, layer_bytes) for name, layer_bytes in answer["layer_bytes"].items()]


def _llamacpp(stage: Stage, cache_bytes: int, peer: Peer) -> list[Side]:
    """Groups of 32 with a float16 scale; float32 activations, rounded to 8 bits within the product."""
    answer = peer.ask(do="build", in_features=stage.in_features, widths=stage.widths, cache_bytes=cache_bytes)

    def side(form: str, layer_bytes: int) -> Side:
        name = f"llama.cpp {form}"

        def start(x: Tensor) -> Contestant:
            peer.ask(do="input", format=form, tokens=x.shape[0])
            return Contestant(name, lambda calls: float(peer.ask(do="run", format=form, calls=calls)["cpu_s"]))

        return Side(name, layer_bytes, INT8_ACTIVATIONS, start)

    return [side(form, layer_bytes) for form, layer_bytes in answer["layer_bytes"].items()]
