"""Linears that were not quantized, the output projection above all: a kernel for few tokens of bfloat16 on a CPU.

The operator with its reference, the layer that calls it, and what puts that layer into a model. Packed linears are
linear.py's. Importing this file loads the kernels of csrc/ where they are built.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qquant import _native

MAX_TOKENS = 8
"""Most tokens that the kernel serves, reading the weight once for all of them; with more, torch's matmul is faster."""

MIN_WEIGHTS = 1 << 16
"""Weights below this many stay with torch: a call takes longer than their products. Measured on a Zen 4 CPU, 1 thread,
torch's time by the kernel's: 2.0 to 3.0 at 1 token and 1.5 to 1.9 at 8, from 256 x 256 to 151936 x 2048."""


def dense_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, summed in float32 and rounded once.

    Args:
        x: [..., K] of a float dtype, any strides. Read, never written.
        weight: [N, K] in x's dtype. Read, never written.
        bias: [N] in x's dtype or float32, or None.

    Returns:
        [..., N] in x's dtype, contiguous.
    """
    check_dense(x, weight, bias)
    product = x.float() @ weight.float().T
    return (product if bias is None else product + bias.float()).to(x.dtype).contiguous()


def check_dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse tensors that do not belong together; the kernel checks the same."""
    torch._check(weight.dim() == 2, lambda: f"weight must be [N, K], got {list(weight.shape)}")
    rows, columns = weight.shape
    torch._check(
        x.dim() > 0 and x.shape[-1] == columns,
        lambda: f"x must end in {columns} features, got {list(x.shape)}",
    )
    torch._check(
        weight.dtype == x.dtype and x.dtype.is_floating_point,
        lambda: f"x and weight must be of one float dtype, got {x.dtype} and {weight.dtype}",
    )
    if bias is not None:
        torch._check(
            bias.shape == (rows,) and bias.dtype in (x.dtype, torch.float32),
            lambda: f"bias must be [{rows}] {x.dtype} or float32, got {list(bias.shape)} {bias.dtype}",
        )


def _dense_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_dense(x, weight, bias)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_OPERATOR = "qquant::dense_linear"
_library = torch.library.Library("qquant", "FRAGMENT")
_library.define("dense_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("dense_linear", dense_reference, "CompositeExplicitAutograd")
torch.library.register_fake(_OPERATOR, _dense_fake, lib=_library)

dense_linear = torch.ops.qquant.dense_linear.default
"""``dense_reference`` by the fastest kernel that is live for the tensors' device."""

_native.load_torch_ops()


def kernel_is_live() -> bool:
    """Whether a compiled kernel serves the operator on this CPU; plain C++, without vectors, is slower than torch."""
    built = torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, "CPU")
    return built and ": portable" not in _native.describe("qquant._C")


class DenseLinear(nn.Linear):
    """An ``nn.Linear`` that is faster for few tokens; its parameters, and so its state dict, are an existing linear's.

    Up to ``MAX_TOKENS`` tokens of bfloat16 go through the kernel where no gradient is wanted, everything else through
    ``F.linear``. Both sum in float32 and round once, in another order. A weight that is tied to an embedding stays so.
    """

    @classmethod
    def sharing(cls, linear: nn.Linear) -> DenseLinear:
        """A layer with the parameters of ``linear`` themselves, not copies of them."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in the input's dtype."""
        weight, bias = self.weight, self.bias
        learns = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        if (
            input.dtype == weight.dtype == torch.bfloat16
            and input.device.type == "cpu"
            and 0 < input.numel() <= MAX_TOKENS * self.in_features
            and not learns
        ):
            found: Tensor = dense_linear(input, weight, bias)
            return found
        # A strided input, as one token of each sequence is, makes torch copy the weight once per sequence.
        return F.linear(input.contiguous(), weight, bias)


def use_dense_kernel(model: nn.Module) -> list[str]:
    """Put ``DenseLinear`` in the place of a model's large bfloat16 linears on the CPU, in place.

    Args:
        model: any; linears of other classes than ``nn.Linear`` itself, with hooks, or elsewhere are left alone.

    Returns:
        Lines to print: what runs on the kernel, or what could have and why it does not; none where there is nothing.
    """
    names = [name for name, _ in _large(model)]
    if not names:
        return []
    shown = f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]
    if not kernel_is_live():
        why = next((one.why for one in _native.status() if one.name == "qquant._C"), "")
        why = why or "this qquant._C has none for this processor"
        return [f"{shown} (bfloat16): torch; the kernel for few tokens is not there: {why}"]
    for name, linear in list(_large(model)):
        if isinstance(linear, DenseLinear):  # by an earlier call
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, DenseLinear.sharing(linear))
        _gather_pages(linear.weight)
    return [f"{shown} (bfloat16): dense_linear for 1 to {MAX_TOKENS} tokens, torch for more"]


def _gather_pages(weight: Tensor) -> None:
    """Put a weight, where it is, into large pages if the system does so: the kernel then reads it a quarter faster."""
    host = _native.host()
    if host is not None:
        host.gather_large_pages(weight.data_ptr(), weight.nbytes)


def _large(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        # Other classes, hooks and forwards of their own (as accelerate gives to what it offloads) do something else.
        if (
            type(module) in (nn.Linear, DenseLinear)
            and name
            and "forward" not in vars(module)
            and not (module._forward_hooks or module._forward_pre_hooks)
            and module.weight.device.type == "cpu"
            and module.weight.dtype == torch.bfloat16
            and module.weight.numel() >= MIN_WEIGHTS
        ):
            yield name, module
