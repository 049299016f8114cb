"""How much a model's predictions feel each linear's outputs: E[g g^T] of the gradient of its own log-likelihood.

Labels are drawn from the model itself, which makes the moments those of the Fisher matrix: to second order the KL
divergence that an error of the outputs causes. Blocks are brought in once forwards and once backwards, one at a time.
What waits for the way back lies on a run's shelves, and every block that is done is done for good.

Source: the output side of the Kronecker factors in YAQA, arXiv:2505.22988, kept in blocks of its diagonal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qquant.capture import BlockSource, Stream, check_finite, head
from qquant.errors import NumericError, UsageError
from qquant.hooks import counted_rows, first_output
from qquant.models.layouts import block_list, linears
from qquant.moments import Hessian
from qquant.refinement import block_side
from qquant.run import Run, Shelf
from qquant.shards import DTYPE_NAMES, TensorSpec
from qquant.telling import OnProgress, say_once, unheard

TOKENS = 16384
"""Tokens that gradients are taken of. Measured: half as many cost 3 % of KL, twice as many gain 1 %."""

_STEP = "gradients of the outputs"
_HEAD_TOKENS = 256  # tokens whose logits are in memory at a time
_SMALL_SIDE = 16  # blocks of outputs below this gain little


def output_moments(
    source: BlockSource,
    stream: Stream,
    device: torch.device | str,
    *,
    run: Run | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
    on_progress: OnProgress = unheard,
) -> Mapping[str, Tensor]:
    """Go through the model forwards and backwards on some of the samples.

    What leaves every block is kept for these samples until the way back: tokens * hidden * blocks numbers.

    Args:
        source: the original model. Its output projection is loaded while it is needed, and released.
        stream: the samples in front of block 0; read, never changed. Where ``run`` has finished with the first block,
            where they stand does not matter.
        device: where the model computes.
        run: keeps what is computed, and goes on where an earlier process was cut off; None: in memory, and alone.
        tokens: about how many are used, in whole samples spread evenly over the stream; at least one sample.
        seed: of the labels that are drawn.
        on_progress: told after each block, twice per block in all.

    Returns:
        Full name of each linear -> [out / side, side, side] float32, blocks of E[g g^T] along its diagonal, with the
        side that ``refinement.block_side`` gives; g is taken of the sum over tokens. Read from the disk when asked for,
        where ``run`` keeps it there.

    Raises:
        UsageError: called under ``torch.inference_mode``, or with a model that was loaded under it.
        NumericError: an activation, a logit or a gradient is not finite.
        StoppedError: ``run`` was asked to stop.
    """
    _refuse_inference_mode(source.model)
    kept = run or Run()
    chosen = stream.spread(tokens)
    made = [
        _moments_of(block, f"{source.layout.blocks}.{index}")
        for index, block in enumerate(block_list(source.model, source.layout))
    ]
    # The first sample belongs to the rank that speaks for all.
    first = stream.hidden[0] if kept.ranks.writer else None
    width, dtype = kept.ranks.json(None if first is None else [first.shape[-1], DTYPE_NAMES[first.dtype]])
    states = {str(i): TensorSpec(dtype, (1, stream.lengths[i], width)) for i in chosen}
    ways = _Ways(source, stream, device, kept, chosen, states, made)
    ways.reserve()
    ways.forwards(lambda done: on_progress(_STEP, done, 2 * len(made)))
    ways.turn(seed)
    ways.backwards(lambda done: on_progress(_STEP, len(made) + done, 2 * len(made)))
    return _Kept(kept, made)


def _moments_of(block: nn.Module, prefix: str) -> dict[str, TensorSpec]:
    """Full name of each linear of a block -> dtype and shape of its moments."""
    found = {}
    for name, layer in linears(block).items():
        side = block_side(layer.out_features)
        found[f"{prefix}.{name}"] = TensorSpec("F32", (layer.out_features // side, side, side))
    return found


class _Kept(Mapping[str, Tensor]):
    """The moments of all linears, read when they are asked for.

    Args:
        run: has them on one shelf per block.
        made: per block, the linears' full names with dtype and shape.
    """

    def __init__(self, run: Run, made: list[dict[str, TensorSpec]]) -> None:
        """Know where each is; nothing is read."""
        self._run, self._made = run, made
        self._places = {name: index for index, part in enumerate(made) for name in part}
        self._open: tuple[int, Shelf] | None = None

    def __getitem__(self, name: str) -> Tensor:
        index = self._places[name]
        if self._open is None or self._open[0] != index:
            self._open = index, self._run.shelf(_outputs_name(index), self._made[index])
        return self._open[1].read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Ways:
    """The way through a model and back.

    Args:
        source: as in ``output_moments``.
        stream: as in ``output_moments``.
        device: as in ``output_moments``.
        run: keeps everything.
        chosen: samples that are used.
        states: dtype and shape of their hidden states.
        made: of each block's moments.
    """

    def __init__(
        self,
        source: BlockSource,
        stream: Stream,
        device: torch.device | str,
        run: Run,
        chosen: list[int],
        states: dict[str, TensorSpec],
        made: list[dict[str, TensorSpec]],
    ) -> None:
        """Nothing is computed yet."""
        self._source, self._stream, self._device, self._run = source, stream, device, run
        self._chosen, self._states, self._made = chosen, states, made
        self._mine, self._count = run.ranks.mine(chosen), len(made)

    def reserve(self) -> None:
        """Take the disk space of the whole way before the first block goes forwards, so that no later step lacks it.

        Gradients take turns on two shelves. Moments take the place of hidden states that the way back is done with;
        where they are larger, their shelves are made now as well.
        """
        if self._run.finished(_forwards_key(0)) is not None:
            return
        for index in range(1, self._count + 1):
            self._hidden(index)
        for index in range(max(1, self._count - 1), self._count + 1):
            self._slopes(index)
        states = sum(spec.nbytes for spec in self._states.values())
        for index, made in enumerate(self._made):
            if sum(spec.nbytes for spec in made.values()) > states:
                self._run.shelf(_outputs_name(index), made)

    def forwards(self, tell: Callable[[int], None]) -> None:
        """Keep what enters each block, and what leaves the last."""
        for index in range(self._count):
            key = _forwards_key(index)
            if self._run.finished(key) is None:
                block, entering, leaving = self._source.load(index), self._entering(index), self._hidden(index + 1)
                self._source.prefetch(index + 1)
                with self._run.ranks.agreed(), torch.no_grad():
                    for i in self._mine:
                        hidden = first_output(block(entering(i), **self._stream.calls[i][index]))
                        check_finite([(i, hidden)], f"{self._source.layout.blocks}.{index}")
                        leaving.write(str(i), hidden)
                self._source.release(index)
                self._finish(key, leaving)
            tell(index + 1)

    def turn(self, seed: int) -> None:
        """Make of what leaves the last block the gradient of -log p(label) with respect to it."""
        key = "gradients turned"
        if self._run.finished(key) is None:
            leaving, slopes = self._hidden(self._count), self._slopes(self._count)
            self._source.load_outside(with_head=True)
            with self._run.ranks.agreed():
                for i in self._mine:
                    hidden, mask = leaving.read(str(i)).to(self._device), self._stream.masks[i]
                    slope = _head_slope(self._source, hidden, mask, self._device, label_generator(seed, i))
                    slopes.write(str(i), slope)
            self._source.release_outside()
            self._finish(key, slopes)
        self._run.drop(_hidden_name(self._count))

    def backwards(self, tell: Callable[[int], None]) -> None:
        """Gather the moments of each block, and bring the gradients in front of it."""
        for done, index in enumerate(reversed(range(self._count)), 1):
            key = f"gradients backwards {index}"
            if self._run.finished(key) is None:
                block = self._source.load(index)
                self._source.prefetch(index - 1)
                written = self._through(block, index)
                self._source.release(index)
                self._finish(key, *written)
            self._run.drop(_hidden_name(index))
            tell(done)
        for index in (0, 1):
            self._run.drop(_slopes_name(index))

    def _through(self, block: nn.Module, index: int) -> list[Shelf]:
        """Shelves with a block's moments and, but for the first block, the gradients of what enters it."""
        ranks, entering, behind = self._run.ranks, self._entering(index), self._slopes(index + 1)
        before = self._slopes(index) if index else None
        sums = {name: _moment_of(layer) for name, layer in linears(block).items()}
        for step in ranks.steps(self._chosen):
            for i in step:
                call, slope = self._stream.calls[i][index], behind.read(str(i)).to(self._device)
                slope = _through_block(block, entering(i), call, slope, self._stream.masks[i], sums)
                if before is not None:
                    before.write(str(i), slope)
            for moment in sums.values():
                moment.end_lane(ranks)
        shelf = self._run.shelf(_outputs_name(index), self._made[index])
        for full, moment in zip(self._made[index], sums.values(), strict=True):
            try:
                found = moment.finish(ranks)
            except NumericError as error:
                rule = "gradients must be finite, got NaN or Inf"
                raise NumericError(f"{rule} at {full}; compute in float32") from error
            if ranks.writer or not self._run.lasting:  # a shelf on the disk is everybody's
                shelf.write(full, found)
        return [shelf] if before is None else [shelf, before]

    def _entering(self, index: int) -> Callable[[int], Tensor]:
        """Sample -> what enters block ``index``, on the device."""
        if index == 0:
            return self._stream.hidden.__getitem__
        shelf = self._hidden(index)
        return lambda i: shelf.read(str(i)).to(self._device)

    def _hidden(self, index: int) -> Shelf:
        """What enters block ``index``; what leaves the last, for their number."""
        return self._run.shelf(_hidden_name(index), self._states)

    def _slopes(self, index: int) -> Shelf:
        """The gradients with respect to the same; on the shelf of those two blocks behind, which are done with."""
        return self._run.shelf(_slopes_name(index), self._states)

    def _finish(self, key: str, *shelves: Shelf) -> None:
        for shelf in shelves:
            shelf.sync()
        self._run.ranks.barrier()
        self._run.finish(key, True)


def _forwards_key(index: int) -> str:
    return f"gradients forwards {index}"


def _hidden_name(index: int) -> str:
    return f"gradients-hidden-{index}"


def _slopes_name(index: int) -> str:
    return f"gradients-slopes-{index % 2}"


def _outputs_name(index: int) -> str:
    return f"gradients-outputs-{index}"


def label_generator(seed: int, sample: int) -> torch.Generator:
    """What draws the labels of one sample, whoever else draws: torch's generators read 32 bits of a seed."""
    digest = hashlib.sha256(f"{seed} {sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def _refuse_inference_mode(model: nn.Module) -> None:
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise UsageError(
            "weighing outputs takes gradients, which torch.inference_mode() forbids for whatever is made under it; "
            "load the model and quantize it outside (torch.no_grad() is fine), or leave `output` out of the method"
        )


def _moment_of(layer: nn.Linear) -> Hessian:
    """What gathers a linear's g as its inputs are gathered for a Hessian, in blocks along the diagonal."""
    side = block_side(layer.out_features)
    if side < _SMALL_SIDE <= layer.out_features:
        say_once(
            f"outputs are weighted together in blocks of the largest divisor up to 256, which for "
            f"{layer.out_features} outputs is {side}: `output` gains little there"
        )
    return Hessian(layer.out_features, side=side, device=layer.weight.device)


def _head_slope(
    source: BlockSource, hidden: Tensor, mask: Tensor | None, device: torch.device | str, generator: torch.Generator
) -> Tensor:
    """The gradient of -log p(label) with respect to what leaves the last block, [1, T, hidden]; labels drawn from p."""
    pieces = []
    for start in range(0, hidden.shape[1], _HEAD_TOKENS):
        piece = hidden[:, start : start + _HEAD_TOKENS].detach().requires_grad_()
        with torch.enable_grad():
            scores = head(source, piece, device)[0].float().log_softmax(-1)
            if not bool(torch.isfinite(scores.detach()).all()):
                raise NumericError("logits must be finite, got NaN or Inf of a calibration sample; compute in float32")
            labels = drawn_labels(scores.detach().exp(), generator)
            chosen = scores.gather(1, labels)[:, 0]
            if mask is not None:
                chosen = chosen[mask[start : start + _HEAD_TOKENS].to(chosen.device)]
            pieces.append(torch.autograd.grad(-chosen.sum(), piece)[0])
    return torch.cat(pieces, dim=1)


def drawn_labels(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One label per row of [T, vocabulary] probabilities, [T, 1] int64, by inverting their cumulative sums.

    One random number a row, where ``torch.multinomial`` draws one for every entry.
    """
    rising = probabilities.cumsum(-1)
    points = torch.rand(rising.shape[0], 1, generator=generator).to(rising.device) * rising[:, -1:]
    return torch.searchsorted(rising, points, right=True).clamp_(max=rising.shape[1] - 1)


def _through_block(
    block: nn.Module,
    hidden: Tensor,
    call: dict[str, Any],
    slope: Tensor,
    mask: Tensor | None,
    sums: dict[str, Hessian],
) -> Tensor:
    """Run a block once more with gradients, add those of its linears' outputs, return that of its input."""

    def watch(_: nn.Module, __: Any, output: Tensor, *, moment: Hessian) -> None:
        output.register_hook(partial(_note, moment=moment, mask=mask))

    layers = linears(block)
    hooks = [layers[name].register_forward_hook(partial(watch, moment=moment)) for name, moment in sums.items()]
    entering = hidden.detach().requires_grad_()
    try:
        with torch.enable_grad():
            leaving = first_output(block(entering, **call))
            (found,) = torch.autograd.grad(leaving, entering, slope)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _note(slope: Tensor, *, moment: Hessian, mask: Tensor | None) -> None:
    moment.add(counted_rows(slope.detach(), mask))
