"""PackedWeight: what a quantized linear holds, as the checkpoint's tensors or as panels, and the way between the two.

The weight is there once. Which form a kernel reads, and what multiplies, is linear.py's; the two layouts themselves are
packing.py's and panels.py's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qquant.errors import UsageError
from qquant.linear_ops import fill_panels, from_panels, panel_weights, panels_to_words, words_to_panels
from qquant.packing import dequantize, in_order, pack_codes, pack_zeros, unpack_zeros
from qquant.panels import (
    ROWS,
    PanelForm,
    PanelTensors,
    Siblings,
    column_order,
    make_room,
    stored_places,
)
from qquant.telling import say_once

WIDTHS = (2, 3, 4, 8)
"""Bits of a code that the GPTQ format knows."""

STORED = ("qweight", "qzeros", "scales", "g_idx", "bias")
"""The checkpoint's tensors of a layer."""

_PANELS = ("words", "panel_scales", "panel_zeros", "order", "panel_bias")
"""Those of a packed one, in the order of ``PanelTensors``."""


def _stored_tensor(name: str) -> Any:
    """A tensor of the checkpoint as an attribute: it is there in the stored form only, so asking for it unpacks."""

    def read(weight: PackedWeight) -> Tensor | None:
        if weight.packed:
            say_once(
                f"{name} of a packed linear was looked at: it goes back to the checkpoint's tensors until its next "
                "call, and linears computed with it go their own ways; stored() shows them and leaves it packed, and "
                "qquant.model_kernels.attach_kernels packs siblings together again",
                "unpacked by a look",
                logger="qquant.kernels",
            )
        weight.unpack()
        buffers = weight._buffers
        if name not in buffers:
            raise AttributeError(name)
        return buffers[name]

    def write(weight: PackedWeight, value: Tensor | None) -> None:
        weight.unpack()
        weight._buffers[name] = value

    return property(read, write)


def _leave(siblings: weakref.ref[Siblings]) -> None:
    if (left := siblings()) is not None:
        left.break_up()


class PackedWeight(nn.Module):
    """The tensors of a quantized linear in one of two forms.

    ``pack`` and ``unpack`` go from one to the other, and the state dict shows the checkpoint's names, shapes and dtypes
    in both. Reading or setting one of those tensors on the module unpacks it, so that a write to it is never lost.

    Args:
        in_features: K.
        out_features: N.
        bits: 2, 3, 4 or 8; panels hold 4 or 8.
        group_size: columns per group, -1 for the whole row.
        bias: dtype of the stored bias, or None for no bias.
        version: 1 (``zero - 1`` stored) or 2.
        scales_dtype: dtype of the stored scales.
        device: where the buffers are made; "meta" while loading.

    Raises:
        UsageError: other bits, or a group size below 1 that is not -1.
    """

    qweight = _stored_tensor("qweight")  # [K * bits / 32, N] int32
    qzeros = _stored_tensor("qzeros")  # [G, N * bits / 32] int32
    scales = _stored_tensor("scales")  # [G, N] floating
    g_idx = _stored_tensor("g_idx")  # [K] int32
    bias = _stored_tensor("bias")  # [N] floating, or None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int,
        group_size: int,
        bias: torch.dtype | None = None,
        version: int = 1,
        scales_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> None:
        """Make empty buffers of the right shapes."""
        super().__init__()
        if bits not in WIDTHS:
            raise UsageError(f"bits must be one of {', '.join(map(str, WIDTHS))}, got {bits!r}")
        if group_size != -1 and group_size < 1:
            raise UsageError(f"group_size must be 1 or more, or -1 for one group per row, got {group_size!r}")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size = bits, in_features if group_size == -1 else group_size
        self.version = version
        self._form: PanelForm | None = None
        self._dtypes = {"scales": scales_dtype, "bias": bias}  # as stored
        self._shared: tuple[Siblings, int] | None = None
        for name, tensor in self._empty(device).items():
            self.register_buffer(name, tensor)

    def _empty(self, device: torch.device | str | None) -> dict[str, Tensor | None]:
        """The checkpoint's tensors, not filled."""
        groups = -(-self.in_features // self.group_size)

        def empty(*shape: int, dtype: torch.dtype | None = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        bias = self._dtypes["bias"]
        return {
            "qweight": empty(self.in_features * self.bits // 32, self.out_features),
            "qzeros": empty(groups, self.out_features * self.bits // 32),
            "scales": empty(groups, self.out_features, dtype=self._dtypes["scales"]),
            "g_idx": empty(self.in_features),
            "bias": None if bias is None else empty(self.out_features, dtype=bias),
        }

    @property
    def packed(self) -> bool:
        """Whether the weight is held in panels."""
        return self._form is not None

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self._codes().device

    def _codes(self) -> Tensor:
        tensor = self._buffers["qweight" if self._form is None else "words"]
        assert tensor is not None
        return tensor

    @property
    def panels(self) -> PanelTensors:
        """The tensors of a packed layer; of another there is no such attribute."""
        words, scales, *others = (self._buffers.get(name) for name in _PANELS)
        if words is None or scales is None:
            raise AttributeError("panels")
        return PanelTensors(words, scales, *others)

    def panel_form(self) -> tuple[PanelForm, Tensor | None]:
        """What ``pack`` will make: sizes, and the order of columns or None where they stay as they are.

        Raises:
            UsageError: panels cannot hold this layer.
            BadModelError: g_idx names groups that are not there.
        """
        if self.bits not in (4, 8):
            raise UsageError(f"panels hold codes of 4 or 8 bits, this layer's have {self.bits}")
        if self._form is not None:
            return self._form, self.panels.order
        stored, step = self.stored(), 32 // self.bits
        scales = stored["scales"]
        groups = scales.shape[0]
        size, order, columns = column_order(stored["g_idx"], groups=groups, group_size=self.group_size, step=step)
        if columns > 2 * groups * -(-self.group_size // step) * step:
            raise UsageError(f"panels hold groups of about one size, one of this layer's {groups} has {size} columns")
        low, high = (int(end) for end in self._zeros(stored).aminmax())
        dtype = torch.float16 if scales.dtype == torch.float16 else torch.float32
        panels = -(-self.out_features // ROWS)
        zero = low if low == high else None
        return PanelForm(panels, columns // step, groups, size, zero, dtype, "bias" in stored), order

    def _zeros(self, stored: dict[str, Tensor]) -> Tensor:
        return unpack_zeros(stored["qzeros"], self.bits, self.out_features, self.version)

    def pack(self, form: tuple[PanelForm, Tensor | None] | None = None, room: PanelTensors | None = None) -> None:
        """Bring the weight into panels and drop the checkpoint's tensors; nothing happens if it is packed.

        Args:
            form: what ``panel_form`` said; None: asked for here.
            room: tensors of that form to fill; None: fresh ones.

        Raises:
            QquantError: as ``panel_form``.
        """
        if self.packed:
            return
        # What inference mode makes could not be changed outside of it.
        with torch.inference_mode(False), torch.no_grad():
            sizes, order = form or self.panel_form()
            stored = self.stored()
            room = room or make_room(sizes, self.device)
            words_to_panels(room.words, stored["qweight"], order, self.bits)
            fill_panels(room.scales, stored["scales"])
            if room.zeros is not None:
                fill_panels(room.zeros, self._zeros(stored))
            if room.bias is not None:
                fill_panels(room.bias.view(-1, 1, ROWS), stored["bias"][None])
        self._dtypes = {name: stored[name].dtype if name in stored else None for name in ("scales", "bias")}
        self._hold(sizes, room._replace(order=order))

    def _hold(self, form: PanelForm, panels: PanelTensors) -> None:
        self._form = form
        self._buffers.clear()
        self._buffers.update({name: part for name, part in zip(_PANELS, panels, strict=True) if part is not None})
        self.forget()

    def share(self, shared: Siblings, index: int) -> None:
        """Be computed with siblings from now on: the panels are that object's."""
        assert self._form is not None
        self._shared = shared, index
        # A sibling that somebody put another layer in the place of never fetches its results.
        weakref.finalize(self, _leave, weakref.ref(shared)).atexit = False
        self._hold(self._form, shared.of(index))

    def part(self) -> None:
        """Be computed alone from now on, and so are the siblings; the panels stay where they are."""
        if self._shared is not None:
            self._shared[0].break_up()

    @property
    def siblings(self) -> Siblings | None:
        """What computes this layer with its siblings, or None: it is computed alone."""
        return self._shared[0] if self._shared is not None and self._shared[0].whole else None

    @property
    def shares(self) -> bool:
        """Whether one call computes this layer with its siblings."""
        return self.siblings is not None

    def unpack(self) -> None:
        """Bring the weight back into the checkpoint's tensors, bit for bit; nothing happens if it is there."""
        if not self.packed:
            return
        with torch.inference_mode(False), torch.no_grad():
            stored = self.stored()
        self._drop_panels({name: stored.get(name) for name in STORED})

    def _drop_panels(self, stored: dict[str, Tensor | None]) -> None:
        self.part()
        self._form, self._shared = None, None
        self._buffers.clear()
        self._buffers.update(stored)
        self.forget()

    def stored(self) -> dict[str, Tensor]:
        """The checkpoint's tensors: the buffers themselves, or fresh ones made from the panels; no bias if none."""
        form = self._form
        if form is None:
            return {name: tensor for name in STORED if (tensor := self._buffers[name]) is not None}
        words, scales, zeros, order, bias = self.panels
        rows, device = self.out_features, words.device
        if words.is_meta:  # no numbers, which the rest looks at
            return {name: tensor for name, tensor in self._empty(device).items() if tensor is not None}
        places = None if order is None else stored_places(order, self.in_features)
        qweight = panels_to_words(words, places, rows, self.bits)
        size = form.group_size
        g_idx = in_order(self.in_features, size, device) if places is None else places // size
        codes = from_panels(zeros, rows) if zeros is not None else qweight.new_full((form.groups, rows), form.zero or 0)
        # Version 1's one is taken off whole words, whatever their fields, as unpack_zeros adds it.
        one = pack_codes(torch.full((32 // self.bits, 1), int(self.version == 1), device=device), self.bits)
        found = {
            "qweight": qweight,
            "qzeros": pack_zeros(codes, self.bits, version=2) - one,
            "scales": from_panels(scales, rows).to(self._dtypes["scales"]),
            "g_idx": g_idx,
        }
        return found if bias is None else {**found, "bias": bias[:rows].to(self._dtypes["bias"], copy=True)}

    def forget(self) -> None:
        """To be told when tensors were replaced or written to: drops what was derived from them."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.stored().items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        wanted = {prefix + name: tensor.shape for name, tensor in self._empty("meta").items() if tensor is not None}
        if self.packed and all(getattr(state_dict.get(name), "shape", None) == wanted[name] for name in wanted):
            self._drop_panels(self._empty(self.device))  # all of it is about to be replaced, whatever it is
        self.unpack()
        super()._load_from_state_dict(state_dict, prefix, *others)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has the checkpoint's tensors: panels may be part of what holds a whole model."""
        stored = self.stored()
        return {**self.__dict__, "_buffers": {n: stored.get(n) for n in STORED}, "_form": None, "_shared": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what ``__getstate__`` made."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device; scales keep their stored dtype, because a model cast to bfloat16 would round them."""
        before, device, bias = dict(self._buffers), self.device, self._dtypes["bias"]
        if bias is not None:
            self._dtypes["bias"] = fn(torch.empty(0, dtype=bias, device=device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None and name != "bias" and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        if self._shared is not None and self._form is not None:
            shared, index = self._shared
            if self.device != device and device.type != "meta":
                self._hold(self._form, shared.moved(index, self.device))
            elif self._codes() is not before["words"]:  # as to_empty does, which fills nothing
                shared.break_up()
        rounded = self._buffers.get("panel_bias")
        if rounded is not None and bias != self._dtypes["bias"]:
            with torch.inference_mode(rounded.is_inference()):
                rounded.copy_(rounded.to(self._dtypes["bias"]))
        self.forget()
        return self

    def dequantized(self) -> Tensor:
        """The real weights, [out, in] float32."""
        if not self.packed:
            stored = {name: tensor for name, tensor in self.stored().items() if name != "bias"}
            return dequantize(**stored, bits=self.bits, version=self.version).T
        weight, order = self.panel_weights(torch.float32), self.panels.order
        return weight if order is None else weight[:, stored_places(order, self.in_features)]

    def real_bias(self) -> Tensor | None:
        """[out] float32, or None; the layer stays in the form it is in."""
        bias = self._buffers.get("bias") if self._form is None else self.panels.bias
        return None if bias is None else bias[: self.out_features].float()

    def panel_weights(self, dtype: torch.dtype) -> Tensor:
        """The real weights of a packed layer, [out, columns of the panels]: those may be in another order, and more."""
        assert self._form is not None
        panels, zero = self.panels, self._form.zero or 0
        found: Tensor = panel_weights(
            panels.words, panels.scales, panels.zeros, self.bits, self._form.group_size, zero, dtype
        )
        return found[: self.out_features]

    def row_factors(self, factor: Tensor) -> list[tuple[Tensor, Tensor, torch.dtype]]:
        """What to multiply in place so that the output is scaled: tensors, factors that broadcast, stored dtypes.

        Args:
            factor: [out] floating. ``forget`` is to be called when all is multiplied.
        """
        if not self.packed:
            stored = self.stored()
            return [(stored[name], factor, stored[name].dtype) for name in ("scales", "bias") if name in stored]
        padded = F.pad(factor, (0, -self.out_features % ROWS), value=1.0)
        jobs = [(self.panels.scales, padded.view(-1, 1, ROWS), self._dtypes["scales"])]
        if self.panels.bias is not None:
            jobs.append((self.panels.bias, padded, self._dtypes["bias"]))
        return [(tensor, by, dtype) for tensor, by, dtype in jobs if dtype is not None]
