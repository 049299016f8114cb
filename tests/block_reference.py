"""Slow oracles of what methods do to a whole decoder block: scales trained, channels scaled or turned; for tests only.

Everything is float64 and goes by definitions: Adam step by step, every choice of factors tried with a plain rounding of
the weights, heads turned one by one. What is done to one linear is in method_reference.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor, nn

from qquant.config import QuantizeConfig
from qquant.solver import Solution
from qquant.tuning import Lesson
from tests.reference import fit_row, round_row


@dataclass(frozen=True)
class Tuned:
    """What Adam finds, by inner name of a linear."""

    moves: dict[str, Tensor]
    """[out, groups], shares by which scales move."""
    scales: dict[str, Tensor]
    """[out, groups], the moved scales as float16 holds them."""
    before: float
    """Error on the samples that are held out."""
    after: float


def tune_slowly(
    block: nn.Module, solved: Mapping[str, Solution], lessons: Sequence[Lesson], steps: int, rate: float
) -> Tuned:
    """Adam on ``scale * (1 + move)``, the step falling along half a cosine, gradients by autograd through the formula.

    Every eighth sample is held out, the last one if there are fewer. A step looks at whole samples in turn, until they
    have 2048 tokens or each was there once. A scale moves by half of itself at most.
    """
    held = [i for i in range(len(lessons)) if i % 8 == 7] or [len(lessons) - 1]
    turns = cycle([lesson for i, lesson in enumerate(lessons) if i not in held])
    moves = {name: torch.zeros_like(solution.scales, dtype=torch.float64) for name, solution in solved.items()}
    mean, square = ({name: torch.zeros_like(move) for name, move in moves.items()} for _ in range(2))
    for step in range(1, steps + 1):
        batch = [next(turns)]
        while sum(counted(one) for one in batch) < 2048 and len(batch) < len(lessons) - len(held):
            batch.append(next(turns))
        leaves = {name: move.clone().requires_grad_() for name, move in moves.items()}
        tokens = sum(counted(one) for one in batch)
        weights = {n: weight_of(solved[n], solved[n].scales.double() * (1 + leaf)) for n, leaf in leaves.items()}
        loss = sum((error_of(block, weights, one) for one in batch), torch.zeros(())) / tokens
        slopes = torch.autograd.grad(loss, list(leaves.values()))
        pace = rate * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        for name, slope in zip(leaves, slopes, strict=True):
            mean[name] = 0.9 * mean[name] + 0.1 * slope
            square[name] = 0.99 * square[name] + 0.01 * slope**2
            change = (mean[name] / (1 - 0.9**step)) / ((square[name] / (1 - 0.99**step)).sqrt() + 1e-12)
            moves[name] = (moves[name] - pace * change).clamp(-0.5, 0.5)
    scales = {name: storable(solved[name].scales.double(), move) for name, move in moves.items()}
    found = {name: weight_of(solved[name], scales[name]) for name in solved}
    with torch.no_grad():
        before = sum(float(error_of(block, {}, lessons[i])) for i in held)
        after = sum(float(error_of(block, found, lessons[i])) for i in held)
    return Tuned(moves, scales, before, after)


def counted(lesson: Lesson) -> int:
    """Tokens that count."""
    return lesson.wanted.shape[1] if lesson.mask is None else int(lesson.mask.sum())


def weight_of(solution: Solution, scales: Tensor) -> Tensor:
    """scale * (code - zero) of each column's own group: [out, in]."""
    groups = solution.g_idx.long()
    return scales[:, groups] * (solution.codes.double() - solution.zeros.double()[:, groups])


def error_of(block: nn.Module, weights: Mapping[str, Tensor], lesson: Lesson) -> Tensor:
    """e^T F e summed over the tokens that count, e what leaves the block with these weights in it less what should."""
    changed = copy.deepcopy(block)
    for name, weight in weights.items():
        layer = changed.get_submodule(name)
        del layer.weight
        layer.weight = weight
    output = changed(lesson.hidden, **lesson.call)
    missed = ((output[0] if isinstance(output, tuple) else output) - lesson.wanted)[0].double()
    felt = torch.eye(missed.shape[1]) if lesson.felt is None else torch.block_diag(*lesson.felt)
    kept = [t for t in range(len(missed)) if lesson.mask is None or lesson.mask[t]]
    return torch.einsum("ti,ij,tj->", missed[kept], felt.double(), missed[kept])


def storable(scales: Tensor, moves: Tensor) -> Tensor:
    """The nearest float16 of each moved scale; what would be 0 or infinite stays."""
    found = (scales * (1 + moves)).half().double()
    bad = (found == 0) | found.isinf()
    return torch.where(bad, scales, found)


def best_factors_slowly(
    readers: Sequence[tuple[Tensor, QuantizeConfig]], inputs: Tensor, channels: list[int]
) -> list[float]:
    """The powers of two that a seam's channels are divided by, the readers' columns multiplied by; 1 where nothing is.

    Every zone with every strength is tried; the best is taken if it saves a tenth of the rounding error.

    Args:
        readers: weight [out, in] and settings of each linear that reads the channels.
        inputs: [T, in], what comes to them.
        channels: [in], the channel that each of their inputs is.
    """
    count = max(channels) + 1
    size, power = inputs.abs().mean(0).tolist(), inputs.square().mean(0).tolist()
    heavy = torch.cat([weight for weight, _ in readers]).abs().mean(0).tolist()

    def octaves(values: list[float]) -> list[float]:
        """Of each channel, above the lower median."""
        of_channel: list[list[float]] = [[] for _ in range(count)]
        for value, channel in zip(values, channels, strict=True):
            of_channel[channel].append(value)
        logs = [math.log2(sum(some) / len(some)) if sum(some) else -math.inf for some in of_channel]
        middle = sorted(logs)[(count - 1) // 2]
        return [log - middle if math.isfinite(log - middle) else 0.0 for log in logs]

    imbalance = [(x - w) / 2 for x, w in zip(octaves(size), octaves(heavy), strict=True)]

    def cost(factors: list[float]) -> float:
        of_column = [factors[channel] for channel in channels]
        return sum(rounding_cost(weight, of_column, power, settings) for weight, settings in readers)

    nothing = [1.0] * count
    best, least = nothing, 0.9 * cost(nothing)
    for zone in (0.0, 1.0):
        for strength in (0.5, 0.75, 1.0):
            tried = [2.0 ** min(12, round(max(0.0, octave - zone) * strength)) for octave in imbalance]
            found = math.inf if tried == nothing else cost(tried)
            if found < least:
                best, least = tried, found
    return best


def rounding_cost(weight: Tensor, factors: Sequence[float], power: Sequence[float], config: QuantizeConfig) -> float:
    """The sum of E[x^2] (w' - w)^2 over evenly spaced rows, times all rows by these; w rounded behind its factor.

    Each row's group has the best of four ranges.
    """
    rows, columns = weight.shape
    size = columns if config.group_size == -1 else config.group_size
    looked_at, total = range(0, rows, max(1, rows // 256)), 0.0
    for row in looked_at:
        for start in range(0, columns, size):
            members = range(start, start + size)
            values = [float(weight[row, k]) * factors[k] for k in members]
            losses = []
            for shrink in (1.0, 0.9, 0.8, 0.7):
                scale, zero = fit_row(values, config.bits, config.sym, shrink, config.recipe.signed)
                codes = round_row(values, scale, zero, config.bits)
                pairs = zip(members, values, codes, strict=True)
                losses.append(sum(power[k] * ((scale * (c - zero) - v) / factors[k]) ** 2 for k, v, c in pairs))
            total += min(losses)
    return total * rows / len(looked_at)


def hadamard_or_gram_schmidt(size: int) -> Tensor:
    """[size, size]: entry i, j of Hadamard's matrix is -1 to the number of bits that i and j share, over sqrt(size).

    Where size is no power of two: the seeded random matrix, each column less its part along the ones before it.
    """
    if size & (size - 1) == 0:
        signs = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
        return torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)
    random = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    found: list[Tensor] = []
    for column in random.T:
        for _ in range(2):  # the second time takes away what rounding left
            for other in found:
                column = column - (column @ other) * other
        found.append(column / column.norm())
    return torch.stack(found, 1)


def turned_values(rows: Tensor, head: int) -> Tensor:
    """Each head's rows of a matrix or vector of values, [heads * head, ...], turned."""
    turn = hadamard_or_gram_schmidt(head)
    return torch.cat([torch.tensordot(turn, rows[at : at + head], dims=1) for at in range(0, len(rows), head)])


def turned_reader(weight: Tensor, head: int) -> Tensor:
    """A matrix [out, query heads * head] that reads turned values and gives what it gave."""
    back = hadamard_or_gram_schmidt(head).T
    return torch.cat([weight[:, at : at + head] @ back for at in range(0, weight.shape[1], head)], 1)
