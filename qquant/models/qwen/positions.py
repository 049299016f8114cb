"""What a position does in a Qwen v1 model: rotary angles, dynamic NTK's stretch of their base, LogN's sharper queries.

Pure functions of positions and lengths, and the small state that belongs to one sequence. The model is modeling.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qquant.errors import UsageError

_DOUBLINGS = 32
"""NTK's steps looked at: 2**32 times the length of training."""

_STATE = "qwen_ntk"
"""Attribute of a cache object: the ``NtkState`` of the sequences it holds."""


@dataclass
class NtkState:
    """How the base of one batch of sequences was stretched when its prompt went in; kept for whatever follows."""

    inv_freq: Tensor | None
    """[B or 1, R / 2] float32 rotary frequencies per row; None: the model's own, not stretched."""
    planned: bool
    """Whether the prompt is still to come, perhaps in several calls."""


def ntk_alpha(lengths: Tensor, seq_length: int) -> Tensor:
    """Dynamic NTK's factor for prompts of given lengths: 1 up to ``seq_length``, 3 up to twice that, then 7, 15, ...

    Args:
        lengths: [...] integers, tokens of each prompt.
        seq_length: length of training.

    Returns:
        [...] float64: max(2 ** ceil(log2(length / seq_length) + 1) - 1, 1), found by counting doublings, so that exact
        powers of two do not depend on a logarithm's rounding.

    Source: Qwen's README, "dynamic NTK interpolation"; values as its code gives them.
    """
    steps = seq_length * 2.0 ** torch.arange(_DOUBLINGS, dtype=torch.float64, device=lengths.device)
    doublings = (lengths[..., None] > steps).sum(-1)
    return 2.0 ** (doublings + 1).double() - 1


def inverse_frequencies(base: float, dim: int, alpha: Tensor | None = None) -> Tensor:
    """Rotary frequencies: (base * alpha ** (dim / (dim - 2))) ** (-2 i / dim) for i below dim / 2.

    Args:
        base: rotary base of the model.
        dim: channels that rotate.
        alpha: [B] float64, NTK's factor per row; None: 1.

    Returns:
        [dim / 2] float32, or [B, dim / 2] with alpha.
    """
    device = None if alpha is None else alpha.device
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    if alpha is None:
        return (base**-exponent).float()
    stretched = base * alpha ** (dim / (dim - 2))
    return (stretched[:, None] ** -exponent).float()


def angles(position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B or 1, L, 1, R / 2] float32 of positions [B or 1, L] under frequencies [(B,) R / 2]."""
    turned = position_ids[..., None].float() * (inv_freq if inv_freq.dim() == 1 else inv_freq[:, None])
    return turned.cos()[:, :, None], turned.sin()[:, :, None]


def logn_factors(position_ids: Tensor, seq_length: int) -> Tensor:
    """LogN's multipliers of the queries, [B or 1, L, 1, 1] float32: ln(p + 1) / ln(seq_length) past it, 1 before."""
    factors = (position_ids + 1).float().log() / math.log(seq_length)
    return factors.clamp(min=1)[:, :, None, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first channels of every head by its position's angles, in float32.

    Args:
        x: [B, L, H, D]. Read, never written.
        cos: [B or 1, L, 1, R / 2] float32; channels i and i + R / 2 form a pair.
        sin: the same.

    Returns:
        [B, L, H, D] in x's dtype; channels from R on are as they were.
    """
    half = cos.shape[-1]
    # Converted whole and rounded once: half by half costs twice the time.
    wide = x.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    first, second = wide[..., :half], wide[..., half : 2 * half]
    before = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(before, sin)
    return wide.to(x.dtype)


def from_mask(mask: Tensor, length: int) -> Tensor:
    """Positions [B, length] int64 of the last tokens of rows, counted from each row's first that is not 0 in ``mask``.

    Args:
        mask: [B, total]; 0 is padding.
        length: how many of the last tokens are wanted.
    """
    first = (mask != 0).long().argmax(-1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - first).clamp(min=0)[:, -length:]


def ntk_state(cache: Any) -> NtkState | None:
    """What a cache knows about its sequences; None where there is no cache or it knows nothing."""
    return getattr(cache, _STATE, None)


def keep_ntk_state(cache: Any, state: NtkState) -> None:
    """Let a cache object carry the state of its sequences, through copies too."""
    setattr(cache, _STATE, state)


def rows_of(inv_freq: Tensor, batch: int) -> Tensor:
    """The frequencies for a batch that may have grown since, each row into its own group of rows (beams).

    Raises:
        UsageError: rows were picked out of a batch whose rows were stretched differently.
    """
    rows = inv_freq.shape[0]
    if rows in (1, batch):
        return inv_freq
    if bool((inv_freq == inv_freq[:1]).all()):
        return inv_freq[:1]
    if batch % rows:
        raise UsageError(
            f"the cache was filled by {rows} rows of different lengths beyond seq_length, and {batch} rows go on; "
            "which is which is not known: prefill the rows that go on by themselves"
        )
    return inv_freq.repeat_interleave(batch // rows, 0)


def may_look(past: Tensor, length: int) -> bool:
    """Whether a static cache's count is worth looking at: it may be empty again, but on a GPU a look is a pause.

    So a prompt of one token into a cache that was reset by hand goes unseen there; ``generate`` plans by itself.
    """
    return not torch.compiler.is_compiling() and (length > 1 or past.device.type == "cpu")
