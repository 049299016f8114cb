"""What calibration tells about a linear: second moments of its inputs, their misses and its outputs' gradients.

Sums over tokens only, lane by lane, so that they are the same for any number of ranks: lanes are those of ranks.py.
Which tokens reach a linear is capture.py's, what the moments are used for solver.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qquant import _native
from qquant.errors import NumericError
from qquant.ranks import ALONE, Ranks

_PANEL = 256  # columns per panel of the Hessian update: only panels on and above the diagonal are computed


class _Sum:
    """A matrix summed over samples: those of one lane first, then the lanes in their order.

    One process holds at most two of it, the lane at hand and the total. Among several ranks the total is divided.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.tokens = 0
        self._shape, self.dtype, self._device = (rows, columns), dtype, torch.device(device)
        # Made here and not where it is first added to, which may be under torch.inference_mode.
        self._lane: Tensor | None = torch.zeros(self._shape, dtype=dtype, device=self._device)
        self._total: Tensor | None = None
        self._ended = 0  # tokens of lanes that are in the total
        self.takes_gram = self._device.type == "cpu" and dtype == torch.float32

    def lane(self, tokens: int = 0) -> Tensor:
        """The lane at hand, [rows, columns] contiguous, to be added to in place by so many tokens more."""
        self.tokens += tokens
        if self._lane is None:
            self._lane = torch.zeros(self._shape, dtype=self.dtype, device=self._device)
        return self._lane

    def end_lane(self, ranks: Ranks) -> None:
        """Add the lanes at hand of all ranks to the total."""
        counts = ranks.counts(self.tokens - self._ended)
        if any(counts):
            lane = self.lane()
            self._total = ranks.add_in_order(self._total, lane, counts)
            self._lane = None if self._total is lane else lane.zero_()
        self.tokens = self._ended = self._ended + sum(counts)

    def free_lane(self) -> None:
        """Give up the memory of the lane at hand if nothing was added to it."""
        if self.tokens == self._ended:
            self._lane = None

    def finish(self, ranks: Ranks) -> Tensor:
        """The whole sum on every rank; takes its memory."""
        self.end_lane(ranks)
        total, self._total, self._lane = self._total, None, None
        if total is None:
            return torch.zeros(self._shape, dtype=self.dtype, device=self._device)
        return ranks.whole(total, self._shape[0])


class Hessian:
    """The second moment E[x x^T] of one linear's inputs, accumulated sample by sample.

    Every sample is added by itself in the order given, in float32, so the sum does not depend on how samples were
    batched on their way here.

    Args:
        columns: input features.
        side: keep only blocks of so many columns along the diagonal, a divisor of ``columns``; None: the whole matrix.
        dtype: of the accumulator, float32 or wider.
        device: where the inputs will be.
    """

    def __init__(
        self,
        columns: int,
        *,
        side: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start from zero."""
        self._side = side
        self._sum = _Sum(columns, columns if side is None else side, dtype, device)

    @property
    def tokens(self) -> int:
        """Tokens added so far: of the lanes that ended on any rank, of the lane at hand here."""
        return self._sum.tokens

    def add(self, inputs: Tensor) -> None:
        """Add one sample's inputs, [T, columns] floating, to the lane at hand; masked tokens are already left out."""
        lane, native = self._sum.lane(inputs.shape[0]), _native.gram()
        takes_gram = native is not None and inputs.dtype == torch.bfloat16 and self._sum.takes_gram
        for block, part in zip(lane.split(lane.shape[1]), inputs.split(lane.shape[1], dim=1), strict=True):
            if native is not None and takes_gram:
                x = part.contiguous()
                native.add_gram(x.data_ptr(), *x.shape, block.data_ptr(), torch.get_num_threads())
                continue
            x = part.to(block.dtype)
            for start in range(0, x.shape[1], _PANEL):
                block[start : start + _PANEL, start:].addmm_(x[:, start : start + _PANEL].T, x[:, start:])

    def end_lane(self, ranks: Ranks = ALONE) -> None:
        """What comes next is of another lane; every rank ends as many. Who never calls it has one lane."""
        self._sum.end_lane(ranks)

    def free_lane(self) -> None:
        """No lane comes next: half of the memory is given back before ``finish``."""
        self._sum.free_lane()

    def finish(self, ranks: Ranks = ALONE) -> Tensor:
        """The mean over tokens, symmetric, on every rank. Takes the accumulator's memory; call it once.

        Returns:
            [columns, columns], or the blocks along its diagonal [columns / side, side, side].

        Raises:
            NumericError: no token was added, or an input was not finite; on every rank.
        """
        full = self._sum.finish(ranks)
        if self.tokens == 0:
            raise NumericError("a Hessian needs at least one calibration token, got none for this linear")
        blocks = full.reshape(-1, full.shape[1], full.shape[1])
        # An input that is not finite spoils at least its own diagonal entry, far cheaper to look at than all inputs.
        if not bool(torch.isfinite(blocks.diagonal(dim1=1, dim2=2)).all()):
            raise NumericError("activations must be finite, got NaN or Inf among a linear's calibration inputs")
        full.div_(self.tokens)
        for block in blocks:
            for start in range(0, block.shape[0], _PANEL):
                end = start + _PANEL
                corner = block[start:end, start:end]
                corner.copy_(corner.triu() + corner.triu(1).T)
                block[end:, start:end] = block[start:end, end:].T
        return full if self._side is None else blocks


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
        self._sum = _Sum(rows, columns, dtype, device)

    @property
    def tokens(self) -> int:
        """Tokens added so far: of the lanes that ended on any rank, of the lane at hand here."""
        return self._sum.tokens

    def add(self, wanted: Tensor, got: Tensor, inputs: Tensor) -> None:
        """Add one sample to the lane at hand.

        Args:
            wanted: [T, rows] floating; masked tokens are already left out, here and of the others.
            got: [T, rows].
            inputs: [T, columns].
        """
        lane, dtype, native = self._sum.lane(inputs.shape[0]), self._sum.dtype, _native.gram()
        plain = wanted.dtype == got.dtype == inputs.dtype == torch.bfloat16
        if native is not None and plain and self._sum.takes_gram:
            # Two numbers within a factor of 2 have an exact difference; of others its rounding is far below it.
            missing, x = (wanted - got).contiguous(), inputs.contiguous()
            native.add_cross(
                missing.data_ptr(), x.data_ptr(), x.shape[0], *lane.shape, lane.data_ptr(), torch.get_num_threads()
            )
            return
        lane.addmm_((wanted.to(dtype) - got.to(dtype)).T, inputs.to(dtype))

    def end_lane(self, ranks: Ranks = ALONE) -> None:
        """As ``Hessian.end_lane``."""
        self._sum.end_lane(ranks)

    def finish(self, ranks: Ranks = ALONE) -> Tensor:
        """The mean over tokens, [rows, columns], on every rank. Takes the accumulator's memory; call it once."""
        full = self._sum.finish(ranks)
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
