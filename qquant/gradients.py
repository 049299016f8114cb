"""How much a model's predictions feel each linear's outputs: E[g g^T] of the gradient of its own log-likelihood.

Labels are drawn from the model itself, which makes the moments those of the Fisher matrix: to second order the KL
divergence that an error of the outputs causes. Blocks are brought in once forwards and once backwards, one at a time.

Source: the output side of the Kronecker factors in YAQA, arXiv:2505.22988, kept in blocks of its diagonal.
"""

from __future__ import annotations

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
    tokens: int = TOKENS,
    seed: int = 0,
    on_progress: OnProgress = unheard,
) -> dict[str, Tensor]:
    """Go through the model forwards and backwards on some of the samples.

    What leaves every block is kept for these samples until the way back: tokens * hidden * (blocks + 1) numbers.

    Args:
        source: the original model. What stands outside its blocks, the output projection too, must be in memory.
        stream: the samples in front of block 0; read, never changed.
        device: where the model computes.
        tokens: about how many are used, in whole samples spread evenly over the stream; at least one sample.
        seed: of the labels that are drawn.
        on_progress: told after each block, twice per block in all.

    Returns:
        Full name of each linear -> [out / side, side, side] float32, blocks of E[g g^T] along its diagonal, with the
        side that ``refinement.block_side`` gives; g is taken of the sum over tokens.

    Raises:
        UsageError: called under ``torch.inference_mode``, or with a model that was loaded under it.
        NumericError: an activation, a logit or a gradient is not finite.
    """
    _refuse_inference_mode(source.model)
    chosen = stream.spread(tokens)
    count = len(block_list(source.model, source.layout))
    hidden: list[list[Tensor]] = [[stream.hidden[i].clone() for i in chosen]]
    with torch.no_grad():
        for index in range(count):
            block = source.load(index)
            pairs = zip(chosen, hidden[-1], strict=True)
            hidden.append([first_output(block(h, **stream.calls[i][index])) for i, h in pairs])
            source.release(index)
            check_finite(hidden[-1], f"{source.layout.blocks}.{index}")
            on_progress(_STEP, index + 1, 2 * count)
    last = hidden.pop()
    generator = torch.Generator().manual_seed(seed)
    slopes = [_head_slope(source, h, stream.masks[i], device, generator) for i, h in zip(chosen, last, strict=True)]
    del last
    found: dict[str, Tensor] = {}
    for index in reversed(range(count)):
        block, entering = source.load(index), hidden.pop()
        sums = {name: _Blocks(layer) for name, layer in linears(block).items()}
        for n, i in enumerate(chosen):
            call, mask = stream.calls[i][index], stream.masks[i]
            slopes[n] = _through_block(block, entering[n], call, slopes[n], mask, sums)
        source.release(index)
        for name, moment in sums.items():
            full = f"{source.layout.blocks}.{index}.{name}"
            try:
                found[full] = moment.finish()
            except NumericError as error:
                rule = "gradients must be finite, got NaN or Inf"
                raise NumericError(f"{rule} at {full}; compute in float32") from error
        on_progress(_STEP, 2 * count - index, 2 * count)
    return found


def _refuse_inference_mode(model: nn.Module) -> None:
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise UsageError(
            "weighing outputs takes gradients, which torch.inference_mode() forbids for whatever is made under it; "
            "load the model and quantize it outside (torch.no_grad() is fine), or leave `output` out of the method"
        )


class _Blocks:
    """The mean of g g^T of one linear, in blocks along the diagonal: gathered as inputs are for a Hessian."""

    def __init__(self, layer: nn.Linear) -> None:
        self.side = block_side(layer.out_features)
        if self.side < _SMALL_SIDE <= layer.out_features:
            say_once(
                f"outputs are weighted together in blocks of the largest divisor up to 256, which for "
                f"{layer.out_features} outputs is {self.side}: `output` gains little there"
            )
        starts = range(0, layer.out_features, self.side)
        self._sums = {start: Hessian(self.side, device=layer.weight.device) for start in starts}

    def add(self, slope: Tensor, mask: Tensor | None) -> None:
        rows = counted_rows(slope, mask)
        for start, moment in self._sums.items():
            moment.add(rows[:, start : start + self.side])

    def finish(self) -> Tensor:
        """The means over tokens, [blocks, side, side]."""
        return torch.stack([moment.finish() for moment in self._sums.values()])


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
    sums: dict[str, _Blocks],
) -> Tensor:
    """Run a block once more with gradients, add those of its linears' outputs, return that of its input."""

    def watch(_: nn.Module, __: Any, output: Tensor, *, moment: _Blocks) -> None:
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


def _note(slope: Tensor, *, moment: _Blocks, mask: Tensor | None) -> None:
    moment.add(slope.detach(), mask)
