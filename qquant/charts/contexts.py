"""Charts of long contexts and of the KV cache: perplexity by length, and what 8 bits cost by scheme.

From the sections ``long_context`` and ``kv_cache`` of results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qquant.charts.plot import (
    SMALL,
    Curve,
    Place,
    curves_height,
    draw_axes,
    draw_curves,
    names_width,
    plot_frame,
    value_scale,
)
from qquant.charts.scales import Scale, doubling_scale, linear_scale, log_scale, number_text
from qquant.charts.svg import (
    CATEGORIES,
    DASHES,
    LINE,
    MUTED,
    SHAPES,
    WIDTH,
    Chart,
    Drawing,
    Look,
    clipped,
    look_of,
    short_names,
)
from qquant.kv_report import KVCacheCost, KVModel, KVScheme
from qquant.long_report import SHOWN, LongContext, LongModel, LongRow
from qquant.results import Result

_ROW = 34.0


def context_charts(results: Sequence[Result]) -> list[Chart]:
    """Perplexity against length and divergence by cache scheme, for the results that hold them."""
    charts = []
    for number, result in enumerate(results, 1):
        if result.long_context is not None and len(result.long_context.lengths_tokens) > 1:
            charts.append(_long_chart(f"long-context-{number}", result.long_context))
        if result.kv_cache is not None:
            charts += _kv_charts(f"kv-cache-{number}", result.kv_cache)
    return charts


def _long_chart(anchor: str, found: LongContext) -> Chart:
    parts = {
        "whole": "perplexity of all predictions",
        "tail": f"perplexity of the last {found.tail_tokens} tokens of a window",
    }
    curves = {part: _long_curves(found, part) for part in parts}
    plot = curves_height(curves["whole"], 190)
    drawing = Drawing(
        anchor,
        f"Perplexity by length: {found.models[0].label}",
        "; ".join(
            f"{curve.name}: " + ", ".join(f"{number_text(p.y)} at {p.x:g} tokens" for p in curve.places)
            for curve in curves["whole"]
        ),
        height=2 * (plot + 56) + 22,
    )
    made_for = sorted({model.made_for_tokens for model in found.models if model.made_for_tokens is not None})
    values = [place.y for part in curves.values() for curve in part for place in curve.places]
    top = 28.0
    for part, title in parts.items():
        frame = plot_frame(top, plot, right=names_width(curves[part], 150))
        x = doubling_scale(found.lengths_tokens, frame.left + 4, frame.right - 4)
        wide = value_scale(values, frame.bottom, frame.top, wide=4)
        y = wide if wide.log else linear_scale(values, frame.bottom, frame.top, from_zero=False)
        x_title = "tokens per window" if part == "tail" else ""
        draw_axes(drawing, frame, x, y, x_title=x_title, y_title=title, x_ticks=found.lengths_tokens)
        for length in made_for:
            if x.low < length < x.high:
                drawing.line([(x.at(length), frame.top), (x.at(length), frame.bottom)], stroke=MUTED, dash="2 3")
                drawing.text(x.at(length) + 4, frame.top + 12, "made for", size=SMALL, fill=MUTED, halo=True)
        draw_curves(drawing, frame, x, y, curves[part])
        top += plot + 56
    return drawing.chart(
        "Lower is better. The same text at every length; the lower plot scores the same last tokens each time, those "
        "of the longest windows, so only the context before them grows. The axes do not begin at zero."
    )


def _long_curves(found: LongContext, part: str) -> list[Curve]:
    """A curve per model and setting: the setting is its colour and mark, the model its dash."""
    settings = list(dict.fromkeys(row.setting for model in found.models for row in model.rows))
    curves = []
    for number, model in enumerate(found.models):
        for row in model.rows:
            step = settings.index(row.setting)
            if len(settings) == 1:
                step = number
            look = Look(CATEGORIES[step % 8], SHAPES[(step + 4 * number) % 8], DASHES[number % len(DASHES)])
            curves.append(Curve(_long_name(found, model, row), look, _long_places(model, row, part)))
    return curves


def _long_name(found: LongContext, model: LongModel, row: LongRow) -> str:
    setting = SHOWN[row.setting].replace("dynamic_", "")
    if len(found.models) == 1:
        return setting
    if all(len(one.rows) == 1 for one in found.models):
        return model.label
    short = short_names([one.label for one in found.models])[model.label]
    return setting if model is found.models[0] else f"{short}: {setting}"


def _long_places(model: LongModel, row: LongRow, part: str) -> tuple[Place, ...]:
    return tuple(
        Place(
            point.length_tokens,
            getattr(point, part).perplexity,
            f"{model.label}, {SHOWN[row.setting]}, {point.length_tokens} tokens: {getattr(point, part).perplexity:.4f}",
        )
        for point in row.points
    )


@dataclass(frozen=True)
class _Scheme:
    """A line of the chart of schemes."""

    model: KVModel
    scheme: KVScheme
    mean: float
    late: float | None
    tokens: int


def _kv_charts(anchor: str, cost: KVCacheCost) -> list[Chart]:
    rows = [
        _Scheme(model, scheme, scheme.accuracy.kl_mean_nats, scheme.accuracy.kl_p99_nats, scheme.accuracy.tokens)
        for model in cost.models
        for scheme in model.schemes
        if scheme.accuracy and scheme.accuracy.kl_mean_nats
    ]
    if not rows:
        return []
    several = len(cost.models) > 1
    drawing = Drawing(
        anchor,
        f"KV cache in 8 bits: {', '.join(model.label for model in cost.models)}",
        "; ".join(f"{row.model.label}, {row.scheme.name}: mean KL {number_text(row.mean)} nats" for row in rows),
        height=_ROW * len(rows) + (20 * len(cost.models) if several else 0) + 72,
    )
    ends = [end for row in rows for end in (row.mean, row.late) if end]
    x = log_scale(ends, 20, WIDTH - 66)
    bottom = drawing.height - 42
    for value in x.ticks():
        drawing.line([(x.at(value), 22), (x.at(value), bottom)], stroke=LINE)
        drawing.text(x.at(value), bottom + 16, number_text(value), side="middle", size=SMALL, fill=MUTED)
    drawing.text(2, bottom + 33, "KL to an exact cache (nats per token): mean, and p99", size=SMALL, fill=MUTED)
    drawing.text(WIDTH, 12, "bytes of bf16", side="end", size=SMALL, fill=MUTED)
    y = 24.0
    for model in cost.models:
        if several:
            drawing.text(2, y + 14, clipped(model.label, WIDTH - 80), bold=True, halo=True)
            y += 20
        for row in rows:
            if row.model is model:
                _draw_scheme(drawing, row, x, y)
                y += _ROW
    return [
        drawing.chart(
            f"Further left is better. Filled: the mean over {rows[0].tokens:,} tokens; hollow: here the worst "
            "hundredth begins. Bold: the scheme with the least mean of those that take the same bytes."
        )
    ]


def _draw_scheme(drawing: Drawing, row: _Scheme, x: Scale, y: float) -> None:
    look = look_of(["published", "none", "hadamard", "fold"], row.scheme.name)
    tip = f"{row.model.label}, {row.scheme.name}: mean {number_text(row.mean)} nats"
    drawing.text(8, y + 10, row.scheme.name, size=SMALL, bold=row.scheme.name == row.model.chosen, halo=True)
    height = y + 20
    if row.late:
        drawing.line([(x.at(row.mean), height), (x.at(row.late), height)], stroke=look.colour, width=1.6)
        late = f"{tip}, p99 {number_text(row.late)} nats"
        drawing.marker(x.at(row.late), height, look.shape, colour=look.colour, hollow=True, radius=3.6, tip=late)
    drawing.marker(x.at(row.mean), height, look.shape, colour=look.colour, tip=tip)
    drawing.text(WIDTH, y + 24, f"{100 * row.scheme.share_of_bfloat16:.1f} %", side="end", size=SMALL)
