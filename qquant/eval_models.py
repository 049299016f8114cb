"""The models of an evaluation by label: what loads them, what identifies them, the rows that a report has for them.

Folders come first, in their order, and behind a quantized candidate the same with int8 activations and with an int8
head; what bitsandbytes makes of the baseline comes last. Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from qquant.baselines import BitsAndBytesKind, check_bitsandbytes, load_bitsandbytes
from qquant.checkpoint import is_quantized, load_model, load_quantized, quantization_config
from qquant.errors import DoesNotFitError, UsageError
from qquant.eval_inputs import stored_dtype
from qquant.eval_record import model_rows
from qquant.identity import model_sha256, tokenizer_sha256
from qquant.linear_kernels import place_of, steps_of
from qquant.results import ModelRow
from qquant.rounded_head import check_head_bits
from qquant.telling import OnProgress

Rounded = dict[str, int]
"""An option of ``load_quantized`` that rounds something in memory -> bits; also the field of a row that says so."""

_ROUNDED = {"activation_bits": "int{} activations", "head_bits": "an int{} head"}


def bitsandbytes_labels(folders: Mapping[str, Path], names: Sequence[str]) -> dict[str, BitsAndBytesKind]:
    """A label for the baseline in each of these kinds, checked before any work is done.

    Raises:
        UsageError: an unknown kind, bitsandbytes is missing, or the baseline is quantized already.
    """
    first, folder = next(iter(folders.items()))
    for name in names:
        check_bitsandbytes(folder, name)
    return {f"{first}-{kind}": kind for name in names for kind in get_args(BitsAndBytesKind) if kind == name}


def with_rounded(
    folders: Mapping[str, Path],
    dtype: torch.dtype,
    device: torch.device,
    *,
    activation_bits: int | None = None,
    head_bits: int | None = None,
) -> tuple[dict[str, Path], dict[str, Rounded]]:
    """The folders with every quantized candidate once more behind itself for each thing to be rounded in memory.

    Args:
        folders: by label; the first is the baseline.
        dtype: that models compute in.
        device: where they run.
        activation_bits: 8: once with rounded activations; None: no candidate is run so.
        head_bits: 8: once with a rounded output projection; None: no candidate is run so.

    Returns:
        Folders by label, and what is rounded, by the labels that are new.

    Raises:
        UsageError: no candidate is quantized, other bits, or there is no kernel that rounds activations here.
    """
    check_head_bits(head_bits)
    options = {"activation_bits": activation_bits, "head_bits": head_bits}
    wishes = {option: bits for option, bits in options.items() if bits is not None}
    found: dict[str, Path] = {}
    rounded: dict[str, Rounded] = {}
    for label, folder in folders.items():
        first = not found
        found[label] = folder
        if first or not wishes or not is_quantized(folder):
            continue
        if activation_bits is not None:  # refuses what cannot be
            bits = int(quantization_config(folder).get("bits", 0))
            steps_of(place_of(device), dtype=dtype, bits=bits, activation_bits=activation_bits)
        for option, bits in wishes.items():
            again = f"{label} with {_ROUNDED[option].format(bits)}"
            found[again], rounded[again] = folder, {option: bits}
    if wishes and not rounded:
        option = next(iter(wishes))
        raise UsageError(f"{option} is about quantized models, and no candidate is quantized; name one that is")
    return found, rounded


def loaders(
    folders: Mapping[str, Path],
    kinds: Mapping[str, BitsAndBytesKind],
    dtype: torch.dtype,
    device: torch.device,
    rounded: Mapping[str, Rounded] | None = None,
) -> dict[str, Callable[[], Any]]:
    """Functions that load the models, by label; ``rounded``: label -> what is rounded in memory, where something is."""
    first = next(iter(folders.values()))
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    place = None if device.type == "cpu" else {"": str(device)}
    again: dict[str, Any] = {"dtype": dtype, "device_map": place, "use_cache_quantization": False}
    return {
        **{label: partial(load_model, folder, **options) for label, folder in folders.items()},
        **{
            label: partial(load_quantized, folders[label], **{**again, **bits})
            for label, bits in (rounded or {}).items()
        },
        **{label: partial(load_bitsandbytes, first, kind, **options) for label, kind in kinds.items()},
    }


def identities(folders: Mapping[str, Path], tell: OnProgress) -> dict[str, str]:
    """``identity.model_sha256`` of every folder, by label; a folder under two labels is read once."""
    found: dict[Path, str] = {}
    for label, folder in folders.items():
        if folder not in found:
            found[folder] = model_sha256(folder, partial(tell, f"hashing {label}"))
    return {label: found[folder] for label, folder in folders.items()}


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
