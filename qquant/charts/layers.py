"""Heat maps of the error that quantizing leaves in every linear of every layer.

Which tensor is which linear is layer_names.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from qquant.charts.plot import LEFT, SMALL
from qquant.charts.scales import Scale, number_text
from qquant.charts.svg import LINE, MUTED, STEPS, WIDTH, Chart, Drawing, clipped, short_names, text_width
from qquant.layer_names import error_grid, in_order
from qquant.results import ModelRow, Result

_ROW = 17.0
"""Height of a row, user units."""


def layer_charts(results: Sequence[Result]) -> list[Chart]:
    """Errors of all quantized linears, a panel per candidate, on one logarithmic colour scale."""
    charts = []
    for number, result in enumerate(results, 1):
        grids = {
            row.label: (row, grid)
            for row in result.rows
            if (grid := error_grid((error.name, error.relative_error) for error in row.layer_errors))
        }
        if not grids:
            continue
        kinds = in_order({kind for _, grid in grids.values() for kind, _ in grid})
        layers = 1 + max(layer for _, grid in grids.values() for _, layer in grid)
        values = [value for _, grid in grids.values() for value in grid.values()]
        worst = max((value, row.label, at) for row, grid in grids.values() for at, value in grid.items())
        panel = 22 + _ROW * len(kinds)
        drawing = Drawing(
            f"layers-{number}",
            f"Error by layer: {result.rows[0].label}",
            f"{len(grids)} heat maps of {layers} layers by {', '.join(kinds)}; errors from {number_text(min(values))} "
            f"to {number_text(max(values))}, the largest in layer {worst[2][1]}, {worst[2][0]} of {worst[1]}.",
            height=(panel + 8) * len(grids) + 82,
        )
        across = Scale(0, layers, LEFT, WIDTH - 2)
        top = 0.0
        names = short_names([row.label for row in result.rows])
        for row, grid in grids.values():
            _draw_grid(drawing, row, names[row.label], grid, kinds, across, (min(values), max(values)), top)
            top += panel + 8
        step = max(1, math.ceil(layers / 12))
        for layer in range(0, layers, step):
            drawing.text(across.at(layer + 0.5), top + 6, str(layer), side="middle", size=SMALL, fill=MUTED)
        drawing.text((across.start + across.end) / 2, top + 22, "layer", side="middle", size=SMALL, fill=MUTED)
        _draw_steps(drawing, min(values), max(values), top + 36)
        charts.append(
            drawing.chart(
                "Share of each linear's output energy that is error on the calibration data, logarithmic and on one "
                f"scale for all panels. The largest, {number_text(worst[0])}, is layer {worst[2][1]}, {worst[2][0]}, "
                f"of {worst[1]}."
            )
        )
    return charts


def _step_of(value: float, low: float, high: float) -> int:
    """Which of the colours a value has."""
    if high <= low:
        return len(STEPS) - 1
    return min(len(STEPS) - 1, int(len(STEPS) * math.log(value / low) / math.log(high / low)))


def _draw_grid(
    drawing: Drawing,
    row: ModelRow,
    name: str,
    grid: dict[tuple[str, int], float],
    kinds: Sequence[str],
    across: Scale,
    ends: tuple[float, float],
    top: float,
) -> None:
    name = clipped(name, 150 if row.method == "rtn" else 330)
    note = " (error of the weights: rtn uses no data)" if row.method == "rtn" else ""
    drawing.text(2, top + 13, name, bold=True)
    if note:
        drawing.text(10 + 1.1 * text_width(name), top + 13, note.strip(), size=SMALL, fill=MUTED)
    top += 20
    # Where cells are missing, or as dark as the page, the outline shows that they belong here.
    drawing.rect(across.start, top, across.end - across.start, _ROW * len(kinds), fill="none", stroke=LINE)
    wide = (across.end - across.start) / across.high
    gap = 1.0 if wide > 6 else 0.0
    for number, kind in enumerate(kinds):
        drawing.text(LEFT - 6, top + number * _ROW + 12.5, kind, side="end", size=SMALL, fill=MUTED)
    for (kind, layer), value in grid.items():
        tip = f"layer {layer}, {kind}: {number_text(value)}"
        y = top + kinds.index(kind) * _ROW
        drawing.rect(across.at(layer), y, wide - gap, _ROW - 1, fill=STEPS[_step_of(value, *ends)], tip=tip)


def _draw_steps(drawing: Drawing, low: float, high: float, top: float) -> None:
    """The colours and the values between which each stands."""
    wide = 28.0
    left = LEFT + (WIDTH - LEFT - wide * len(STEPS)) / 2
    for number, step in enumerate(STEPS):
        drawing.rect(left + number * wide, top, wide - 1, 11, fill=step)
    for number in range(0, len(STEPS) + 1, 3):
        value = low * (high / low) ** (number / len(STEPS))
        drawing.text(
            left + number * wide, top + 24, number_text(float(f"{value:.1e}")), side="middle", size=SMALL, fill=MUTED
        )
    drawing.text(left + wide * len(STEPS) / 2, top + 39, "relative error", side="middle", size=SMALL, fill=MUTED)
