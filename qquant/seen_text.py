"""What of an evaluation's text the candidates were calibrated on: their manifests' sketches held against its tokens.

The arithmetic is overlap.py's. A folder without a sketch, older ones and other tools' among them, says nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

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
        found[folder] = overlap = _overlap(folder, ids)
        if overlap is not None and overlap.striking:
            striking.append(f"{overlap.share:.0%} by {label}")
    if striking:
        _log.warning(
            "calibration and evaluation text overlap: of the evaluation's runs of %d tokens, %s had been seen in "
            "calibration, so what quantizing costs looks smaller than it is; evaluate on another text",
            NGRAM_TOKENS,
            ", ".join(striking),
        )
    return {label: overlap.share for label, folder in folders.items() if (overlap := found[folder]) is not None}


def _overlap(folder: Path, ids: Tensor) -> Overlap | None:
    path = folder / MANIFEST_NAME
    data = read_json(path).get("data") if path.is_file() else None
    sketch = data.get("sketch") if isinstance(data, dict) else None
    if sketch is None:
        return None
    if not isinstance(sketch, dict):
        sketch = {}
    try:
        return overlap_of(sketch, ids)
    except BadDataError as error:
        _log.warning("%s: whether it was calibrated on the evaluation text is not known: %s", path, error)
        return None
