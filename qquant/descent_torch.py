"""What csrc/descent.cpp computes, in torch: for machines without the compiled module, and to hold it against in tests.

The same steps in the same order, all blocks of outputs at once. One step handles one output of every block, so a matrix
takes minutes where the compiled loop takes seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_rows(weights: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, order: Tensor, top: int) -> Tensor:
    """Round one column, one output of each block after another; later ones make up for what earlier ones leave.

    Args:
        weights: [out] floating.
        scale: [out].
        zero: [out].
        factor: [blocks, side, side], V of O^-1 = V^T V, V upper triangular in visiting order.
        order: [blocks, side] int64, the output of its block that is visited at each step.
        top: largest code.

    Returns:
        [out] uint8.
    """
    blocks, side = order.shape
    wanted, steps, middles = (part.reshape(blocks, side).gather(1, order) for part in (weights, scale, zero))
    codes = torch.empty_like(wanted)
    for i in range(side):
        codes[:, i] = torch.nan_to_num(((wanted[:, i] / steps[:, i]).round() + middles[:, i]).clamp(0, top))
        kept = steps[:, i] * (codes[:, i] - middles[:, i])
        error = (wanted[:, i] - kept) / factor[:, i, i]
        wanted[:, i + 1 :] -= error[:, None] * factor[:, i, i + 1 :]
    return torch.empty_like(codes).scatter_(1, order, codes).reshape(-1).to(torch.uint8)


def descend(
    pulls: Tensor,
    moves: Tensor,
    metric: Tensor | None,
    corner: Tensor,
    codes: Tensor,
    scales: Tensor,
    group_of: Tensor,
    top: int,
) -> int:
    """Go once through a block of columns and put each code where the objective is least.

    Args:
        pulls: [columns, out], O E H of the block; kept exact here.
        moves: [columns, out], by how much each weight moved; added to.
        metric: [blocks, side, side], O's diagonal blocks; None: the identity.
        corner: [columns, columns], the block of H.
        codes: [columns, out] uint8; changed.
        scales: [groups, out].
        group_of: [columns] int64.
        top: largest code.

    Returns:
        How many codes moved.
    """
    columns, rows = pulls.shape
    blocks, side = (rows, 1) if metric is None else metric.shape[:2]
    moved = 0
    for j in range(columns):
        own, scale = corner[j, j], scales[group_of[j]].reshape(blocks, side)
        code, pull = codes[j].to(pulls.dtype).reshape(blocks, side), pulls[j].reshape(blocks, side)
        change, felt = torch.zeros_like(pull), torch.zeros_like(pull)
        for i in range(side):
            curvature = own if metric is None else own * metric[:, i, i]
            wanted = (code[:, i] - pull[:, i] / (curvature * scale[:, i])).round().clamp(0, top)
            sound = (curvature > 0) & (scale[:, i] != 0) & ~wanted.isnan()
            step = torch.where(sound, scale[:, i] * (wanted - code[:, i]), 0)
            moved += int((step != 0).sum())
            code[:, i] = torch.where(sound, wanted, code[:, i])
            change[:, i] = step
            if metric is None:
                felt[:, i] = step
                continue
            felt += step[:, None] * metric[:, i]
            pull[:, i + 1 :] += own * step[:, None] * metric[:, i, i + 1 :]
        codes[j] = code.reshape(-1).to(torch.uint8)
        moves[j] += change.reshape(-1)
        pulls[j + 1 :].addr_(corner[j, j + 1 :], felt.reshape(-1))
    return moved
