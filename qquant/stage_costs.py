"""The linears of a block that read one input, and what quantizing them costs.

Measuring is sensitivity.py's, choosing mixed_precision.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qquant.config import QuantizeConfig


@dataclass(frozen=True)
class StageShape:
    """The linears of a block that read one input."""

    names: tuple[str, ...]
    """Full names, in model order."""
    outputs: tuple[int, ...]
    """Rows of each."""
    inputs: int
    """Columns of all."""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> StageShape:
        """From JSON with its fields."""
        return cls(tuple(told["names"]), tuple(told["outputs"]), told["inputs"])


@dataclass(frozen=True)
class StageCost:
    """What one stage costs at each of its settings."""

    shape: StageShape
    settings: tuple[QuantizeConfig, ...]
    kl: tuple[float, ...]
    """Mean KL in nats per token at each setting: measured at the first, the others by the energy of the error that
    they leave in the stage's output, to which KL is proportional as long as it is small."""
    errors: tuple[float, ...]
    """That energy relative to the first setting's."""


SettingsOf = Callable[[StageShape], Sequence[QuantizeConfig]]
"""The settings that a stage may take, the coarsest first; none: the stage stays as it is."""
