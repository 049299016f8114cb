"""Cosines and sines of one new token's position, in the two forms in which decoders hand them to their layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TurnForm:
    """What a layer gets as ``position_embeddings``.

    Llama and its kin: cosines and sines, [B or 1, 1, D] bfloat16 each. The original Qwen: [B or 1, 1, 1, R / 2] float32
    each, and LogN's factors, which are None up to the training length.
    """

    size: int
    """D, of a head."""
    in_float32: bool

    def fits(self, turns: object, batch: int) -> bool:
        """Whether these are of one token and in this form, without factors."""
        if not isinstance(turns, tuple) or len(turns) != (3 if self.in_float32 else 2):
            return False
        if self.in_float32 and turns[2] is not None:
            return False
        dtype = torch.float32 if self.in_float32 else torch.bfloat16
        for one in turns[:2]:
            shape = one.shape
            if one.dtype != dtype or shape[0] not in (1, batch):
                return False
            if not self.in_float32 and (len(shape) != 3 or shape[1:] != (1, self.size)):
                return False
            if self.in_float32 and (len(shape) != 4 or shape[1:3] != (1, 1) or 2 * shape[3] > self.size):
                return False
        return True

    def random(self, sequences: int, generator: torch.Generator) -> tuple[Any, ...]:
        """Those of random angles."""
        if self.in_float32:
            angles = torch.randn(sequences, 1, 1, self.size // 2, generator=generator)
            return angles.cos(), angles.sin(), None
        angles = torch.randn(sequences, 1, self.size, generator=generator)
        return angles.cos().bfloat16(), angles.sin().bfloat16()
