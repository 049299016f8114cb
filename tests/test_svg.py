"""Parts of charts: text that cannot break out, scales with round ticks, labels that keep clear of one another."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qquant.charts.label_places import Box, place_labels, spread
from qquant.charts.plot import (
    LEFT,
    SMALL,
    Bar,
    Curve,
    Part,
    Place,
    bars_height,
    draw_axes,
    draw_bars,
    draw_curves,
    draw_legend,
    plot_frame,
)
from qquant.charts.scales import (
    Scale,
    disk_unit,
    doubling_scale,
    linear_scale,
    log_scale,
    memory_unit,
    nice_step,
    number_text,
    signed_text,
    tick_text,
)
from qquant.charts.svg import (
    SHAPES,
    Drawing,
    Look,
    Shape,
    clipped,
    coordinate,
    escaped,
    look_of,
    short_names,
    text_width,
)

LOOK = Look("var(--c1)", "circle")


def drawing() -> Drawing:
    return Drawing("one", "a title", "what it shows", height=100)


def tree(drawn: Drawing) -> ET.Element:
    return ET.fromstring(drawn.svg())


def texts(drawn: Drawing) -> list[str]:
    return [node.text or "" for node in tree(drawn).iter("text")]


@given(st.text())
def test_any_text_comes_out_as_text(text: str) -> None:
    drawn = drawing()
    drawn.text(0, 10, text, tip=text or None)
    root = tree(drawn)
    assert {node.tag for node in root.iter()} <= {"svg", "title", "desc", "text"}
    kept = escaped(text).replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&#x27;", "'")
    # XML reads every line end as one line feed
    shown = kept.replace("&amp;", "&").replace("\r\n", "\n").replace("\r", "\n")
    assert (root.findall("text")[0].text or "") == shown


@pytest.mark.parametrize("text", ["\x00", "\x1b[31m", "\u202e", "\u2066", "\ud800", "\uffff"], ids=ascii)
def test_what_controls_a_terminal_or_a_direction_is_replaced(text: str) -> None:
    assert escaped(text).startswith("\ufffd")


@pytest.mark.parametrize("anchor", ["", "1a", "a b", 'a"', "a/b"], ids=ascii)
def test_an_anchor_that_is_no_id_is_refused(anchor: str) -> None:
    with pytest.raises(ValueError, match="letters, digits and hyphens"):
        Drawing(anchor, "title", "description", height=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hollow", [False, True], ids=["filled", "hollow"])
def test_every_mark_shows_its_value(shape: Shape, hollow: bool) -> None:
    drawn = drawing()
    drawn.marker(5, 5, shape, colour="var(--c1)", hollow=hollow, tip="5 & 5")
    mark = tree(drawn)[-1]
    assert [child.text for child in mark] == ["5 & 5"]
    assert "var(--c1)" in (mark.get("fill"), mark.get("stroke"))


def test_shapes_and_colours_of_eight_series_all_differ() -> None:
    names = [str(number) for number in range(8)]
    looks = [look_of(names, name) for name in names]
    assert len({look.colour for look in looks}) == len({look.shape for look in looks}) == 8


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (-0.01, "0"), (3.0, "3"), (-2.26, "-2.3"), (10.04, "10"), (-10.5, "-10.5")], ids=str
)
def test_coordinates_are_short(value: float, text: str) -> None:
    assert coordinate(value) == text


def test_the_middle_of_a_long_name_is_left_out() -> None:
    name = "reference-model-of-seven-billion-parameters-int4-g128"
    short = clipped(name, 120)
    assert text_width(short) <= 120
    assert short.startswith("ref")
    assert short.endswith("128")
    assert clipped("int4", 120) == "int4"


def test_chinese_letters_are_as_wide_as_high() -> None:
    assert text_width("中文", 10) == 20


NAMES = {
    "prefixed": (["base", "base-int4", "base_int8"], ["base", "int4", "int8"]),
    "own": (["base", "int4"], ["base", "int4"]),
    "twice": (["base", "base-"], ["base", "base-"]),
    "none": ([], []),
}


@pytest.mark.parametrize(("names", "shown"), list(NAMES.values()), ids=list(NAMES))
def test_candidates_drop_the_name_of_the_baseline(names: list[str], shown: list[str]) -> None:
    assert list(short_names(names).values()) == shown


NUMBERS = {
    0: "0",
    0.00002: "2×10⁻⁵",
    1e-7: "10⁻⁷",
    -3.4e-8: "−3.4×10⁻⁸",
    0.0005: "0.0005",
    0.12345: "0.123",
    12.0: "12",
    -2.5: "−2.5",
    999.4: "999",
    999.9: "1,000",
    12345.6: "12,346",
}


@pytest.mark.parametrize(("value", "text"), list(NUMBERS.items()), ids=list(NUMBERS.values()))
def test_numbers_are_written_as_people_write_them(value: float, text: str) -> None:
    assert number_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(-1.24, "−1.2"), (1.25, "+1.2"), (-0.04, "0.0"), (0, "0.0")], ids=str)
def test_a_difference_has_a_sign_unless_it_is_zero(value: float, text: str) -> None:
    assert signed_text(value) == text


def test_memory_is_counted_in_powers_of_two() -> None:
    assert memory_unit([2**30]).text(1.5 * 2**30) == "1.5 GiB"
    assert memory_unit([11 * 2**20]).text(11 * 2**20) == "11 MiB"
    assert memory_unit([]).name == "MiB"


def test_files_are_counted_in_powers_of_ten() -> None:
    assert disk_unit([10**9]).text(1.5 * 10**9) == "1.5 GB"
    assert disk_unit([11_555_048]).text(11_555_048) == "11.6 MB"
    assert disk_unit([]).name == "MB"


TICKS = {12345.6: "12,346", 99_999: "99,999", 1e5: "100k", 2.5e6: "2.5M", -5e5: "−500k", 1e12: "1T", 1e15: "1P"}


@pytest.mark.parametrize(("value", "text"), list(TICKS.items()), ids=list(TICKS.values()))
def test_a_number_beside_an_axis_stays_short(value: float, text: str) -> None:
    assert tick_text(value) == text
    assert text_width(text, SMALL) < LEFT - 5  # else it would begin outside the drawing


@pytest.mark.parametrize(("rough", "step"), [(0.9, 1), (1, 1), (1.1, 2), (3, 5), (6, 10), (0.03, 0.05)], ids=str)
def test_steps_are_one_two_or_five(rough: float, step: float) -> None:
    assert nice_step(rough) == pytest.approx(step)


VALUES = st.lists(st.floats(-1e9, 1e9, allow_subnormal=False), min_size=1, max_size=9)
POSITIVE = st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=9)


def assert_holds(scale: Scale, values: list[float], slack: float) -> None:
    places = [scale.at(value) for value in values]
    assert all(scale.start - slack <= place <= scale.end + slack for place in places)
    for (one, there), (other, beyond) in combinations(zip(values, places, strict=True), 2):
        assert (one < other) <= (there <= beyond + slack)


@given(VALUES)
def test_a_linear_scale_holds_its_values_and_zero(values: list[float]) -> None:
    # slack: 300 units in double precision, relative to values that may be 1e9 and differ by 1e-300
    assert_holds(linear_scale(values, 0, 300), [*values, 0.0], 1e-4)


@given(POSITIVE)
def test_a_logarithmic_scale_holds_its_values_with_two_ticks_or_more(values: list[float]) -> None:
    scale = log_scale(values, 0, 300)
    assert_holds(scale, values, 1e-6)
    assert 2 <= len(scale.ticks()) <= 13


@given(POSITIVE)
def test_a_doubling_scale_keeps_its_values_off_the_edges(values: list[float]) -> None:
    scale = doubling_scale(values, 0, 300)
    assert all(0 < scale.at(value) < 300 for value in values)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 12.0, [0, 5, 10]), (-0.3, 0.3, [-0.2, 0, 0.2]), (46.0, 51.0, [46, 47, 48, 49, 50, 51])],
    ids=["from_zero", "around_zero", "far_from_zero"],
)
def test_ticks_are_round_and_inside(low: float, high: float, ticks: list[float]) -> None:
    assert Scale(low, high, 0, 1).ticks() == pytest.approx(ticks)


def test_a_wide_logarithmic_scale_has_ticks_at_some_decades() -> None:
    ticks = Scale(1e-12, 1, 0, 1, log=True).ticks()
    assert ticks == [1e-12, 1e-9, 1e-6, 1e-3, 1]


PLACES = st.lists(st.floats(0, 100), min_size=1, max_size=12)


@given(PLACES)
def test_spread_labels_keep_their_order_gap_and_range(wanted: list[float]) -> None:
    places = spread(wanted, 5, 0, 100)
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    # slack: sums of up to twelve doubles below 100
    assert all(-1e-9 <= place <= 100 + 1e-9 for place in places)
    assert all(places[after] - places[before] >= 5 - 1e-9 for before, after in pairwise(order))


def test_labels_that_are_apart_stay_where_they_are() -> None:
    assert spread([50, 10, 30], 13, 0, 100) == [50, 10, 30]


def test_more_labels_than_fit_are_evenly_squeezed() -> None:
    assert spread([0.0] * 5, 13, 0, 20) == pytest.approx([0, 5, 10, 15, 20])


def test_labels_of_crowded_marks_lie_on_nothing() -> None:
    points = [(100.0 + 3 * number, 100.0 + 9 * number) for number in range(6)]
    boxes = place_labels(points, [(60, 14)] * 6, Box(0, 0, 370, 300), radius=6)
    assert not any(one.overlap(other) for one, other in combinations(boxes, 2))
    marks = [Box(x - 6, y - 6, 12, 12) for x, y in points]
    assert not any(box.overlap(mark) for box in boxes for mark in marks)


@pytest.mark.parametrize("corner", [(0.0, 0.0), (370.0, 0.0), (0.0, 300.0), (370.0, 300.0)], ids=str)
def test_a_label_in_a_corner_stays_inside(corner: tuple[float, float]) -> None:
    inside = Box(0, 0, 370, 300)
    (box,) = place_labels([corner], [(80, 27)], inside)
    assert box.overlap(inside) == pytest.approx(80 * 27)


def test_a_label_is_nearest_to_its_own_mark() -> None:
    points = [(100.0, 100.0), (130.0, 100.0)]
    for point, box in zip(points, place_labels(points, [(40, 14)] * 2, Box(0, 0, 370, 300)), strict=True):
        assert box.gap(point) == min(box.gap(other) for other in points)


def test_numbers_at_ticks_do_not_touch_and_the_last_is_kept() -> None:
    drawn = drawing()
    frame = plot_frame(10, 60)
    values = [1, 2, 4, 8, 16, 32, 64, 100]
    x = Scale(1, 100, frame.left, frame.right)
    draw_axes(drawn, frame, x, Scale(0, 1, frame.bottom, frame.top), x_title="x", y_title="y", x_ticks=values)
    shown = [text for text in texts(drawn) if text in map(str, values)]
    assert "100" in shown
    assert "2" not in shown


def test_names_of_curves_stand_in_the_order_of_their_ends() -> None:
    drawn = drawing()
    frame = plot_frame(10, 80, right=100)
    curves = [Curve(name, LOOK, (Place(0, 0, "low"), Place(1, end, name))) for name, end in (("b", 0.5), ("a", 0.51))]
    draw_curves(drawn, frame, Scale(0, 1, frame.left, frame.right), Scale(0, 1, frame.bottom, frame.top), curves)
    heights = {node.text: float(node.get("y", "0")) for node in tree(drawn).iter("text")}
    assert heights["b"] - heights["a"] == pytest.approx(13, abs=0.11)  # two rounded coordinates


def test_bars_are_as_long_as_their_values() -> None:
    drawn = drawing()
    bars = [Bar("a", "1", (Part(1, "var(--c1)", "a: 1"),)), Bar("b", "4", (Part(4, "var(--c2)", "b: 4"),), 3, 4)]
    draw_bars(drawn, bars, top=0)
    short, long = (float(node.get("width", "0")) for node in tree(drawn).iter("rect"))
    assert long == pytest.approx(4 * short, abs=0.25)  # widths are rounded to 0.1
    assert bars_height(bars) == 72


def test_a_legend_breaks_its_lines_before_the_edge() -> None:
    drawn = drawing()
    entries = [(f"a series of number {number}", LOOK, "mark") for number in range(4)]
    assert draw_legend(drawn, entries, top=0) == 34
    assert max(float(node.get("x", "0")) + text_width(node.text or "") for node in tree(drawn).iter("text")) < 370
