"""What quantizing one stage of a model costs, measured: KL to the original with everything else left as it is.

A stage is the linears of a block that read one input. The model is read block by block, and with the original's
activations go those of one model per stage already met, in which that stage alone is quantized. Several processes
divide the samples among them; one that was cut off goes on from a snapshot. What to do with the costs is
mixed_precision.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qquant.capture import Stream, discover_stages, head
from qquant.config import QuantizeConfig
from qquant.divergence import capture_some, gathered_in_order, kl_sum
from qquant.errors import QquantError
from qquant.heap import return_unused_memory
from qquant.hooks import first_output, inputs_seen
from qquant.models.layouts import Layout, block_list, linears
from qquant.moments import Hessian
from qquant.ranks import Ranks
from qquant.run import Run
from qquant.samples import Sample
from qquant.shards import DTYPE_NAMES, TensorSpec
from qquant.snapshots import Snapshots
from qquant.solver import solve
from qquant.sources import StreamedModel
from qquant.stage_costs import SettingsOf, StageCost, StageShape
from qquant.telling import OnProgress, unheard

_COSTS = "costs"
_PASS = "measuring"
_ROWS = 64
"""Rows of each linear on which settings are compared with the first one; rows are quantized independently."""


@torch.inference_mode()
def measure_stages(
    source: StreamedModel,
    probes: Sequence[Sample],
    samples: Sequence[Sample],
    settings_of: SettingsOf,
    *,
    run: Run | None = None,
    on_progress: OnProgress = unheard,
) -> list[StageCost]:
    """Measure every stage of a model.

    Memory: a block, its Hessians, and for each stage of the model the difference from the original's activations in
    bfloat16; all but the block and the Hessians are divided among the ranks. Time: one pass of ``samples`` with its
    solving, and each probe through half the blocks once per stage.

    Args:
        source: the original; float32, or the rounding of what is computed hides the cost of 8 bits.
        probes: samples that KL is measured on.
        samples: samples that Hessians are made of; not read if no setting needs data.
        settings_of: what each stage may take.
        run: where costs are kept when they are known, and what has been come to before that; its ranks share the work.
            None: kept nowhere, one process.
        on_progress: told of each block.

    Returns:
        The cost of each stage that has settings, in model order.

    Raises:
        NumericError: a Hessian that no damping helps, or numbers that are not finite; the stage is named.
        StoppedError: a stop was asked for; what was come to is kept.
    """
    run = run or Run()
    snapshots = Snapshots(run, _PASS)
    found = run.finished(_COSTS)
    if found is None:
        passing = _Pass(source, probes, samples, settings_of, run.ranks)
        passing.refuse_full_disk(run)
        found = passing.to_the_end(snapshots, on_progress)
        run.keep(_COSTS, found)
    snapshots.end()
    costs = []
    for stage in found:
        shape = StageShape.of(stage)
        kl = tuple(stage["kl"] * error for error in stage["errors"])
        costs.append(StageCost(shape, tuple(settings_of(shape)), kl, tuple(stage["errors"])))
    return costs


def known_stages(source: StreamedModel) -> list[StageShape]:
    """The stages of all blocks as far as they are known before one has been run: by the table, or linear by linear."""
    layout, shapes = source.layout, []
    for index, block in enumerate(block_list(source.model, layout)):
        prefix = f"{layout.blocks}.{index}"
        named = _by_table(layout) or [[name] for name in linears(block)]
        shapes += [_shape(block, prefix, names) for names in named]
    return shapes


def _by_table(layout: Layout) -> list[list[str]] | None:
    """The linears of each stage of a block; None for a model that no table knows."""
    return None if layout.units is None else [list(stage) for unit in layout.units for stage in unit.stages]


@dataclass
class _Measured:
    """A stage whose error is on its way to the last block."""

    shape: StageShape
    errors: tuple[float, ...]
    """Of each of its settings."""
    changes: dict[int, Tensor]
    """Per probe of this rank: what the stage's error changed in the activations, [1, T, hidden] bfloat16. A change
    needs few digits: 8 bits of it lose some 1e-5 of the KL."""

    def as_json(self) -> dict[str, Any]:
        """All but the changes."""
        return {**asdict(self.shape), "errors": self.errors}


class _Pass:
    """One way of all samples through the blocks, see ``measure_stages``."""

    def __init__(
        self,
        source: StreamedModel,
        probes: Sequence[Sample],
        samples: Sequence[Sample],
        settings_of: SettingsOf,
        ranks: Ranks,
    ) -> None:
        """In front of the first block."""
        self._source, self._settings_of, self._ranks = source, settings_of, ranks
        self._mine, self._my_data = ranks.mine(range(len(probes))), ranks.mine(range(len(samples)))
        source.load_outside(with_head=False)
        self._probes, self._width = capture_some(source, probes, self._mine)
        self._data, _ = capture_some(source, samples, self._my_data)
        source.release_outside()
        self._measured: list[_Measured] = []

    def refuse_full_disk(self, run: Run) -> None:
        """Raise DoesNotFitError, on every rank, if the snapshots will not fit: there are two while one is taken."""
        with self._ranks.agreed():
            if self._ranks.writer:
                stages = [shape for shape in known_stages(self._source) if self._settings_of(shape)]
                specs = self._specs(len(stages))
                run.refuse_full_disk(2 * sum(spec.nbytes for spec in specs.values()))

    def to_the_end(self, snapshots: Snapshots, on_progress: OnProgress) -> list[dict[str, Any]]:
        """Every stage with its KL at its first setting and the errors of all, as JSON."""
        blocks = len(block_list(self._source.model, self._source.layout))
        for index in range(self._restored(snapshots), blocks):
            on_progress("measuring the sensitivity of blocks", index, blocks)
            with self._ranks.agreed():
                block = self._source.load(index)
            self._block(block, index)
            self._source.release(index)
            return_unused_memory()
            state = {"block": index + 1, "stages": [stage.as_json() for stage in self._measured]}
            snapshots.take(state, self._tensors(), self._specs(len(self._measured)))
        return self._finished()

    def _block(self, block: nn.Module, index: int) -> None:
        ranks, hidden = self._ranks, self._probes.hidden
        calls = [calls[index] for calls in self._probes.calls]
        after = {i: first_output(block(hidden[i], **calls[i])) for i in self._mine}
        for older in self._measured:
            for i, plain in after.items():
                changed = first_output(block(hidden[i] + older.changes[i], **calls[i])) - plain
                older.changes[i] = changed.to(torch.bfloat16)
        prefix = f"{self._source.layout.blocks}.{index}"
        found = _stages(block, prefix, self._source, ranks, lambda: block(hidden[0], **calls[0]))
        chosen = [tuple(self._settings_of(shape)) for shape in found]
        layers = [_layers(block, prefix, shape) for shape in found]
        hessians = _hessians(block, [part[0] for part in layers], chosen, self._data, index, ranks)
        places = [place for place, settings in enumerate(chosen) if settings]
        for start in range(0, len(places), ranks.size):  # each rank solves a stage by turns
            together = places[start : start + ranks.size]
            solved: dict[int, tuple[Tensor, tuple[float, ...]]] = {}
            means = {place: _mean(hessians[place], found[place], ranks) for place in together}
            with ranks.agreed():
                for place in together[ranks.rank : ranks.rank + 1]:
                    solved[place] = _errors(layers[place], means[place], chosen[place], found[place])
            del means
            for owner, place in enumerate(together):
                replaced, errors = solved.pop(place, (None, None))
                replaced, errors = ranks.share(replaced, owner, kind="solutions"), ranks.json(errors, owner)
                changes = _changes(block, layers[place], replaced, lambda i: block(hidden[i], **calls[i]), after)
                self._measured.append(_Measured(found[place], tuple(errors), changes))
        for i, plain in after.items():
            hidden[i] = plain

    def _tensors(self) -> dict[str, Tensor]:
        """All that changes from block to block, of this rank, by name."""
        tensors = {_probe(i): self._probes.hidden[i] for i in self._mine}
        tensors |= {_sample(i): self._data.hidden[i] for i in self._my_data}
        changed = ((n, i, stage.changes[i]) for n, stage in enumerate(self._measured) for i in self._mine)
        return tensors | {_change(n, i): change for n, i, change in changed}

    def _specs(self, stages: int) -> dict[str, TensorSpec]:
        """Of what all ranks have, behind so many stages."""
        width, dtype = self._width, DTYPE_NAMES[self._source.dtype]
        specs = {}
        for i, length in enumerate(self._probes.lengths):
            specs[_probe(i)] = TensorSpec(dtype, (1, length, width))
            specs |= {_change(n, i): TensorSpec("BF16", (1, length, width)) for n in range(stages)}
        for i, length in enumerate(self._data.lengths):
            specs[_sample(i)] = TensorSpec(dtype, (1, length, width))
        return specs

    def _restored(self, snapshots: Snapshots) -> int:
        """Go to where the newest snapshot was taken: in front of which block."""
        state, device = snapshots.state, self._source.device
        if state is None:
            return 0
        stages = [(StageShape.of(stage), tuple(stage["errors"])) for stage in state["stages"]]
        with snapshots.newest(self._specs(len(stages))) as read:
            for i in self._mine:
                self._probes.hidden[i] = read(_probe(i)).to(device)
            for i in self._my_data:
                self._data.hidden[i] = read(_sample(i)).to(device)
            for n, (shape, errors) in enumerate(stages):
                changes = {i: read(_change(n, i)).to(device) for i in self._mine}
                self._measured.append(_Measured(shape, errors, changes))
        return int(state["block"])

    def _finished(self) -> list[dict[str, Any]]:
        """Put the head on every stream and compare."""
        source, stream = self._source, self._probes
        found = []
        with self._ranks.agreed():
            source.load_outside(with_head=True)
            for i in self._mine:
                hidden = stream.hidden[i]
                theirs = stream.counted(i, head(source, hidden, source.device))
                changed = (head(source, hidden + stage.changes[i], source.device) for stage in self._measured)
                found.append([i, len(theirs), [kl_sum(stream.counted(i, ours), theirs) for ours in changed]])
            source.release_outside()
        _, counts, sums = zip(*gathered_in_order(self._ranks, found), strict=True)
        means = [math.fsum(of_stage) / sum(counts) for of_stage in zip(*sums, strict=True)]
        return [{**stage.as_json(), "kl": kl} for stage, kl in zip(self._measured, means, strict=True)]


def _probe(i: int) -> str:
    return f"probe {i}"


def _sample(i: int) -> str:
    return f"sample {i}"


def _change(stage: int, i: int) -> str:
    return f"probe {i} by stage {stage}"


def _shape(block: nn.Module, prefix: str, names: Sequence[str]) -> StageShape:
    """Of linears of a block that read one input."""
    weights = [block.get_parameter(f"{name}.weight") for name in names]
    full = tuple(f"{prefix}.{name}" for name in names)
    return StageShape(full, tuple(weight.shape[0] for weight in weights), weights[0].shape[1])


def _stages(
    block: nn.Module, prefix: str, source: StreamedModel, ranks: Ranks, run_one: Callable[[], Any]
) -> list[StageShape]:
    """The stages of a block, by the table or by watching one sample, the first rank's."""
    named = _by_table(source.layout)
    if named is None:
        with ranks.agreed():
            named = discover_stages(block, prefix, run_one) if ranks.writer else []
        named = ranks.json(named)
    return [_shape(block, prefix, names) for names in named]


def _layers(block: nn.Module, prefix: str, shape: StageShape) -> list[nn.Linear]:
    layers = [block.get_submodule(name.removeprefix(f"{prefix}.")) for name in shape.names]
    return [layer for layer in layers if isinstance(layer, nn.Linear)]


def _hessians(
    block: nn.Module,
    layers: Sequence[nn.Linear],
    settings: Sequence[Sequence[QuantizeConfig]],
    data: Stream,
    index: int,
    ranks: Ranks,
) -> list[Hessian | None]:
    """The Hessian of each stage that needs one, from one run of all samples, which go through the block with it."""
    hessians = [
        Hessian(layer.in_features, device=layer.weight.device) if any(config.needs_data for config in chosen) else None
        for layer, chosen in zip(layers, settings, strict=True)
    ]
    with inputs_seen(layers) as seen:
        for lane in ranks.steps(range(len(data.lengths))):
            for i in lane:
                data.hidden[i] = first_output(block(data.hidden[i], **data.calls[i][index]))
                for n, hessian in enumerate(hessians):
                    if hessian is not None:
                        hessian.add(data.counted(i, seen[n]))
            for hessian in hessians:
                if hessian is not None:
                    hessian.end_lane(ranks)
    for hessian in hessians:
        if hessian is not None:
            hessian.free_lane()
    return hessians


def _mean(accumulated: Hessian | None, shape: StageShape, ranks: Ranks) -> Tensor | None:
    """The Hessian of a stage, on every rank; takes the accumulator's memory."""
    try:
        return None if accumulated is None else accumulated.finish(ranks)
    except QquantError as error:
        raise type(error)(f"{shape.names[0]}: {error}") from error


def _errors(
    layers: Sequence[nn.Linear], hessian: Tensor | None, settings: Sequence[QuantizeConfig], shape: StageShape
) -> tuple[Tensor, tuple[float, ...]]:
    """The stage's weights [out of all, in] at the first setting, and each setting's error beside the first one's."""
    whole = torch.cat([layer.weight for layer in layers])
    try:
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


def _changes(
    block: nn.Module,
    layers: Sequence[nn.Linear],
    replaced: Tensor,
    run_one: Callable[[int], Any],
    after: Mapping[int, Tensor],
) -> dict[int, Tensor]:
    """What the replaced weights change in the block's output, per probe; the originals are put back."""
    originals = [layer.weight for layer in layers]
    parts = replaced.split([layer.out_features for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    try:
        return {i: (first_output(run_one(i)) - plain).to(torch.bfloat16) for i, plain in after.items()}
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.weight = original
