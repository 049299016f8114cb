"""The models of an evaluation by label: what loads them, what identifies them, the rows that a report has for them.

Folders come first, in their order; what bitsandbytes makes of the baseline comes last. Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from qquant.baselines import BitsAndBytesKind, check_bitsandbytes, load_bitsandbytes
from qquant.checkpoint import is_quantized, load_model, quantization_config
from qquant.errors import DoesNotFitError
from qquant.eval_inputs import stored_dtype
from qquant.eval_record import model_rows
from qquant.identity import model_sha256, tokenizer_sha256
from qquant.results import ModelRow
from qquant.telling import OnProgress


def bitsandbytes_labels(folders: Mapping[str, Path], names: Sequence[str]) -> dict[str, BitsAndBytesKind]:
    """A label for the baseline in each of these kinds, checked before any work is done.

    Raises:
        UsageError: an unknown kind, bitsandbytes is missing, or the baseline is quantized already.
    """
    first, folder = next(iter(folders.items()))
    for name in names:
        check_bitsandbytes(folder, name)
    return {f"{first}-{kind}": kind for name in names for kind in get_args(BitsAndBytesKind) if kind == name}


def loaders(
    folders: Mapping[str, Path], kinds: Mapping[str, BitsAndBytesKind], dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Any]]:
    """Functions that load the models, by label."""
    first = next(iter(folders.values()))
    return {
        **{label: partial(load_model, folder, dtype=dtype, device=device) for label, folder in folders.items()},
        **{label: partial(load_bitsandbytes, first, kind, dtype=dtype, device=device) for label, kind in kinds.items()},
    }


def identities(folders: Mapping[str, Path], tell: OnProgress) -> dict[str, str]:
    """``identity.model_sha256`` of every folder, by label."""
    return {label: model_sha256(folder, partial(tell, f"hashing {label}")) for label, folder in folders.items()}


def tokenizers(folders: Mapping[str, Path]) -> dict[str, str]:
    """``identity.tokenizer_sha256`` of every folder, by label."""
    return {label: tokenizer_sha256(folder) for label, folder in folders.items()}


def rows(folders: Mapping[str, Path], **measured: Any) -> tuple[ModelRow, ...]:
    """The report's rows: what the folders are, and what ``eval_record.model_rows`` takes besides."""
    keys = {label: quantization_keys(folder) for label, folder in folders.items()}
    dtypes = {label: stored_dtype(folder) for label, folder in folders.items()}
    return model_rows(folders, keys, dtypes, **measured)


def quantization_keys(folder: Path) -> dict[str, Any]:
    """What a folder says about its quantization, checked; empty for a plain model."""
    return quantization_config(folder) if is_quantized(folder) else {}


@contextmanager
def fits(otherwise: str) -> Iterator[None]:
    """Torch's out-of-memory error as ours, which says ``otherwise``."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DoesNotFitError(f"{otherwise}: {error}") from error
