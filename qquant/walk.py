"""The walk over a model's decoder blocks: capture what enters a block, quantize its linears, pass on what leaves it.

One engine serves models in memory and models that are read from disk block by block: the caller's ``BlockSource``
brings a block in and takes it away again. Mathematics is in solver.py, files are in checkpoint.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qquant.calibrate import Sample
from qquant.config import ModuleRecord, QuantizeConfig
from qquant.errors import BadModelError, NumericError, QquantError
from qquant.models.layouts import Layout, Unit, block_list, linears
from qquant.solver import Hessian, Solution, relative_error, solve

# The inputs of a unit's last linear are kept between its Hessian and its output if they take less than this;
# otherwise the unit is run again. Either way the numbers are the same.
_KEPT_TAIL_BYTES = 256 * 2**20


class BlockSource(Protocol):
    """Where the walk gets its blocks from."""

    model: nn.Module
    layout: Layout

    def load(self, index: int) -> nn.Module:
        """Block ``index`` with its weights in memory."""

    def release(self, index: int) -> None:
        """The walk is done with the block."""


Emit = Callable[[str, nn.Linear, Solution, QuantizeConfig], None]
"""Receives each solved linear: full name, the layer with its original weight, the solution, its settings."""


@dataclass
class Stream:
    """The calibration samples as they stand before the current block."""

    hidden: list[Tensor]
    """Per sample: [1, T, hidden], in the compute dtype."""
    masks: list[Tensor | None]
    """Per sample: [T] bool, False tokens are left out of Hessians; None: all count."""
    calls: list[list[dict[str, Any]]]
    """Per sample, per block: the keyword arguments the model gives the block (shared between samples of one length)."""

    def counted(self, index: int, inputs: Tensor) -> Tensor:
        """The rows of sample ``index``'s inputs [1, T, K] that count: [T', K]."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        mask = self.masks[index]
        return flat if mask is None else flat[mask.to(flat.device)]


class _Stop(Exception):  # noqa: N818 - it ends a forward pass early, it is no error
    """Raised inside a forward pass once what was wanted has been seen."""


class _Recorder(nn.Module):
    """Stands in for a block: notes its arguments, returns its input."""

    def __init__(self, block: nn.Module, last: bool) -> None:
        super().__init__()
        object.__setattr__(self, "original", block)
        self.last = last
        self.hidden: Tensor | None = None
        self.call: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "original"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **call: Any) -> Tensor:
        if args:
            raise BadModelError("a block must take its arguments after the first by keyword; this model's do not")
        self.hidden, self.call = hidden_states, call
        if self.last:
            raise _Stop
        return hidden_states


@contextmanager
def _replaced_blocks(model: nn.Module, layout: Layout, stand_ins: Sequence[nn.Module]) -> Iterator[None]:
    blocks = block_list(model, layout)
    originals = list(blocks)
    for index, stand_in in enumerate(stand_ins):
        blocks[index] = stand_in
    try:
        yield
    finally:
        for index, original in enumerate(originals):
            blocks[index] = original


@torch.inference_mode()
def capture(source: BlockSource, samples: Sequence[Sample], device: torch.device | str) -> Stream:
    """Run everything before the first block and note what each block will be called with.

    Args:
        source: the model; its embeddings must be in memory, its blocks need not.
        samples: calibration samples.
        device: where the model's embeddings are.

    Returns:
        The stream in front of block 0.
    """
    model, layout = source.model, source.layout
    blocks = block_list(model, layout)
    recorders = [_Recorder(block, index == len(blocks) - 1) for index, block in enumerate(blocks)]
    stream = Stream([], [], [])
    known: dict[int, list[dict[str, Any]]] = {}
    with _replaced_blocks(model, layout, recorders):
        for sample in samples:
            ids, mask = sample.input_ids.to(device)[None], sample.mask
            whole = bool(mask.all())
            try:
                model(input_ids=ids, attention_mask=None if whole else mask.long().to(device)[None], use_cache=False)
            except _Stop:
                pass
            hidden = recorders[0].hidden
            if hidden is None:
                raise BadModelError(f"the model never called the first of its blocks, {layout.blocks}.0")
            length = ids.shape[1]
            calls = known.get(length) if whole else None
            if calls is None:
                calls = [recorder.call for recorder in recorders]
                if whole:
                    known[length] = calls
            stream.hidden.append(hidden.clone())
            stream.masks.append(None if whole else mask)
            stream.calls.append(calls)
    return stream


@torch.inference_mode()
def head(source: BlockSource, hidden: Tensor, device: torch.device | str) -> Tensor:
    """The model's logits [1, T, vocab] for what leaves the last block [1, T, hidden]."""

    class Given(nn.Module):
        def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden

    blocks = block_list(source.model, source.layout)
    with _replaced_blocks(source.model, source.layout, [Given() for _ in blocks]):
        ids = torch.zeros(1, hidden.shape[1], dtype=torch.long, device=device)
        logits: Tensor = source.model(input_ids=ids, use_cache=False).logits
    return logits


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
                stream.hidden = [_first(block(hidden, **call)) for hidden, call in zip(stream.hidden, calls, strict=True)]
            elif units is None or not self.config.true_sequential:
                self._whole_block(block, prefix, stream, calls)
            else:
                for unit in units:
                    self._unit(block, prefix, unit, stream, calls)
            _check_finite(stream, prefix)
            self.source.release(index)

    def _unit(
        self, block: nn.Module, prefix: str, unit: Unit, stream: Stream, calls: list[dict[str, Any]]
    ) -> None:
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
            stream.hidden[i] = hidden + _first(output)

    def _whole_block(self, block: nn.Module, prefix: str, stream: Stream, calls: list[dict[str, Any]]) -> None:
        """Quantize a block that is only known by its structure: run it whole for every set of linears."""

        def run(i: int) -> Tensor:
            return _first(block(stream.hidden[i], **calls[i]))

        stages = discover_stages(block, prefix, lambda: run(0))
        if self.config.true_sequential:
            for stage in stages:
                self._stage(block, prefix, stage, run, stream, keep=False)
        else:
            hessians = self._hessians(block, [stage[0] for stage in stages], run, stream)
            for stage, hessian in zip(stages, hessians, strict=True):
                self._solve(block, prefix, stage, hessian.finish())
        stream.hidden = [run(i) for i in range(len(stream.hidden))]

    def _stage(
        self, block: nn.Module, prefix: str, stage: list[str], run: Callable[[int], Any], stream: Stream, *, keep: bool
    ) -> list[Tensor] | None:
        """Accumulate one Hessian, solve the linears that share it; returns their inputs if they are worth keeping."""
        if all(self.config.for_module(f"{prefix}.{name}") is None for name in stage):
            self._solve(block, prefix, stage, None)
            return None
        kept: list[Tensor] | None = [] if keep else None
        linear = block.get_submodule(stage[0])
        assert isinstance(linear, nn.Linear)
        hessian = Hessian(linear.in_features, device=linear.weight.device)
        for i in range(len(stream.hidden)):
            inputs = _input_of(linear, lambda i=i: run(i))  # type: ignore[misc]
            self._add(hessian, stream.counted(i, inputs), f"{prefix}.{stage[0]}")
            if kept is not None:
                kept.append(inputs)
                if sum(tensor.nbytes for tensor in kept) > _KEPT_TAIL_BYTES:
                    kept = None
        self._solve(block, prefix, stage, hessian.finish())
        return kept

    def _hessians(
        self, block: nn.Module, names: list[str], run: Callable[[int], Any], stream: Stream
    ) -> list[Hessian]:
        """The Hessians of several inputs from one run of every sample."""
        layers = [block.get_submodule(name) for name in names]
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
                    self._add(hessian, stream.counted(i, seen[n]), names[n])
        finally:
            for hook in hooks:
                hook.remove()
        return hessians

    def _add(self, hessian: Hessian, inputs: Tensor, name: str) -> None:
        try:
            hessian.add(inputs)
        except QquantError as error:
            raise type(error)(f"{name}: {error}") from error

    def _solve(self, block: nn.Module, prefix: str, names: list[str], hessian: Tensor | None) -> None:
        """Solve the linears that share a Hessian and put the quantized weights in their place.

        Linears with the same settings are solved as one tall matrix: rows do not see one another, so the result is
        the same and the column loop runs once.
        """
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
            layers = [block.get_submodule(name) for name in together]
            weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight
            try:
                solution = solve(weight, hessian, chosen)
            except QquantError as error:
                raise type(error)(f"{prefix}.{together[0]}: {error}") from error
            del weight
            seconds = (time.perf_counter() - began) / len(together)
            for name, layer, part in zip(together, layers, _split(solution, layers), strict=True):
                assert isinstance(layer, nn.Linear)
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
        layer.weight = nn.Parameter(solution.weight().T.contiguous().to(layer.weight.dtype).T, requires_grad=False)
        self.records.append(record)
        self.on_module(record)


def discover_stages(block: nn.Module, prefix: str, run: Callable[[], Any]) -> list[list[str]]:
    """Which linears of a block share an input, in the order in which data reaches them, found by running it once.

    Raises:
        BadModelError: a linear is not reached (an expert that the router did not choose, say).
    """
    inputs: list[Tensor] = []
    stages: list[list[str]] = []

    def note(name: str, tensor: Tensor) -> None:
        for known, stage in zip(inputs, stages, strict=True):
            if known is tensor:
                stage.append(name)
                return
        inputs.append(tensor)
        stages.append([name])

    layers = linears(block)
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    missing = sorted(layers.keys() - {name for stage in stages for name in stage})
    if missing:
        raise BadModelError(
            f"every linear of a block must see calibration data, {prefix}.{missing[0]} was not reached "
            f"({len(missing)} such); experts that a router skips are not supported"
        )
    return stages


def _input_of(layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What reaches ``layer`` when ``run`` is called; the rest of the run is cut off."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Stop

    hook = layer.register_forward_pre_hook(note)
    try:
        run()
    except _Stop:
        pass
    finally:
        hook.remove()
    return seen[0]


def _split(solution: Solution, layers: Sequence[nn.Module]) -> list[Solution]:
    """Cut a tall solution back into its layers."""
    heights = [int(layer.weight.shape[0]) for layer in layers]
    parts = zip(solution.codes.split(heights), solution.scales.split(heights), solution.zeros.split(heights), strict=True)
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


def _first(output: Any) -> Tensor:
    """The hidden states of a module's output, which some models return as the first of a tuple."""
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _check_finite(stream: Stream, prefix: str) -> None:
    for i, hidden in enumerate(stream.hidden):
        if not bool(torch.isfinite(hidden).all()):
            raise NumericError(f"activations must be finite, got NaN or Inf after {prefix} (calibration sample {i})")
