"""The parts of a Qwen v1 block that know of nothing but tensors: norm, MLP, rotary frequencies, plain attention.

Attention, blocks and the model are modeling.py; the formulas of positions are positions.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qquant.models.qwen import positions
from qquant.models.qwen.configuration import QWenConfig


class QWenRMSNorm(nn.Module):
    """x / rms(x) in float32, rounded to x's dtype, then times the weight in that dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] in x's dtype."""
        # Without a weight torch computes in float32 and rounds its result to x's dtype.
        return F.rms_norm(x, (x.shape[-1],), None, self.eps) * self.weight


def output_projection(width: int, config: QWenConfig) -> nn.Linear:
    """What an attention or MLP adds to the residual stream, [width] -> [hidden]; marked for smaller initial weights."""
    projection = nn.Linear(width, config.hidden_size, bias=not config.no_bias)
    projection.adds_to_residual = True  # type: ignore[assignment]
    return projection


class QWenMLP(nn.Module):
    """c_proj(w1(x) * silu(w2(x))): the gate is w2."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.c_proj = output_projection(width, config)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden]."""
        raised, gate = self.w1(x), F.silu(self.w2(x))
        # Where no gradient needs the gate, the product takes its place: one large temporary less.
        product = raised * gate if torch.is_grad_enabled() else gate.mul_(raised)
        found: Tensor = self.c_proj(product)
        return found


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention [B, H, L, D] -> [B, L, H, D] that keeps its weights; softmax in float32."""
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class QWenRotaryEmbedding(nn.Module):
    """Holds the rotary frequencies that no NTK has stretched; chooses those of a sequence."""

    inv_freq: Tensor

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        self.config = config
        inv_freq = positions.inverse_frequencies(config.rotary_emb_base, config.rotary_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move with the model, but stay float32: a rounded frequency turns far positions by whole radians."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.inv_freq.dtype != torch.float32:
            exact = positions.inverse_frequencies(self.config.rotary_emb_base, self.config.rotary_dim)
            self.inv_freq = exact.to(self.inv_freq.device)
        return self

    def stretched(self, lengths: Tensor) -> Tensor:
        """Frequencies [B, R / 2] float32 for prompts of ``lengths`` [B]."""
        alpha = positions.ntk_alpha(lengths, self.config.seq_length)
        return positions.inverse_frequencies(self.config.rotary_emb_base, self.config.rotary_dim, alpha)

    def forward(
        self, position_ids: Tensor, inv_freq: Tensor | None, sharpen: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cosines and sines [B or 1, L, 1, R / 2] and LogN's factors [B or 1, L, 1, 1] or None, all float32."""
        chosen = self.inv_freq if inv_freq is None else inv_freq
        cos, sin = positions.angles(position_ids, chosen.to(position_ids.device))
        return cos, sin, positions.logn_factors(position_ids, self.config.seq_length) if sharpen else None
