"""The norms of a decoder's residual stream in one operator instead of six, for bfloat16 on a CPU, bit for bit.

The operator with its reference, the module that calls it, and what puts that module into a model, after trying whether
its bits are those of the norm it replaces. Importing this file loads the kernels of csrc/ where they are built.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from qquant import _native

_EPS_NAMES = ("variance_epsilon", "eps")
"""What families call the number that is added to the mean square."""

_FIRST_ROWS, _MORE_ROWS = 1024, 8
"""Rows that a norm is tried on: many for the first of a kind, because a float32 sum that differs in its last bit tips
the rounding of one element in some ten thousand; few for the others, whose weights alone are new."""


def norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (x / rms(x))``: the inner part in float32 and rounded to x's dtype, the product in that dtype.

    Args:
        x: [..., N] of a float dtype. Read, never written.
        weight: [N] in x's dtype.
        eps: added to the mean square.

    Returns:
        [..., N] in x's dtype, contiguous.
    """
    check_norm(x, weight)
    return _normed(x, weight, eps)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same for a weight of any dtype: the product has the wider one."""
    values = x.float()
    inverse = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * (values * inverse).to(x.dtype)).contiguous()


def check_norm(x: Tensor, weight: Tensor) -> None:
    """Refuse tensors that do not belong together; the kernel checks the same."""
    torch._check(
        x.dim() > 0 and weight.dim() == 1 and weight.shape[0] == x.shape[-1] > 0,
        lambda: f"weight must be as long as a row of x, got {list(weight.shape)} for {list(x.shape)}",
    )
    torch._check(x.dtype == weight.dtype, lambda: f"x and weight must be of one dtype, got {x.dtype}, {weight.dtype}")


def _norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    check_norm(x, weight)
    return x.new_empty(x.shape)


_OPERATOR = "qquant::rms_norm"
_library = torch.library.Library("qquant", "FRAGMENT")
_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
_library.impl("rms_norm", norm_reference, "CompositeExplicitAutograd")
torch.library.register_fake(_OPERATOR, _norm_fake, lib=_library)

rms_norm = torch.ops.qquant.rms_norm.default
"""``norm_reference`` by the fastest kernel that is live for the tensors' device."""

_native.load_torch_ops()


def kernel_is_live() -> bool:
    """Whether a compiled kernel, and not the reference, serves the operator on this CPU."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(_OPERATOR, "CPU")


class KernelRMSNorm(nn.Module):
    """A norm with the weight of an existing one, so that its state dict is the same; eps is kept under both names."""

    weight: nn.Parameter

    def __init__(self, weight: nn.Parameter, eps: float, kind: str = "RMSNorm") -> None:
        super().__init__()
        self.weight, self.kind = weight, kind
        self.eps = self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., N] in its own dtype, or in the weight's where that is wider."""
        learns = torch.is_grad_enabled() and (hidden_states.requires_grad or self.weight.requires_grad)
        bfloat16 = hidden_states.dtype == self.weight.dtype == torch.bfloat16
        use = rms_norm if bfloat16 and hidden_states.device.type == "cpu" and not learns else _normed
        found: Tensor = use(hidden_states, self.weight, self.eps)
        return found

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def use_norm_kernel(model: nn.Module) -> list[str]:
    """Put ``KernelRMSNorm`` in the place of a model's bfloat16 norms on the CPU, in place.

    A norm is any module whose class is named so, with one weight and an eps; it is replaced if both give the same bits
    on random inputs. Others, of families that compute otherwise, are left alone.

    Args:
        model: any.

    Returns:
        Lines to print: how many run on the kernel, how many do not and why; none where there are no such norms.
    """
    if not kernel_is_live():
        return []
    found = [(name, norm) for name, norm in model.named_modules() if name and _is_norm(norm)]
    # Those of an earlier call.
    same = Counter(norm.kind for norm in model.modules() if isinstance(norm, KernelRMSNorm))
    other: Counter[str] = Counter()
    tried: set[tuple[type[nn.Module], int, float]] = set()
    for name, norm in found:
        kind = type(norm).__name__
        kernel = KernelRMSNorm(norm.weight, _eps_of(norm) or 0.0, kind).train(norm.training)
        key = type(norm), norm.weight.shape[0], kernel.eps
        if not _agree(norm, kernel, _MORE_ROWS if key in tried else _FIRST_ROWS):
            other[kind] += 1
            continue
        tried.add(key)
        same[kind] += 1
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, kernel)
    return [
        *(f"{count} {kind} (bfloat16): rms_norm, the same bits in one step" for kind, count in same.items()),
        *(f"{count} {kind} (bfloat16): as they are, rms_norm computes otherwise" for kind, count in other.items()),
    ]


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and not isinstance(module, KernelRMSNorm)
        and [*module._parameters] == ["weight"]
        and isinstance(weight, nn.Parameter)
        and weight.dim() == 1
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and _eps_of(module) is not None
        and not (module._modules or module._buffers or module._forward_hooks or module._forward_pre_hooks)
        and "forward" not in vars(module)
    )


def _eps_of(module: nn.Module) -> float | None:
    named = (getattr(module, name, None) for name in _EPS_NAMES)
    return next((float(eps) for eps in named if isinstance(eps, float)), None)


def _agree(norm: nn.Module, kernel: KernelRMSNorm, count: int) -> bool:
    """Whether both give the same bits on rows of many magnitudes, the smallest of them no larger than eps."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, kernel.weight.shape[0], generator=generator)
    rows = (drawn * 10.0 ** torch.linspace(-4, 3, count)[:, None]).bfloat16()
    with torch.no_grad():
        return torch.equal(norm(rows), kernel(rows))
