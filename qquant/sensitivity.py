"""What quantizing one stage of a model costs, measured: KL to the original with everything else left as it is.

A stage is the linears of a block that read one input. The model is read block by block, and with the original's
activations go those of one model per stage already met, in which that stage alone is quantized. What to do with the
costs is mixed_precision.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qquant.accuracy import kl_divergence, log_probs
from qquant.capture import Stream, capture, discover_stages, head
from qquant.config import QuantizeConfig
from qquant.errors import NumericError, QquantError
from qquant.heap import return_unused_memory
from qquant.hooks import first_output, inputs_seen
from qquant.models.layouts import block_list
from qquant.moments import Hessian
from qquant.samples import Sample
from qquant.solver import solve
from qquant.sources import StreamedModel
from qquant.telling import OnProgress, unheard

_ROWS = 64
"""Rows of each linear on which settings are compared with the first one; rows are quantized independently."""


@dataclass(frozen=True)
class StageShape:
    """The linears of a block that read one input."""

    names: tuple[str, ...]
    """Full names, in model order."""
    outputs: tuple[int, ...]
    """Rows of each."""
    inputs: int
    """Columns of all."""


@dataclass(frozen=True)
class StageCost:
    """What one stage costs at each of its settings."""

    shape: StageShape
    settings: tuple[QuantizeConfig, ...]
    kl: tuple[float, ...]
    """Mean KL in nats per token at each setting: measured at the first, the others by the energy of the error that
    they leave in the stage's output, to which KL is proportional as long as it is small."""
    errors: tuple[float, ...]
    """That energy relative to the first setting's."""


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its original on some samples."""

    kl: float
    """Mean over tokens of KL(original || model), nats."""
    stderr: float | None
    """Standard error of that mean, from how much samples differ; None for a single sample."""
    tokens: int
    """That counted."""


SettingsOf = Callable[[StageShape], Sequence[QuantizeConfig]]
"""The settings that a stage may take, the coarsest first; none: the stage stays as it is."""


@torch.inference_mode()
def measure_stages(
    source: StreamedModel,
    probes: Sequence[Sample],
    samples: Sequence[Sample],
    settings_of: SettingsOf,
    *,
    on_progress: OnProgress = unheard,
) -> list[StageCost]:
    """Measure every stage of a model.

    Memory: a block, its Hessians, and for each stage of the model the difference from the original's activations in
    bfloat16. Time: one pass of ``samples`` with its solving, and each probe through half the blocks once per stage.

    Args:
        source: the original; float32, or the rounding of what is computed hides the cost of 8 bits.
        probes: samples that KL is measured on.
        samples: samples that Hessians are made of; not read if no setting needs data.
        settings_of: what each stage may take.
        on_progress: told of each block.

    Returns:
        The cost of each stage that has settings, in model order.

    Raises:
        NumericError: a Hessian that no damping helps, or numbers that are not finite; the stage is named.
    """
    device = source.device
    source.load_outside(with_head=False)
    stream, data = capture(source, probes, device), capture(source, samples, device)
    source.release_outside()
    blocks = block_list(source.model, source.layout)
    measured: list[_Measured] = []
    for index in range(len(blocks)):
        on_progress("measuring the sensitivity of blocks", index, len(blocks))
        block = source.load(index)
        calls = [calls[index] for calls in stream.calls]
        after = [first_output(block(hidden, **call)) for hidden, call in zip(stream.hidden, calls, strict=True)]
        for older in measured:
            older.advance(block, stream.hidden, calls, after)
        prefix = f"{source.layout.blocks}.{index}"
        found = _stages(block, prefix, source, stream, calls)
        settings = [tuple(settings_of(shape)) for shape in found]
        layers = [_layers(block, prefix, shape) for shape in found]
        hessians = _hessians(block, [part[0] for part in layers], settings, data, index)
        for shape, chosen, part in zip(found, settings, layers, strict=True):
            hessian = hessians.pop(0)
            if not chosen:
                continue
            replaced, errors = _errors(part, hessian, chosen, shape)
            del hessian
            changes = _run_with(block, part, replaced, stream.hidden, calls, after)
            measured.append(_Measured(shape, chosen, errors, changes))
        stream.hidden = after
        source.release(index)
        return_unused_memory()
    return _finish(source, stream, measured)


@torch.inference_mode()
def divergence(original: StreamedModel, other: StreamedModel, samples: Sequence[Sample]) -> Divergence:
    """KL(original || other) per token that counts, both read block by block.

    Neighbouring tokens are alike, so the standard error is taken over samples. Over single tokens it came out 1.9 to
    2.5 times smaller than over samples of 256 tokens (three models).

    Args:
        original: in the same dtype as ``other``; float32 for costs below those of rounding to bfloat16.
        other: a model of the same shape, such as a quantized folder that was reopened.
        samples: what both are run on.
    """
    streams = [_through(source, samples) for source in (original, other)]
    for source in (original, other):
        source.load_outside(with_head=True)
    sums, counts = [], []
    for i in range(len(samples)):
        theirs, ours = (
            stream.counted(i, head(source, stream.hidden[i], source.device))
            for source, stream in zip((original, other), streams, strict=True)
        )
        sums.append(_kl(ours, theirs))
        counts.append(len(ours))
    for source in (original, other):
        source.release_outside()
    return mean_of(sums, counts)


def mean_of(sums: Sequence[float], counts: Sequence[int]) -> Divergence:
    """The mean over all tokens of samples that differ in length, and its standard error.

    The mean is a ratio of two sums over m samples, S / N. To first order its error is that of the sum of
    ``s - (S / N) n``, which is 0 over all of them: ``sqrt(m / (m - 1) * sum((s - S / N * n)**2)) / N``. For samples of
    one length this is the standard error of the mean of their means.

    Args:
        sums: per sample the sum of KL over its tokens, nats.
        counts: per sample how many tokens that are.

    Source: Cochran, Sampling Techniques, 3rd edition, section 6.4 (ratio estimates), without the finite population's
    correction.
    """
    samples, tokens = len(counts), sum(counts)
    kl = math.fsum(sums) / tokens
    if samples == 1:
        return Divergence(kl, None, tokens)
    spread = math.fsum((total - kl * count) ** 2 for total, count in zip(sums, counts, strict=True))
    return Divergence(kl, math.sqrt(samples / (samples - 1) * spread) / tokens, tokens)


@dataclass
class _Measured:
    """A stage whose error is on its way to the last block."""

    shape: StageShape
    settings: tuple[QuantizeConfig, ...]
    errors: tuple[float, ...]
    changes: list[Tensor]
    """Per probe: what the stage's error changed in the activations, [1, T, hidden] bfloat16. A change needs few
    digits: 8 bits of it lose some 1e-5 of the KL."""

    def advance(
        self, block: nn.Module, before: Sequence[Tensor], calls: Sequence[dict[str, Any]], after: Sequence[Tensor]
    ) -> None:
        """Take the changes through a block; the original's activations before and after it are given."""
        for i, (hidden, plain) in enumerate(zip(before, after, strict=True)):
            changed = first_output(block(hidden + self.changes[i], **calls[i])) - plain
            self.changes[i] = changed.to(torch.bfloat16)


def _stages(
    block: nn.Module, prefix: str, source: StreamedModel, stream: Stream, calls: Sequence[dict[str, Any]]
) -> list[StageShape]:
    """The stages of a block, by the table or by watching one sample."""
    units = source.layout.units
    if units is None:
        named = discover_stages(block, prefix, lambda: block(stream.hidden[0], **calls[0]))
    else:
        named = [list(stage) for unit in units for stage in unit.stages]
    shapes = []
    for names in named:
        weights = [block.get_parameter(f"{name}.weight") for name in names]
        full = tuple(f"{prefix}.{name}" for name in names)
        shapes.append(StageShape(full, tuple(weight.shape[0] for weight in weights), weights[0].shape[1]))
    return shapes


def _layers(block: nn.Module, prefix: str, shape: StageShape) -> list[nn.Linear]:
    layers = [block.get_submodule(name.removeprefix(f"{prefix}.")) for name in shape.names]
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def _hessians(
    block: nn.Module,
    layers: Sequence[nn.Linear],
    settings: Sequence[Sequence[QuantizeConfig]],
    data: Stream,
    index: int,
) -> list[Hessian | None]:
    """The Hessian of each stage that needs one, from one run of all samples, which go through the block with it."""
    hessians = [
        Hessian(layer.in_features, device=layer.weight.device) if any(config.needs_data for config in chosen) else None
        for layer, chosen in zip(layers, settings, strict=True)
    ]
    with inputs_seen(layers) as seen:
        for i, hidden in enumerate(data.hidden):
            data.hidden[i] = first_output(block(hidden, **data.calls[i][index]))
            for n, hessian in enumerate(hessians):
                if hessian is not None:
                    hessian.add(data.counted(i, seen[n]))
    return hessians


def _errors(
    layers: Sequence[nn.Linear], accumulated: Hessian | None, settings: Sequence[QuantizeConfig], shape: StageShape
) -> tuple[Tensor, tuple[float, ...]]:
    """The stage's weights [out of all, in] at the first setting, and each setting's error beside the first one's."""
    whole = torch.cat([layer.weight for layer in layers])
    try:
        hessian = None if accumulated is None else accumulated.finish()
        replaced = solve(whole, hessian, settings[0]).weight().to(whole.dtype)
        # Some rows of every linear, each standing for as many as were left out.
        picked, weights = [], []
        start = 0
        for count in shape.outputs:
            rows = torch.arange(0, count, max(1, count // _ROWS), device=whole.device)
            picked.append(rows + start)
            weights.append(torch.full((len(rows),), count / len(rows), device=whole.device))
            start += count
        rows, weight_of = torch.cat(picked), torch.cat(weights)
        part = whole[rows]
        energies = [_energy(replaced[rows] - part, hessian, weight_of)]
        for chosen in settings[1:]:
            energies.append(_energy(solve(part, hessian, chosen).weight() - part, hessian, weight_of))
    except QquantError as error:
        raise type(error)(f"{shape.names[0]}: {error}") from error
    first = energies[0]
    return replaced, tuple(energy / first if first > 0 else 1.0 for energy in energies)


def _energy(error: Tensor, hessian: Tensor | None, weight_of: Tensor) -> float:
    """Sum over rows of e H e^T; without a Hessian all inputs count alike."""
    along = error if hessian is None else error @ hessian
    return float(((along * error).sum(1) * weight_of).sum(dtype=torch.float64))


def _run_with(
    block: nn.Module,
    layers: Sequence[nn.Linear],
    replaced: Tensor,
    hidden: Sequence[Tensor],
    calls: Sequence[dict[str, Any]],
    after: Sequence[Tensor],
) -> list[Tensor]:
    """What the replaced weights change in the block's output, per probe; the originals are put back."""
    originals = [layer.weight for layer in layers]
    parts = replaced.split([layer.out_features for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    try:
        return [
            (first_output(block(before, **call)) - plain).to(torch.bfloat16)
            for before, call, plain in zip(hidden, calls, after, strict=True)
        ]
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.weight = original


def _finish(source: StreamedModel, stream: Stream, measured: Sequence[_Measured]) -> list[StageCost]:
    """Put the head on every stream and compare."""
    totals, count = [0.0] * len(measured), 0
    source.load_outside(with_head=True)
    for i, hidden in enumerate(stream.hidden):
        theirs = stream.counted(i, head(source, hidden, source.device))
        count += len(theirs)
        for n, stage in enumerate(measured):
            ours = stream.counted(i, head(source, hidden + stage.changes[i], source.device))
            totals[n] += _kl(ours, theirs)
    source.release_outside()
    return [
        StageCost(stage.shape, stage.settings, tuple(total / count * error for error in stage.errors), stage.errors)
        for stage, total in zip(measured, totals, strict=True)
    ]


def _kl(ours: Tensor, theirs: Tensor) -> float:
    """The sum of KL(theirs || ours) over tokens, [T, vocab] logits each."""
    total = 0.0
    for _, log_q, log_p in log_probs(ours, theirs):
        assert log_p is not None
        total += float(kl_divergence(log_p, log_q).sum())
    if not total < float("inf"):
        raise NumericError("logits must be finite, got NaN or Inf while the sensitivity of the model was measured")
    return total


def _through(source: StreamedModel, samples: Sequence[Sample]) -> Stream:
    """The samples behind the last block."""
    source.load_outside(with_head=False)
    stream = capture(source, samples, source.device)
    source.release_outside()
    for index in range(len(block_list(source.model, source.layout))):
        block = source.load(index)
        for i, hidden in enumerate(stream.hidden):
            stream.hidden[i] = first_output(block(hidden, **stream.calls[i][index]))
        source.release(index)
    return stream
