"""The operators that move a checkpoint's words into panels and back: kernels against the references of linear_ops.py.

The same kernel without torch, for every instruction set, is in csrc/pack_harness.cpp.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qquant import linear_ops
from qquant.packing import pack_codes, unpack_codes
from qquant.panels import column_order, stored_places
from tests.test_linear_ops import needs_kernels

ROWS = linear_ops.PANEL_ROWS
bounded = settings(deadline=None, derandomize=True, max_examples=100, database=None)

SHAPES = st.tuples(
    st.sampled_from([4, 8]),
    st.integers(1, 40),  # words of an output
    st.one_of(st.integers(1, 40), st.sampled_from([64, 80, 129, 200])),  # outputs
    st.integers(0, 2**16),
)


def draw_words(steps: int, outputs: int, random: torch.Generator) -> Tensor:
    return torch.randint(-(2**31), 2**31, (steps, outputs), generator=random).int()


def draw_groups(columns: int, random: torch.Generator) -> Tensor:
    """The group of each column, groups of any sizes, empty ones too."""
    groups = int(torch.randint(1, 7, (), generator=random))
    return torch.randint(0, groups, (columns,), generator=random).int()


def order_of(g_idx: Tensor, bits: int) -> Tensor:
    """The column at each place of panels; the group size is one that no word is full of, so that all are sorted."""
    order = column_order(g_idx, groups=int(g_idx.max()) + 1, group_size=1, step=32 // bits)[1]
    assert order is not None
    return order


def panels_for(steps: int, outputs: int) -> Tensor:
    """Panels of something else, all of which is to be written."""
    return torch.full((-(-outputs // ROWS), steps, ROWS), -1, dtype=torch.int32)


def moved(words: Tensor, columns: Tensor | None, bits: int) -> Tensor:
    steps = words.shape[0] if columns is None else columns.numel() * bits // 32
    panels = panels_for(steps, words.shape[1])
    linear_ops.words_to_panels(panels, words, columns, bits)
    return panels


@bounded
@given(SHAPES)
def test_panels_hold_the_codes_of_the_columns_asked_for(shape: tuple[int, int, int, int]) -> None:
    bits, steps, outputs, seed = shape
    random = torch.Generator().manual_seed(seed)
    words = draw_words(steps, outputs, random)
    order = order_of(draw_groups(steps * 32 // bits, random), bits)
    codes = unpack_codes(words, bits)[order.long().clamp(min=0)].masked_fill((order < 0)[:, None], 0)
    panels = moved(words, order, bits)
    assert torch.equal(linear_ops.from_panels(panels, outputs), pack_codes(codes, bits))
    assert not linear_ops.from_panels(panels, len(panels) * ROWS)[:, outputs:].any()


@bounded
@given(SHAPES)
def test_kernels_have_the_bits_of_the_references(shape: tuple[int, int, int, int]) -> None:
    bits, steps, outputs, seed = shape
    random = torch.Generator().manual_seed(seed)
    words = draw_words(steps, outputs, random)
    order = order_of(draw_groups(steps * 32 // bits, random), bits)
    for columns in (None, order):
        panels = moved(words, columns, bits)
        reference = torch.empty_like(panels)
        linear_ops.to_panels_reference(reference, words, columns, bits)
        assert torch.equal(panels, reference)
        # Any columns of the panels, some of them twice, some not at all.
        count = panels.shape[1] * 32 // bits
        picked = torch.randint(-1, count, (24,), generator=random).int()
        for choice in (None, picked):
            back = linear_ops.panels_to_words(panels, choice, outputs, bits)
            assert torch.equal(back, linear_ops.to_words_reference(panels, choice, outputs, bits))


@bounded
@given(SHAPES)
def test_what_was_moved_comes_back_bit_for_bit(shape: tuple[int, int, int, int]) -> None:
    bits, steps, outputs, seed = shape
    random = torch.Generator().manual_seed(seed)
    words, columns = draw_words(steps, outputs, random), steps * 32 // bits
    order = order_of(draw_groups(columns, random), bits)
    assert torch.equal(linear_ops.panels_to_words(moved(words, None, bits), None, outputs, bits), words)
    places = stored_places(order, columns)
    assert torch.equal(linear_ops.panels_to_words(moved(words, order, bits), places, outputs, bits), words)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_may_lie_in_memory_in_any_way(bits: int) -> None:
    random = torch.Generator().manual_seed(0)
    words = draw_words(10, 88, random)
    order = order_of(draw_groups(320 // bits, random), bits)
    expected = moved(words, order, bits)
    for view in (torch.cat([words, words], 1)[:, :88], words.T.contiguous().T, words.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(moved(view, order, bits), expected)
    places = stored_places(order, 320 // bits)
    spread = torch.stack([expected, expected], 1)[:, 0]
    assert not spread.is_contiguous()
    assert torch.equal(linear_ops.panels_to_words(spread, places, 88, bits), words)


@needs_kernels
@pytest.mark.parametrize("bits", [4, 8])
def test_panels_are_the_same_for_one_thread_and_two(bits: int, two_threads: None) -> None:
    # Large enough to be split: see kGrainBytes of csrc/pack_ops.cpp.
    random = torch.Generator().manual_seed(0)
    words = draw_words(1024, 1000, random)
    order = order_of(draw_groups(1024 * 32 // bits, random), bits)
    both = moved(words, order, bits)
    torch.set_num_threads(1)
    assert torch.equal(both, moved(words, order, bits))


@pytest.mark.parametrize(("steps", "outputs"), [(0, 20), (4, 0)])
def test_nothing_is_moved_where_there_is_nothing(steps: int, outputs: int) -> None:
    words = torch.zeros(steps, outputs, dtype=torch.int32)
    panels = moved(words, None, 4)
    assert linear_ops.panels_to_words(panels, None, outputs, 4).shape == (steps, outputs)


@pytest.mark.parametrize("bits", [4, 8])
def test_operators_are_well_formed(bits: int) -> None:
    random = torch.Generator().manual_seed(0)
    words = draw_words(4, 20, random)
    order = order_of(draw_groups(128 // bits, random), bits)
    for columns in (None, order):
        panels = moved(words, columns, bits)
        torch.library.opcheck(linear_ops.words_to_panels, (panels, words, columns, bits))
        torch.library.opcheck(linear_ops.panels_to_words, (panels, columns, 20, bits))


BAD_INWARDS: dict[str, tuple[dict[str, Any], str]] = {
    "bits_of_3": ({"bits": 3}, "bits must be 4 or 8, got 3"),
    "words_of_three_axes": ({"words": torch.zeros(1, 4, 20).int()}, r"words must be \[S, N\] int32, got \[1, 4, 20\]"),
    "words_of_int64": ({"words": torch.zeros(4, 20).long()}, r"words must be \[S, N\] int32"),
    "columns_of_int64": ({"columns": torch.zeros(32).long()}, "columns must be int32 and fill whole words of 8 codes"),
    "columns_of_half_a_word": ({"columns": torch.zeros(4).int()}, r"columns must be int32 .*, got \[4\]"),
    "columns_of_two_axes": ({"columns": torch.zeros(4, 8).int()}, r"columns must be int32 .*, got \[4, 8\]"),
    "panels_of_other_steps": ({"out": torch.zeros(2, 3, 16).int()}, r"out must be \[2, 4, 16\] int32 and contiguous"),
    "panels_of_other_outputs": ({"out": torch.zeros(1, 4, 16).int()}, r"out must be \[2, 4, 16\] int32"),
    "panels_of_the_order": ({"columns": torch.zeros(8).int()}, r"out must be \[2, 1, 16\] int32"),
    "panels_of_uint8": ({"out": torch.zeros(2, 4, 16).byte()}, r"out must be \[2, 4, 16\] int32"),
    "panels_with_gaps": ({"out": torch.zeros(2, 4, 32).int()[..., :16]}, "out must be .* contiguous"),
}
BAD_OUTWARDS: dict[str, tuple[dict[str, Any], str]] = {
    "bits_of_2": ({"bits": 2}, "bits must be 4 or 8, got 2"),
    "panels_of_two_axes": ({"panels": torch.zeros(4, 16).int()}, r"panels must be \[P, T, 16\] int32, got \[4, 16\]"),
    "panels_of_8_rows": ({"panels": torch.zeros(2, 4, 8).int()}, r"panels must be \[P, T, 16\] int32"),
    "panels_of_float": ({"panels": torch.zeros(2, 4, 16)}, r"panels must be \[P, T, 16\] int32"),
    "columns_of_float": ({"columns": torch.zeros(32)}, "columns must be int32"),
    "rows_of_more_panels": ({"rows": 33}, "rows must fill 2 panels of 16, got 33"),
    "rows_of_fewer_panels": ({"rows": 16}, "rows must fill 2 panels of 16, got 16"),
    "fewer_than_no_rows": ({"rows": -1}, "rows must fill 2 panels of 16, got -1"),
}
BAD_COLUMNS: dict[str, tuple[int, str]] = {
    "one_past_the_last": (32, r"columns must be -1..31, got 0..32"),
    "before_none": (-2, r"columns must be -1..31, got -2..0"),
}


def inwards(**changes: Any) -> None:
    call = {"out": torch.zeros(2, 4, 16).int(), "words": torch.zeros(4, 20).int(), "columns": None, "bits": 4}
    linear_ops.words_to_panels(*{**call, **changes}.values())


def outwards(**changes: Any) -> None:
    call = {"panels": torch.zeros(2, 4, 16).int(), "columns": None, "rows": 20, "bits": 4}
    linear_ops.panels_to_words(*{**call, **changes}.values())


@pytest.mark.parametrize("name", list(BAD_INWARDS))
def test_words_that_do_not_belong_to_the_panels_are_refused(name: str) -> None:
    change, message = BAD_INWARDS[name]
    with pytest.raises(RuntimeError, match=message):
        inwards(**change)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        inwards(**change)


@pytest.mark.parametrize("name", list(BAD_OUTWARDS))
def test_panels_that_do_not_belong_to_the_words_are_refused(name: str) -> None:
    change, message = BAD_OUTWARDS[name]
    with pytest.raises(RuntimeError, match=message):
        outwards(**change)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match=message):
        outwards(**change)


@pytest.mark.parametrize("name", list(BAD_COLUMNS))
def test_columns_that_are_not_there_are_refused_and_nothing_is_written(name: str) -> None:
    column, message = BAD_COLUMNS[name]
    columns = torch.zeros(32, dtype=torch.int32)
    columns[7] = column
    with pytest.raises(RuntimeError, match=message):
        outwards(columns=columns)
    out, words = panels_for(4, 20), torch.zeros(4, 20, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        inwards(out=out, words=words, columns=columns)
    with pytest.raises(RuntimeError, match=message):
        linear_ops.to_panels_reference(out, words, columns, 4)
    assert torch.equal(out, panels_for(4, 20))
