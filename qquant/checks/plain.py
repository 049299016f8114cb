"""The numbers of tensors that are not packed: embeddings, norms, biases, linears left alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qquant.checks.findings import Finding, problem, warning
from qquant.shards import DTYPES, CheckpointReader

_AGAIN = "get the checkpoint again"
_FLOAT16_MAX = torch.finfo(torch.float16).max
_BLANK = 128
"""Numbers of zero in a row from here on are looked at."""
_BLANK_BESIDE = 32
"""Of those, that must lie in a row which is not all zeros, where the run goes on into rows that are."""
_BLANK_BYTES = 4096
"""From here on whole rows of zeros are named: what a file system leaves of a write that was cut off."""
_DENORMAL = torch.finfo(torch.float16).tiny
"""Beside what a cut-off write left stands a number of usual size; beside numbers that ran out of exponent, none."""


def plain_values(reader: CheckpointReader, name: str, *, filled: bool, zero: bool) -> Iterator[Finding]:
    """Whether the numbers of one tensor can be meant; it is read once, piece by piece.

    Args:
        reader: the checkpoint's tensors.
        name: of a floating tensor; any other is passed over.
        filled: whether all zeros would be a fault: of matrices, and of norms that multiply.
        zero: whether anything but zeros would be: the bias of a layer that has none.
    """
    if not DTYPES[reader.spec(name).dtype].is_floating_point:
        return
    low, high, blanks = 0.0, 0.0, _Blanks()
    for chunk in reader.chunks(name):
        least, most = chunk.aminmax()
        if not bool(least.isfinite() & most.isfinite()):
            yield problem("values", name, f"numbers must be finite, got NaN or Inf; {_AGAIN}")
            return
        low, high = min(low, float(least)), max(high, float(most))
        blanks.add(chunk)
    largest = max(-low, high)
    if filled and largest == 0:
        yield problem("values", name, f"all numbers are zero, as where a tensor was never written; {_AGAIN}")
    if zero and largest > 0:
        yield problem(
            "values", name, "the model has no bias here, so a stored one must be zeros: other readers leave it out, "
            "and compute something else",
        )  # fmt: skip
    if largest > _FLOAT16_MAX:
        yield warning("values", name, f"{largest:.3g} does not fit float16, in which many readers compute")
    if filled and largest > 0 and len(reader.spec(name).shape) >= 2:
        yield from _holes(reader, name, blanks.runs())


class _Blanks:
    """Where many numbers in a row are zero, of a tensor that comes in flattened pieces."""

    def __init__(self) -> None:
        self._at, self._open = 0, 0  # numbers seen; where the zeros began that the last one ended with
        self._found: list[Tensor] = []

    def add(self, chunk: Tensor) -> None:
        """The next piece, [n]."""
        end = self._at + chunk.numel()
        blank = chunk == 0
        if bool(blank.any()):
            edges = torch.cat([torch.zeros(1, dtype=torch.bool), blank, torch.zeros(1, dtype=torch.bool)])
            runs = (edges[1:] != edges[:-1]).nonzero().view(-1, 2) + self._at
            if int(runs[0, 0]) == self._at:
                runs[0, 0] = self._open
            self._open = int(runs[-1, 0]) if int(runs[-1, 1]) == end else end
            self._found.append(_long(runs))
        else:
            self._open = end
        self._at = end

    def runs(self) -> Tensor:
        """[runs, 2], the first and the number behind the last."""
        found = torch.cat([*self._found, torch.empty(0, 2, dtype=torch.int64)])
        # What went on in the next piece was noted at the end of each.
        return found[torch.cat([found[1:, 0] != found[:-1, 0], torch.ones(len(found[:1]), dtype=torch.bool)])]


def _long(runs: Tensor) -> Tensor:
    return runs[runs[:, 1] - runs[:, 0] >= _BLANK]


def _holes(reader: CheckpointReader, name: str, runs: Tensor) -> Iterator[Finding]:
    """What was perhaps never written: runs [n, 2] of zeros that no padding explains.

    Rows of zeros at a matrix' end pad a vocabulary or an MLP, and columns of zeros the linear that reads it; rows of
    zeros elsewhere may be tokens that nobody uses. A run that begins or ends within a row is none of these.
    """
    if not len(runs):
        return
    rows, columns = reader.spec(name).shape[0], math.prod(reader.spec(name).shape[1:])
    starts, ends = runs.unbind(1)
    first, last = -(-starts // columns), ends // columns  # whole rows
    within = first > last
    head = torch.where(within, ends - starts, first * columns - starts)
    tail = torch.where(within, 0, ends - last * columns)
    least = torch.where(within, _BLANK, _BLANK_BESIDE)
    torn = (head >= least) | (tail >= least)
    if bool(torn.any()):
        starts, ends, head, tail, least = (part[torn] for part in (starts, ends, head, tail, least))
        within = within[torn]
        used, before, behind = _around(reader, name, starts, ends)
        counts = torch.cat([torch.zeros(1, dtype=torch.int64), used.cumsum(0)])
        left = starts % columns
        of_head, of_tail = counts[left + head] - counts[left], counts[tail]
        # What stands beside it in another row says nothing of this one.
        before, behind = before | (left == 0), behind | (ends % columns == 0)
        torn = ((of_head >= least) & before & (behind | ~within)) | ((of_tail >= least) & behind)
        if bool(torn.any()):
            longest = int((ends - starts)[torn].max())
            text = f"{longest} numbers in a row are zero, from within a row of the matrix on or up to within one"
            yield problem("values", name, f"{text}, as where a write was cut off; {_AGAIN}")
            return
    size = DTYPES[reader.spec(name).dtype].itemsize * columns
    inside = (last - first >= 2) & ((last - first) * size >= _BLANK_BYTES) & (last < rows)
    if bool(inside.any()):
        row, end = int(first[inside][0]), int(last[inside][0]) - 1
        yield warning("values", name, f"rows {row} to {end} are all zeros; fine only if the original's are")


def _around(reader: CheckpointReader, name: str, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which columns hold anything, [columns] bool; before and behind which runs is a number of usual size, [n] bool."""
    columns = math.prod(reader.spec(name).shape[1:])
    used, at = torch.zeros(columns, dtype=torch.bool), 0
    usual = torch.zeros(2, len(starts), dtype=torch.bool)
    for chunk in reader.chunks(name):
        end = at + chunk.numel()
        used |= torch.nn.functional.pad(chunk != 0, (at % columns, -end % columns)).view(-1, columns).any(0)
        for found, places in zip(usual, (starts - 1, ends), strict=True):
            here = (places >= at) & (places < end)
            found[here] = chunk[places[here] - at].abs() >= _DENORMAL
        at = end
    return used, usual[0], usual[1]


def tied_values(reader: CheckpointReader, name: str, original: str) -> Iterator[Finding]:
    """Whether a stored copy of a tied tensor is one."""
    same = reader.spec(name) == reader.spec(original) and all(
        torch.equal(*pair) for pair in zip(reader.chunks(name), reader.chunks(original), strict=True)
    )
    if not same:
        yield problem(
            "values", name, f"config.json ties it to {original}, and another tensor is stored; if both are meant, "
            "set tie_word_embeddings to false",
        )  # fmt: skip
