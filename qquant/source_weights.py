"""Several sources of calibration data and their weights: as they are typed, as they are called, and in whole samples.

Nothing is read here; whether a file of a name exists is all that is asked of the disk.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from qquant.errors import UsageError
from qquant.text_sources import at_home

Sources = str | Path | Sequence[str | Path] | Mapping[str, float] | Mapping[Path, float]
"""One source, several of equal weight, or source -> weight."""


def weighted(sources: Sources) -> dict[str | Path, float]:
    """Source -> weight, in the order given.

    Raises:
        UsageError: none, one that is named twice, or a weight that is not a number above zero.
    """
    if isinstance(sources, str | Path):
        return {sources: 1.0}
    pairs: Iterable[tuple[str | Path, float]]
    pairs = sources.items() if isinstance(sources, Mapping) else ((source, 1.0) for source in sources)
    found: dict[str | Path, float] = {}
    for source, weight in pairs:
        if not isinstance(source, str | Path):
            raise UsageError(f"a source must be a path or a hub id, got {type(source).__name__}; give its name")
        if str(source) in map(str, found):
            raise UsageError(f"a source must be named once, got {source} twice; give it a weight, as {source}=2")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise UsageError(f"a weight must be a number above zero, got {weight!r} for {source}; or leave it out")
        found[source] = float(weight)
    if not found:
        raise UsageError("calibration needs a source, got none; name a file")
    return found


def parse_sources(words: Sequence[str]) -> dict[str, float]:
    """``en.txt`` and ``zh.jsonl=2`` as typed: source -> weight.

    A hub id holds no ``=``, and what is behind the last one counts as a weight only if it is a number; a file that
    exists under exactly the name that was typed is that file.

    Raises:
        UsageError: as ``weighted``.
    """
    found: dict[str, float] = {}
    for word in words:
        name, equals, number = word.rpartition("=")
        weight = _number(number)
        if not equals or not name or weight is None or os.path.exists(at_home(word)):
            name, weight = word, 1.0
        if name in found:
            raise UsageError(f"a source must be named once, got {name} twice; give it a weight, as {name}=2")
        found |= {name: weight}
    return {str(source): weight for source, weight in weighted(found).items()}


def sample_counts(weights: Mapping[str | Path, float], n_samples: int) -> list[int]:
    """Whole samples of each source that add up to ``n_samples`` and come closest to the weights (largest remainder).

    Raises:
        UsageError: a source would get none.
    """
    total = math.fsum(weights.values())
    exact = [n_samples * weight / total for weight in weights.values()]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], index))
    for index in by_remainder[: n_samples - sum(counts)]:
        counts[index] += 1
    for source, count in zip(weights, counts, strict=True):
        if not count:
            raise UsageError(
                f"n_samples must give every source at least one sample, {n_samples} leaves none for {source}; "
                "raise --n-samples or its weight"
            )
    return counts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
