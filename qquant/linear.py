"""QuantLinear: a linear layer whose weight stays packed, and its forward.

The reference is right on every device: unpack, dequantize in float32, multiply. What else may multiply, and for how
many tokens, is the table of linear_kernels.py. How the weight is held is packed_weight.py's, whole models are
model_kernels.py's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from qquant.errors import UsageError
from qquant.linear_kernels import (
    ACTIVATION_BITS,
    ANY,
    FLOATS,
    NEED_PANELS,
    Implementation,
    Step,
    check_activation_bits,
    place_of,
    steps_of,
    wished,
)
from qquant.linear_kernels import Kernel as Kernel
from qquant.linear_ops import panel_linear
from qquant.linear_torch import Product, int4_product, int8_product, obstacle
from qquant.packed_weight import PackedWeight
from qquant.packing import dequantize, pack_codes, pack_zeros, unpack_codes, unpack_zeros
from qquant.telling import say_once


@torch.library.custom_op("qquant::gptq_linear", mutates_args=())
def gptq_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bias: Tensor | None,
    bits: int,
    version: int,
) -> Tensor:
    """``x @ W + bias`` with W unpacked from the GPTQ layout: the reference that every kernel is compared with.

    Args:
        x: [..., K] floating.
        qweight: [K * bits / 32, N] int32.
        qzeros: [G, N * bits / 32] int32.
        scales: [G, N] floating.
        g_idx: [K] int32.
        bias: [N] floating, or None.
        bits: 2, 3, 4 or 8.
        version: 1 if qzeros hold ``zero - 1``, 2 if they hold ``zero``.

    Returns:
        [..., N] in x's dtype.
    """
    weight = dequantize(qweight, qzeros, scales, g_idx, bits=bits, version=version).to(x.dtype)
    return F.linear(x, weight.T, None if bias is None else bias.to(x.dtype))


@gptq_linear.register_fake
def _(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor,
    bias: Tensor | None,
    bits: int,
    version: int,
) -> Tensor:
    torch._check(x.shape[-1] == g_idx.shape[0], lambda: f"x must end in {g_idx.shape[0]} features, got {x.shape[-1]}")
    return x.new_empty(*x.shape[:-1], scales.shape[1])


_say_once = torch.compiler.assume_constant_result(say_once)


class _InputGradient(torch.autograd.Function):
    """A packed linear inside a graph of gradients: its input has one, its weight has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return layer.forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.dequantized().to(gradients[0].dtype), None


class QuantLinear(PackedWeight):
    """A linear layer with GPTQ-packed weights; drop-in for ``nn.Linear`` at inference.

    Where our kernels serve it, the weight is brought into panels at the first call, if nobody has done so before.

    Args:
        in_features: K.
        out_features: N.
        kernel: what may multiply, see ``Kernel``.
        activation_bits: 8 rounds activations to 8 bits on a CPU, which is faster and changes results; None does not.
        **layout: as ``PackedWeight`` takes it: bits, group_size, bias, version, scales_dtype, device.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel: Kernel | str = Kernel.AUTO,
        activation_bits: Literal[8] | None = None,
        **layout: Any,
    ) -> None:
        """Make empty buffers of the right shapes; the weights come from a state dict or ``from_codes``."""
        super().__init__(in_features, out_features, **layout)
        self._kernel, self._activation_bits = wished(kernel), check_activation_bits(activation_bits)
        self._plans: dict[torch.dtype, tuple[Step, ...]] = {}
        self._products: dict[torch.dtype, tuple[tuple[int, Product], ...]] = {}
        self._served: Tensor | None = None

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        g_idx: Tensor,
        *,
        bits: int,
        group_size: int,
        bias: Tensor | None = None,
    ) -> QuantLinear:
        """Pack a solved weight.

        Args:
            codes: [out, in] integer.
            scales: [out, groups] floating, exactly representable in float16.
            zeros: [out, groups] integer-valued.
            g_idx: [in] int32.
            bits: 2, 3, 4 or 8.
            group_size: columns per group, -1 for the whole row.
            bias: [out] or None, kept as it is.
        """
        rows, columns = codes.shape
        bias_dtype = None if bias is None else bias.dtype
        layer = cls(columns, rows, bits=bits, group_size=group_size, bias=bias_dtype, device="meta")
        layer.qweight = pack_codes(codes.T, bits)
        layer.qzeros = pack_zeros(zeros.T, bits)
        layer.scales = scales.T.to(torch.float16).contiguous()
        layer.g_idx = g_idx.clone()
        if bias is not None:
            layer.bias = bias.detach().clone()
        return layer

    @property
    def kernel(self) -> Kernel:
        """What may multiply; setting it counts from the next call on."""
        return self._kernel

    @kernel.setter
    def kernel(self, wish: Kernel | str) -> None:
        self._kernel = wished(wish)
        self.forget()

    @property
    def activation_bits(self) -> Literal[8] | None:
        """8 if activations are rounded to 8 bits; setting it counts from the next call on."""
        return self._activation_bits

    @activation_bits.setter
    def activation_bits(self, bits: Literal[8] | None) -> None:
        self._activation_bits = check_activation_bits(bits)
        self.forget()

    def steps(self, dtype: torch.dtype) -> tuple[Step, ...]:
        """What serves this layer where it lies, in order of tokens.

        Raises:
            UsageError: ``kernel`` or ``activation_bits`` ask for what is not there.
        """
        place = place_of(self.device)
        asked = self.kernel is Kernel.TORCH or (place.missing and self.kernel is Kernel.AUTO)
        why = self._torch_obstacle() if asked else ""
        return steps_of(
            place,
            dtype=dtype,
            bits=self.bits,
            kernel=self.kernel,
            activation_bits=self.activation_bits,
            torch_obstacle=why,
        )

    def _torch_obstacle(self) -> str:
        """Why torch's kernels cannot read this layer; empty if they can."""
        form, order = self.panel_form() if self.bits in (4, 8) and not self._codes().is_meta else (None, None)
        return obstacle(
            bits=self.bits,
            group_size=self.group_size,
            columns=self.in_features,
            rows=self.out_features,
            device=self.device.type,
            ordered=form is not None and order is None,
            one_zero=None if form is None else form.zero,
        )

    def prepare(self, dtype: torch.dtype) -> tuple[Step, ...]:
        """Bring the weight into the form that calls with this dtype need, and say what will serve them.

        Raises:
            UsageError: as ``steps``, or panels cannot hold a layer that was asked to run our kernels.
        """
        steps = self.steps(dtype)
        panels = any(step.implementation in NEED_PANELS for step in steps)
        if panels and not self.packed:
            try:
                self.refuse_offloaded()
                self.pack()
            except UsageError as error:
                if self.insists:
                    raise
                steps = (Step(ANY, Implementation.REFERENCE, str(error)),)
        elif self.packed and self.kernel in (Kernel.REFERENCE, Kernel.TORCH):
            self.unpack()
        self._products[dtype] = tuple((step.tokens, self._product(step.implementation)) for step in steps)
        self._served = self._buffers.get("words")
        return steps

    @property
    def insists(self) -> bool:
        """Whether anything but our kernels is an error."""
        return self.kernel is Kernel.KERNEL or self.activation_bits is not None

    def refuse_offloaded(self) -> None:
        """Raise UsageError if accelerate puts this layer's tensors in place before each call, by their stored names."""
        if getattr(self.__dict__.get("_hf_hook"), "offload", False) or self._codes().is_meta:
            raise UsageError("its tensors are elsewhere between its calls")

    def forget(self) -> None:
        """To be told when tensors were replaced or written to: drops what was derived from them."""
        self._plans, self._products, self._served = {}, {}, None
        if self.packed:
            for dtype in FLOATS:
                try:
                    self._plans[dtype] = self.steps(dtype)
                except UsageError:  # whoever calls with this dtype is told
                    continue

    def __getstate__(self) -> dict[str, Any]:
        """As PackedWeight's, without what calls have prepared."""
        return {**super().__getstate__(), "_plans": {}, "_products": {}, "_served": None}

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in x's dtype."""
        if not x.dim() or x.shape[-1] != self.in_features:
            raise UsageError(f"x must end in {self.in_features} features, got {list(x.shape)}")
        if torch.compiler.is_compiling():
            return self._traced(x)
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
            return self._plain(x)  # the operators would drop the tangent
        if x.requires_grad and torch.is_grad_enabled():
            with_gradient: Tensor = _InputGradient.apply(x, self)  # type: ignore[no-untyped-call]
            return with_gradient
        products = self._products.get(x.dtype)
        # Whoever moves buffers without telling the module, as accelerate does, replaces them.
        if products is None or self._buffers.get("words") is not self._served:
            products = self._prepared(x.dtype)
        tokens = x.numel() // self.in_features
        for limit, product in products:
            if tokens <= limit:
                return product(x)
        raise AssertionError("the last step serves any number of tokens")

    def _prepared(self, dtype: torch.dtype) -> tuple[tuple[int, Product], ...]:
        if not dtype.is_floating_point:
            raise UsageError(f"x must be floating, got {dtype}")
        if self._buffers.get("words") is not self._served:
            self.forget()
        last = self.prepare(dtype)[-1]
        if last.implementation is Implementation.REFERENCE and self.kernel is Kernel.AUTO and not self._codes().is_meta:
            say_once(f"packed linears are dequantized for every call of many tokens: {last.why}", last.why)
        return self._products[dtype]

    def _product(self, implementation: Implementation) -> Product:
        if implementation in ACTIVATION_BITS:
            return self._panel_product(ACTIVATION_BITS[implementation])
        if implementation is Implementation.DENSE:
            return self._dense
        if implementation is Implementation.REFERENCE:
            return self._reference
        return self._torch_product(implementation)

    def _panel_product(self, activation_bits: int) -> Product:
        """One call of the operator, its arguments but ``x`` put together once."""
        form = self._form
        assert form is not None
        arguments = form.arguments(self.panels, [self.out_features], self.bits, activation_bits)

        def alone(x: Tensor) -> Tensor:
            found: list[Tensor] = panel_linear(x, *arguments)
            return found[0]

        if self._shared is None:
            return alone
        shared, index = self._shared
        return shared.product(index, activation_bits, self._forward_pre_hooks, alone)

    def _dense(self, x: Tensor) -> Tensor:
        panels = self.panels
        if panels.order is not None:
            x = x.index_select(-1, panels.order.clamp(min=0)).masked_fill(panels.order < 0, 0.0)
        bias = self.real_bias()
        return F.linear(x, self.panel_weights(x.dtype), None if bias is None else bias.to(x.dtype))

    def _reference(self, x: Tensor) -> Tensor:
        if self.packed:  # for a dtype that no kernel knows: the same arithmetic
            return self._plain(x)
        packed = self.qweight, self.qzeros, self.scales, self.g_idx
        result: Tensor = gptq_linear(x, *packed, self.bias, self.bits, self.version)
        return result

    def _plain(self, x: Tensor) -> Tensor:
        """The reference's arithmetic in either form of the weight, by functions that torch can differentiate."""
        bias = self.real_bias()
        return F.linear(x, self.dequantized().to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _torch_product(self, implementation: Implementation) -> Product:
        """Torch's kernel over a copy of the weight, which is made anew when the weight is replaced."""
        codes = unpack_codes(self.qweight, self.bits, self.in_features)
        if implementation is Implementation.TORCH_INT4PACK:
            zeros = unpack_zeros(self.qzeros, self.bits, self.out_features, self.version)
            plain = int4_product(codes, self.scales, zeros, self.group_size)
        else:
            plain = int8_product(codes, self.scales)
        source = self.qweight

        def product(x: Tensor) -> Tensor:
            if self._buffers.get("qweight") is not source:
                self.forget()
                return self.forward(x)
            found = plain(x)
            return found if self.bias is None else found + self.bias.to(x.dtype)

        return product

    def _traced(self, x: Tensor) -> Tensor:
        """The forward that torch.compile and torch.export record: no packing, no siblings, the same operators.

        A compiled graph asks for the number of tokens as the table does, and is compiled again beyond its answer. An
        exported one must serve any number: it takes the first step, which is right for all.
        """
        plan = self._plans.get(x.dtype)
        if plan is None:
            if not self.packed and self.bits in (4, 8) and self.kernel is not Kernel.REFERENCE:
                _say_once(
                    "packed linears were traced before their first call, and the trace runs the reference; "
                    "call the model once, or qquant.model_kernels.attach_kernels, and trace again"
                )
            return self._reference(x)
        step = plan[0]
        if len(plan) > 1 and not torch.compiler.is_exporting():
            tokens = x.numel() // self.in_features
            step = next((step for step in plan[:-1] if tokens <= step.tokens), plan[-1])
        if step.implementation is Implementation.DENSE or (x.requires_grad and torch.is_grad_enabled()):
            return self._dense(x)  # the panel operator has no gradient of its own
        form = self._form
        if form is None or step.implementation not in ACTIVATION_BITS:
            return self._reference(x)
        bits = ACTIVATION_BITS[step.implementation]
        found: list[Tensor] = panel_linear(x, *form.arguments(self.panels, [self.out_features], self.bits, bits))
        return found[0]

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        bias = self._buffers.get("panel_bias" if self.packed else "bias") is not None
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}, bias={bias}"
