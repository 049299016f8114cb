"""The walk over a model's decoder blocks: accumulate Hessians, solve a block's linears, pass on what leaves it.

One engine serves models in memory and models that are read from disk block by block: the caller's ``BlockSource``
brings a block in and takes it away again. Mathematics is in solver.py, files are in checkpoint.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qquant.capture import BlockSource, Stream, check_finite, discover_stages, input_of
from qquant.config import ModuleRecord, QuantizeConfig
from qquant.errors import NumericError, QquantError
from qquant.folding import TOKENS as SCALING_TOKENS
from qquant.folding import Passing, fold_block
from qquant.heap import return_unused_memory
from qquant.hooks import first_output, inputs_seen
from qquant.models.layouts import Unit, block_list, linears
from qquant.moments import CrossMoment, Hessian, Moments
from qquant.refinement import OUTPUT_DAMP, damped
from qquant.solver import Solution, relative_error, solve
from qquant.telling import say_once
from qquant.tuning import Lesson, tuned_scales

# The inputs of a unit's last linear are kept between its Hessian and its output if they take less than this;
# otherwise the unit is run again. Either way the numbers are the same.
_KEPT_TAIL_BYTES = 256 * 2**20


Emit = Callable[[str, nn.Linear, Solution, QuantizeConfig], None]
"""Receives each solved linear: full name, the layer, the solution, its settings. The layer's bias is the final one."""

Keep = Callable[[str, Tensor], None]
"""Receives each tensor that a fold changed and that is no quantized weight: full name, as it is to be stored."""

Exact = list[Tensor] | None
"""The samples as the original model has them, where the method asks for that."""

Calls = list[dict[str, Any]]
"""Per sample: the keyword arguments of a block."""

Run = Callable[[Tensor, int], Any]
"""(hidden states [1, T, hidden], sample) -> what a unit or a block makes of them."""


@dataclass
class _Gathered:
    """The sums that one stage's moments are made of."""

    inputs: Hessian
    mismatch: CrossMoment | None = None
    residual: CrossMoment | None = None

    def finish(self) -> Moments:
        """The means; takes the accumulators' memory."""
        return Moments(
            inputs=self.inputs.finish(),
            mismatch=None if self.mismatch is None else self.mismatch.finish(),
            residual=None if self.residual is None else self.residual.finish(),
        )


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
    """

    source: BlockSource
    config: QuantizeConfig
    emit: Emit
    on_module: Callable[[ModuleRecord], None] = lambda record: None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    keep: Keep = lambda name, tensor: None
    stored_dtype: Callable[[str], torch.dtype | None] = lambda name: None
    records: list[ModuleRecord] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    _originals: dict[nn.Linear, Tensor] = field(default_factory=dict)
    """Of the current unit's linears that are quantized already: their original weights, where these are needed."""
    _solved: list[tuple[str, nn.Linear, Solution, QuantizeConfig]] = field(default_factory=list)
    """Of the current block, where it is tuned when all its linears are solved."""

    @torch.no_grad()
    def run(self, stream: Stream) -> None:
        """Go through all blocks; afterwards ``stream.hidden`` is what leaves the last quantized block.

        Round to nearest needs no data, but a stream all the same: it proves the written checkpoint later.

        Raises:
            QquantError: whatever the solver or the data raised, with the module's name in front.
        """
        # The samples once more, as the original model has them: tensors are replaced, never changed.
        exact = list(stream.hidden) if self.config.recipe.needs_exact_stream else None
        for index in range(len(block_list(self.source.model, self.source.layout))):
            block = self.source.load(index)
            prefix = f"{self.source.layout.blocks}.{index}"
            calls = [calls[index] for calls in stream.calls]
            units = self.source.layout.units
            self._fold(block, prefix, stream, exact, calls)
            entering = list(stream.hidden) if self.config.recipe.tune else []
            if not self.config.needs_data:
                for name in linears(block):
                    self._solve(block, prefix, [name], None)
                for i, hidden in enumerate(stream.hidden):
                    stream.hidden[i] = first_output(block(hidden, **calls[i]))
            elif units is None or not self.config.true_sequential:
                self._whole_block(block, prefix, stream, exact, calls)
            else:
                for unit in units:
                    self._unit(block, prefix, unit, stream, exact, calls)
            if exact is not None and self.config.recipe.tune:
                self._tune(block, prefix, entering, stream, exact, calls)
            check_finite(stream.hidden, prefix)
            self.source.release(index)
            return_unused_memory()

    def _fold(self, block: nn.Module, prefix: str, stream: Stream, exact: Exact, calls: Calls) -> None:
        """Rescale or turn channels before anything is gathered; from here on this is the original block."""
        if self.config.recipe.folds:
            hidden = stream.hidden if exact is None else exact
            samples = [Passing(hidden[i], calls[i], stream.masks[i]) for i in stream.spread(SCALING_TOKENS)]
            changed = fold_block(
                block, self.source.layout, prefix, self.config, samples, self.outputs, self.stored_dtype
            )
            for name, tensor in changed.items():
                self.keep(name, tensor)

    def _tune(
        self,
        block: nn.Module,
        prefix: str,
        entering: list[Tensor],
        stream: Stream,
        exact: list[Tensor],
        calls: Calls,
    ) -> None:
        """Train the scales of a block whose linears are all solved, and hand the solutions on."""
        # What the last unit adds to the residual stream is felt as the stream behind it is.
        units = self.source.layout.units
        felt = None if units is None else self.outputs.get(f"{prefix}.{units[-1].tail}")
        felt = None if felt is None else damped(felt, OUTPUT_DAMP)
        lessons = [Lesson(*parts, felt) for parts in zip(entering, calls, exact, stream.masks, strict=True)]
        solved = {name.removeprefix(f"{prefix}."): solution for name, _, solution, _ in self._solved}
        found = tuned_scales(block, solved, lessons, self.config.recipe.tune) if solved else None
        for name, layer, solution, config in self._solved:
            if found is not None:
                solution = replace(solution, scales=found[name.removeprefix(f"{prefix}.")])
                _put(layer, solution)
            self.emit(name, layer, solution, config)
        self._solved.clear()
        if found is not None:
            for i, hidden in enumerate(entering):
                stream.hidden[i] = first_output(block(hidden, **calls[i]))

    def _unit(self, block: nn.Module, prefix: str, unit: Unit, stream: Stream, exact: Exact, calls: Calls) -> None:
        """Quantize one residual unit stage by stage and add its output to the stream."""
        norm, module = block.get_submodule(unit.norm), block.get_submodule(unit.module)
        tail = block.get_submodule(unit.tail)

        def run(hidden: Tensor, i: int) -> Any:
            normed = norm(hidden)
            return module(hidden_states=normed, **calls[i]) if unit.sees_positions else module(normed)

        kept: list[Tensor] | None = None
        for number, stage in enumerate(unit.stages):
            last = number == len(unit.stages) - 1
            kept = self._stage(block, prefix, list(stage), run, stream, exact, tail=last)
        for i, hidden in enumerate(stream.hidden):
            if kept is not None:
                output = tail(kept[i])
                kept[i] = hidden.new_empty(0)
            else:
                output = run(hidden, i)
            stream.hidden[i] = hidden + first_output(output)
        if self.config.for_module(f"{prefix}.{unit.tail}") is None:  # else its stage has done so
            self._advance(exact, lambda hidden, i: hidden + first_output(run(hidden, i)))
        self._originals.clear()

    def _whole_block(self, block: nn.Module, prefix: str, stream: Stream, exact: Exact, calls: Calls) -> None:
        """Quantize a block that is only known by its structure: run it whole for every set of linears."""

        def run(hidden: Tensor, i: int) -> Tensor:
            return first_output(block(hidden, **calls[i]))

        if self.config.recipe.residual:
            say_once(
                "what earlier errors did to the residual stream is not made up for (residual): which linears of this "
                f'family write into it is not known; of method "{self.config.method}" the rest is done',
                key="no residual",
            )
        stages = discover_stages(block, prefix, lambda: run(stream.hidden[0], 0))
        if self.config.true_sequential:
            for stage in stages:
                self._stage(block, prefix, stage, run, stream, exact, tail=False)
        else:
            hessians = self._hessians(block, [stage[0] for stage in stages], run, stream)
            for stage, hessian in zip(stages, hessians, strict=True):
                self._solve(block, prefix, stage, _Gathered(hessian))
        stream.hidden = [run(hidden, i) for i, hidden in enumerate(stream.hidden)]
        self._advance(exact, run)
        self._originals.clear()

    def _advance(self, exact: Exact, run: Run) -> None:
        """Bring the original's samples behind what was just quantized."""
        if exact is not None:
            with self._original_weights():
                for i, hidden in enumerate(exact):
                    exact[i] = run(hidden, i)

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
        self,
        block: nn.Module,
        prefix: str,
        stage: list[str],
        run: Run,
        stream: Stream,
        exact: Exact,
        *,
        tail: bool,
    ) -> list[Tensor] | None:
        """Gather one stage's moments, solve its linears; returns a tail's inputs if they are worth keeping.

        A tail's output is its unit's, so that the original's samples are brought behind the unit on the way.
        """
        if all(self.config.for_module(f"{prefix}.{name}") is None for name in stage):
            self._solve(block, prefix, stage, None)
            return None
        kept: list[Tensor] | None = [] if tail else None
        linear = _linear(block, stage[0])
        columns, device, size = linear.in_features, linear.weight.device, 0
        gathered = _Gathered(Hessian(columns, device=device))
        if exact is not None:
            gathered.mismatch = CrossMoment(columns, columns, device=device)
            if tail and self.config.recipe.residual:
                gathered.residual = CrossMoment(linear.out_features, columns, device=device)
        for i, hidden in enumerate(stream.hidden):
            inputs = input_of(linear, partial(run, hidden, i))
            counted = stream.counted(i, inputs)
            gathered.inputs.add(counted)
            if exact is not None and gathered.mismatch is not None:
                with self._original_weights():
                    wanted = input_of(linear, partial(run, exact[i], i))
                gathered.mismatch.add(stream.counted(i, wanted), counted, counted)
                if gathered.residual is not None:
                    gathered.residual.add(stream.counted(i, exact[i]), stream.counted(i, hidden), counted)
                if tail:
                    exact[i] = exact[i] + linear(wanted)
            size += inputs.nbytes
            if kept is not None and size <= _KEPT_TAIL_BYTES:
                kept.append(inputs)
            else:
                kept = None
        self._solve(block, prefix, stage, gathered)
        return kept

    def _hessians(self, block: nn.Module, names: list[str], run: Run, stream: Stream) -> list[Hessian]:
        """The Hessians of several inputs from one run of every sample."""
        layers = [_linear(block, name) for name in names]
        hessians = [Hessian(layer.in_features, device=layer.weight.device) for layer in layers]
        with inputs_seen(layers) as seen:
            for i, hidden in enumerate(stream.hidden):
                run(hidden, i)
                for n, hessian in enumerate(hessians):
                    hessian.add(stream.counted(i, seen[n]))
        return hessians

    def _solve(self, block: nn.Module, prefix: str, names: list[str], gathered: _Gathered | None) -> None:
        """Solve the linears that share an input and put the quantized weights in their place.

        Linears with the same settings are solved as one tall matrix: rows do not see one another but in blocks of one
        linear, so the result is the same and the column loop runs once.
        """
        return_unused_memory()
        try:
            shared = None if gathered is None else gathered.finish()
        except NumericError as error:
            raise NumericError(f"{prefix}.{names[0]}: {error}") from error
        settings = {name: self.config.for_module(f"{prefix}.{name}") for name in names}
        self.skipped += [f"{prefix}.{name}" for name in names if settings[name] is None]
        while remaining := [name for name in names if settings[name] is not None]:
            chosen, outputs = settings[remaining[0]], self.outputs.get(f"{prefix}.{remaining[0]}")
            assert chosen is not None
            together = [
                name
                for name in remaining
                if settings[name] == chosen and _side(self.outputs.get(f"{prefix}.{name}")) == _side(outputs)
            ]
            for name in together:
                settings[name] = None
            began = time.perf_counter()
            layers = [_linear(block, name) for name in together]
            weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight
            moments = shared
            if shared is not None and outputs is not None:
                blocks = [self.outputs[f"{prefix}.{name}"].to(weight.device) for name in together]
                moments = replace(shared, outputs=torch.cat(blocks))
            try:
                solution = solve(weight, moments, chosen)
            except QquantError as error:
                raise type(error)(f"{prefix}.{together[0]}: {error}") from error
            del weight
            seconds = (time.perf_counter() - began) / len(together)
            hessian = None if shared is None else shared.inputs
            for name, layer, part in zip(
                together, layers, solution.split([layer.out_features for layer in layers]), strict=True
            ):
                self._install(f"{prefix}.{name}", layer, part, chosen, hessian, seconds)

    def _install(
        self,
        name: str,
        layer: nn.Linear,
        solution: Solution,
        config: QuantizeConfig,
        hessian: Tensor | None,
        seconds: float,
    ) -> None:
        aim = layer.weight if solution.target is None else solution.target
        record = ModuleRecord(
            name=name,
            bits=config.bits,
            group_size=config.group_size,
            sym=config.sym,
            desc_act=config.needs_g_idx,
            shape=(layer.out_features, layer.in_features),
            relative_error=relative_error(aim, solution, hessian),
            damp_percent=solution.damp_percent,
            damp_escalations=solution.damp_escalations,
            dead_columns=solution.dead_columns,
            seconds=seconds,
        )
        if self.config.recipe.tune:
            self._solved.append((name, layer, solution, config))
        else:
            self.emit(name, layer, solution, config)
        if self.config.recipe.needs_exact_stream:
            self._originals[layer] = layer.weight
        _put(layer, solution)
        self.records.append(record)
        self.on_module(record)


def _put(layer: nn.Linear, solution: Solution) -> None:
    """The weight as a reader of the file computes it."""
    # Stored as [in, out] and viewed as [out, in]: the memory order in which QuantLinear multiplies, so that what
    # the next block sees is what a reader of the file computes.
    layer.weight = nn.Parameter(solution.weight().to(layer.weight.dtype).T.contiguous().T, requires_grad=False)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _side(outputs: Tensor | None) -> int:
    """Outputs that are weighted together; 0 where none are weighted."""
    return 0 if outputs is None else outputs.shape[1]
