"""Had calibration seen this text? A sketch of the token runs of calibration samples, and another text held against it.

Arithmetic on token ids; where sketches are kept, and what is said about an overlap, is for others.

A sketch holds hashes of runs of ``NGRAM_TOKENS`` neighbouring tokens, those with the smallest values (bottom-k). Runs
overlap one another, so it does not matter where windows begin, and which runs are kept depends on their contents alone:
of another text the same share is looked at, and the share of those that the sketch holds is an unbiased estimate for
the whole text. Nobody gets the text back: 32 to 50 bits of hash stand for 16 tokens, and of most runs there is
nothing. Who has a text, however, can see that it was used; that is what a sketch is for.

Source: bottom-k sketches, Broder, On the resemblance and containment of documents (SEQUENCES 1997); runs as a sign of
contamination: Brown et al., arXiv:2005.14165, appendix C.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qquant.errors import BadDataError
from qquant.records import COMMON_SHARE as COMMON_SHARE
from qquant.records import NGRAM_TOKENS as NGRAM_TOKENS

KEPT = 1024
"""Hashes of a sketch, at most: 4 KB, 5.5 KB as text."""
CHANCE = 0.01
"""How often texts that share no more than that may be called overlapping, because few of their runs are looked at."""

_MULTIPLIER = 6364136223846793005
_INCREMENT = 1442695040888963407
"""Of Knuth's linear congruential generator, MMIX: an odd multiplier that spreads low bits over high ones."""
_BITS = 63
"""Of a hash: what a signed integer of torch holds without its sign."""
_STORED_BITS = 32


@dataclass(frozen=True)
class Overlap:
    """How much of a text calibration had seen."""

    found: int
    """Runs that the sketch holds, of those that were looked at."""
    looked_at: int

    @property
    def share(self) -> float:
        """Share of the text's distinct runs that calibration had seen, estimated; 0 to 1."""
        return self.found / self.looked_at

    @property
    def striking(self) -> bool:
        """Whether the text shares more than ``COMMON_SHARE`` with calibration, beyond ``CHANCE``."""
        return self.share > COMMON_SHARE and _chance(self.share, self.looked_at) < CHANCE


def run_hashes(ids: Tensor) -> Tensor:
    """A hash of every run of ids [T]: [T - NGRAM_TOKENS + 1] int64, 0 .. 2**63 - 1."""
    runs = max(0, ids.numel() - NGRAM_TOKENS + 1)
    value = torch.zeros(runs, dtype=torch.int64)
    for place in range(NGRAM_TOKENS):
        value = _mixed((value ^ ids[place : place + runs].long().cpu()) * _MULTIPLIER + _INCREMENT)  # modulo 2**64
    hashes: Tensor = _mixed(_mixed(value * _MULTIPLIER) * _MULTIPLIER) & (2**_BITS - 1)
    return hashes


def sketch_of(rows: Iterable[Tensor]) -> dict[str, Any]:
    """Sketch the runs of some samples, as JSON takes it.

    Args:
        rows: [T] int64 token ids each. Read, never written. Runs do not go from one row into the next.

    Returns:
        ``ngram_tokens``; ``shift_bits``: low bits of a hash that are not kept; ``limit``: hashes above it were not
        kept; ``hashes``: base64 of ascending little-endian uint32.
    """
    distinct = torch.unique(torch.cat([torch.empty(0, dtype=torch.int64), *map(run_hashes, rows)]))
    kept = distinct[:KEPT]
    top = int(kept[-1]) if len(distinct) > KEPT else 2**_BITS - 1
    shift = max(0, top.bit_length() - _STORED_BITS)
    words = b"".join((value >> shift).to_bytes(4, "little") for value in kept.tolist())
    hashes = base64.b64encode(words).decode()
    return {"ngram_tokens": NGRAM_TOKENS, "shift_bits": shift, "limit": top >> shift, "hashes": hashes}


def overlap_of(sketch: Mapping[str, Any], *rows: Tensor) -> Overlap | None:
    """Hold a text, or several that do not go on in one another, against a sketch.

    Args:
        sketch: what ``sketch_of`` made, perhaps long ago.
        rows: [T] int64 token ids of each text, by the same tokenizer. Read, never written.

    Returns:
        None where the texts are so short that none of their runs is looked at.

    Raises:
        BadDataError: no sketch, or one of another kind.
    """
    try:
        length, shift, limit = (int(sketch[name]) for name in ("ngram_tokens", "shift_bits", "limit"))
        words = base64.b64decode(sketch["hashes"], validate=True)
        if length != NGRAM_TOKENS or not 0 <= shift < _BITS or not 0 <= limit < 2**_STORED_BITS or len(words) % 4:
            raise ValueError(f"runs of {length} tokens, shift {shift}, limit {limit}, {len(words)} bytes")
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise BadDataError(f"a sketch must be as this version writes it, got {error!r}; quantize again") from error
    held = torch.tensor([int.from_bytes(words[at : at + 4], "little") for at in range(0, len(words), 4)])
    looked_at = torch.unique(torch.cat([torch.empty(0, dtype=torch.int64), *map(run_hashes, rows)])) >> shift
    looked_at = looked_at[looked_at <= limit]
    if not len(looked_at):
        return None
    return Overlap(found=int(torch.isin(looked_at, held.long()).sum()), looked_at=len(looked_at))


def _mixed(value: Tensor) -> Tensor:
    """High bits folded into low ones; a shift of signed integers drags the sign along, which the mask takes away."""
    folded: Tensor = value ^ ((value >> 32) & 0xFFFFFFFF)
    return folded


def _chance(share: float, looked_at: int) -> float:
    """Chernoff's bound on how likely so large a share is found where ``COMMON_SHARE``, which is smaller, is true."""
    rest = 0.0 if share == 1 else (1 - share) * math.log((1 - share) / (1 - COMMON_SHARE))
    return math.exp(-looked_at * (share * math.log(share / COMMON_SHARE) + rest))
