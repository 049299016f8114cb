"""What an evaluation is run on: folders by label, one dtype, a window that every model has room for, a text as ids.

Models are not loaded here; what is done with all this is the door's, eval.py.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qquant.calibrate import check_tokenizer
from qquant.errors import BadDataError, UsageError
from qquant.measure import DECODE_ROUNDS, DECODE_TOKENS
from qquant.shards import DTYPES, CheckpointReader
from qquant.sources import compute_dtype, load_tokenizer, pick_dtype, read_config, resolve_folder

OWN_TEXT = "eval.txt"
"""A text of this name in the baseline's folder is evaluated on when no other is named."""


def labelled(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their own names (a hub snapshot's by its model's), numbered where a name comes twice."""
    result: dict[str, Path] = {}
    for folder in folders:
        place = folder.resolve()
        name = place.parent.parent.name.rpartition("--")[2] if place.parent.name == "snapshots" else place.name
        number = sum(label == name or label.startswith(f"{name}#") for label in result) + 1
        result[name if number == 1 else f"{name}#{number}"] = folder
    return result


def common_dtype(baseline: Path, name: str, device: torch.device) -> torch.dtype:
    """The one dtype that every model computes in."""
    asked = pick_dtype(name)
    return asked or compute_dtype(stored_dtype(baseline), device)


def stored_dtype(folder: Path) -> torch.dtype:
    """What config.json calls the dtype of the weights, or where it is silent, that of most matrices in the files."""
    named = getattr(read_config(folder), "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    found = [DTYPES[e.spec.dtype] for e in CheckpointReader(folder).entries.values() if len(e.spec.shape) > 1]
    floating = [dtype for dtype in found if dtype.is_floating_point]
    return max(set(floating), key=floating.count, default=torch.float32)


def prompt_length(folders: Iterable[Path], seq_len: int) -> int:
    """How long a prompt leaves every model the positions that timing decodes into; 0: none. Refuses a long window."""
    named = [getattr(read_config(folder).get_text_config(), "max_position_embeddings", None) for folder in folders]
    limit = min((int(positions) for positions in named if positions), default=None)
    if limit is None:
        return seq_len
    if seq_len > limit:
        raise UsageError(f"seq_len must not exceed what the models were made for, {limit} tokens, got {seq_len}")
    return max(0, min(seq_len, limit - DECODE_TOKENS * DECODE_ROUNDS))


def read_text(
    path: Path, baseline: Path, *, longest: int, max_tokens: int | None, option: str = "seq_len"
) -> tuple[Tensor, str]:
    """A text as the baseline's tokenizer cuts it, without special tokens.

    Args:
        path: UTF-8 text, gzipped if named ``.gz``.
        baseline: folder with the tokenizer.
        longest: tokens of the longest window; the text must have more.
        max_tokens: tokens used from its start; None: all.
        option: what ``longest`` came from, for the message of a text that is too short.

    Returns:
        [tokens] int64, and the sha256 of the file.

    Raises:
        BadDataError: no such text, no UTF-8, or too short.
        BadModelError: no usable tokenizer.
    """
    tokenizer = load_tokenizer(baseline)
    if warning := check_tokenizer(tokenizer, baseline):
        logging.getLogger("qquant").warning("%s", warning)
    if not path.is_file():
        raise BadDataError(f"evaluation data must be one text file, and {path} is none")
    content = path.read_bytes()
    try:
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadDataError(f"evaluation data must be UTF-8 text (gzipped if named .gz), {path}: {error}") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    if len(ids) <= longest:
        raise BadDataError(
            f"a text must have more than {option} ({longest}) tokens, {path.name} gives {len(ids)}; "
            f"lower --{option.replace('_', '-')}"
            + ("" if option == "seq_len" else " or give a longer text with --data")
        )
    return torch.tensor(ids, dtype=torch.int64), hashlib.sha256(content).hexdigest()


def own_text(baseline: str) -> Path:
    """The evaluation text that lies in a model's folder; raises UsageError if there is none."""
    path = resolve_folder(baseline) / OWN_TEXT
    if not path.is_file():
        raise UsageError(f"an evaluation needs a text, and {baseline} brings no {OWN_TEXT}; give --data")
    return path
