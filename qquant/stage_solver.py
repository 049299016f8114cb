"""The linears that share an input, solved by all ranks: the same pieces of rows for any number of them.

Here rows are cut into pieces, handed out and put together again. What is done with a piece is solver.py's, which
linears share an input is known to walk.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qquant.columns import Prepared, prepare
from qquant.config import QuantizeConfig
from qquant.errors import QquantError
from qquant.moments import Moments
from qquant.ranks import Ranks
from qquant.solver import Solution, error_energies, error_rows, error_share, solve

PIECE_ROWS = 2048
"""Rows that are solved together, unless outputs that are weighted together are more. Part of what makes the bytes."""

_COMMON = ("damp_percent", "damp_escalations", "dead_columns", "fallback", "whole_hessian")


@dataclass(frozen=True)
class Solved:
    """What became of one linear."""

    solution: Solution
    """Without its target."""
    settings: QuantizeConfig
    relative_error: float
    """As ``solver.relative_error`` has it."""
    seconds: float
    """That the linears solved together took, over their number."""


def solve_stage(
    layers: Mapping[str, nn.Linear],
    moments: Moments | None,
    settings: Mapping[str, QuantizeConfig | None],
    outputs: Mapping[str, Tensor],
    ranks: Ranks,
) -> dict[str, Solved]:
    """Solve linears that read the same inputs; every rank calls this with the same values and returns the same.

    Linears with the same settings are one tall matrix, whose pieces are solved by turns: piece p by rank p % size. Rows
    do not see one another but in blocks of one linear's outputs, which lie in one piece.

    Args:
        layers: full name -> linear, [out, in]. Read, never written.
        moments: of their inputs, whole on every rank; ``residual`` only of a linear that is alone. None: no data.
        settings: full name -> what to do; None: leave it alone.
        outputs: full name -> [out / side, side, side], blocks of E[g g^T]; of linears that have them.
        ranks: the processes that do it together.

    Returns:
        Full name -> what became of it, of the linears with settings; those of the same settings behind one another.

    Raises:
        UsageError: settings that cannot be followed, with the full name of a linear in front.
        NumericError: a weight or a moment that is not finite, likewise: of the linear at fault. Both on every rank.
    """
    solved: dict[str, Solved] = {}
    remaining = {name: chosen for name, chosen in settings.items() if chosen is not None}
    while remaining:
        first, chosen = next(iter(remaining.items()))
        side = _side(outputs.get(first))
        together = [name for name, other in remaining.items() if other == chosen and _side(outputs.get(name)) == side]
        for name in together:
            del remaining[name]
        tall = _Tall({name: layers[name].weight for name in together}, moments, chosen, outputs if side else {}, side)
        solved |= tall.solved(ranks)
    return solved


def _side(outputs: Tensor | None) -> int:
    """Outputs that are weighted together; 0 where none are weighted."""
    return 0 if outputs is None else outputs.shape[1]


def pieces_of(heights: Mapping[str, int], side: int) -> list[dict[str, range]]:
    """Cut linears under one another into pieces of ``PIECE_ROWS`` rows, never through ``side`` outputs of one.

    Args:
        heights: name -> rows of each linear, a multiple of ``side``.
        side: outputs that are weighted together; 0: none are.

    Returns:
        From the top to the bottom: which rows of which linears make each piece.
    """
    height = max(PIECE_ROWS // side * side, side) if side else PIECE_ROWS
    pieces: list[dict[str, range]] = []
    room = 0
    for name, rows in heights.items():
        begin = 0
        while begin < rows:
            if not room:
                pieces.append({})
                room = height
            end = min(rows, begin + room)
            pieces[-1][name] = range(begin, end)
            room, begin = room - (end - begin), end
    return pieces


@dataclass(frozen=True)
class _Tall:
    """Linears under one another."""

    weights: dict[str, Tensor]
    moments: Moments | None
    config: QuantizeConfig
    outputs: Mapping[str, Tensor]
    side: int

    def solved(self, ranks: Ranks) -> dict[str, Solved]:
        began = time.perf_counter()
        found: dict[int, tuple[Solution, Any]] = {}
        pieces = pieces_of({name: weight.shape[0] for name, weight in self.weights.items()}, self.side)
        with ranks.agreed():
            try:
                mine = range(ranks.rank, len(pieces), ranks.size)
                # Of one piece alone the factor is freed as soon as its columns are done.
                ready = self._prepared() if mine and len(pieces) > 1 else None
                for number in mine:
                    found[number] = self._piece(pieces[number], ready)
                del ready
            except QquantError as error:
                raise type(error)(f"{self._at_fault()}: {error}") from error
        return self._together(pieces, found, ranks, began)

    def _at_fault(self) -> str:
        """The first linear whose weights cannot be rounded to nearest either; the first of all if all can."""
        chosen = self.config
        nearest = QuantizeConfig(method="rtn+clip-off", bits=chosen.bits, group_size=chosen.group_size, sym=chosen.sym)
        for name, weight in self.weights.items():
            try:
                solve(weight, None, nearest)
            except QquantError:
                return name
        return next(iter(self.weights))

    def _prepared(self) -> Prepared | None:
        return prepare(self.moments, self.config) if self.moments is not None and self.config.needs_data else None

    def _piece(self, piece: dict[str, range], ready: Prepared | None) -> tuple[Solution, Any]:
        """The solution of a piece, without its target, and what is told of it as JSON.

        That is what is the same for all pieces, and the energies of each linear's error and weight.
        """
        weight = torch.cat([self.weights[name][rows.start : rows.stop] for name, rows in piece.items()])
        solution = solve(weight, self._moments_of(piece, weight.device), self.config, prepared=ready)
        hessian = None if self.moments is None else self.moments.inputs
        aim, energies, top = weight if solution.target is None else solution.target, {}, 0
        for name, rows in piece.items():
            measured = [top + row - rows.start for row in error_rows(self.weights[name].shape[0]) if row in rows]
            energies[name] = error_energies(aim, solution, hessian, measured)
            top += len(rows)
        common = {field: getattr(solution, field) for field in _COMMON}
        return replace(solution, target=None), {"common": common, "energies": energies}

    def _moments_of(self, piece: dict[str, range], device: torch.device) -> Moments | None:
        """The moments as the rows of a piece need them."""
        moments = self.moments
        if moments is not None and self.outputs:
            blocks = [
                self.outputs[name][rows.start // self.side : rows.stop // self.side] for name, rows in piece.items()
            ]
            moments = replace(moments, outputs=torch.cat([part.to(device) for part in blocks]))
        if moments is not None and moments.residual is not None:
            (rows,) = piece.values()  # a linear that writes into the residual stream is alone
            moments = replace(moments, residual=moments.residual[rows.start : rows.stop])
        return moments

    def _together(
        self, pieces: list[dict[str, range]], found: dict[int, tuple[Solution, Any]], ranks: Ranks, began: float
    ) -> dict[str, Solved]:
        """Every rank's solutions on every rank, put together to whole linears."""
        parts: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in self.weights}
        energies = {name: [0.0, 0.0] for name in self.weights}
        common: Solution | None = None  # what is the same for all pieces: g_idx, damping, fallbacks
        for number, piece in enumerate(pieces):
            owner = number % ranks.size
            solution, told = found.pop(number, (None, None))
            told = ranks.json(told, owner)
            codes, scales, zeros = (
                ranks.share(None if solution is None else getattr(solution, field), owner, kind="solutions")
                for field in ("codes", "scales", "zeros")
            )
            if common is None:
                g_idx = ranks.share(None if solution is None else solution.g_idx, owner, kind="solutions")
                common = Solution(codes, scales, zeros, g_idx, **told["common"])
            heights = [len(rows) for rows in piece.values()]
            shared = zip(codes.split(heights), scales.split(heights), zeros.split(heights), strict=True)
            for name, part in zip(piece, shared, strict=True):
                parts[name].append(part)
                for place, energy in enumerate(told["energies"][name]):
                    energies[name][place] += energy
        assert common is not None
        seconds = (time.perf_counter() - began) / len(parts)
        solved = {}
        for name, of_linear in parts.items():
            codes, scales, zeros = (_stacked(matrices) for matrices in zip(*of_linear, strict=True))
            solution = replace(common, codes=codes, scales=scales, zeros=zeros)
            solved[name] = Solved(solution, self.config, error_share(*energies[name]), seconds)
        return solved


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    """Matrices under one another; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
