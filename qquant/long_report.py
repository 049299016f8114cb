"""The record of perplexity by sequence length, and the part of a report's Markdown and pictures drawn from it.

Pydantic models only, as in results.py, which holds one of these. How the numbers come about is long_context.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from qquant.records import Strict, renamed, shown, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "long-context.png"

SettingName = Literal["plain", "ntk", "ntk_logn", "logn", "as_configured"]
"""What a model does beyond the length it was trained at; ``as_configured`` where that cannot be switched."""

SHOWN: dict[SettingName, str] = {
    "plain": "plain",
    "ntk": "+ dynamic_ntk",
    "ntk_logn": "+ dynamic_ntk + logn",
    "logn": "+ logn",
    "as_configured": "as configured",
}
"""Rows of the table, as Qwen's README words them."""

_COLOURS = tuple(SHOWN)
_LINES = ("-", "--", ":", "-.")


class LongDifference(Strict):
    """A mean of per-token differences of the negative log-likelihood, and how far chance moves it."""

    mean_nats: float
    stderr_nats: float | None
    """Standard error of the mean, from the differences; None for a single token."""


class LongScore(Strict):
    """One set of tokens, predicted by one model in one setting from windows of one length."""

    tokens: int
    nll_mean_nats: float
    perplexity: float
    """exp(nll_mean_nats)."""
    to_plain: LongDifference | None
    """Against the same model's first setting; None: this is that one."""
    to_baseline: LongDifference | None
    """Against the report's first model in the same setting; None: this is that model, or it has no such setting."""


class LongPoint(Strict):
    """One column of the table."""

    length_tokens: Annotated[int, renamed("length_tokens", "length")]
    """Tokens fed per window."""
    whole: LongScore
    """Every token of the text but the first."""
    tail: LongScore
    """Only the last tokens of each of the longest windows: the same ones from contexts of every length."""


class LongRow(Strict):
    """One model in one setting."""

    setting: SettingName
    points: tuple[LongPoint, ...]
    """In the order of the lengths."""


class LongModel(Strict):
    """One model in all its settings."""

    label: str
    made_for_tokens: Annotated[int | None, renamed("made_for_tokens", "made_for")]
    """Tokens that its config names: seq_length of a Qwen v1 model, max_position_embeddings of any other."""
    rows: tuple[LongRow, ...]


class LongContext(Strict):
    """What ``--measure long-context`` measured; the first model is the baseline."""

    lengths_tokens: Annotated[tuple[int, ...], renamed("lengths_tokens", "lengths")]
    """Tokens per window, ascending; each divides the longest."""
    windows: int
    """Of the longest length; ``windows * lengths_tokens[-1]`` tokens are scored at every length."""
    tail_tokens: int
    """Tokens at the end of each longest window that ``LongPoint.tail`` is about: half of the shortest window."""
    models: tuple[LongModel, ...]


def long_sections(found: LongContext, *, picture: bool) -> list[str]:
    """The section of a report's Markdown, paragraph by paragraph; every number is a rounded field of the record."""
    scored = found.models[0].rows[0].points[-1].whole.tokens
    limits = [
        f"{model.label} was made for {model.made_for_tokens} tokens"
        if model.made_for_tokens is not None
        else f"the config of {model.label} names no length that it was made for"
        for model in found.models
    ]
    return [
        "## Long context",
        f"Windows of {', '.join(map(str, found.lengths_tokens))} tokens that each start afresh and do not overlap: one "
        f"text, the same {scored} tokens scored at every length. {'; '.join(limits)}.",
        "### Perplexity by sequence length",
        "Over all predictions of the windows, from one token of context to a whole window of it.",
        _grid(found, lambda point: shown(point.whole.perplexity, ".4f")),
        f"### Perplexity of the last {found.tail_tokens} tokens of each of the {found.windows} longest windows",
        f"The same {found.models[0].rows[0].points[-1].tail.tokens} tokens in every column, each predicted from "
        f"a column's length of context, or up to {found.tail_tokens - 1} less.",
        _grid(found, lambda point: shown(point.tail.perplexity, ".4f")),
        *([f"![{PICTURE.removesuffix('.png')}]({PICTURE})"] if picture else []),
        *_differences(found),
    ]


def _grid(found: LongContext, cell: Callable[[LongPoint], str | None]) -> str:
    """Models and their settings downwards, lengths across; a row without a single cell is left out."""
    body = []
    for model in found.models:
        for row in model.rows:
            cells = [cell(point) for point in row.points]
            if any(value is not None for value in cells):
                body.append([model.label, SHOWN[row.setting], *[value or "-" for value in cells]])
    return table(["model", "setting", *[str(length) for length in found.lengths_tokens]], body)


def _differences(found: LongContext) -> list[str]:
    """What a setting gains over the plain model and what a candidate loses to the baseline, with standard errors."""
    parts = []
    if any(len(model.rows) > 1 for model in found.models):
        parts += [
            "### What a setting changes",
            "Mean difference of the negative log-likelihood to the same model's plain row, in nats per token over all "
            "predictions, with its standard error; below zero is better.",
            _grid(found, lambda point: _difference(point.whole.to_plain)),
        ]
    if len(found.models) > 1:
        parts += [
            f"### What a candidate loses to {found.models[0].label}",
            "The same to the baseline's row of the same setting.",
            _grid(found, lambda point: _difference(point.whole.to_baseline)),
        ]
    return parts


def _difference(value: LongDifference | None) -> str | None:
    if value is None:
        return None
    if value.mean_nats == 0 and not value.stderr_nats:
        return "0"  # not a rounded one: every token's loss is the same number
    error = "" if value.stderr_nats is None else f" ± {value.stderr_nats:.4f}"
    return f"{value.mean_nats:+.4f}{error}"


def draw_long_context(figure: Figure, found: LongContext) -> str | None:
    """Perplexity against length, all predictions on the left and the last tokens on the right; a line per row.

    Returns why it cannot be drawn.
    """
    from matplotlib.ticker import LogLocator

    if len(found.lengths_tokens) < 2:
        return "one length makes no line"
    rows = sum(len(model.rows) for model in found.models)
    figure.set_size_inches(10, 4.3 + 0.25 * ((rows + 1) // 2))
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, part, title in ((left, "whole", "all predictions"), (right, "tail", "last tokens of the windows")):
        for number, model in enumerate(found.models):
            for row in model.rows:
                name = SHOWN[row.setting] if len(found.models) == 1 else f"{model.label}: {SHOWN[row.setting]}"
                axis.plot(
                    found.lengths_tokens,
                    [getattr(point, part).perplexity for point in row.points],
                    marker="o",
                    markersize=4,
                    linestyle=_LINES[number % len(_LINES)],
                    color=f"C{_COLOURS.index(row.setting)}",
                    label=name,
                )
        for length in sorted({model.made_for_tokens for model in found.models if model.made_for_tokens is not None}):
            axis.axvline(length, color="grey", linewidth=1, linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(found.lengths_tokens, [str(length) for length in found.lengths_tokens])
        axis.set(title=title, xlabel="tokens per window")
        axis.grid(alpha=0.25)
    left.set_ylabel("perplexity (dashed: length the model was made for)")
    # Plain numbers, and enough of them: a logarithmic axis of less than a decade would otherwise say 2 x 10^2.
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7)))
    left.yaxis.set_major_formatter("{x:g}")
    for axis in (left, right):
        axis.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return None
