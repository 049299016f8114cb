"""Memory and disk that making a quantized checkpoint takes, by arithmetic over a model's shapes and the method.

Every moment that can be the peak is counted from the code that is named beside it. What a loaded model takes is
footprint.py's; whether it fits, and what is done where it does not, is for the caller to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qquant.errors import DoesNotFitError
from qquant.methods import Recipe
from qquant.stored_bytes import ModelShapes

CPU_QUANTIZING_BYTES = 50_000_000
"""Tokenizer, calibration samples and code that is paged in while a checkpoint is made. Measured: docs/plan.md."""
IMPORTED_BYTES = 370_000_000
"""What a process holds once torch, transformers and this package are imported. Measured: 373 MB of resident memory
before the model, on the runs of docs/plan.md."""

# Held against the rooms that they are taken from by a test.
_KEPT_TAIL_BYTES = 256 * 2**20  # walk.py: inputs of a unit's last linear are kept if they are few
_PIECE_ROWS = 2048  # stage_solver.py: rows that are solved together
_GRADIENT_TOKENS = 16384  # gradients.py
_HEAD_TOKENS = 256  # gradients.py: tokens whose logits are worked on at a time
_SIDE = 256  # refinement.py: outputs that are weighted together
_GROUP = 32  # weights with a scale of their own, at the least that is usual


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes beyond what a process holds once everything is imported."""

    fixed_bytes: int
    """On the device that computes, however many samples there are: the largest of all moments."""
    fixed_at: str
    """Which moment that is."""
    activation_bytes: int
    """On the same device, where the activations of all samples are in memory; on the disk they take none of it."""
    host_bytes: int
    """In the machine's memory beside a GPU; 0 on a CPU."""
    shelf_bytes: int
    """On the disk beside the result, while it is made: two versions of the activations, and what gradients leave."""

    def spills(self, limit_bytes: int, *, imported_bytes: int = IMPORTED_BYTES) -> bool:
        """Whether activations have to be kept on the disk for the rest to stay under a limit.

        Args:
            limit_bytes: of the device that computes; on a CPU of the whole process.
            imported_bytes: that are taken of it already.

        Raises:
            DoesNotFitError: not even then.
        """
        least = imported_bytes + self.fixed_bytes
        if least > limit_bytes:
            raise DoesNotFitError(
                f"quantizing this model takes at least {least / 1e9:.2f} GB of memory, {self.fixed_at}, and "
                f"{limit_bytes / 1e9:.2f} GB are allowed or free; allow more (--max-memory), give shorter samples "
                "(--seq-len), or choose a method that compares less, such as gptq"
            )
        return least + self.activation_bytes > limit_bytes


def quantizing_needs(
    shapes: ModelShapes,
    recipe: Recipe,
    *,
    samples: int,
    seq_len: int,
    device: Literal["cpu", "cuda"] = "cuda",
    element_bytes: int = 2,
) -> Needs:
    """What making a checkpoint takes.

    Args:
        shapes: of the original model.
        recipe: of the method.
        samples: of calibration.
        seq_len: tokens of each, at most; shorter samples take less.
        device: that computes; "cpu" adds what is in its memory beside tensors.
        element_bytes: of what is computed in.
    """
    run = _Making(shapes, recipe, samples, seq_len, element_bytes)
    fixed, moment = max((size, name) for name, size in run.moments())
    activations = samples * seq_len * shapes.hidden * element_bytes * (2 if recipe.needs_exact_stream else 1)
    return Needs(
        fixed_bytes=fixed + (CPU_QUANTIZING_BYTES if device == "cpu" else 0),
        fixed_at=moment,
        activation_bytes=activations,
        # A tensor as it is stored and as it is computed in, on its way to the device.
        host_bytes=2 * shapes.largest_tensor * element_bytes if device == "cuda" else 0,
        shelf_bytes=2 * activations + run.gradient_shelves(),
    )


@dataclass(frozen=True)
class _Making:
    shapes: ModelShapes
    recipe: Recipe
    samples: int
    seq_len: int
    element: int

    def moments(self) -> Iterator[tuple[str, int]]:
        """Every moment that can be the peak, and its bytes."""
        yield from self._outside()
        if self.recipe.output:
            yield "while gradients are taken", self.block + max(self._passing(), self._returning())
        if self.recipe.folds:
            # folding.Folder: a linear in float32 beside what it becomes.
            yield "while channels are scaled", self.block + self.felt + 8 * self._widest() + self._passing()
        earlier = 0  # original weights of the unit's linears that are quantized already, where these are kept
        solved = 0  # codes of the block's linears that wait until all are solved
        for inputs, outputs in self.shapes.stages:
            tail = outputs == self.shapes.hidden
            held = self.block + self.felt + (earlier if self.recipe.needs_exact_stream else 0) + solved
            for name, size in self._stage(inputs, outputs, tail=tail):
                yield f"{name} linears of {inputs} inputs", held + size
            earlier = 0 if tail else earlier + self.element * inputs * outputs
            solved += inputs * outputs if self.recipe.tune else 0
        if self.recipe.tune:
            yield "while scales are tuned", self.block + self.felt + self._tuning()

    @property
    def block(self) -> int:
        """A block's weights."""
        return self.element * sum(inputs * outputs for inputs, outputs in self.shapes.stages)

    @property
    def felt(self) -> int:
        """Of a block: how much predictions feel its outputs, at most."""
        return 4 * _SIDE * sum(outputs for _, outputs in self.shapes.stages) if self.recipe.output else 0

    def gradient_shelves(self) -> int:
        """``gradients._Ways.reserve``: what enters every block gives way to moments on the way back, if no larger."""
        if not self.recipe.output:
            return 0
        tokens = min(self.samples * self.seq_len, max(_GRADIENT_TOKENS, self.seq_len))
        states = tokens * self.shapes.hidden * self.element
        return 3 * states + len(self.shapes.caches) * (states + (self.felt if self.felt > states else 0))

    def _stage(self, inputs: int, outputs: int, *, tail: bool) -> Iterator[tuple[str, int]]:
        """Linears with one input; ``stage_moments.Gathered``, then ``stage_solver.solve_stage``."""
        recipe, element = self.recipe, self.element
        square, rows = 4 * inputs * inputs, min(outputs, _PIECE_ROWS)
        sums = 0
        if recipe.needs_data:
            sums = square * (2 if recipe.needs_exact_stream else 1)
            if tail and recipe.residual:
                sums += 4 * inputs * outputs
            kept = self.samples * self.seq_len * inputs * element if tail else 0
            kept = kept if kept <= _KEPT_TAIL_BYTES else 0
            second = self.seq_len * inputs * element if recipe.needs_exact_stream else 0
            # moments._Sum: the lane at hand beside the total.
            yield "while inputs are gathered for", sums * min(2, self.samples) + self._passing() + second + kept
            sums += kept
            # factor.inverse_factor: half of each side twice more, while the factor is inverted.
            yield "while a factor is made for", sums + square + square // 2
        piece, codes = rows * inputs, inputs * outputs
        inverse = square if recipe.needs_data else 0
        if recipe.base == "gptaq":
            inverse *= 2
        if recipe.base == "qep" or recipe.residual:
            # solver.corrected_target: the weight and what changes it, twice on its way through the factor.
            yield "while weights are corrected for", sums + inverse + codes + piece * (element + 16)
        # solver._quantize_columns: weight, target and what is worked on in float32, codes twice.
        yield "while columns are rounded for", sums + inverse + codes + piece * (element + 10)
        if recipe.refine:
            # solver._refined, refinement.refit_scales: the Hessian damped; five matrices of the piece in float32.
            inverse = inverse if outputs > rows else 0
            yield "while codes are refined for", sums + inverse + square + codes + piece * (element + 22)
        # walk._install: what the codes stand for, in float32 and, turned round, in what is computed in.
        yield "while weights are replaced of", sums + codes + (4 + 2 * element) * self._widest()

    def _outside(self) -> Iterator[tuple[str, int]]:
        """The output projection and logits: ``gradients._head_slope``, and the proof of the written folder."""
        vocabulary, element = self.shapes.vocabulary, self.element
        head = vocabulary * self.shapes.hidden * element
        piece = min(_HEAD_TOKENS, self.seq_len) * vocabulary
        logits = self.seq_len * vocabulary * element
        if self.recipe.output:
            # In float32: log-probabilities, probabilities or their sums, and two gradients.
            yield "while logits are differentiated", head + 16 * piece
        # What the walk computed waits while the written model runs, packed in at most a byte per weight.
        widest = (4 + element) * self._widest()
        yield "while the result is run for its proof", logits + self.block // element + widest + self._passing()
        yield "while the result is proven", head + 2 * logits

    def _passing(self) -> int:
        """One sample on its way through a block: the MLP's three wide tensors, the residual stream and its norm."""
        return self.seq_len * self.element * (3 * self._inner() + 4 * self.shapes.hidden)

    def _returning(self) -> int:
        """One sample on its way back, and the sums of its block's g g^T."""
        return self._backwards() + 2 * self.felt

    def _backwards(self) -> int:
        """One sample on its way back, with all that was kept for it."""
        stream = self.seq_len * self.shapes.hidden
        return self.seq_len * self._inner() * 8 * self.element + stream * (14 * self.element + 32)

    def _tuning(self) -> int:
        """``tuning.tuned_scales``: beside a block its codes, its weights once more and their gradients.

        Ten matrices of its scales (they themselves, zeros, moves, what Adam keeps, gradients); and one lesson on its
        way back, or a weight that is made of its codes.
        """
        codes = self.block // self.element
        lesson = 2 * self.seq_len * self.shapes.hidden * self.element
        return codes + 40 * codes // _GROUP + 2 * self.block + max(lesson + self._backwards(), 16 * self._widest())

    def _inner(self) -> int:
        return max(inputs for inputs, _ in self.shapes.stages)

    def _widest(self) -> int:
        return max(linear.weights for linear in self.shapes.linears)
