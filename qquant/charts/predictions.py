"""The chart of predicted against measured memory, cell by cell.

Predictions and measurements are both read from the section ``profile`` of results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from qquant.charts.grid_cells import KV_SHAPES, PRECISIONS, Cell, names_of, profile_cells
from qquant.charts.label_places import Box, place_labels
from qquant.charts.plot import SMALL, draw_axes, draw_legend, plot_frame, value_scale
from qquant.charts.scales import linear_scale, memory_unit, signed_text
from qquant.charts.svg import GOOD, MUTED, Chart, Drawing, Look, text_width
from qquant.records import KVKind
from qquant.results import Result

_BAND = 0.05
"""What a prediction may be off by."""
_NAMED = 2
"""At most so many cells outside the band are named."""


def prediction_charts(results: Sequence[Result]) -> list[Chart]:
    """Predicted against measured memory, a mark per cell, on the diagonal with its band, and their difference below."""
    charts = []
    for number, result in enumerate(results, 1):
        cells = [
            c for c in (profile_cells(result.profile) if result.profile else []) if c.measured_bytes and c.predicted
        ]
        if cells:
            charts.append(_prediction_chart(f"prediction-{number}", cells))
    return charts


def difference(cell: Cell) -> float:
    """Predicted less measured, as a share of the measured."""
    if cell.predicted is None or not cell.measured_bytes:
        raise ValueError(f"a difference takes a measured and a predicted peak, got a cell without: {cell.place}")
    return cell.predicted.peak_bytes / cell.measured_bytes - 1


def _prediction_chart(anchor: str, cells: Sequence[Cell]) -> Chart:
    unit = memory_unit(cell.measured_bytes or 0 for cell in cells)
    pairs = [
        (c.measured_bytes / unit.size, c.predicted.peak_bytes / unit.size)
        for c in cells
        if c.measured_bytes and c.predicted
    ]
    edge = 100 * _BAND
    inside = sum(abs(difference(cell)) <= _BAND for cell in cells)
    worst = max(cells, key=lambda cell: abs(difference(cell)))
    said = f"{inside} of {len(cells)} cells within ±{edge:.0f} %"
    drawing = Drawing(
        anchor,
        f"Predicted against measured memory: {names_of(cells)}",
        said,
        height=492,
    )
    upper, lower = plot_frame(28, 240), plot_frame(320, 110)
    both = [value for pair in pairs for value in pair]
    x, y = value_scale(both, upper.left, upper.right), value_scale(both, upper.bottom, upper.top)
    title = f"predicted peak ({unit.name}); the band is ±{edge:.0f} %"
    ticks = x.ticks()
    draw_axes(drawing, upper, x, y, x_title="", y_title=title, x_ticks=ticks)
    least = x.low if x.log else 0.0
    _draw_band(drawing, [(x.at(v), y.at(max(y.low, min(y.high, v * f)))) for v, f in _band(least, x.high, x.log)])
    drawing.line([(x.at(x.low), y.at(x.low)), (x.at(x.high), y.at(x.high))], stroke=MUTED)
    percents = [100 * difference(cell) for cell in cells]
    z = linear_scale([*percents, -edge - 1, edge + 1], lower.bottom, lower.top)
    x_title = f"measured peak ({unit.name})"
    draw_axes(drawing, lower, x, z, x_title=x_title, y_title="predicted less measured (%)", x_ticks=ticks)
    above, below = z.at(edge), z.at(-edge)
    _draw_band(drawing, [(lower.left, above), (lower.right, above), (lower.right, below), (lower.left, below)])
    drawing.line([(lower.left, z.at(0)), (lower.right, z.at(0))], stroke=MUTED)
    spots = []
    for cell, (measured, predicted), percent in zip(cells, pairs, percents, strict=True):
        look = Look(PRECISIONS[cell.precision], KV_SHAPES[cell.kv_cache])
        tip = f"{cell.place}: {unit.text(predicted * unit.size)} predicted, {unit.text(measured * unit.size)} measured"
        for height in (y.at(predicted), z.at(percent)):
            drawing.marker(x.at(measured), height, look.shape, colour=look.colour, radius=4, tip=tip)
        spots.append((x.at(measured), z.at(percent)))
    _name_outliers(
        drawing, cells, spots, Box(lower.left, lower.top, lower.right - lower.left, lower.bottom - lower.top)
    )
    draw_legend(drawing, _legend(cells), top=474)
    return drawing.chart(
        f"{said}; the farthest is {signed_text(100 * difference(worst))} %: {worst.place}. Above the diagonal more "
        "was predicted than needed."
    )


def _band(low: float, high: float, log: bool) -> list[tuple[float, float]]:
    """Corners (value, factor) of the band around the diagonal."""
    return [(low, 1 + _BAND), (high, 1 + _BAND), (high, 1 - _BAND), (low, 1 - _BAND)] if log else [
        (low, 1.0), (high / (1 + _BAND), 1 + _BAND), (high, 1.0), (high, 1 - _BAND),
    ]  # fmt: skip


def _draw_band(drawing: Drawing, corners: Sequence[tuple[float, float]]) -> None:
    drawing.area(corners, fill=GOOD, opacity=0.18)


def _name_outliers(drawing: Drawing, cells: Sequence[Cell], spots: Sequence[tuple[float, float]], room: Box) -> None:
    """Write beside the farthest cells outside the band which they are."""
    far = sorted(range(len(cells)), key=lambda number: -abs(difference(cells[number])))[:_NAMED]
    far = [number for number in far if abs(difference(cells[number])) > _BAND]
    names = [f"{cells[n].precision}, KV {cells[n].kv_cache}, batch {cells[n].batch}" for n in far]
    sizes = [(text_width(name, SMALL), 13.0) for name in names]
    own = [spots[number] for number in far]
    rest = [spot for number, spot in enumerate(spots) if number not in far]
    for name, spot, box in zip(names, own, place_labels(own, sizes, room, radius=6, others=rest), strict=True):
        # Where no place is free beside its mark, the name stays in the mark's tooltip.
        if box.gap(spot) < 16 and box.overlap(room) > 0.99 * box.width * box.height:
            drawing.text(box.left, box.top + 10, name, size=SMALL, halo=True)


def _legend(cells: Sequence[Cell]) -> list[tuple[str, Look, str]]:
    """Colours of the precisions, then marks of the KV caches."""
    precisions = [one for one in PRECISIONS if any(cell.precision == one for cell in cells)]
    caches = [one for one in get_args(KVKind) if any(cell.kv_cache == one for cell in cells)]
    return [(one, Look(PRECISIONS[one], "circle"), "block") for one in precisions] + [
        (f"KV {one}", Look(MUTED, KV_SHAPES[one]), "mark") for one in caches
    ]
