"""A whole model's packed linears brought to the kernels that serve them: one stretch of memory, siblings side by side.

What serves a layer is the table of linear_kernels.py; how siblings are computed at once is shared_input.py's.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qquant import telling
from qquant.decoder_step import use_decoder_step
from qquant.dense_linear import use_dense_kernel
from qquant.errors import BadModelError, UsageError
from qquant.heap import return_unused_memory
from qquant.kv_attention import use_decode_kernel
from qquant.linear import QuantLinear
from qquant.linear_kernels import ANY, NEED_PANELS, Implementation, Kernel, Step, described, place_of
from qquant.linear_ops import panel_linear
from qquant.models.layouts import siblings
from qquant.panels import ROWS, PanelForm, PanelTensors, large_pages, make_room
from qquant.rms_norm import use_norm_kernel
from qquant.shared_input import Call, Multiply, SharedInput

Fill = Callable[[str, QuantLinear], None]
"""Called with the full name of a layer right before it is packed: gives it its tensors, if it has none yet."""

_LINE_BYTES = 64
"""Of a processor's cache: no tensor of the arena begins inside one."""
_RETURNS = 16
"""How often memory that a checkpoint was read into is given back while it is loaded."""


class _Arena:
    """Memory for the panels of a model on a CPU, in large pages."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes, self._used_bytes = capacity_bytes, 0
        self._memory: mmap.mmap | None = None

    def room(self, form: PanelForm, device: torch.device) -> PanelTensors:
        """Tensors to fill; of memory of their own where the arena cannot be used."""
        grid = (form.panels, form.groups, ROWS)
        wanted: list[tuple[torch.dtype, tuple[int, ...]] | None] = [
            (torch.int32, (form.panels, form.steps, ROWS)),
            (form.scales_dtype, grid),
            (torch.uint8, grid) if form.zero is None else None,
            None,
            (torch.float32, (form.panels * ROWS,)) if form.bias else None,
        ]
        sizes = [0 if one is None else one[0].itemsize * prod(one[1]) for one in wanted]
        begins = list(accumulate((-(-size // _LINE_BYTES) * _LINE_BYTES for size in sizes), initial=self._used_bytes))
        if device.type != "cpu" or begins[-1] > self._capacity_bytes:
            return make_room(form, device)
        memory = self._memory = self._memory or large_pages(self._capacity_bytes)
        if memory is None:
            return make_room(form, device)
        self._used_bytes = begins[-1]
        words, scales, *others = (
            None
            if one is None
            else torch.frombuffer(memory, dtype=one[0], count=prod(one[1]), offset=begin).view(one[1])
            for one, begin in zip(wanted, begins, strict=False)
        )
        assert words is not None
        assert scales is not None
        return PanelTensors(words, scales, *others)


class _Choice(NamedTuple):
    """What serves a layer."""

    layer: QuantLinear
    steps: tuple[Step, ...]
    form: tuple[PanelForm, Tensor | None] | None
    """None if it is not to be packed."""


def attach_kernels(model: nn.Module, fill: Fill | None = None) -> list[str]:
    """Bring every packed linear of a model into the form that its kernel reads, and say which kernel that is.

    Layers are taken in model order and one set of siblings at a time, so that what is held beside the result is the
    size of such a set. Siblings, linears known to read one input, are computed by one call where their panels allow it.
    Large linears that are not packed, norms and attention get kernels of their own (docs/decode.md), unless every
    packed linear is to run the reference; weights must be loaded by then. May be called again, say after a move to
    another device; what an earlier call put in the place of other modules stays there.

    Args:
        model: modified in place; its state dict stays what it was. Without a packed linear, nothing is done.
        fill: gives a layer its tensors; None: they are there.

    Returns:
        Lines to print, one for each kernel chosen.

    Raises:
        UsageError: a layer's ``kernel`` or ``activation_bits`` ask for what is not there.
        BadModelError: a layer's g_idx names groups that are not there.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        return []
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    arena = _Arena(sum(_most_bytes(layer) for layer in layers.values()))
    found: Counter[str] = Counter()
    sets = list(_sets(model, list(layers)))
    for number, names in enumerate(sets, 1):
        for name in names:
            if fill is not None:
                fill(name, layers[name])
        # What inference mode makes could not be changed outside of it.
        with torch.inference_mode(False), torch.no_grad():
            choices = [_choose(name, layers[name], dtype) for name in names]
            _pack(choices, arena)
        # What was read and then packed; at every set it would take a third of the time of loading.
        if fill is not None and (number == len(sets) or number % max(1, len(sets) // _RETURNS) == 0):
            return_unused_memory()
        for choice in choices:
            found[_line(choice)] += 1
            telling.said.update(step.why for step in choice.steps if step.implementation is Implementation.REFERENCE)
    lines = [line.format(f"{count} linear{'s' if count > 1 else ''}") for line, count in found.items()]
    if all(layer.kernel is Kernel.REFERENCE for layer in layers.values()):
        return lines  # who asks for the reference wants to compare with it: plain torch for the whole model
    lines += [*use_dense_kernel(model), *use_norm_kernel(model), *use_decode_kernel(model)]
    return lines + use_decoder_step(model)


def _sets(model: nn.Module, names: list[str]) -> Iterator[list[str]]:
    """Names in model order, siblings together."""
    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    together = {group[0]: group for group in siblings(model, model_type) if set(group) <= set(names)}
    later = {name for group in together.values() for name in group[1:]}
    for name in names:
        if name not in later:
            yield list(together.get(name, (name,)))


def _choose(name: str, layer: QuantLinear, dtype: torch.dtype) -> _Choice:
    steps = layer.steps(dtype)
    if not any(step.implementation in NEED_PANELS for step in steps):
        return _Choice(layer, steps, None)
    try:
        layer.refuse_offloaded()
        return _Choice(layer, steps, layer.panel_form())
    except UsageError as error:
        if layer.insists:
            raise
        return _Choice(layer, (Step(ANY, Implementation.REFERENCE, str(error)),), None)
    except BadModelError as error:
        raise BadModelError(f"{name}.{error}") from error


def _pack(choices: list[_Choice], arena: _Arena) -> None:
    """Pack the layers of one set, side by side if one call can compute them all."""
    held = [(one.layer, *one.form) for one in choices if one.form is not None]
    if len(held) == 1 or len(held) < len(choices) or len({_likeness(*one) for one in held}) > 1:
        for layer, form, order in held:
            if layer.packed:
                layer.part()  # from siblings that were there the last time
            else:
                layer.pack((form, order), arena.room(form, layer.device))
        return
    if not held or (held[0][0].shares and len({id(layer.siblings) for layer, _, _ in held}) == 1):
        return
    counts = [form.panels for _, form, _ in held]
    first, form, order = held[0]
    room = arena.room(form._replace(panels=sum(counts)), first.device)._replace(order=order)
    ends = list(accumulate(counts))
    for (layer, form, order), end in zip(held, ends, strict=True):
        layer.unpack()
        layer.pack((form, order), room.rows(end - form.panels, end))
    shared = SharedInput(room, counts, [layer.out_features for layer, _, _ in held], _multiplier(first.bits, form))
    for index, (layer, _, _) in enumerate(held):
        layer.share(shared, index)


def _likeness(layer: QuantLinear, form: PanelForm, order: Tensor | None) -> tuple[object, ...]:
    """Equal for layers that one call can compute."""
    columns = None if order is None else tuple(order.tolist())
    wish = layer.kernel, layer.activation_bits
    return (layer.bits, layer.device, layer.in_features, *wish, form._replace(panels=0), columns)


def _multiplier(bits: int, form: PanelForm) -> Multiply:
    def multiply(panels: PanelTensors, widths: list[int], activation_bits: int) -> Call:
        arguments = form.arguments(panels, widths, bits, activation_bits)

        def call(x: Tensor) -> list[Tensor]:
            found: list[Tensor] = panel_linear(x, *arguments)
            return found

        return call

    return multiply


def _most_bytes(layer: QuantLinear) -> int:
    """What the panels of a layer may take on a CPU, whatever its tensors will hold."""
    if layer.bits not in (4, 8) or layer.device.type not in ("cpu", "meta"):
        return 0
    step = 32 // layer.bits
    groups = -(-layer.in_features // layer.group_size)
    columns = groups * -(-layer.group_size // step) * step
    rows = -(-layer.out_features // ROWS) * ROWS
    return rows * (columns * layer.bits // 8 + groups * (4 + 1) + 4) + 5 * _LINE_BYTES


def _line(choice: _Choice) -> str:
    layer = choice.layer
    size = "row" if layer.group_size >= layer.in_features else f"g{layer.group_size}"
    eight = ", 8-bit activations" if layer.activation_bits is not None else ""
    how = described(choice.steps, place_of(layer.device)).replace("{", "{{").replace("}", "}}")
    return f"int{layer.bits} {size}{eight}, {{}}: {how}"
