"""What csrc/descent.cpp computes, in Python: for machines without the compiled module, and to hold it against in tests.

The same steps in the same order, all blocks of outputs at once. One step handles one output of every block: numpy,
because torch takes ten times as long to begin an operation, and all of these are tiny.
"""

from __future__ import annotations

import numpy as np
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
    # [side, blocks]: the numbers of one step lie together.
    wanted, steps, middles = (
        part.reshape(blocks, side).gather(1, order).T.contiguous().numpy() for part in (weights, scale, zero)
    )
    rows = factor.permute(1, 2, 0).contiguous().numpy()
    codes = np.empty_like(wanted)
    with np.errstate(all="ignore"):
        for i in range(side):
            codes[i] = np.nan_to_num((np.rint(wanted[i] / steps[i]) + middles[i]).clip(0, top))
            error = (wanted[i] - steps[i] * (codes[i] - middles[i])) / rows[i, i]
            wanted[i + 1 :] -= error * rows[i, i + 1 :]
    found = torch.from_numpy(codes).T.contiguous()
    return torch.empty_like(found).scatter_(1, order, found).reshape(-1).to(torch.uint8)


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
    blocks, side = (rows, 1) if metric is None else (metric.shape[0], metric.shape[1])
    felt_by = None if metric is None else metric.permute(1, 2, 0).contiguous().numpy()  # [side, side, blocks]
    moved = 0
    for j in range(columns):
        own = corner[j, j].numpy()[()]
        code, pull, scale = (
            part.to(pulls.dtype).reshape(blocks, side).T.contiguous().numpy()
            for part in (codes[j], pulls[j], scales[int(group_of[j])])
        )
        change, felt = np.zeros_like(pull), np.zeros_like(pull)
        with np.errstate(all="ignore"):
            for i in range(side):
                curvature = own if felt_by is None else own * felt_by[i, i]
                wanted = np.rint(code[i] - pull[i] / (curvature * scale[i])).clip(0, top)
                sound = (curvature > 0) & (scale[i] != 0) & ~np.isnan(wanted)
                step = np.where(sound, scale[i] * (wanted - code[i]), np.zeros_like(wanted))
                code[i] = np.where(sound, wanted, code[i])
                change[i] = step
                moved += int(np.count_nonzero(step))
                if felt_by is None:
                    felt[i] = step
                elif step.any():
                    felt += step * felt_by[i]
                    pull[i + 1 :] += own * step * felt_by[i, i + 1 :]
        codes[j] = torch.from_numpy(code).T.reshape(-1).to(torch.uint8)
        moves[j] += torch.from_numpy(change).T.reshape(-1)
        pulls[j + 1 :].addr_(corner[j, j + 1 :], torch.from_numpy(felt).T.reshape(-1))
    return moved
