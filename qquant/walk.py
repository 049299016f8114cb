"""The walk over a model's decoder blocks: accumulate Hessians, solve a block's linears, pass on what leaves it.

One engine serves models in memory and models that are read from disk block by block: the caller's ``BlockSource``
brings a block in and takes it away again. Mathematics is in solver.py, files are in checkpoint.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qquant.capture import BlockSource, Stream, discover_stages, first_output, input_of
from qquant.config import ModuleRecord, QuantizeConfig
from qquant.errors import NumericError, QquantError
from qquant.heap import return_unused_memory
from qquant.models.layouts import Unit, block_list, linears
from qquant.solver import Hessian, Solution, relative_error, solve

# The inputs of a unit's last linear are kept between its Hessian and its output if they take less than this;
# otherwise the unit is run again. Either way the numbers are the same.
_KEPT_TAIL_BYTES = 256 * 2**20


Emit = Callable[[str, nn.Linear, Solution, QuantizeConfig], None]
"""Receives each solved linear: full name, the layer with its original weight, the solution, its settings."""


@dataclass
class Walk:
    """Quantizes a model block by block.

    Args:
        source: the blocks.
        config: what to do; per-module rules included.
        emit: receives each solution.
        on_module: called with each record as it is made, for progress.
    """

    source: BlockSource
    config: QuantizeConfig
    emit: Emit
    on_module: Callable[[ModuleRecord], None] = lambda record: None
    records: list[ModuleRecord] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @torch.inference_mode()
    def run(self, stream: Stream) -> None:
        """Go through all blocks; afterwards ``stream.hidden`` is what leaves the last quantized block.

        Round to nearest needs no data, but a stream all the same: it proves the written checkpoint later.

        Raises:
            QquantError: whatever the solver or the data raised, with the module's name in front.
        """
        for index in range(len(block_list(self.source.model, self.source.layout))):
            block = self.source.load(index)
            prefix = f"{self.source.layout.blocks}.{index}"
            calls = [calls[index] for calls in stream.calls]
            units = self.source.layout.units
            if self.config.method == "rtn":
                for name in linears(block):
                    self._solve(block, prefix, [name], None)
                for i, hidden in enumerate(stream.hidden):
                    stream.hidden[i] = first_output(block(hidden, **calls[i]))
            elif units is None or not self.config.true_sequential:
                self._whole_block(block, prefix, stream, calls)
            else:
                for unit in units:
                    self._unit(block, prefix, unit, stream, calls)
            _check_finite(stream, prefix)
            self.source.release(index)
            return_unused_memory()

    def _unit(self, block: nn.Module, prefix: str, unit: Unit, stream: Stream, calls: list[dict[str, Any]]) -> None:
        """Quantize one residual unit stage by stage and add its output to the stream."""
        norm, module = block.get_submodule(unit.norm), block.get_submodule(unit.module)
        tail = block.get_submodule(unit.tail)

        def run(i: int) -> Any:
            normed = norm(stream.hidden[i])
            return module(hidden_states=normed, **calls[i]) if unit.sees_positions else module(normed)

        kept: list[Tensor] | None = None
        for number, stage in enumerate(unit.stages):
            last = number == len(unit.stages) - 1
            kept = self._stage(block, prefix, list(stage), run, stream, keep=last)
        for i, hidden in enumerate(stream.hidden):
            if kept is not None:
                output = tail(kept[i])
                kept[i] = hidden.new_empty(0)
            else:
                output = run(i)
            stream.hidden[i] = hidden + first_output(output)

    def _whole_block(self, block: nn.Module, prefix: str, stream: Stream, calls: list[dict[str, Any]]) -> None:
        """Quantize a block that is only known by its structure: run it whole for every set of linears."""

        def run(i: int) -> Tensor:
            return first_output(block(stream.hidden[i], **calls[i]))

        stages = discover_stages(block, prefix, lambda: run(0))
        if self.config.true_sequential:
            for stage in stages:
                self._stage(block, prefix, stage, run, stream, keep=False)
        else:
            hessians = self._hessians(block, [stage[0] for stage in stages], run, stream)
            for stage, hessian in zip(stages, hessians, strict=True):
                self._solve(block, prefix, stage, hessian)
        stream.hidden = [run(i) for i in range(len(stream.hidden))]

    def _stage(
        self, block: nn.Module, prefix: str, stage: list[str], run: Callable[[int], Any], stream: Stream, *, keep: bool
    ) -> list[Tensor] | None:
        """Accumulate one Hessian, solve the linears that share it; returns their inputs if they are worth keeping."""
        if all(self.config.for_module(f"{prefix}.{name}") is None for name in stage):
            self._solve(block, prefix, stage, None)
            return None
        kept: list[Tensor] | None = [] if keep else None
        linear = _linear(block, stage[0])
        hessian, size = Hessian(linear.in_features, device=linear.weight.device), 0
        for i in range(len(stream.hidden)):
            inputs = input_of(linear, partial(run, i))
            hessian.add(stream.counted(i, inputs))
            size += inputs.nbytes
            if kept is not None and size <= _KEPT_TAIL_BYTES:
                kept.append(inputs)
            else:
                kept = None
        self._solve(block, prefix, stage, hessian)
        return kept

    def _hessians(self, block: nn.Module, names: list[str], run: Callable[[int], Any], stream: Stream) -> list[Hessian]:
        """The Hessians of several inputs from one run of every sample."""
        layers = [_linear(block, name) for name in names]
        hessians = [Hessian(layer.in_features, device=layer.weight.device) for layer in layers]
        seen: dict[int, Tensor] = {}
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, n=n: seen.__setitem__(n, args[0]))
            for n, layer in enumerate(layers)
        ]
        try:
            for i in range(len(stream.hidden)):
                run(i)
                for n, hessian in enumerate(hessians):
                    hessian.add(stream.counted(i, seen[n]))
        finally:
            for hook in hooks:
                hook.remove()
        return hessians

    def _solve(self, block: nn.Module, prefix: str, names: list[str], accumulated: Hessian | None) -> None:
        """Solve the linears that share a Hessian and put the quantized weights in their place.

        Linears with the same settings are solved as one tall matrix: rows do not see one another, so the result is
        the same and the column loop runs once.
        """
        return_unused_memory()
        try:
            hessian = None if accumulated is None else accumulated.finish()
        except NumericError as error:
            raise NumericError(f"{prefix}.{names[0]}: {error}") from error
        settings = {name: self.config.for_module(f"{prefix}.{name}") for name in names}
        for name in names:
            if settings[name] is None:
                self.skipped.append(f"{prefix}.{name}")
        while remaining := [name for name in names if settings[name] is not None]:
            chosen = settings[remaining[0]]
            assert chosen is not None
            together = [name for name in remaining if settings[name] == chosen]
            for name in together:
                settings[name] = None
            began = time.perf_counter()
            layers = [_linear(block, name) for name in together]
            weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight
            try:
                solution = solve(weight, hessian, chosen)
            except QquantError as error:
                raise type(error)(f"{prefix}.{together[0]}: {error}") from error
            del weight
            seconds = (time.perf_counter() - began) / len(together)
            for name, layer, part in zip(together, layers, _split(solution, layers), strict=True):
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
        record = ModuleRecord(
            name=name,
            bits=config.bits,
            group_size=config.group_size,
            sym=config.sym,
            desc_act=config.needs_g_idx,
            shape=(layer.out_features, layer.in_features),
            relative_error=relative_error(layer.weight, solution, hessian),
            damp_percent=solution.damp_percent,
            damp_escalations=solution.damp_escalations,
            dead_columns=solution.dead_columns,
            seconds=seconds,
        )
        self.emit(name, layer, solution, config)
        # Stored as [in, out] and viewed as [out, in]: the memory order in which QuantLinear multiplies, so that what
        # the next block sees is what a reader of the file computes.
        layer.weight = nn.Parameter(solution.weight().to(layer.weight.dtype).T.contiguous().T, requires_grad=False)
        self.records.append(record)
        self.on_module(record)


def _linear(block: nn.Module, name: str) -> nn.Linear:
    layer = block.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _split(solution: Solution, layers: Sequence[nn.Linear]) -> list[Solution]:
    """Cut a tall solution back into its layers."""
    heights = [layer.out_features for layer in layers]
    tall = (solution.codes, solution.scales, solution.zeros)
    parts = zip(*(tensor.split(heights) for tensor in tall), strict=True)
    return [
        Solution(
            codes=codes,
            scales=scales,
            zeros=zeros,
            g_idx=solution.g_idx,
            damp_percent=solution.damp_percent,
            damp_escalations=solution.damp_escalations,
            dead_columns=solution.dead_columns,
        )
        for codes, scales, zeros in parts
    ]


def _check_finite(stream: Stream, prefix: str) -> None:
    for i, hidden in enumerate(stream.hidden):
        if not bool(torch.isfinite(hidden).all()):
            raise NumericError(f"activations must be finite, got NaN or Inf after {prefix} (calibration sample {i})")
