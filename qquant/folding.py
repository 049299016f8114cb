"""Channels of a decoder block rescaled or turned so that they round better, folded into weights: the function stays.

Two folds, both free at run time. Scaling (after AWQ, arXiv:2306.00978): linears multiply the columns of strong inputs,
and what makes these inputs (a norm, the values, the MLP's ungated branch) divides by the same. How far is judged by how
much stronger than usual an input is and how much weaker its weights are. Scales are powers of two, so that no product
changes by a single bit; measured, finer ones gain nothing. Rotation (R2 of SpinQuant, arXiv:2405.16406, and QuaRot,
arXiv:2404.00456): an orthogonal matrix per head between the values and the projection that reads them.

R1, a rotation of the residual stream, is left out: it changes the embeddings, and where these are tied to the output
projection, the norm in front of which has to be merged into it, it unties them. When folds happen is walk.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from qquant.affine import choose_qparams, dequantize, quantize
from qquant.config import QuantizeConfig
from qquant.errors import NumericError
from qquant.hooks import counted_rows, inputs_seen
from qquant.models.layouts import Layout, Unit, linears
from qquant.telling import say_once

STRENGTHS = (0.5, 0.75, 1.0)
"""Shares of a channel's imbalance that are tried; 0, no scaling, is what they have to beat."""
DEAD_ZONES = (0.0, 1.0)
"""Octaves of imbalance that are let be."""
LEAST_GAIN = 0.1
"""Share of the rounding error that a scaling must save; models without outliers stay far under it."""
TOKENS = 4096
"""Tokens that scales are chosen by."""

_FARTHEST = 12  # largest exponent of two
_ROWS = 256  # of a linear that scales are judged by, at least, where it has them
_SHRINK_FACTORS = (1.0, 0.9, 0.8, 0.7)
# The linear whose last rows are the values, and the MLP's branch without an activation, by the linear that reads them.
_VALUES = {"self_attn.o_proj": "self_attn.v_proj", "attn.c_proj": "attn.c_attn"}
_UNGATED = {"mlp.down_proj": "mlp.up_proj", "mlp.c_proj": "mlp.w1"}


@dataclass(frozen=True)
class Passing:
    """One sample on its way through a block."""

    hidden: Tensor
    """[1, T, hidden], what enters the block."""
    call: Mapping[str, Any]
    """The block's keyword arguments."""
    mask: Tensor | None
    """[T] bool, False tokens do not count; None: all count."""

    def counted(self, states: Tensor) -> Tensor:
        """The rows of [1, T, K] that count: [T', K]."""
        return counted_rows(states, self.mask)


@dataclass(frozen=True)
class Seam:
    """A set of channels, who makes them and who reads them."""

    maker: str
    """A norm, or a linear whose last ``count`` rows make the channels."""
    readers: tuple[str, ...]
    """Linears that share these channels as their input."""
    count: int
    """Channels of the maker."""
    head: int = 0
    """Of values: channels per head. Readers see each head of them several times over, once per query head."""


@dataclass(frozen=True)
class Folded:
    """What was folded into one block."""

    changed: dict[str, Tensor]
    """Full name -> every tensor to be stored anew, as it is to be stored; packed weights are not among them."""
    exponents: dict[str, list[int]]
    """Maker of channels -> by which power of two each of them was divided; of those that were scaled."""


def foldable(layout: Layout, blocks: int) -> set[str]:
    """Full names of all tensors but quantized linears' weights that a fold may change."""
    makers = [*_VALUES.values(), *_UNGATED.values(), *(unit.norm for unit in layout.units or ())]
    return {
        f"{layout.blocks}.{i}.{name}.{leaf}" for i in range(blocks) for name in makers for leaf in ("weight", "bias")
    }


def seams(block: nn.Module, units: Sequence[Unit], is_quantized: Callable[[str], bool]) -> Iterator[Seam]:
    """Where a block of a known family may be folded: every linear at a seam is quantized."""
    layers = linears(block)
    for unit in units:
        first, tail = unit.stages[0], unit.tail
        if all(is_quantized(name) for name in first):
            yield Seam(unit.norm, first, layers[first[0]].in_features)
        maker = _VALUES.get(tail) or _UNGATED[tail]
        if not (is_quantized(maker) and is_quantized(tail)):
            continue
        if tail in _UNGATED:
            yield Seam(maker, (tail,), layers[tail].in_features)
            continue
        rows = layers[maker].out_features
        # Queries, keys and values of one projection are equally many.
        count = rows if maker.endswith("v_proj") else rows // 3
        head: Any = block.get_submodule(unit.module).head_dim
        yield Seam(maker, (tail,), count, int(head))


def fold_block(
    block: nn.Module,
    layout: Layout,
    prefix: str,
    config: QuantizeConfig,
    samples: Sequence[Passing],
    outputs: dict[str, Tensor],
    stored_dtype: Callable[[str], torch.dtype | None],
    exponents: Mapping[str, Sequence[int]] | None = None,
) -> Folded:
    """Do what the method asks for to one block.

    Args:
        block: with its original weights; changed in place.
        layout: of the model.
        prefix: full name of the block.
        config: its recipe; rules tell which linears are left alone, and nothing is folded across these.
        samples: of the original model, as they enter the block.
        outputs: full name of a linear -> blocks of E[g g^T] of its outputs; changed along with the outputs.
        stored_dtype: full name of a tensor -> the dtype in which it will be stored, None: that of the block. What is
            stored is also what is computed with.
        exponents: of a fold of this block that was done before, to be done again; ``samples`` are not read then.

    Returns:
        What was done.
    """
    recipe = config.recipe
    if layout.units is None:
        say_once(
            "scaling and rotation were not folded into the weights: this family's channels are not known; "
            f'of method "{config.method}" the rest is done',
            key="no folding",
        )
        return Folded({}, {})
    names = list(linears(block))
    felt = {name: outputs[f"{prefix}.{name}"] for name in names if f"{prefix}.{name}" in outputs}
    settings = {name: config.for_module(f"{prefix}.{name}") for name in names}
    folder = Folder(block, layout.units, settings, lambda name: stored_dtype(f"{prefix}.{name}"), felt)
    if recipe.scaling:
        folder.scale(samples, exponents)
    if recipe.rotation:
        folder.rotate()
    outputs.update({f"{prefix}.{name}": moment for name, moment in felt.items()})
    return Folded({f"{prefix}.{name}": tensor for name, tensor in folder.changed.items()}, folder.exponents)


class Folder:
    """Folds one block.

    Args:
        block: with its original weights; changed in place.
        units: of its family.
        settings: inner name of a linear -> how it will be quantized, None: left alone.
        dtype_of: inner name of a tensor -> the dtype it is stored in; what is stored is also what is computed with.
        outputs: inner name of a linear -> blocks of E[g g^T] of its outputs; changed along with them.

    Attributes:
        changed: tensors that have to be stored anew, by inner name; weights of quantized linears are not among them.
        exponents: as ``Folded`` has them.
    """

    def __init__(
        self,
        block: nn.Module,
        units: Sequence[Unit],
        settings: Mapping[str, QuantizeConfig | None],
        dtype_of: Callable[[str], torch.dtype | None],
        outputs: dict[str, Tensor],
    ) -> None:
        """Find the seams."""
        self.block, self.settings, self.dtype_of, self.outputs = block, settings, dtype_of, outputs
        self.seams = list(seams(block, units, lambda name: settings[name] is not None))
        self.changed: dict[str, Tensor] = {}
        self.exponents: dict[str, list[int]] = {}

    def rotate(self) -> None:
        """Turn each head's values by one orthogonal matrix, and the columns that read them."""
        for seam in self.seams:
            if seam.head:
                turn = orthogonal(seam.head)
                self._change_maker(seam, partial(_turn_rows, turn))
                layer = self._linear(seam.readers[0])
                columns = _turn_rows(turn, _wide(layer.weight).T).T
                layer.weight = nn.Parameter(columns.to(layer.weight.dtype), requires_grad=False)
                self._turn_outputs(seam, turn)

    def scale(self, samples: Sequence[Passing], exponents: Mapping[str, Sequence[int]] | None = None) -> None:
        """Scale channels wherever that saves enough of the readers' rounding error.

        Args:
            samples: of the original model, as they enter the block.
            exponents: as they were chosen before; ``samples`` are not read then.
        """
        measured = _inputs(self.block, [seam.readers[0] for seam in self.seams], samples) if exponents is None else {}
        for seam in self.seams:
            if exponents is None:
                size, power = measured[seam.readers[0]]
                factors = self._best(seam, self._as_made(seam, size), power)
            else:
                known = exponents.get(seam.maker)
                device = self._linear(seam.readers[0]).weight.device
                factors = None if known is None else torch.tensor(known, device=device).double().exp2()
            if factors is None:
                continue
            self.exponents[seam.maker] = factors.log2().int().tolist()
            factors = self._as_stored(seam, factors.double())
            for name in seam.readers:
                layer = self._linear(name)
                columns = _wide(layer.weight)
                columns = columns * self._as_read(seam, factors).to(columns.dtype)
                layer.weight = nn.Parameter(columns.to(layer.weight.dtype), requires_grad=False)
            self._change_maker(seam, partial(_divide, factors))
            self._scale_outputs(seam, factors)

    def _best(self, seam: Seam, size: Tensor, power: Tensor) -> Tensor | None:
        """The factors [count] that leave the readers the least rounding error, None where none is worth it."""
        layers = [(self._linear(name), self.settings[name]) for name in seam.readers]

        def loss(factors: Tensor) -> float:
            read = self._as_read(seam, factors)
            try:
                return sum(rounding_error(layer.weight, read, power, c) for layer, c in layers if c)
            except NumericError:  # too large for float16 scales; where they are so without factors, solving says so
                return math.inf

        ones = torch.ones_like(size)
        least, best = loss(ones) * (1 - LEAST_GAIN), None
        weights = torch.cat([layer.weight for layer, _ in layers]).abs().mean(0).to(size.dtype)
        octaves = (_octaves(size) - _octaves(self._as_made(seam, weights))) / 2
        for zone, strength in product(DEAD_ZONES, STRENGTHS):
            factors = ((octaves - zone).clamp(min=0) * strength).round().clamp(max=_FARTHEST).exp2()
            if not torch.equal(factors, ones) and (found := loss(factors)) < least:
                least, best = found, factors
        return best

    def _as_stored(self, seam: Seam, factors: Tensor) -> Tensor:
        """The factors by which a norm's weight, as stored, becomes smaller: float16 runs out of small numbers."""
        if seam.maker in self.settings:
            return factors
        weight: Any = self.block.get_submodule(seam.maker).weight
        divided = (weight.double() / factors).to(self.dtype_of(f"{seam.maker}.weight") or weight.dtype).double()
        return torch.where(divided != 0, weight.double() / divided, factors)

    @staticmethod
    def _as_made(seam: Seam, of_inputs: Tensor) -> Tensor:
        """The mean of something over the inputs [in] that are one channel of the maker: [count]."""
        side = seam.head or 1
        # [heads of values, query heads that read each, channels of a head]
        return of_inputs.reshape(seam.count // side, -1, side).mean(1).flatten()

    def _as_read(self, seam: Seam, factors: Tensor) -> Tensor:
        """Factors of the maker's channels as the readers see them: [in]."""
        if not seam.head:
            return factors
        times = self._linear(seam.readers[0]).in_features // seam.count
        return factors.reshape(-1, 1, seam.head).expand(-1, times, -1).reshape(-1)

    def _change_maker(self, seam: Seam, change: Callable[[Tensor], Tensor]) -> None:
        """Change what makes the channels: [count, columns]."""
        maker = self.block.get_submodule(seam.maker)
        for leaf, tensor in list(maker.named_parameters(recurse=False)):
            rows = _wide(tensor).reshape(tensor.shape[0], -1).clone()
            rows[-seam.count :] = change(rows[-seam.count :])
            full, found = f"{seam.maker}.{leaf}", rows.reshape(tensor.shape)
            if full.removesuffix(".weight") not in self.settings:
                stored = found.to(self.dtype_of(full) or tensor.dtype)
                self.changed[full] = found = stored
            setattr(maker, leaf, nn.Parameter(found.to(tensor.dtype), requires_grad=False))

    def _scale_outputs(self, seam: Seam, factors: Tensor) -> None:
        """Outputs so much smaller are felt so much more."""
        moment = self.outputs.get(seam.maker)
        if moment is not None:
            all_rows = torch.ones(moment.shape[0] * moment.shape[1], dtype=moment.dtype, device=moment.device)
            all_rows[-seam.count :] = factors.to(moment)
            by = all_rows.reshape(moment.shape[:2])
            self.outputs[seam.maker] = moment * by[:, :, None] * by[:, None, :]

    def _turn_outputs(self, seam: Seam, turn: Tensor) -> None:
        """Turned with their outputs; what a turn moves out of the blocks that are kept is lost."""
        moment = self.outputs.get(seam.maker)
        if moment is not None:
            side = moment.shape[1]
            whole = torch.block_diag(*moment.double())
            part = whole[-seam.count :, -seam.count :]
            part.copy_(_turn_rows(turn, _turn_rows(turn, part).T))
            kept = [whole[at : at + side, at : at + side] for at in range(0, whole.shape[0], side)]
            self.outputs[seam.maker] = torch.stack(kept).to(moment.dtype)

    def _linear(self, name: str) -> nn.Linear:
        layer = self.block.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        return layer


def orthogonal(size: int) -> Tensor:
    """[size, size] float64: Hadamard's matrix where size is a power of two, else a random one, always the same."""
    if size & (size - 1):
        random = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
        q, r = torch.linalg.qr(random)
        signed: Tensor = q * r.diagonal().sign()
        return signed
    found = torch.ones(1, 1, dtype=torch.float64)
    while found.shape[0] < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / math.sqrt(size)


def rounding_error(weight: Tensor, factors: Tensor, power: Tensor, config: QuantizeConfig) -> float:
    """What rounding ``weight * factors`` to nearest costs the outputs: that of 256 to 511 of them, times all by these.

    Each group's range is the best of a few; inputs count by their power, as if they came independently.

    Args:
        weight: [out, in].
        factors: [in].
        power: [in], E[x^2] of the inputs before they are divided.
        config: bits, group size and symmetry.
    """
    rows = weight[:: max(1, weight.shape[0] // _ROWS)].to(power.dtype)
    size = weight.shape[1] if config.group_size == -1 else config.group_size
    grouped = (rows * factors).reshape(rows.shape[0], -1, size)
    counts = (power / factors**2).reshape(-1, size)
    least: Tensor | None = None
    for shrink in _SHRINK_FACTORS:
        scale, zero = choose_qparams(
            grouped, bits=config.bits, sym=config.sym, shrink=shrink, signed=config.recipe.signed
        )
        codes = quantize(grouped, scale[..., None], zero[..., None], config.bits)
        error = dequantize(codes, scale[..., None], zero[..., None]) - grouped
        loss = (error * error * counts).sum(-1)
        least = loss if least is None else torch.minimum(least, loss)
    assert least is not None
    return float(least.sum()) * weight.shape[0] / rows.shape[0]


def _octaves(sizes: Tensor) -> Tensor:
    """How far above the median, as powers of two; a channel that is never used counts as usual."""
    logs = sizes.log2()
    logs -= logs.median()
    return torch.where(logs.isfinite(), logs, 0)


def _wide(tensor: Tensor) -> Tensor:
    """Vectors in float64; matrices in float32 or wider, as twice their memory would be felt."""
    least = torch.float64 if tensor.ndim == 1 else torch.float32
    return tensor.detach().to(torch.promote_types(tensor.dtype, least))


def _divide(factors: Tensor, rows: Tensor) -> Tensor:
    return rows / factors.to(rows.dtype)[:, None]


def _turn_rows(turn: Tensor, rows: Tensor) -> Tensor:
    """Every head's rows of [heads * size, columns] turned."""
    by_head = rows.reshape(-1, turn.shape[0], rows.shape[1])
    return (turn.to(rows) @ by_head).reshape(rows.shape)


def _inputs(block: nn.Module, names: Sequence[str], samples: Sequence[Passing]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean |x| and mean x^2 [in] float32 of the inputs of some linears."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    tokens = 0
    for sample in samples:
        with inputs_seen([block.get_submodule(name) for name in names]) as seen:
            block(sample.hidden, **sample.call)
        for place, inputs in seen.items():
            name = names[place]
            rows = sample.counted(inputs).to(torch.float32)
            sizes, powers = sums.get(name, (rows.new_zeros(()), rows.new_zeros(())))
            sums[name] = (sizes + rows.abs().sum(0), powers + rows.square().sum(0))
        tokens += sample.counted(sample.hidden).shape[0]
    return {name: (sizes / max(1, tokens), powers / max(1, tokens)) for name, (sizes, powers) in sums.items()}
