"""The numbers of tensors that are not packed: embeddings, norms, biases, linears left alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qquant.checks.findings import Finding, problem, warning
from qquant.shards import DTYPES, CheckpointReader

_AGAIN = "get the checkpoint again"
_FLOAT16_MAX = torch.finfo(torch.float16).max


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
    low, high = 0.0, 0.0
    for chunk in reader.chunks(name):
        least, most = chunk.aminmax()
        if not bool(least.isfinite() & most.isfinite()):
            yield problem("values", name, f"numbers must be finite, got NaN or Inf; {_AGAIN}")
            return
        low, high = min(low, float(least)), max(high, float(most))
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
