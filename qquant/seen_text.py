"""What of an evaluation the candidates were calibrated on: their manifests' sketches held against its tokens.

The arithmetic is overlap.py's. A folder without a sketch, older ones and other tools' among them, says nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qquant.checkpoint import MANIFEST_NAME
from qquant.errors import BadDataError
from qquant.json_files import read_json
from qquant.overlap import NGRAM_TOKENS, Overlap, overlap_of

_log = logging.getLogger("qquant")


def seen_shares(folders: Mapping[str, Path], ids: Tensor) -> dict[str, float]:
    """Estimate how much of a text each model's calibration had seen, and warn once of those where it is much.

    Args:
        folders: label -> folder.
        ids: [tokens] int64 of the text.

    Returns:
        Label -> share of the text's distinct runs of ``NGRAM_TOKENS`` tokens, 0 to 1; labels without a sketch, or
        with a text too short for it, are missing.
    """
    found: dict[Path, Overlap | None] = {}
    striking: list[str] = []
    for label, folder in folders.items():
        if folder in found:  # one folder may have several labels
            continue
        sketch = _sketch(folder)
        found[folder] = overlap = None if sketch is None else _overlap(folder, sketch, [ids])
        if overlap is not None and overlap.striking:
            striking.append(f"{overlap.share:.0%} by {label}")
    _warn("evaluation text", striking, "evaluate on another text")
    return {label: overlap.share for label, folder in folders.items() if (overlap := found[folder]) is not None}


def seen_questions(
    folders: Mapping[str, Path], tokenizers: Mapping[str, Any], tasks: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Estimate how much of the questions of tasks each model's calibration had seen, and warn once per task.

    Questions are taken as they were published, without choices, examples or wording, which other questions share.

    Args:
        folders: label -> folder.
        tokenizers: label -> tokenizer of that folder.
        tasks: name -> questions.

    Returns:
        Label -> share of the distinct runs of ``NGRAM_TOKENS`` tokens, 0 to 1, in the task of which it is largest;
        labels without a sketch, or with questions too short for it, are missing.
    """
    shares: dict[str, float] = {}
    striking: dict[str, list[str]] = {task: [] for task in tasks}
    for label, folder in folders.items():
        sketch = _sketch(folder)
        if sketch is None:
            continue
        for task, questions in tasks.items():
            coded = (tokenizers[label](one, add_special_tokens=False, verbose=False)["input_ids"] for one in questions)
            overlap = _overlap(folder, sketch, [torch.tensor(ids, dtype=torch.int64) for ids in coded])
            if overlap is None:
                continue
            shares[label] = max(overlap.share, shares.get(label, 0.0))
            if overlap.striking:
                striking[task].append(f"{overlap.share:.0%} by {label}")
    for task, found in striking.items():
        _warn(f"questions of {task}", found, "leave that task out, or calibrate on other data")
    return shares


def _warn(what: str, striking: Sequence[str], remedy: str) -> None:
    if striking:
        _log.warning(
            "calibration and %s overlap: of the evaluation's runs of %d tokens, %s had been seen in calibration, so "
            "what quantizing costs looks smaller than it is; %s",
            what,
            NGRAM_TOKENS,
            ", ".join(striking),
            remedy,
        )


def _sketch(folder: Path) -> dict[str, Any] | None:
    """Of a folder's manifest; {} for one that is damaged."""
    path = folder / MANIFEST_NAME
    data = read_json(path).get("data") if path.is_file() else None
    sketch = data.get("sketch") if isinstance(data, dict) else None
    return sketch if sketch is None or isinstance(sketch, dict) else {}


def _overlap(folder: Path, sketch: Mapping[str, Any], rows: Sequence[Tensor]) -> Overlap | None:
    try:
        return overlap_of(sketch, *rows)
    except BadDataError as error:
        where = folder / MANIFEST_NAME
        _log.warning("%s: whether it was calibrated on the evaluation text is not known: %s", where, error)
        return None
