"""QuantLinear: a linear layer whose weight stays packed in the GPTQ layout, and its forward.

The forward is right on every device: unpack, dequantize in float32, multiply. Where torch has a packed int4 kernel
that was measured to be faster and as exact, it serves small inputs (see ``docs/linear.md`` for the figures).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qquant.packing import dequantize, in_order, pack_codes, pack_zeros, unpack_codes, unpack_zeros

Kernel = Literal["auto", "reference"]

# Measured on an AVX-512 CPU (docs/linear.md): up to this many rows the int4 kernel beats dequantize + matmul;
# above it the cost of unpacking is spread over enough rows.
_INT4PACK_ROWS = 128
_INT4PACK_GROUPS = (32, 64, 128, 256)


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


class QuantLinear(nn.Module):
    """A linear layer with GPTQ-packed weights; drop-in for ``nn.Linear`` at inference.

    Buffers carry the names, shapes and dtypes of the checkpoint format, so the module's state dict is the file's.

    Args:
        in_features: K.
        out_features: N.
        bits: 2, 3, 4 or 8.
        group_size: columns per group, -1 for the whole row.
        bias: dtype of the stored bias, or None for no bias.
        version: 1 (``zero - 1`` stored) or 2.
        scales_dtype: dtype of the stored scales.
        kernel: "auto" chooses by measurement, "reference" always dequantizes and multiplies.
        device: where the buffers are made; "meta" while loading.
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor
    bias: Tensor | None

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
        kernel: Kernel = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        """Make empty buffers of the right shapes; the weights come from a state dict or ``from_codes``."""
        super().__init__()
        size = in_features if group_size == -1 else group_size
        groups = -(-in_features // size)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.version, self.kernel = bits, size, version, kernel
        self._packed: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(QuantLinear.forget_packed)  # type: ignore[no-untyped-call]

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.register_buffer("qweight", empty(in_features * bits // 32, out_features))
        self.register_buffer("qzeros", empty(groups, out_features * bits // 32))
        self.register_buffer("scales", empty(groups, out_features, dtype=scales_dtype))
        self.register_buffer("g_idx", empty(in_features))
        self.register_buffer("bias", None if bias is None else empty(out_features, dtype=bias))

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to a device; the scales keep their stored dtype, because a model cast to bfloat16 would round them."""
        stored = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.forget_packed()
        if self.scales.dtype != stored.dtype:
            self.scales = stored.to(self.scales.device)
        return self

    def forget_packed(self, *_: object) -> None:
        """Drop the copy that the int4 kernel reads; it is made anew from the buffers when it is next wanted."""
        self._packed = None

    def dequantized(self) -> Tensor:
        """The real weights, [out, in] float32."""
        packed = self.qweight, self.qzeros, self.scales, self.g_idx
        return dequantize(*packed, bits=self.bits, version=self.version).T

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in x's dtype."""
        rows = x.numel() // max(1, self.in_features)
        if self.kernel == "auto" and 0 < rows <= _INT4PACK_ROWS and self._int4pack_applies(x):
            return self._int4pack_forward(x)
        packed = self.qweight, self.qzeros, self.scales, self.g_idx
        result: Tensor = gptq_linear(x, *packed, self.bias, self.bits, self.version)
        return result

    def _int4pack_applies(self, x: Tensor) -> bool:
        """Whether torch's packed int4 kernel can serve this layer: bfloat16 on an AVX-512 CPU, plain groups."""
        return (
            self.bits == 4
            and x.dtype == torch.bfloat16
            and x.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and self.group_size in _INT4PACK_GROUPS
            and self.in_features % self.group_size == 0
            and self.out_features % 16 == 0
            and torch.backends.cpu.get_cpu_capability() == "AVX512"
            and (self._packed is not None or self._groups_are_in_order())
        )

    def _groups_are_in_order(self) -> bool:
        return torch.equal(self.g_idx.cpu().to(torch.int32), in_order(self.in_features, self.group_size, "cpu"))

    def _int4pack_forward(self, x: Tensor) -> Tensor:
        if self._packed is None:
            codes = unpack_codes(self.qweight, 4, self.in_features).T.to(torch.int32).contiguous()
            zeros = unpack_zeros(self.qzeros, 4, self.out_features, self.version).to(torch.float32)
            scales = self.scales.to(torch.float32)
            # The kernel computes (code - 8) * scale + shift.
            grid = torch.stack([scales, (8 - zeros) * scales], dim=-1).to(torch.bfloat16).contiguous()
            self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), grid
        weight, grid = self._packed
        flat = x.reshape(-1, self.in_features).contiguous()
        result: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, weight, self.group_size, grid)
        result = result.reshape(*x.shape[:-1], self.out_features)
        return result if self.bias is None else result + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}, bias={bias}"
