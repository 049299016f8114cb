"""Plots put together from shapes and scales: axes with a light grid, curves with labels at their ends, bars, legends.

Nothing here knows results: what is plotted comes from accuracy.py, memory.py and their neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qquant.charts.label_places import spread
from qquant.charts.scales import Scale, linear_scale, log_scale, tick_text
from qquant.charts.svg import INK, LINE, MUTED, PANEL, WIDTH, Drawing, Look, clipped, text_width

SMALL = 12.0
"""Height of the text of ticks and labels, user units."""
LEFT = 48.0
"""Where plots begin: room for the numbers of the y axis."""
_LABEL_GAP = 13.0
_BAR_STEP = 36.0
_BAR = 12.0


@dataclass(frozen=True)
class Frame:
    """Where a plot lies, user units."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True)
class Place:
    """One point of a curve."""

    x: float
    y: float
    tip: str
    low: float | None = None
    """Least of what ``y`` is the middle of; drawn as a whisker."""
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """Points joined by a line, ascending in x."""

    name: str
    """Written at the line's end; empty for none."""
    look: Look
    places: tuple[Place, ...]
    marked: bool = True
    """A mark stands on every point."""


def draw_axes(
    drawing: Drawing,
    frame: Frame,
    x: Scale,
    y: Scale,
    *,
    x_title: str,
    y_title: str,
    x_ticks: Sequence[float] | None = None,
) -> None:
    """Draw light lines across, numbers at the ticks and what they mean; only ``drawing`` is changed."""
    # Text stands upright above the axis: a reader of a phone does not turn the head.
    drawing.text(2, frame.top - 10, clipped(y_title, drawing.width, SMALL), size=SMALL, fill=MUTED)
    for value in y.ticks():
        height = y.at(value)
        drawing.line([(frame.left, height), (frame.right, height)], stroke=LINE)
        drawing.text(frame.left - 5, height + 4, tick_text(value), side="end", size=SMALL, fill=MUTED)
    drawing.line([(frame.left, frame.bottom), (frame.right, frame.bottom)], stroke=MUTED)
    taken = 1e9
    # From the right, because the largest value says more than the one before it.
    for value in reversed(x.ticks() if x_ticks is None else x_ticks):
        place, shown = x.at(value), tick_text(value)
        drawing.line([(place, frame.bottom), (place, frame.bottom + 4)], stroke=MUTED)
        half = text_width(shown, SMALL) / 2
        if place + half < taken:
            drawing.text(place, frame.bottom + 16, shown, side="middle", size=SMALL, fill=MUTED)
            taken = place - half - 4
    drawing.text((frame.left + frame.right) / 2, frame.bottom + 32, x_title, side="middle", size=SMALL, fill=MUTED)


def value_scale(values: Sequence[float], start: float, end: float, *, wide: float = 12) -> Scale:
    """Linear from zero, or logarithmic where the largest value is more than ``wide`` times the least."""
    if min(values) > 0 and max(values) > wide * min(values):
        return log_scale(values, start, end)
    return linear_scale(values, start, end)


def draw_curves(drawing: Drawing, frame: Frame, x: Scale, y: Scale, curves: Sequence[Curve]) -> None:
    """Draw curves, each with its name at the right edge in line with its last point and clear of the others."""
    for curve in curves:
        points = [(x.at(place.x), y.at(place.y)) for place in curve.places]
        if len(points) > 1:
            width = 2.0 if curve.marked else 1.4
            drawing.line(points, stroke=curve.look.colour, width=width, dash=curve.look.dash)
        for place, (across, _) in zip(curve.places, points, strict=True):
            if place.low is not None and place.high is not None:
                drawing.line([(across, y.at(place.low)), (across, y.at(place.high))], stroke=curve.look.colour)
    for curve in curves:
        for place in curve.places if curve.marked else ():
            drawing.marker(x.at(place.x), y.at(place.y), curve.look.shape, colour=curve.look.colour, tip=place.tip)
    named = [curve for curve in curves if curve.name]
    wanted = [y.at(curve.places[-1].y) for curve in named]
    heights = spread(wanted, _LABEL_GAP, frame.top + 4, frame.bottom - 4)
    for curve, height, own in zip(named, heights, wanted, strict=True):
        end = x.at(curve.places[-1].x)
        _name_curve(drawing, frame, curve, (end, own), height)


def _name_curve(drawing: Drawing, frame: Frame, curve: Curve, end: tuple[float, float], height: float) -> None:
    """A thin leader from the curve's end, its mark, its name."""
    left = frame.right + 4
    if abs(end[1] - height) > 3 or left - end[0] > 14:
        drawing.line([(end[0] + 6, end[1]), (frame.right - 2, end[1]), (left, height)], stroke=MUTED, width=0.5)
    drawing.marker(left + 6, height, curve.look.shape, colour=curve.look.colour, radius=3.6)
    name = clipped(curve.name, drawing.width - left - 14, SMALL)
    drawing.text(left + 14, height + 4, name, size=SMALL, tip=curve.name if name != curve.name else None)


def curves_height(curves: Sequence[Curve], least: float) -> float:
    """Height of a plot in which all names have a line of their own, user units."""
    return max(least, _LABEL_GAP * sum(bool(curve.name) for curve in curves) + 8)


def names_width(curves: Sequence[Curve], most: float = 132) -> float:
    """Room that the names at the right edge take, user units."""
    return min(most, max((20 + text_width(curve.name, SMALL) for curve in curves if curve.name), default=8))


@dataclass(frozen=True)
class Part:
    """One stretch of a bar."""

    value: float
    colour: str
    tip: str


@dataclass(frozen=True)
class Bar:
    """One line of a bar chart: a name above, stretches one after another, an end value beside."""

    name: str
    text: str
    parts: tuple[Part, ...]
    low: float | None = None
    """Ends of a whisker around the bar's end."""
    high: float | None = None

    @property
    def total(self) -> float:
        """All stretches together."""
        return sum(part.value for part in self.parts)


def bars_height(bars: Sequence[Bar]) -> float:
    """What ``draw_bars`` takes, user units."""
    return _BAR_STEP * len(bars)


def draw_bars(drawing: Drawing, bars: Sequence[Bar], *, top: float) -> None:
    """Draw horizontal bars from zero on one scale, each with its name above it and its value beside it."""
    room = max(text_width(bar.text, SMALL) for bar in bars) + 10
    scale = replace(
        linear_scale([max(bar.total, bar.high or 0) for bar in bars], 2, drawing.width - room),
        high=max(max(bar.total, bar.high or 0) for bar in bars) or 1.0,
    )
    for number, bar in enumerate(bars):
        y = top + number * _BAR_STEP
        name = clipped(bar.name, drawing.width - 8)
        drawing.text(2, y + 11, name, tip=bar.name if name != bar.name else None)
        reached, gap = 0.0, 1.0 if len(bar.parts) > 1 else 0.0
        for part in bar.parts:
            left, right = scale.at(reached), scale.at(reached + part.value)
            drawing.rect(left, y + 16, max(right - left - gap, 0.3), _BAR, fill=part.colour, tip=part.tip)
            reached += part.value
        middle, end = y + 16 + _BAR / 2, scale.at(bar.total)
        if bar.low is not None and bar.high is not None:
            ends = scale.at(bar.low), scale.at(bar.high)
            # Light below dark, so that the whisker is seen on a bar of any colour.
            drawing.line([(ends[0], middle), (ends[1], middle)], stroke=PANEL, width=4)
            drawing.line([(ends[0], middle), (ends[1], middle)], stroke=INK, width=1.4)
            for x in ends:
                drawing.line([(x, middle - 4), (x, middle + 4)], stroke=INK, width=1.4)
            end = max(end, ends[1])
        drawing.text(end + 6, middle + 4, bar.text, size=SMALL)


def draw_legend(drawing: Drawing, entries: Sequence[tuple[str, Look, str]], *, top: float) -> float:
    """Draw a legend that fills lines from the left; an entry's kind is "mark", "line" or "block".

    Returns:
        Its height in user units.
    """
    x, y = 2.0, top
    for name, look, kind in entries:
        width = 22 + text_width(name, SMALL) + 6
        if x > 2 and x + width > drawing.width:
            x, y = 2.0, y + 17
        if kind == "line":
            drawing.line([(x, y + 6), (x + 18, y + 6)], stroke=look.colour, width=1.8, dash=look.dash)
        elif kind == "block":
            drawing.rect(x + 3, y + 1, 11, 11, fill=look.colour)
        else:
            drawing.marker(x + 9, y + 6, look.shape, colour=look.colour)
        drawing.text(x + 20, y + 10, name, size=SMALL)
        x += width
    return y + 17 - top


def plot_frame(top: float, height: float, *, right: float = 14) -> Frame:
    """A plot of this height (user units) over the drawing's width, less ``right`` units at its right edge."""
    return Frame(LEFT, top, WIDTH - right, top + height)
