"""Running a model up to its blocks, one block at a time: what enters each, and what reaches each linear inside.

Calibration samples travel as a ``Stream``. What is done with the inputs (Hessians, solving) is walk.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qquant.activations import Activations
from qquant.calibrate import Sample
from qquant.errors import BadModelError, NumericError
from qquant.hooks import counted_rows
from qquant.models.layouts import Layout, block_list, linears


class BlockSource(Protocol):
    """Where the walk gets its blocks from."""

    model: nn.Module
    layout: Layout

    def load(self, index: int) -> nn.Module:
        """Block ``index`` with its weights in memory."""

    def prefetch(self, index: int) -> None:
        """Block ``index`` will be asked for soon, if there is one."""

    def release(self, index: int) -> None:
        """The walk is done with the block."""

    def load_outside(self, *, with_head: bool) -> None:
        """What stands outside the blocks can be run; the output projection only if it is wanted."""

    def release_outside(self) -> None:
        """What stands outside the blocks is not needed for a while."""


@dataclass
class Stream:
    """The calibration samples as they stand before the current block."""

    hidden: list[Tensor] | Activations
    """Per sample: [1, T, hidden], in the compute dtype."""
    masks: list[Tensor | None]
    """Per sample: [T] bool, False tokens are left out of Hessians; None: all count."""
    calls: list[list[dict[str, Any]]]
    """Per sample, per block: the keyword arguments the model gives the block (shared between samples of one length)."""
    lengths: list[int]
    """Per sample: T."""

    def counted(self, index: int, inputs: Tensor) -> Tensor:
        """The rows of sample ``index``'s inputs [1, T, K] that count: [T', K]."""
        return counted_rows(inputs, self.masks[index])

    def spread(self, tokens: int) -> list[int]:
        """Samples, about evenly spaced, that hold about so many tokens; at least one.

        Each lies by one further on in its stretch than the one before, so that they are not all in one rank's lane.
        """
        count = len(self.lengths)
        wanted = max(1, min(count, round(tokens * count / max(1, sum(self.lengths)))))
        return [n * count // wanted + n % (count // wanted) for n in range(wanted)]


class _Stop(Exception):
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


@torch.no_grad()
def capture(
    source: BlockSource,
    samples: Sequence[Sample],
    device: torch.device | str,
    *,
    keep: Callable[[int, Tensor], None] | None = None,
) -> Stream:
    """Run everything before the first block and note what each block will be called with.

    Args:
        source: the model; its embeddings must be in memory, its blocks need not.
        samples: calibration samples.
        device: where the model's embeddings are.
        keep: receives the number of each sample and its hidden states, which are then not kept in the stream.

    Returns:
        The stream in front of block 0.
    """
    model, layout = source.model, source.layout
    blocks = block_list(model, layout)
    recorders = [_Recorder(block, index == len(blocks) - 1) for index, block in enumerate(blocks)]
    held: list[Tensor] = []
    stream = Stream(held, [], [], [len(sample.input_ids) for sample in samples])
    known: dict[int, list[dict[str, Any]]] = {}
    with _replaced_blocks(model, layout, recorders):
        for number, sample in enumerate(samples):
            ids, mask = sample.input_ids.to(device)[None], sample.mask
            whole = bool(mask.all())
            stream.masks.append(None if whole else mask)
            try:
                model(input_ids=ids, attention_mask=None if whole else mask.long().to(device)[None], use_cache=False)
            except _Stop:
                pass
            except (IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
                if layout.units is not None:
                    raise
                raise BadModelError(
                    f"blocks known only by their structure must pass one hidden-states tensor on; "
                    f"{type(model).__name__} does not work that way ({type(error).__name__}: {error})"
                ) from error
            hidden = recorders[0].hidden
            if hidden is None:
                raise BadModelError(f"the model never called the first of its blocks, {layout.blocks}.0")
            length = ids.shape[1]
            calls = known.get(length) if whole else None
            if calls is None:
                calls = [recorder.call for recorder in recorders]
                if whole:
                    known[length] = calls
            (keep or (lambda _, tensor: held.append(tensor)))(number, hidden.clone())
            stream.calls.append(calls)
    return stream


def head(source: BlockSource, hidden: Tensor, device: torch.device | str) -> Tensor:
    """The model's logits [1, T, vocab] for what leaves the last block [1, T, hidden]; gradients flow if asked for."""

    class Given(nn.Module):
        def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden

    blocks = block_list(source.model, source.layout)
    with _replaced_blocks(source.model, source.layout, [Given() for _ in blocks]):
        ids = torch.zeros(1, hidden.shape[1], dtype=torch.long, device=device)
        logits: Tensor = source.model(input_ids=ids, use_cache=False).logits
    return logits


def check_finite(hidden: Iterable[tuple[int, Tensor]], name: str) -> None:
    """Refuse what leaves a block, the number and [1, T, hidden] of each sample, if not all finite: ``NumericError``."""
    for i, sample in hidden:
        if not bool(torch.isfinite(sample).all()):
            raise NumericError(f"activations must be finite, got NaN or Inf after {name} (calibration sample {i})")


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


def input_of(layer: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What reaches ``layer`` when ``run`` is called; the rest of the run is cut off."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Stop

    hook = layer.register_forward_pre_hook(note)
    try:
        with suppress(_Stop):
            run()
    finally:
        hook.remove()
    return seen[0]
