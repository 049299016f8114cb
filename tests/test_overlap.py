"""Had calibration seen this text? Shares estimated from a sketch, against texts whose true share is known."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from qquant.errors import BadDataError
from qquant.overlap import COMMON_SHARE, KEPT, NGRAM_TOKENS, Overlap, overlap_of, run_hashes, sketch_of

VOCAB = 5000


def text(seed: int, tokens: int) -> Tensor:
    """Tokens that are as unequal in frequency as words are, so that some runs could repeat."""
    uniform = torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (VOCAB**uniform).long() - 1


def windows(ids: Tensor, length: int = 256) -> list[Tensor]:
    return list(ids[: len(ids) // length * length].view(-1, length))


def share(calibration: list[Tensor], ids: Tensor) -> Overlap:
    found = overlap_of(sketch_of(calibration), ids)
    assert found is not None
    return found


def test_the_same_text_is_all_seen_but_for_the_borders_of_windows() -> None:
    ids = text(0, 40_960)
    found = share(windows(ids), ids)
    true = (256 - NGRAM_TOKENS + 1) / 256
    # A share of n runs that are looked at has a standard error of at most 0.5 / sqrt(n); four of them.
    assert abs(found.share - true) < 2 / found.looked_at**0.5
    assert found.striking


@pytest.mark.parametrize("shift", [1, 7, 100, 255])
def test_where_windows_begin_does_not_matter(shift: int) -> None:
    ids = text(1, 20_480)
    assert share(windows(ids), ids[shift:]).share > 0.8


@pytest.mark.parametrize("part", [0.1, 0.25, 0.5])
def test_a_partial_overlap_is_estimated(part: float) -> None:
    ids = text(2, 80_000)
    seen = int(part * 40_000)
    found = share([ids[:40_000]], torch.cat([ids[:seen], text(3, 40_000 - seen)]))
    assert abs(found.share - part) < 2 / found.looked_at**0.5
    assert found.striking


def test_texts_of_one_kind_share_nothing_of_note() -> None:
    found = share(windows(text(4, 40_000)), text(5, 40_000))
    assert found.share < COMMON_SHARE / 2
    assert not found.striking


def test_common_phrases_are_not_striking() -> None:
    phrases = [text(seed, 40) for seed in range(100, 110)]
    calibration, evaluation = (
        torch.cat([part for n in range(200) for part in (text(base + n, 300), phrases[n % 10])])
        for base in (1000, 5000)
    )
    found = share([calibration], evaluation)
    true = len(set(run_hashes(evaluation).tolist()) & set(run_hashes(calibration).tolist()))
    assert true > 100
    assert not found.striking


def test_a_repeated_phrase_counts_once() -> None:
    ids = text(6, 1000)
    assert (
        share([torch.zeros(500, dtype=torch.int64)], torch.cat([torch.zeros(5000, dtype=torch.int64), ids])).found == 1
    )


@pytest.mark.parametrize("tokens", [100, 5000, 300_000])
def test_a_sketch_is_small_json_without_the_ids(tokens: int) -> None:
    sketch = sketch_of(windows(text(7, tokens), 100))
    assert len(json.dumps(sketch)) < 6000
    assert len(base64.b64decode(sketch["hashes"])) <= 4 * KEPT
    assert json.loads(json.dumps(sketch)) == sketch


def test_a_sketch_does_not_depend_on_the_order_of_samples() -> None:
    rows = windows(text(8, 30_000))
    assert sketch_of(rows) == sketch_of(rows[::-1])


def test_a_sketch_is_the_same_on_every_machine() -> None:
    """The figures are those of the arithmetic that overlap.py describes, done here with Python's own integers."""

    def mixed(value: int) -> int:
        return value ^ (value >> 32)

    def hashed(run: list[int]) -> int:
        value, whole = 0, 2**64 - 1
        for token in run:
            value = mixed(((value ^ token) * 6364136223846793005 + 1442695040888963407) & whole)
        value = mixed(value * 6364136223846793005 & whole)
        return mixed(value * 6364136223846793005 & whole) & (2**63 - 1)

    ids = text(9, 40)
    assert run_hashes(ids).tolist() == [
        hashed(ids[i : i + NGRAM_TOKENS].tolist()) for i in range(40 - NGRAM_TOKENS + 1)
    ]


def test_hashes_are_spread_evenly() -> None:
    counts = torch.bincount(run_hashes(torch.arange(64_015)) >> 57, minlength=64).double()
    # Consecutive ids are as regular as input can be. 64 boxes of 1000: chi-squared with 63 degrees of freedom, whose
    # mean is 63 and standard deviation 11.2; five of them.
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 63 + 5 * 11.2


@pytest.mark.parametrize("tokens", [0, NGRAM_TOKENS - 1])
def test_a_text_shorter_than_a_run_says_nothing(tokens: int) -> None:
    assert overlap_of(sketch_of([text(10, 100)]), text(10, tokens)) is None
    found = overlap_of(sketch_of([text(10, tokens)]), text(10, 100))
    assert found is not None
    assert found.share == 0


STRIKING = {
    "one of one is chance": (1, 1, False),
    "two of two": (2, 2, True),
    "three of a hundred": (3, 100, False),
    "ten of a hundred": (10, 100, True),
    "as much as is common": (20, 1000, False),
    "twice that, of many": (40, 1000, True),
    "nothing": (0, 1000, False),
    "everything": (1000, 1000, True),
}


@pytest.mark.parametrize(("found", "looked_at", "striking"), STRIKING.values(), ids=STRIKING)
def test_striking_is_more_than_common_beyond_chance(found: int, looked_at: int, striking: bool) -> None:
    assert Overlap(found, looked_at).striking == striking


BROKEN: dict[str, dict[str, Any]] = {
    "empty": {},
    "other runs": {"ngram_tokens": 8},
    "no number": {"limit": None},
    "odd bytes": {"hashes": "AAAA"},
    "no base64": {"hashes": "!"},
    "negative shift": {"shift_bits": -1},
    "no text": {"hashes": 3},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_sketch_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    sketch = {**sketch_of([text(11, 100)]), **change} if change else {}
    with pytest.raises(BadDataError, match="a sketch must be as this version writes it"):
        overlap_of(sketch, text(11, 100))


def test_several_texts_are_looked_at_as_one_but_runs_do_not_go_from_one_into_the_next() -> None:
    first, second = text(12, 40), text(13, 40)
    apart = overlap_of(sketch_of([first, second]), first, second)
    joined = overlap_of(sketch_of([first, second]), torch.cat([first, second]))
    assert apart == Overlap(found=50, looked_at=50)  # 25 runs each
    assert joined == Overlap(found=50, looked_at=65)  # and 15 that cross
    assert overlap_of(sketch_of([first])) is None
