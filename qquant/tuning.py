"""The scales of a quantized decoder block trained so that it gives what the original block gives; codes stay.

Adam on the squared error between what leaves the block on the quantized model's samples and what leaves the original
one on its own. Only numbers that the format stores anyway change, and only if samples that were not trained on agree.
When blocks are tuned is walk.py's.

Sources: one block's output as the aim, BRECQ, arXiv:2102.05426; Adam, arXiv:1412.6980.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qquant.hooks import first_output
from qquant.solver import Solution

RATE = 1e-3
"""The first step's size, as a share of a scale; falls to 0 along half a cosine."""
BATCH_TOKENS = 2048
"""Tokens that a step looks at, in whole samples."""
HELD_OUT = 8
"""One sample in so many judges instead of being trained on."""

_BETAS = (0.9, 0.99)  # of Adam, for a few dozen steps
_TINY = 1e-12
_FARTHEST = 0.5  # a scale moves by no larger share


@dataclass(frozen=True)
class Lesson:
    """One sample at a block: what the quantized model brings, and what should leave."""

    hidden: Tensor
    """[1, T, hidden], from the quantized model."""
    call: Mapping[str, Any]
    """The block's keyword arguments."""
    wanted: Tensor
    """[1, T, hidden], what leaves the original block on the original's samples."""
    mask: Tensor | None
    """[T] bool, False tokens do not count; None: all count."""
    felt: Tensor | None = None
    """[blocks, side, side], how much predictions feel what leaves the block; None: all of it alike."""

    def error(self, output: Tensor) -> Tensor:
        """The squared error, weighted by what is felt and summed over what counts, float32 or wider."""
        wide = torch.promote_types(output.dtype, torch.float32)
        error = (output.to(wide) - self.wanted.to(wide)).reshape(-1, output.shape[-1])
        weighted = error
        if self.felt is not None:
            blocks, side, _ = self.felt.shape
            by_block = error.reshape(-1, blocks, side).transpose(0, 1)
            weighted = (by_block @ self.felt.to(error)).transpose(0, 1).reshape(error.shape)
        missed = (weighted * error).sum(-1)
        return (missed if self.mask is None else missed[self.mask.to(missed.device)]).sum()

    @property
    def tokens(self) -> int:
        """How many count."""
        return self.wanted.shape[1] if self.mask is None else int(self.mask.sum())


class Lessons(Sequence[Lesson]):
    """Lessons that are made when one is asked for, so that samples on the disk stay there until then."""

    def __init__(self, count: int, made: Callable[[int], Lesson]) -> None:
        """Begin.

        Args:
            count: how many there are.
            made: the lesson of a number from 0 on, the same each time.
        """
        self._count, self._made = count, made

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: int) -> Lesson:  # type: ignore[override]
        if not 0 <= i < self._count:
            raise IndexError(i)
        return self._made(i)


class _Dequantize(torch.autograd.Function):
    """Weights of codes and scales; keeps the codes for the way back, not what they stand for."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, solution: Solution, dtype: torch.dtype) -> Tensor:
        """[out, groups] -> [out, in]."""
        ctx.solution = solution
        return replace(solution, scales=scales).weight().to(dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        """Each group's slopes times its steps, summed."""
        found: Solution = ctx.solution
        by_step = replace(found, scales=torch.ones_like(found.scales)).weight().mul_(slope)
        sums = torch.zeros_like(found.scales).index_add_(1, found.g_idx.long(), by_step)
        return sums, None, None


def tuned_scales(
    block: nn.Module, solved: Mapping[str, Solution], lessons: Sequence[Lesson], steps: int, *, rate: float = RATE
) -> dict[str, Tensor] | None:
    """Train the scales of a block's quantized linears.

    Args:
        block: the quantized weights are in place. Read, never written.
        solved: inner name of each quantized linear -> its codes and scales.
        lessons: one sample in 8, at least the last, judges the outcome; all others are trained on, in their order.
            Each is asked for when it is used, and no two are held at a time.
        steps: of Adam.
        rate: size of the first step, as a share of a scale.

    Returns:
        Inner name -> [out, groups] float32, exactly representable in float16; None where samples that were held out
        say that the old ones are as good, or where none can be held out.
    """
    held = list(range(HELD_OUT - 1, len(lessons), HELD_OUT)) or [len(lessons) - 1]
    taught = [i for i in range(len(lessons)) if i not in held]
    if not taught:
        return None
    moves = {name: torch.zeros_like(solution.scales) for name, solution in solved.items()}
    first = {name: torch.zeros_like(move) for name, move in moves.items()}
    second = {name: torch.zeros_like(move) for name, move in moves.items()}
    batches = _batches(lessons, taught)
    for step in range(steps):
        slopes = _slopes(block, solved, moves, lessons, next(batches))
        pace = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        for name, slope in slopes.items():
            first[name].lerp_(slope, 1 - _BETAS[0])
            second[name].lerp_(slope.square(), 1 - _BETAS[1])
            size = (second[name] / (1 - _BETAS[1] ** (step + 1))).sqrt_().add_(_TINY)
            moves[name] -= pace / (1 - _BETAS[0] ** (step + 1)) * first[name] / size
            moves[name].clamp_(-_FARTHEST, _FARTHEST)
    found = {name: _storable(solution.scales, moves[name]) for name, solution in solved.items()}
    before = _error(block, {}, lessons, held)
    trained = {name: replace(solved[name], scales=scales) for name, scales in found.items()}
    after = _error(block, trained, lessons, held)
    return found if after < before else None


def _batches(lessons: Sequence[Lesson], taught: Sequence[int]) -> Iterator[dict[int, int]]:
    """Whole samples of about ``BATCH_TOKENS`` with their tokens, in order, again and again."""
    tokens: dict[int, int] = {}
    batch: dict[int, int] = {}
    while True:
        for i in taught:
            if i not in tokens:
                tokens[i] = lessons[i].tokens
            batch[i] = tokens[i]
            if sum(batch.values()) >= BATCH_TOKENS or len(batch) >= len(taught):
                yield batch
                batch = {}


def _slopes(
    block: nn.Module,
    solved: Mapping[str, Solution],
    moves: Mapping[str, Tensor],
    lessons: Sequence[Lesson],
    batch: Mapping[int, int],
) -> dict[str, Tensor]:
    """The gradient of a batch's mean error with respect to the moves."""
    leaves = {name: move.detach().clone().requires_grad_() for name, move in moves.items()}
    tokens = max(1, sum(batch.values()))
    with torch.enable_grad():
        weights = {
            f"{name}.weight": _Dequantize.apply(  # type: ignore[no-untyped-call]
                solved[name].scales * (1 + leaf), solved[name], _dtype(block, name)
            )
            for name, leaf in leaves.items()
        }
        # One sample at a time, so that only its activations are in memory.
        inner = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        for i in batch:
            error = _missed(block, inner, lessons[i]) / tokens
            error.backward()
        torch.autograd.backward(list(weights.values()), [weight.grad for weight in inner.values()])
    return {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in leaves.items()}


def _missed(block: nn.Module, weights: Mapping[str, Tensor], lesson: Lesson) -> Tensor:
    output = functional_call(block, dict(weights), (lesson.hidden,), dict(lesson.call))
    return lesson.error(first_output(output))


@torch.no_grad()
def _error(block: nn.Module, solved: Mapping[str, Solution], lessons: Sequence[Lesson], held: Sequence[int]) -> float:
    """Summed over the lessons that are held out, with these linears in place of the block's own."""
    weights = {f"{name}.weight": solution.weight().to(_dtype(block, name)) for name, solution in solved.items()}
    return sum(float(_missed(block, weights, lessons[i])) for i in held)


def _dtype(block: nn.Module, name: str) -> torch.dtype:
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer.weight.dtype


def _storable(scales: Tensor, moves: Tensor) -> Tensor:
    """The moved scales as float16 holds them; one that would become 0 or infinite stays."""
    found = (scales * (1 + moves)).to(torch.float16).to(scales.dtype)
    return torch.where(found.isfinite() & (found != 0), found, scales)
