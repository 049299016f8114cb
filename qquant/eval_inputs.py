"""What an evaluation is run on: folders by label, one dtype, a window that every model has room for, a text as ids.

Models are not loaded here; what is done with all this is the door's, eval.py.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qquant.calibrate import check_tokenizer
from qquant.console import printable
from qquant.errors import BadDataError, UsageError
from qquant.measure import DECODE_ROUNDS, DECODE_TOKENS
from qquant.model_folder import load_tokenizer, read_config, resolve_folder
from qquant.shards import DTYPES, CheckpointReader
from qquant.sources import compute_dtype, pick_device, pick_dtype

OWN_TEXT = "eval.txt"
"""A text of this name in the baseline's folder is evaluated on when no other is named."""


class Inputs(NamedTuple):
    """All that an evaluation needs before it loads a model."""

    folders: dict[str, Path]
    """By label; the first is the baseline."""
    dtype: torch.dtype
    """That every model computes in."""
    device: torch.device
    ids: Tensor
    """[tokens] int64 of the text."""
    digest: str
    """sha256 of the text's file."""


def read_inputs(
    names: Sequence[str | Path],
    data: str | Path,
    longest: int,
    *,
    option: str = "seq_len",
    max_tokens: int | None,
    device: str,
    dtype: str,
    seed: int,
    threads: int | None,
    check: Callable[[Iterable[Path]], None] = lambda folders: None,
) -> Inputs:
    """Resolve the folders, read the text, and set torch's seed and threads for the whole process.

    Args:
        names: folders or hub ids; the first is the baseline, whose tokenizer cuts the text.
        data: see ``read_text``.
        longest: tokens of the longest window; the text must have more.
        option: what ``longest`` came from, for messages.
        max_tokens: use only this many tokens from the start of the text.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        dtype: "auto" or a compute dtype.
        seed: of torch's generators.
        threads: CPU threads; None leaves them alone.
        check: refuses folders that cannot be evaluated, before the text is read.

    Raises:
        QquantError: bad options, model or data.
    """
    place = pick_device(device)
    folders = labelled([resolve_folder(str(name)) for name in names])
    baseline = next(iter(folders.values()))
    compute = common_dtype(baseline, dtype, place)
    check(folders.values())
    ids, digest = read_text(Path(data), baseline, longest=longest, max_tokens=max_tokens, option=option)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    return Inputs(folders, compute, place, ids, digest)


def refuse_below_one(**counts: int | None) -> None:
    """Raise UsageError unless every count is at least 1, or None."""
    if any(count is not None and count < 1 for count in counts.values()):
        names, values = ([*map(str, part)] for part in (counts, counts.values()))
        shown = [f"{', '.join(part[:-1])} and {part[-1]}" for part in (names, values)]
        raise UsageError(f"{shown[0]} must be at least 1, got {shown[1]}")


def labelled(folders: Sequence[Path]) -> dict[str, Path]:
    """Folders by their own names (a hub snapshot's by its model's), numbered where a name comes twice."""
    result: dict[str, Path] = {}
    for folder in folders:
        place = folder.resolve()
        name = place.parent.parent.name.rpartition("--")[2] if place.parent.name == "snapshots" else place.name
        name = " ".join(printable(name).split())  # it stands in headings and tables of reports
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
