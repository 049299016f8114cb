"""The walk over a model's decoder blocks: accumulate Hessians, solve a block's linears, pass on what leaves it.

One engine serves models in memory and models that are read from disk block by block: the caller's ``BlockSource``
brings a block in and takes it away again. Mathematics is in solver.py, files are in checkpoint.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qquant.activations import Streams, in_memory
from qquant.capture import BlockSource, Stream, check_finite, discover_stages, input_of
from qquant.config import ModuleRecord, QuantizeConfig
from qquant.errors import out_of_memory
from qquant.folding import TOKENS as SCALING_TOKENS
from qquant.folding import Passing, fold_block
from qquant.heap import return_unused_memory
from qquant.hooks import first_output, inputs_seen
from qquant.models.layouts import Unit, block_list, linears
from qquant.moments import Moments
from qquant.refinement import OUTPUT_DAMP, damped
from qquant.run import Run
from qquant.solver import Solution
from qquant.stage_moments import Gathered
from qquant.stage_records import DONE, FOLDED, piece_of
from qquant.stage_solver import Solved, solve_stage
from qquant.telling import say_once
from qquant.tuning import Lesson, Lessons, tuned_scales

# The inputs of a unit's last linear are kept between its Hessian and its output if they take less than this;
# otherwise the unit is run again. Either way the numbers are the same.
_KEPT_TAIL_BYTES = 256 * 2**20


_log = logging.getLogger("qquant")

Result = TypeVar("Result")

Emit = Callable[[str, nn.Linear, Solution, QuantizeConfig], None]
"""Receives each solved linear: full name, the layer, the solution, its settings. The layer's bias is the final one."""

Keep = Callable[[str, Tensor], None]
"""Receives each tensor that a fold changed and that is no quantized weight: full name, as it is to be stored."""

Calls = list[dict[str, Any]]
"""Per sample: the keyword arguments of a block."""

Forward = Callable[[Tensor, int], Any]
"""(hidden states [1, T, hidden], sample) -> what a unit or a block makes of them."""


@dataclass
class Walk:
    """Quantizes a model block by block.

    Args:
        source: the blocks.
        config: what to do; per-module rules included.
        emit: receives each solution.
        on_module: called with each record as it is made, for progress.
        outputs: full name of a linear -> how much predictions feel its outputs, from ``gradients.output_moments``.
        keep: receives what a fold changes.
        stored_dtype: full name of a tensor -> the dtype in which it will be stored; None: that of the block.
        unfinished: where finished stages are kept, and found if they were finished before; its ranks share the work.
        weight_of: full name of a linear that was finished before -> its weight [out, in] as a reader computes it.
    """

    source: BlockSource
    config: QuantizeConfig
    emit: Emit
    on_module: Callable[[ModuleRecord], None] = lambda record: None
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    keep: Keep = lambda name, tensor: None
    stored_dtype: Callable[[str], torch.dtype | None] = lambda name: None
    unfinished: Run = field(default_factory=Run)
    weight_of: Callable[[str], Tensor] | None = None
    _stream: Stream = field(init=False)
    _streams: Streams = field(init=False)
    _mine: list[int] = field(init=False)
    """The samples that this rank goes through."""
    _felt: dict[str, Tensor] = field(default_factory=dict)
    """Of the current block's linears: what ``outputs`` has, as folds change it."""
    _originals: dict[nn.Linear, Tensor] = field(default_factory=dict)
    """Of the current unit's linears that are quantized already: their original weights, where these are needed."""
    _solved: list[tuple[str, nn.Linear, Solution, QuantizeConfig]] = field(default_factory=list)
    """Of the current block, where it is tuned when all its linears are solved."""
    _untold: list[tuple[list[ModuleRecord], list[str]]] = field(default_factory=list)
    """Of the current block, where it is finished as a whole: its stages' records, and the linears left alone."""

    @torch.no_grad()
    def run(self, stream: Stream, streams: Streams | None = None) -> None:
        """Go through all blocks; afterwards ``stream.hidden`` is what leaves the last quantized block.

        Round to nearest needs no data, but a stream all the same: it proves the written checkpoint later.

        Args:
            stream: the samples in front of block 0, or of the block that ``streams`` goes on with.
            streams: where the samples are kept; None: in memory.

        Raises:
            QquantError: whatever the solver or the data raised, with the module's name in front.
            StoppedError: a stop was asked for; what is finished is kept.
        """
        ranks = self.unfinished.ranks
        self._stream, self._mine = stream, ranks.mine(range(len(stream.lengths)))
        self._streams = streams or in_memory(stream.hidden, with_exact=self.config.recipe.needs_exact_stream)
        stream.hidden = self._streams.hidden
        count = len(block_list(self.source.model, self.source.layout))
        if self.config.recipe.tune and not self._streams.restored:
            self._streams.commit(self._streams.block, always=True)  # tuning asks again for what enters a block
        for index in range(self._streams.block, count):
            with ranks.agreed():
                block = self.source.load(index)
            self.source.prefetch(index + 1)
            self._block(block, f"{self.source.layout.blocks}.{index}", [calls[index] for calls in stream.calls])
            self.source.release(index)
            return_unused_memory()
            if ranks.size > 1:
                _log.debug("sent %s", json.dumps({"rank": ranks.rank, **ranks.sent}))
            self._streams.commit(index + 1, always=bool(self.config.recipe.tune))

    def _block(self, block: nn.Module, prefix: str, calls: Calls) -> None:
        hidden, units = self._streams.hidden, self.source.layout.units
        names = [f"{prefix}.{name}" for name in linears(block)]
        self._felt = {name: self.outputs[name] for name in names if name in self.outputs}
        self._fold(block, prefix, calls)
        entering = self._streams.entering() if self.config.recipe.tune else None
        if not self.config.needs_data:
            for name in linears(block):
                if not self._found_finished(block, prefix, [name]):
                    self._solve(block, prefix, [name], None)
            for i in self._mine:
                hidden[i] = self._tried(lambda i: first_output(block(hidden[i], **calls[i])), i)
        elif units is None or not self.config.true_sequential:
            self._whole_block(block, prefix, calls)
        else:
            for unit in units:
                self._unit(block, prefix, unit, calls)
        if entering is not None:
            self._tune(block, prefix, entering, calls)
        with self.unfinished.ranks.agreed():
            check_finite(((i, hidden[i]) for i in self._mine), prefix)

    def _tried(self, work: Callable[..., Result], *given: Any) -> Result:
        """What ``work`` returns, which changes nothing; if memory runs out, once more without the samples in it."""
        try:
            return work(*given)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or not self._streams.spill():
                raise
        say_once("memory ran out: activations of calibration samples are kept on the disk from here on")
        return_unused_memory()
        return work(*given)

    def _fold(self, block: nn.Module, prefix: str, calls: Calls) -> None:
        """Rescale or turn channels before anything is gathered; from here on this is the original block."""
        if not self.config.recipe.folds:
            return
        ranks, stream = self.unfinished.ranks, self._stream
        entering = self._streams.hidden if self._streams.exact is None else self._streams.exact
        done = self.unfinished.finished(key := f"{FOLDED}{prefix}")
        samples = []
        for i in stream.spread(SCALING_TOKENS) if done is None else ():
            hidden = ranks.share(entering[i] if (owner := ranks.owner(i)) == ranks.rank else None, owner)
            samples.append(Passing(hidden, calls[i], stream.masks[i]))
        before = done and done["exponents"]  # other last bits might choose otherwise than what was written
        given = (self.source.layout, prefix, self.config, samples, self._felt, self.stored_dtype)
        folded = fold_block(block, *given, before)
        if done is None:
            for name, tensor in folded.changed.items():
                self.keep(name, tensor)
            self.unfinished.finish(key, {"changed": sorted(folded.changed), "exponents": folded.exponents})

    def _tune(self, block: nn.Module, prefix: str, entering: Callable[[int], Tensor], calls: Calls) -> None:
        """Train the scales of a block whose linears are all solved, and hand the solutions on."""
        # What the last unit adds to the residual stream is felt as the stream behind it is.
        units, exact, masks = self.source.layout.units, self._streams.exact, self._stream.masks
        assert exact is not None
        felt = None if units is None else self._felt.get(f"{prefix}.{units[-1].tail}")
        felt = None if felt is None else damped(felt, OUTPUT_DAMP)
        lessons = Lessons(len(calls), lambda i: Lesson(entering(i), calls[i], exact[i], masks[i], felt))
        solved = {name.removeprefix(f"{prefix}."): solution for name, _, solution, _ in self._solved}
        found = tuned_scales(block, solved, lessons, self.config.recipe.tune) if solved else None
        if self.unfinished.finished(key := f"{DONE}{prefix}"):  # what is written anew does not count meanwhile
            self.unfinished.keep(key, None)
        for name, layer, solution, config in self._solved:
            if found is not None:
                solution = replace(solution, scales=found[name.removeprefix(f"{prefix}.")])
                _put(layer, solution.weight())
            self.emit(name, layer, solution, config)
        self._solved.clear()
        records, skipped = ([one for part in parts for one in part] for parts in zip(*self._untold, strict=True))
        self._untold.clear()
        self.unfinished.keep(key, piece_of(records, skipped))
        if found is not None:
            for i in self._mine:
                self._streams.hidden[i] = first_output(block(entering(i), **calls[i]))

    def _unit(self, block: nn.Module, prefix: str, unit: Unit, calls: Calls) -> None:
        """Quantize one residual unit stage by stage and add its output to the stream."""
        norm, module = block.get_submodule(unit.norm), block.get_submodule(unit.module)
        tail, hidden = block.get_submodule(unit.tail), self._streams.hidden

        def forward(hidden: Tensor, i: int) -> Any:
            normed = norm(hidden)
            return module(hidden_states=normed, **calls[i]) if unit.sees_positions else module(normed)

        gathered: Gathered | None = None
        for number, stage in enumerate(unit.stages):
            last = number == len(unit.stages) - 1
            gathered = self._stage(block, prefix, list(stage), forward, tail=last)
        kept = gathered.kept if gathered is not None else {}
        for i in self._mine:
            inputs = kept.pop(i, None)
            hidden[i] = self._tried(
                lambda i, inputs: hidden[i] + first_output(forward(hidden[i], i) if inputs is None else tail(inputs)),
                i,
                inputs,
            )
        if gathered is None:  # else its last stage has done so
            self._advance(lambda hidden, i: hidden + first_output(forward(hidden, i)))
        self._originals.clear()

    def _whole_block(self, block: nn.Module, prefix: str, calls: Calls) -> None:
        """Quantize a block that is only known by its structure: run it whole for every set of linears."""
        hidden = self._streams.hidden

        def forward(hidden: Tensor, i: int) -> Tensor:
            return first_output(block(hidden, **calls[i]))

        if self.config.recipe.residual:
            say_once(
                "what earlier errors did to the residual stream is not made up for (residual): which linears of this "
                f'family write into it is not known; of method "{self.config.method}" the rest is done',
                key="no residual",
            )
        with self.unfinished.ranks.agreed():
            stages = discover_stages(block, prefix, lambda: forward(hidden[self._mine[0]], self._mine[0]))
        if self.config.true_sequential:
            for stage in stages:
                self._stage(block, prefix, stage, forward, tail=False)
        else:
            moments = self._all_moments(block, prefix, stages, forward)
            for stage, moment in zip(stages, moments, strict=True):
                if not self._found_finished(block, prefix, stage):
                    self._solve(block, prefix, stage, moment)
        for i in self._mine:
            hidden[i] = self._tried(lambda i: forward(hidden[i], i), i)
        self._advance(forward)
        self._originals.clear()

    def _advance(self, forward: Forward) -> None:
        """Bring the original's samples behind what was just quantized."""
        exact = self._streams.exact
        if exact is not None:
            with self._original_weights():
                for i in self._mine:
                    exact[i] = self._tried(lambda i: forward(exact[i], i), i)

    @contextmanager
    def _original_weights(self) -> Iterator[None]:
        """The unit's quantized linears are the original ones for a while."""
        quantized = {layer: layer.weight for layer in self._originals}
        for layer, weight in self._originals.items():
            layer.weight = nn.Parameter(weight, requires_grad=False)
        try:
            yield
        finally:
            for layer, parameter in quantized.items():
                layer.weight = parameter

    def _stage(
        self, block: nn.Module, prefix: str, stage: list[str], forward: Forward, *, tail: bool
    ) -> Gathered | None:
        """Gather one stage's moments and solve its linears; None where nothing had to be gathered.

        A tail's output is its unit's, so that the original's samples are brought behind the unit on the way.
        """
        if self._found_finished(block, prefix, stage):
            return None
        if all(self.config.for_module(f"{prefix}.{name}") is None for name in stage):
            self._solve(block, prefix, stage, None)
            return None
        linear, ranks = _linear(block, stage[0]), self.unfinished.ranks
        hidden, exact = self._streams.hidden, self._streams.exact
        gathered = Gathered.of(linear, exact=exact is not None, residual=tail and bool(self.config.recipe.residual))
        room = _KEPT_TAIL_BYTES if tail else 0
        for lane in ranks.steps(range(len(hidden))):
            for i in lane:
                inputs = self._tried(lambda i: input_of(linear, lambda: forward(hidden[i], i)), i)
                counted = self._stream.counted(i, inputs)
                gathered.inputs.add(counted)
                if exact is not None and gathered.mismatch is not None:
                    with self._original_weights():
                        wanted = self._tried(lambda i: input_of(linear, lambda: forward(exact[i], i)), i)
                    gathered.mismatch.add(self._stream.counted(i, wanted), counted, counted)
                    if gathered.residual is not None:
                        before = self._stream.counted(i, exact[i]), self._stream.counted(i, hidden[i])
                        gathered.residual.add(*before, counted)
                    if tail:
                        exact[i] = self._tried(lambda i, wanted: exact[i] + linear(wanted), i, wanted)
                room -= inputs.nbytes
                if room >= 0:
                    gathered.kept[i] = inputs
            gathered.end_lane(ranks)
        if room < 0:
            gathered.kept.clear()
        self._solve(block, prefix, stage, gathered.finish(f"{prefix}.{stage[0]}", ranks))
        return gathered

    def _all_moments(self, block: nn.Module, prefix: str, stages: list[list[str]], forward: Forward) -> list[Moments]:
        """The moments of several stages from one run of every sample."""
        layers, ranks = [_linear(block, stage[0]) for stage in stages], self.unfinished.ranks
        gathered = [Gathered.of(layer) for layer in layers]
        with inputs_seen(layers) as seen:
            for lane in ranks.steps(range(len(self._streams.hidden))):
                for i in lane:
                    self._tried(lambda i: forward(self._streams.hidden[i], i), i)
                    for n, one in enumerate(gathered):
                        one.inputs.add(self._stream.counted(i, seen[n]))
                for one in gathered:
                    one.end_lane(ranks)
        return [one.finish(f"{prefix}.{stage[0]}", ranks) for one, stage in zip(gathered, stages, strict=True)]

    def _solve(self, block: nn.Module, prefix: str, names: list[str], moments: Moments | None) -> None:
        """Solve the linears that share an input, put the quantized weights in their place, and keep them."""
        return_unused_memory()
        layers = {f"{prefix}.{name}": _linear(block, name) for name in names}
        settings = {full: self.config.for_module(full) for full in layers}
        skipped = [full for full, chosen in settings.items() if chosen is None]
        given, ranks = (layers, moments, settings, self._felt), self.unfinished.ranks
        solved = solve_stage(*given, ranks) if ranks.size > 1 else self._tried(solve_stage, *given, ranks)
        records = [self._install(full, layers[full], one) for full, one in solved.items()]
        if self.config.recipe.tune:
            self._untold.append((records, skipped))
        else:
            self.unfinished.finish(f"{DONE}{prefix}.{names[0]}", piece_of(records, skipped))

    def _install(self, name: str, layer: nn.Linear, solved: Solved) -> ModuleRecord:
        solution, config = solved.solution, solved.settings
        record = ModuleRecord(
            name=name,
            bits=config.bits,
            group_size=config.group_size,
            sym=config.sym,
            desc_act=config.needs_g_idx,
            shape=(layer.out_features, layer.in_features),
            relative_error=solved.relative_error,
            damp_percent=solution.damp_percent,
            damp_escalations=solution.damp_escalations,
            dead_columns=solution.dead_columns,
            fallback=solution.fallback,
            seconds=solved.seconds,
        )
        if self.config.recipe.tune:
            self._solved.append((name, layer, solution, config))
        else:
            self.emit(name, layer, solution, config)
        self._replace(layer, solution.weight())
        self.on_module(record)
        return record

    def _replace(self, layer: nn.Linear, weight: Tensor) -> None:
        if self.config.recipe.needs_exact_stream:
            self._originals[layer] = layer.weight
        _put(layer, weight)

    def _found_finished(self, block: nn.Module, prefix: str, stage: list[str]) -> bool:
        """Whether an earlier process solved this stage; then its quantized weights are put in their place."""
        if (
            self.config.recipe.tune
            or self.weight_of is None
            or self.unfinished.finished(f"{DONE}{prefix}.{stage[0]}") is None
        ):
            return False
        for name in stage:
            if self.config.for_module(full := f"{prefix}.{name}") is not None:
                self._replace(_linear(block, name), self.weight_of(full))
        return True


def _put(layer: nn.Linear, weight: Tensor) -> None:
    """The weight [out, in] as a reader of the file computes it."""
    # Stored as [in, out] and viewed as [out, in]: the memory order in which QuantLinear multiplies, so that what
    # the next block sees is what a reader of the file computes.
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype).T.contiguous().T, requires_grad=False)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer
