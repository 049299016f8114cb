"""Calibration samples: what one is, made of a caller's own token ids, checked against a vocabulary, and named.

Where they come from otherwise is calibrate.py's; no tokenizer, no text and no model here.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qquant.errors import BadDataError, UsageError
from qquant.overlap import sketch_of
from qquant.text_sources import one_line

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Sample:
    """One sequence that is run through the model."""

    input_ids: Tensor
    """[T] int64."""
    mask: Tensor
    """[T] bool; False: the token is masked for the model's attention and not counted in the Hessian."""


def samples_from_ids(
    ids: Tensor | Sequence[Sequence[int] | Tensor],
    masks: Tensor | Sequence[Sequence[int] | Tensor] | None = None,
    *,
    seq_len: int | None = None,
) -> list[Sample]:
    """Make samples of token ids that the caller already has; rows may differ in length.

    Args:
        ids: [N, T] integers, or N rows of integers. Read, never written.
        masks: the same shape, True or 1 where a token counts (an attention mask will do); None: all count.
        seq_len: cut every row to this length; None: keep it whole.

    Raises:
        BadDataError: something other than rows of integers, or masks that do not fit them.
        UsageError: seq_len below 2.
    """
    refuse_below("seq_len", 2 if seq_len is None else seq_len, 2)
    if any(isinstance(rows, Tensor) and _tensor(rows, "rows").dim() == 0 for rows in (ids, masks)):
        raise BadDataError("ids and masks must be rows of integers, got a single number; give [N, T] token ids")
    if masks is not None and len(masks) != len(ids):
        raise BadDataError(f"masks must have one row per row of ids: got {len(masks)} for {len(ids)}; give both alike")
    samples = []
    for index, row in enumerate(ids):
        tokens = _tensor(row, f"row {index} of ids")
        tokens = tokens if tokens.numel() else tokens.long()  # torch makes an empty list float
        if tokens.dim() != 1 or tokens.dtype not in _INTEGERS:
            got = f"{list(tokens.shape)} {tokens.dtype}"
            raise BadDataError(f"row {index} of ids must be a flat row of integers, got {got}; give [N, T] token ids")
        mask = torch.ones_like(tokens) if masks is None else _tensor(masks[index], f"row {index} of masks")
        if mask.shape != tokens.shape:
            got = f"{list(mask.shape)} for {list(tokens.shape)}"
            raise BadDataError(f"the mask of row {index} must have its row's shape, got {got}; give one flag per id")
        if len(odd := mask[(mask != 0) & (mask != 1)]):
            raise BadDataError(f"the mask of row {index} must hold 0 and 1, got {odd[0].item()}; give one flag per id")
        tokens, mask = tokens[:seq_len].cpu(), mask[:seq_len].cpu()
        samples.append(Sample(tokens.to(torch.int64, copy=True), mask.to(torch.bool, copy=True)))
    return samples


def check_samples(samples: Sequence[Sample], vocab_size: int) -> None:
    """Refuse samples that would calibrate nothing or that the model cannot look up.

    Args:
        samples: what load_samples or samples_from_ids returned. Read, never written.
        vocab_size: rows of the model's input embedding.

    Raises:
        BadDataError: no samples, a sample with fewer than 2 counted tokens, or an id outside the vocabulary.
    """
    if not samples:
        raise BadDataError(
            "calibration needs at least one sample, got none; give data, or method rtn, which needs none"
        )
    for index, sample in enumerate(samples):
        ids, mask = sample.input_ids, sample.mask
        if ids.dim() != 1 or ids.shape != mask.shape or ids.dtype != torch.int64 or mask.dtype != torch.bool:
            got = f"{list(ids.shape)} {ids.dtype} and {list(mask.shape)} {mask.dtype}"
            raise BadDataError(
                f"sample {index} must be [T] int64 ids and a [T] bool mask, got {got}; see samples_from_ids"
            )
        counted, length = int(mask.sum()), ids.numel()
        if counted < 2:
            got = f"all of its {length} are masked" if length > 1 and not counted else f"it has {counted} of {length}"
            raise BadDataError(
                f"sample {index} needs at least 2 counted tokens, but {got}; drop it or give a longer one"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise BadDataError(
                f"token ids must be in 0..{vocab_size - 1}, the model's vocabulary, but sample {index} has "
                f"{low if low < 0 else high}; tokenize with the tokenizer of this model"
            )


def fingerprint(samples: Sequence[Sample]) -> str:
    """Name the samples by the SHA-256 of their ids and masks, in order; it holds no text and depends on no machine."""
    digest = hashlib.sha256()
    for sample in samples:
        length = sample.input_ids.numel()
        digest.update(struct.pack(f"<{length + 1}q", length, *sample.input_ids.tolist()))
        digest.update(bytes(sample.mask.tolist()))
    return digest.hexdigest()


def data_record(samples: Sequence[Sample], also_seen: Sequence[Sample] = ()) -> dict[str, Any]:
    """What a manifest says about the samples: how many, their fingerprint, and a sketch to see overlaps by.

    Args:
        samples: what the model was calibrated on.
        also_seen: others that what came out depends on; they are in the sketch only.
    """
    sketch = sketch_of(sample.input_ids for sample in (*samples, *also_seen))
    return {"sha256": fingerprint(samples), "samples": len(samples), "sketch": sketch}


def refuse_below(name: str, value: object, least: int) -> None:
    """Raise UsageError unless an option is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}; give a larger one")


def _tensor(row: Any, where: str) -> Tensor:
    if isinstance(row, Tensor) and (row.is_meta or row.layout != torch.strided):
        raise BadDataError(f"{where} must be a dense tensor with values, got {row.layout} on {row.device}; give such")
    try:
        return torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadDataError(f"{where} must be integers, got: {one_line(error)}; give rows of token ids") from error
