"""The weights of a fine-tuned model: an adapter's updates, merged into each tensor of the base model as it is read.

Whoever reads through ``MergedReader`` sees the fine-tuned model and nothing else. Which update belongs to which tensor
is adapter.py; reading files is shards.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qquant.adapter import Adapter, LowRank, Update
from qquant.errors import BadModelError
from qquant.shards import DTYPES, PIECE, CheckpointReader, Entry, TensorSpec


def add_low_rank(weight: Tensor, low: LowRank, name: str, adapter: Adapter) -> None:
    """Merge a low-rank update into a weight, computed in float32 and rounded once.

    Args:
        weight: [out, in], the dtype it is stored in. Modified in place.
        low: the update.
        name: of the weight, for errors.
        adapter: holds the matrices.

    Raises:
        BadModelError: the sum does not fit the weight's dtype, or DoRA divides by the length of a zero row.

    Source: LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353, as peft computes them.
    """
    outer, inner = adapter.factors(low)
    pieces = _row_pieces(tuple(weight.shape))

    def merged(piece: slice) -> Tensor:
        return (outer[piece] @ inner).mul_(low.scale).add_(weight[piece])  # float32, in memory of its own

    magnitude = adapter.reader.read(low.magnitude).float() if low.magnitude else None
    factor: Tensor | None = None
    if magnitude is not None and low.embedding:  # [in]: a length runs over all rows
        squares = sum((merged(piece).double().square().sum(0) for piece in pieces), torch.zeros(()))
        factor = magnitude / squares.sqrt().float()
    for piece in pieces:
        values = merged(piece)
        if factor is not None:
            values *= factor
        elif magnitude is not None:
            values *= (magnitude[piece] / torch.linalg.vector_norm(values, dim=1))[:, None]
        weight[piece] = _rounded(values, weight.dtype, name, adapter)


class MergedReader:
    """The tensors of a fine-tuned model, merged as they are read; used as a ``CheckpointReader`` is.

    A merged tensor has the dtype of the stored one.

    Args:
        base: the base model's tensors.
        adapter: checked against the model.
        copies: tensors that the base stores under another name, because they were tied: copy -> original.
    """

    def __init__(self, base: CheckpointReader, adapter: Adapter, copies: Mapping[str, str]) -> None:
        """Work out every tensor's dtype and shape; none is read."""
        self.base, self.adapter, self.copies = base, adapter, dict(copies)
        self.folder, self.files, self.metadata = base.folder, base.files, base.metadata
        self.entries: dict[str, Entry] = {name: self._planned(name) for name in (*base.entries, *self.copies)}

    def _planned(self, name: str) -> Entry:
        entry = self.base.entries[self._stored(name)]
        whole = self.adapter.updates.get(name, Update()).whole
        return replace(entry, spec=TensorSpec(entry.spec.dtype, self.adapter.shapes[whole])) if whole else entry

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return self.entries[name].spec if name in self.entries else self.base.spec(name)

    def read(self, name: str) -> Tensor:
        """The merged tensor in memory of its own, on the CPU."""
        update = self.adapter.updates.get(name, Update())
        if update.whole:
            spec = self.spec(name)
            tensor = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="cpu")
            flat, first = tensor.view(-1), 0
            for values in self._whole(name, update.whole):
                flat[first : first + values.numel()] = values
                first += values.numel()
        else:
            tensor = self.base.read(self._stored(name))
        if update.low_rank:
            add_low_rank(tensor, update.low_rank, name, self.adapter)
        if update.bias:
            bias, scale = update.bias
            total = tensor.float() + self.adapter.reader.read(bias).float() * scale
            tensor = _rounded(total, tensor.dtype, name, self.adapter)
        return tensor

    def has_rows(self, name: str) -> bool:
        """Whether ``rows`` of a tensor can be read: not of what the adapter changes."""
        return name not in self.adapter.updates

    def rows(self, name: str, places: Sequence[int]) -> Tensor:
        """Some rows of a matrix, in the order asked for, on the CPU."""
        assert self.has_rows(name), f"{name} is merged as a whole"
        return self.base.rows(self._stored(name), places)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor's values piece by piece, flattened."""
        update = self.adapter.updates.get(name, Update())
        if update.whole and not update.low_rank and not update.bias:
            yield from self._whole(name, update.whole)
        elif name in self.adapter.updates:
            yield from self.read(name).reshape(-1).split(PIECE)
        else:
            yield from self.base.chunks(self._stored(name))

    def _whole(self, name: str, whole: str) -> Iterator[Tensor]:
        """A tensor that takes the stored one's place, in the stored one's dtype, piece by piece and flattened."""
        dtype = DTYPES[self.spec(name).dtype]
        for values in self.adapter.reader.chunks(whole):
            yield _rounded(values, dtype, name, self.adapter)

    def _stored(self, name: str) -> str:
        return name if name in self.base.entries else self.copies.get(name, name)


def _rounded(values: Tensor, dtype: torch.dtype, name: str, adapter: Adapter) -> Tensor:
    rounded = values.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise BadModelError(f"merged weights must be finite, {adapter.folder} makes NaN or Inf of {name} in {dtype}")
    return rounded


def _row_pieces(shape: tuple[int, ...]) -> list[slice]:
    """Consecutive rows that together are all of a tensor's."""
    step = max(1, PIECE // max(1, math.prod(shape[1:])))
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]
