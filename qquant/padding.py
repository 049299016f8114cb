"""A model made fit to be cut over several cards: its MLPs padded with zeros where that is all it takes.

Zeros change no logit: a channel whose gate and value are 0 passes on 0, whatever the activation. What can be cut is
tensor_parallel.py's, shapes are shapes.py's, blocks sources.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qquant.config import QuantizeConfig
from qquant.errors import UsageError
from qquant.models.layouts import Layout
from qquant.shapes import model_shapes
from qquant.shards import DTYPES, PIECE, Entry, TensorSpec
from qquant.sources import StreamedModel, TensorReader
from qquant.stored_bytes import LinearShape, packed_bytes
from qquant.telling import say_once
from qquant.tensor_parallel import Packing, PackingOf, padded_width, uncut

_WIDTH = "intermediate_size"


class PaddedReader:
    """Tensors of which some get zeros behind their rows and columns; used as a ``CheckpointReader`` is.

    Args:
        base: the tensors as they are.
        shapes: name -> shape of those that get larger, in no dimension smaller than they are.
    """

    def __init__(self, base: TensorReader, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Note every shape; no tensor is read."""
        self.base, self.shapes = base, dict(shapes)
        self.entries: dict[str, Entry] = {
            name: replace(entry, spec=self._padded(name, entry.spec)) for name, entry in base.entries.items()
        }

    def _padded(self, name: str, spec: TensorSpec) -> TensorSpec:
        return TensorSpec(spec.dtype, self.shapes.get(name, spec.shape))

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return self.entries[name].spec if name in self.entries else self.base.spec(name)

    def read(self, name: str) -> Tensor:
        """The tensor in memory of its own, on the CPU."""
        tensor = self.base.read(name)
        if name not in self.shapes:
            return tensor
        padded = tensor.new_zeros(self.shapes[name])
        padded[tuple(slice(size) for size in tensor.shape)] = tensor
        return padded

    def has_rows(self, name: str) -> bool:
        """Whether ``rows`` of a tensor can be read: not of what gets zeros."""
        return name not in self.shapes and self.base.has_rows(name)

    def rows(self, name: str, places: Sequence[int]) -> Tensor:
        """Some rows of a matrix, in the order asked for, on the CPU."""
        assert self.has_rows(name), f"{name} is padded as a whole"
        return self.base.rows(name, places)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's values piece by piece, flattened: memory stays at a few pieces whatever the size."""
        if name not in self.shapes:
            yield from self.base.chunks(name)
            return
        spec, shape = self.base.spec(name), self.shapes[name]
        assert shape[1:-1] == spec.shape[1:-1] == (), "only vectors and matrices are padded"
        old, new = (1, 1) if len(shape) == 1 else (spec.shape[1], shape[1])
        rest = torch.empty(0, dtype=DTYPES[spec.dtype])
        for chunk in self.base.chunks(name):
            held = torch.cat([rest, chunk])
            rows = held.numel() // old
            rest = held[rows * old :].clone()
            padded = held.new_zeros(rows, new)
            padded[:, :old] = held[: rows * old].view(rows, old)
            yield padded.view(-1)
        missing = math.prod(shape) - spec.shape[0] * new
        for first in range(0, missing, PIECE):
            yield rest.new_zeros(min(PIECE, missing - first))


def fit_to_ranks(source: StreamedModel, config: QuantizeConfig, ranks: int) -> None:
    """Make sure that what will be quantized can be cut over so many cards.

    Where groups or packed words of the MLPs would be cut, ``source`` becomes the same model with wider MLPs, and says
    so once: same logits, a few zeros more. Attention cannot be padded so.

    Args:
        source: the original model, an adapter merged or not.
        config: how its linears will be packed, rules included.
        ranks: cards; with 1 nothing is looked at.

    Raises:
        UsageError: something does not divide that zeros do not mend: heads, groups of an attention's output, an MLP of
            a family that is only known by its structure.
    """
    if ranks < 1:
        raise UsageError(f"--tp is the number of cards that will serve the model, at least 1, got {ranks}")
    if ranks == 1:
        return

    def packing_of(name: str) -> Packing | None:
        chosen = config.for_module(name)
        return None if chosen is None else Packing(chosen.bits, chosen.group_size)

    linears = model_shapes(source.config).linears
    makers, tails = _mlp(source.layout)
    makers_here = [linear for linear in linears if _inner(linear, source.layout) in makers]
    tails_here = [linear for linear in linears if _inner(linear, source.layout) in tails]
    if tails_here:
        width = tails_here[0].inputs
        wider = padded_width(width, [*makers_here, *tails_here], packing_of, ranks)
        if wider != width:
            _widen(source, makers_here, tails_here, width, wider)
            _say(ranks, width, wider, [*makers_here, *tails_here], packing_of)
    if reason := uncut(model_shapes(source.config), packing_of, ranks):
        rule = f"--tp {ranks} needs whole heads, groups and packed words on every card"
        raise UsageError(f"{rule}, got {reason}; {_remedy(source, reason)}")


def _mlp(layout: Layout) -> tuple[set[str], set[str]]:
    """Inner names of the linears that make an MLP's channels, and of the one that reads them."""
    mlps = [unit for unit in layout.units or () if not unit.sees_positions]
    return {name for unit in mlps for stage in unit.stages[:-1] for name in stage}, {unit.tail for unit in mlps}


def _inner(linear: LinearShape, layout: Layout) -> str:
    """The name inside its block."""
    return linear.name.removeprefix(f"{layout.blocks}.").partition(".")[2]


def _widen(source: StreamedModel, makers: list[LinearShape], tails: list[LinearShape], width: int, wider: int) -> None:
    """Pad the MLPs of a model: rows of what makes their channels, columns of what reads them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for linear in makers:
        shapes[f"{linear.name}.weight"] = (wider, linear.inputs)
        if linear.bias:
            shapes[f"{linear.name}.bias"] = (wider,)
    shapes |= {f"{linear.name}.weight": (linear.outputs, wider) for linear in tails}
    # The original Qwen's key is twice the width.
    times = getattr(source.config.get_text_config(), _WIDTH) // width
    source.become(PaddedReader(source.reader, shapes), {_WIDTH: times * wider})


def _say(ranks: int, width: int, wider: int, linears: list[LinearShape], packing_of: PackingOf) -> None:
    more = 0
    for linear in linears:
        packing = packing_of(linear.name)
        whole = replace(linear, inputs=wider) if linear.tail else replace(linear, outputs=wider)
        sizes = [
            2 * one.weights if packing is None else packed_bytes(one, packing.bits, packing.group_size)
            for one in (linear, whole)
        ]
        more += sizes[1] - sizes[0]
    say_once(
        f"--tp {ranks}: MLPs are padded with zeros from {width} to {wider} channels, so that every card gets whole "
        f"groups; logits stay what they are, files get {more / 1e6:.2f} MB larger"
    )


def _remedy(source: StreamedModel, reason: str) -> str:
    if "heads" in reason:
        return "choose a number of cards that divides them"
    if source.layout.units is None:
        family = source.config.model_type
        return f"which linears of a {family} are its MLP is not known here, so nothing was padded: use fewer cards"
    return "only MLPs can be padded: use fewer cards, or a smaller --group-size"
