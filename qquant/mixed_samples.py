"""Which calibration samples a mix of bits is measured on, which it is made with, and which its result is checked on."""

from __future__ import annotations

from collections.abc import Sequence

from qquant.samples import Sample
from qquant.telling import say_once

SENSITIVITY_TOKENS = 2048
"""Tokens that costs are measured on; see docs/mixed-precision.md for what fewer or more change."""
CHECK_TOKENS = 8192
"""Tokens, used for nothing else, on which the result is compared with the original."""

_WINDOW = 256  # tokens of a sequence that KL is measured on: logits of a large vocabulary take 600 kB each
_DATA_TOKENS = 1 << 16  # in the Hessians: six times the longest rows of a 7B model
_CHECK_SHARE = 8  # at most one sample in so many is kept for the check


def split(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Calibration samples, and windows of those that are kept apart: every eighth, or fewer if they are long."""
    windows = -(-CHECK_TOKENS // _WINDOW)
    per_sample = max(1, max(len(sample.input_ids) for sample in samples) // _WINDOW)
    count = max(1, min(len(samples) // _CHECK_SHARE, -(-windows // per_sample)))
    kept = {round((place + 0.5) * len(samples) / count - 0.5) for place in range(count)}
    cut = [window for place in sorted(kept) for window in _windows(samples[place])]
    return [sample for place, sample in enumerate(samples) if place not in kept], cut[:windows]


def probes_of(samples: Sequence[Sample], tokens: int, *, apart: bool) -> tuple[list[Sample], list[Sample]]:
    """Windows to measure costs on, from samples spread over all, and samples for Hessians.

    These are the others (``apart``: they should be), or all if fewer than half are left.
    """
    count = max(1, min(len(samples), -(-tokens // _WINDOW)))
    picked = sorted({round((place + 0.5) * len(samples) / count - 0.5) for place in range(count)})
    probes = [_windows(samples[place])[0] for place in picked]
    others = [sample for place, sample in enumerate(samples) if place not in set(picked)]
    if len(others) < len(samples) / 2:
        others = list(samples)
        if apart:
            say_once(
                f"costs are measured on samples that are in the Hessians too, so that they may come out too low: "
                f"{len(picked)} of {len(samples)} samples would be needed apart; give more samples (--n-samples), or "
                "lower --sensitivity-tokens",
                key="probes in Hessians",
            )
    longest = max(len(sample.input_ids) for sample in others)
    count = max(1, min(len(others), _DATA_TOKENS // longest))
    return probes, [others[place * len(others) // count] for place in range(count)]


def _windows(sample: Sample) -> list[Sample]:
    """A sample in pieces of at most 256 tokens, leaving out those without a token that counts."""
    pieces = [
        Sample(ids, mask)
        for ids, mask in zip(sample.input_ids.split(_WINDOW), sample.mask.split(_WINDOW), strict=True)
        if bool(mask.any()) and len(ids) > 1
    ]
    return pieces or [sample]
