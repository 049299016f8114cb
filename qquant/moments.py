"""What calibration tells about a linear: second moments of its inputs, their misses and its outputs' gradients.

Sums over tokens only. Which tokens reach a linear is capture.py's, what the moments are used for solver.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qquant import _native
from qquant.errors import NumericError

_PANEL = 256  # columns per panel of the Hessian update: only panels on and above the diagonal are computed


class Hessian:
    """The second moment E[x x^T] of one linear's inputs, accumulated sample by sample.

    Every sample is added by itself in the order given, in float32, so the sum does not depend on how samples were
    batched on their way here.

    Args:
        columns: input features.
        dtype: of the accumulator, float32 or wider.
        device: where the inputs will be.
    """

    def __init__(self, columns: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        """Start from zero."""
        self.tokens = 0
        self._sum = torch.zeros(columns, columns, dtype=dtype, device=device)
        self._takes_gram = self._sum.device.type == "cpu" and dtype == torch.float32

    def add(self, inputs: Tensor) -> None:
        """Add one sample's inputs, [T, columns] floating; masked tokens are already left out."""
        self.tokens += inputs.shape[0]
        native = _native.gram()
        if native is not None and inputs.dtype == torch.bfloat16 and self._takes_gram:
            x = inputs.contiguous()
            native.add_gram(x.data_ptr(), *x.shape, self._sum.data_ptr(), torch.get_num_threads())
            return
        x = inputs.to(self._sum.dtype)
        for start in range(0, x.shape[1], _PANEL):
            self._sum[start : start + _PANEL, start:].addmm_(x[:, start : start + _PANEL].T, x[:, start:])

    def finish(self) -> Tensor:
        """The mean over tokens, [columns, columns], symmetric. Takes the accumulator's memory; call it once.

        Raises:
            NumericError: no token was added, or an input was not finite.
        """
        if self.tokens == 0:
            raise NumericError("a Hessian needs at least one calibration token, got none for this linear")
        # An input that is not finite spoils at least its own diagonal entry, far cheaper to look at than all inputs.
        if not bool(torch.isfinite(self._sum.diagonal()).all()):
            raise NumericError("activations must be finite, got NaN or Inf among a linear's calibration inputs")
        full, self._sum = self._sum, self._sum.new_empty(0)
        full.div_(self.tokens)
        for start in range(0, full.shape[0], _PANEL):
            end = start + _PANEL
            corner = full[start:end, start:end]
            corner.copy_(corner.triu() + corner.triu(1).T)
            full[end:, start:end] = full[start:end, end:].T
        return full


class CrossMoment:
    """E[(a - b) x^T]: how what should have come, ``a``, misses what came, ``b``, along the inputs ``x``.

    The difference is taken first: the two are close, and the difference of two moments would lose what matters.

    Args:
        rows: features of ``a`` and ``b``.
        columns: features of ``x``.
        dtype: of the accumulator, float32 or wider.
        device: where the activations will be.
    """

    def __init__(
        self, rows: int, columns: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        """Start from zero."""
        self.tokens = 0
        self._sum = torch.zeros(rows, columns, dtype=dtype, device=device)
        self._takes_gram = self._sum.device.type == "cpu" and dtype == torch.float32

    def add(self, wanted: Tensor, got: Tensor, inputs: Tensor) -> None:
        """Add one sample: [T, rows], [T, rows] and [T, columns] floating; masked tokens are already left out."""
        dtype = self._sum.dtype
        self.tokens += inputs.shape[0]
        native = _native.gram()
        if native is not None and wanted.dtype == got.dtype == inputs.dtype == torch.bfloat16 and self._takes_gram:
            # Two numbers within a factor of 2 have an exact difference; of others its rounding is far below it.
            missing, x = (wanted - got).contiguous(), inputs.contiguous()
            native.add_cross(
                missing.data_ptr(), x.data_ptr(), x.shape[0], *self._sum.shape, self._sum.data_ptr(),
                torch.get_num_threads(),
            )  # fmt: skip
            return
        self._sum.addmm_((wanted.to(dtype) - got.to(dtype)).T, inputs.to(dtype))

    def finish(self) -> Tensor:
        """The mean over tokens, [rows, columns]. Takes the accumulator's memory; call it once."""
        full, self._sum = self._sum, self._sum.new_empty(0)
        return full.div_(max(1, self.tokens))


@dataclass(frozen=True)
class Moments:
    """Everything that calibration found out about the linears of one stage; only ``inputs`` is always there."""

    inputs: Tensor
    """[in, in], E[x x^T] of the inputs in the quantized model."""
    mismatch: Tensor | None = None
    """[in, in], E[(x_original - x) x^T]: by what the original model's inputs differ."""
    residual: Tensor | None = None
    """[out, in], E[(r_original - r) x^T] of the residual stream that the linear writes into."""
    outputs: Tensor | None = None
    """[out, out], E[g g^T] of the gradient of the model's own log-likelihood with respect to the linear's output."""
