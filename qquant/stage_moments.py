"""The sums that are gathered for one stage: linears that read the same inputs. What is summed is moments.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from qquant.errors import NumericError
from qquant.moments import CrossMoment, Hessian, Moments
from qquant.ranks import Ranks


@dataclass
class Gathered:
    """The sums that one stage's moments are made of."""

    inputs: Hessian
    mismatch: CrossMoment | None = None
    residual: CrossMoment | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)
    """By sample: inputs that will be needed again, if they are few."""

    @classmethod
    def of(cls, linear: nn.Linear, *, exact: bool = False, residual: bool = False) -> Gathered:
        """Zeros for a stage whose first linear is ``linear``."""
        columns, device = linear.in_features, linear.weight.device
        return cls(
            Hessian(columns, device=device),
            CrossMoment(columns, columns, device=device) if exact else None,
            CrossMoment(linear.out_features, columns, device=device) if exact and residual else None,
        )

    def end_lane(self, ranks: Ranks) -> None:
        """Add what was gathered since the last time to the totals of all ranks."""
        for moment in (self.inputs, self.mismatch, self.residual):
            if moment is not None:
                moment.end_lane(ranks)

    def finish(self, name: str, ranks: Ranks) -> Moments:
        """The means, for all ranks; takes the accumulators' memory. ``name``: of the linear, for an error."""
        try:
            return Moments(
                inputs=self.inputs.finish(ranks),
                mismatch=None if self.mismatch is None else self.mismatch.finish(ranks),
                residual=None if self.residual is None else self.residual.finish(ranks),
            )
        except NumericError as error:
            raise NumericError(f"{name}: {error}") from error
