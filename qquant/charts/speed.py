"""Charts of speed: tokens per second of decoding and of the prompt, with how far repetitions lie apart.

From the rows of an evaluation, one sequence at a time, and from the cells of a profile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qquant.charts.grid_cells import (
    PRECISIONS,
    Cell,
    by_series,
    families,
    names_of,
    profile_cells,
    series_look,
    series_name,
    slice_of,
)
from qquant.charts.plot import (
    SMALL,
    Bar,
    Curve,
    Part,
    Place,
    bars_height,
    curves_height,
    draw_axes,
    draw_bars,
    draw_curves,
    names_width,
    plot_frame,
    value_scale,
)
from qquant.charts.scales import doubling_scale, number_text
from qquant.charts.svg import MUTED, Chart, Drawing, look_of, short_names
from qquant.results import Result

_WHISKER = "The whisker reaches from the slowest repetition to the fastest."
Rate = Callable[[Cell], tuple[float, float, float] | None]


def speed_charts(results: Sequence[Result]) -> list[Chart]:
    """Decoding and prefill, in tokens per second.

    Args:
        results: read, never written.

    Returns:
        One chart per evaluation that was timed; per profile one of decoding and one of prefill.
    """
    charts = []
    for number, result in enumerate(results, 1):
        charts += _row_charts(f"speed-{number}", result)
        if result.profile is not None:
            for group, cells in families(profile_cells(result.profile)).items():
                charts += _cell_charts(f"speed-decode{group}-{number}", cells, "batch", "decoding", decode_rate)
                charts += _cell_charts(
                    f"speed-prefill{group}-{number}", cells, "prompt_tokens", "prefill", prefill_rate
                )
    return charts


def decode_rate(cell: Cell) -> tuple[float, float, float] | None:
    """Median, least and largest tokens per second after the first token; None where nothing was decoded."""
    if cell.speed is None or cell.speed.decode_tokens_per_second is None:
        return None
    return _spread(cell.speed.decode_tokens_per_second, cell.batch * (cell.new_tokens - 1), cell.speed.decode_seconds)


def prefill_rate(cell: Cell) -> tuple[float, float, float] | None:
    """Median, least and largest tokens of the prompt per second until the first token."""
    if cell.speed is None:
        return None
    tokens = cell.batch * cell.prompt_tokens
    return _spread(cell.speed.prefill_tokens_per_second, tokens, cell.speed.first_token_seconds)


def _spread(median: float, tokens: int, seconds: Sequence[float]) -> tuple[float, float, float]:
    rates = [tokens / took for took in seconds if took > 0] or [median]
    return median, min(median, *rates), max(median, *rates)


def _row_charts(anchor: str, result: Result) -> list[Chart]:
    rows = [row for row in result.rows if row.speed is not None]
    labels = [row.label for row in result.rows]
    names = short_names(labels)
    panels: dict[str, list[Bar]] = {"decoding, tokens/s": [], "prefill, tokens/s": []}
    prompts = set()
    for row in rows:
        if row.speed is None:
            continue
        speed, colour = row.speed, look_of(labels, row.label).colour
        prompts.add(speed.prompt_tokens)
        decode = _spread(speed.decode_tokens_per_second, speed.decode_tokens, speed.decode_seconds)
        prefill = _spread(speed.prefill_tokens_per_second, speed.prompt_tokens, speed.prefill_seconds)
        for title, found in zip(panels, (decode, prefill), strict=True):
            panels[title].append(_bar(names[row.label], colour, found))
    if not rows:
        return []
    height = sum(24 + bars_height(bars) for bars in panels.values()) + 6
    drawing = Drawing(
        anchor,
        f"Speed of {labels[0]}",
        "; ".join(f"{title}: " + ", ".join(f"{bar.name} {bar.text}" for bar in bars) for title, bars in panels.items()),
        height=height,
    )
    top = 0.0
    for title, bars in panels.items():
        drawing.text(2, top + 14, title, size=SMALL, fill=MUTED, bold=True)
        draw_bars(drawing, bars, top=top + 22)
        top += 24 + bars_height(bars)
    prompt = " or ".join(f"{count:,}" for count in sorted(prompts))
    return [drawing.chart(f"One sequence at a time, prompts of {prompt} tokens; bars are medians. {_WHISKER}")]


def _bar(name: str, colour: str, rate: tuple[float, float, float]) -> Bar:
    middle, low, high = rate
    tip = f"{name}: {number_text(middle)} tokens/s, {number_text(low)} to {number_text(high)}"
    return Bar(name, number_text(middle), (Part(middle, colour, tip),), low, high)


def _cell_charts(anchor: str, cells: Sequence[Cell], along: str, word: str, rate: Rate) -> list[Chart]:
    timed = [cell for cell in cells if rate(cell)]
    if not timed:
        return []
    chosen = slice_of(timed, "batch" if along == "batch" else "tokens")
    if along == "prompt_tokens":
        # One answer length of each prompt is enough: the first token does not know how many follow.
        chosen = [cell for cell in chosen if cell.new_tokens == min(c.new_tokens for c in chosen if _alike(c, cell))]
    values = sorted({getattr(cell, along) for cell in chosen})
    curves, bars = [], []
    for key, own in by_series(chosen).items():
        places = []
        for cell in sorted(own, key=lambda cell: int(getattr(cell, along))):
            middle, low, high = rate(cell) or (0.0, 0.0, 0.0)
            tip = f"{cell.place}: {number_text(middle)} tokens/s, {number_text(low)} to {number_text(high)}"
            tip += _tokens(cell)
            places.append(Place(getattr(cell, along), middle, tip, low, high))
            bars.append(_bar(series_name(key), PRECISIONS[cell.precision], (middle, low, high)))
        curves.append(Curve(series_name(key), series_look(key), tuple(places)))
    title = f"Speed of {word}: {names_of(chosen)}"
    said = "; ".join(f"{bar.name}: {bar.text} tokens/s" for bar in bars)
    fixed = chosen[0].text if along == "batch" else f"batch {chosen[0].batch}"
    if len(values) < 2:
        fixed = f"batch {chosen[0].batch}, {chosen[0].text}"
        drawing = Drawing(anchor, title, said, height=bars_height(bars) + 24)
        drawing.text(2, 14, f"{word}, tokens/s", size=SMALL, fill=MUTED, bold=True)
        draw_bars(drawing, bars, top=22)
        return [drawing.chart(f"Medians at {fixed}. {_WHISKER}")]
    drawing = Drawing(anchor, title, said, height=curves_height(curves, 258) + 72)
    frame = plot_frame(28, drawing.height - 72, right=names_width(curves))
    x = doubling_scale(values, frame.left + 4, frame.right - 4)
    rates = [end for curve in curves for place in curve.places for end in (place.low, place.high) if end]
    y = value_scale(rates, frame.bottom, frame.top)
    x_title = "batch (sequences at once)" if along == "batch" else "tokens of the prompt"
    y_title = f"{word} (tokens/s, all sequences)"
    draw_axes(drawing, frame, x, y, x_title=x_title, y_title=y_title, x_ticks=values)
    draw_curves(drawing, frame, x, y, curves)
    return [
        drawing.chart(
            f"Medians at {fixed}. The colour is the precision of the weights, the mark that of the KV cache. {_WHISKER}"
        )
    ]


def _alike(one: Cell, other: Cell) -> bool:
    """Whether two cells differ at most in the answer's length."""
    return (one.model, one.precision, one.kv_cache, one.batch, one.prompt_tokens) == (
        (other.model, other.precision, other.kv_cache, other.batch, other.prompt_tokens)
    )


def _tokens(cell: Cell) -> str:
    """How long single tokens took."""
    if cell.speed is None or cell.speed.token_p50_seconds is None or cell.speed.token_p95_seconds is None:
        return ""
    middle, late = (1000 * took for took in (cell.speed.token_p50_seconds, cell.speed.token_p95_seconds))
    return f"; a token took {number_text(middle)} ms (p95 {number_text(late)} ms)"
