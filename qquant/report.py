"""The record of an evaluation as JSON, and the Markdown and pictures that are drawn from that record alone.

Pydantic models only: strict, frozen, JSON in and out. Nothing here measures; a field that was not measured is None
and is printed as such, never guessed. What a KV cache costs has its own record and section in kv_report.py, perplexity
by sequence length in long_report.py.
"""

from __future__ import annotations

import logging
import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import SerializerFunctionWrapHandler, ValidationError, model_serializer

from qquant import kv_report, long_report
from qquant.errors import BadDataError
from qquant.kv_report import KVCacheCost
from qquant.long_report import LongContext
from qquant.records import MB, NOT_MEASURED, PERCENT, Accuracy, Environment, Memory, Speed, Strict, field, shown, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Accuracy", "Data", "Environment", "EvalReport", "KVCacheCost", "LayerError", "LongContext", "Memory", "ModelRow",
    "Ratios", "Speed", "ratios_to_baseline", "report_from_json", "shown_command", "to_markdown", "write_report",
]  # fmt: skip

_LOG = logging.getLogger("qquant.report")
_MEGA = 1e6
_WORST_LAYERS = 3
_KINDS = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
"""Rows of the layer picture from top to bottom; other names follow in their own order."""
_KIND_OF = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up",
    "down_proj": "down", "c_attn": "qkv", "w2": "gate", "w1": "up",
}  # fmt: skip
_MARKERS = "osD^vP*X"
_PLACED = (kv_report.PICTURE, long_report.PICTURE)
"""Pictures that stand in a section of their own."""

_TABLES = {
    # heading, field of the row, format; a comparison is a dash in the baseline's own row
    "Accuracy": (
        ("perplexity", "accuracy.perplexity", ".4f"),
        ("PPL ratio", "ratios.perplexity", ".4f"),
        ("NLL difference (nats)", "accuracy.nll_difference_nats", "+.5f"),
        ("its standard error", "accuracy.nll_difference_stderr_nats", ".5f"),
        ("mean KL (nats)", "accuracy.kl_mean_nats", ".3g"),
        ("p99 KL (nats)", "accuracy.kl_p99_nats", ".3g"),
        ("max KL (nats)", "accuracy.kl_max_nats", ".3g"),
        ("same top-1", "accuracy.top1_agreement", PERCENT),
    ),
    "Size": (
        ("weights (MB)", "weights_bytes", MB),
        ("ratio", "ratios.weights_bytes", ".3f"),
        ("bits per weight", "bits_per_weight", ".2f"),
        ("folder (MB)", "folder_bytes", MB),
    ),
    "Speed, one sequence at a time": (
        ("prompt tokens", "speed.prompt_tokens", "d"),
        ("prefill (tokens/s)", "speed.prefill_tokens_per_second", ".1f"),
        ("ratio", "ratios.prefill_tokens_per_second", ".3f"),
        ("steps timed together", "speed.decode_tokens", "d"),
        ("decode (tokens/s)", "speed.decode_tokens_per_second", ".1f"),
        ("ratio", "ratios.decode_tokens_per_second", ".3f"),
    ),
    "Memory": (
        ("tensors (MB)", "memory.tensor_bytes", MB),
        ("ratio", "ratios.tensor_bytes", ".3f"),
        ("RSS before (MB)", "memory.rss_before_bytes", MB),
        ("peak RSS (MB)", "memory.peak_rss_bytes", MB),
        ("CUDA before (MB)", "memory.cuda_before_bytes", MB),
        ("peak CUDA (MB)", "memory.cuda_peak_bytes", MB),
    ),
}
_COMPARISONS = ("ratios.", "accuracy.kl_", "accuracy.nll_difference", "accuracy.top1")


class Data(Strict):
    """The text that was evaluated, by its identity and not by its content or place."""

    name: str
    """Last component of the file's path."""
    sha256: str
    """Of the file's bytes as they lie on disk."""
    tokens: int
    """Tokens that were used, the unscored first one included."""
    seq_len: int
    stride: int


class LayerError(Strict):
    """One line of a candidate's quant_log.json."""

    name: str
    relative_error: float
    """Share of the layer's output energy that is error, on the calibration data; of its weights for method rtn."""


class Ratios(Strict):
    """Candidate divided by baseline, so 1 is no change; None where either side was not measured."""

    perplexity: float | None
    weights_bytes: float | None
    tensor_bytes: float | None
    prefill_tokens_per_second: float | None
    """Median of the ratios of turns that followed each other, not the ratio of the medians."""
    decode_tokens_per_second: float | None
    """As above."""


class ModelRow(Strict):
    """All that is known about one model of the report."""

    label: str
    role: Literal["baseline", "candidate"]
    method: str | None
    """How it was quantized; None for a model that is not."""
    bits: int | None
    group_size: int | None
    checkpoint_dtype: str
    """The dtype its config.json names; the report's compute_dtype says what it was run in."""
    weights_bytes: int | None
    folder_bytes: int | None
    bits_per_weight: float | None
    """8 * weights_bytes by the baseline's parameters: embeddings, scales and all."""
    accuracy: Accuracy | None
    speed: Speed | None
    memory: Memory | None
    ratios: Ratios | None
    layer_errors: tuple[LayerError, ...]


class EvalReport(Strict):
    """One evaluation: what was run, where, on what, and what came out; the first row is the baseline."""

    schema_version: Literal[1] = 1
    created: str
    """UTC, ISO 8601."""
    command: str
    """As typed, with absolute paths cut to their last component."""
    seed: int
    compute_dtype: str
    """One dtype for all rows, so that only the weights differ."""
    environment: Environment
    data: Data
    rows: tuple[ModelRow, ...]
    plots: tuple[str, ...] = ()
    """File names of the pictures that lie beside the report."""
    kv_cache: KVCacheCost | None = None
    """Absent from the JSON of an evaluation that was not asked for it."""
    long_context: LongContext | None = None
    """The same; an evaluation that was asked for it measured nothing else."""

    @model_serializer(mode="wrap")
    def _without_what_was_not_asked_for(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        for name in ("kv_cache", "long_context"):
            if getattr(self, name) is None:
                content.pop(name, None)
        return content


def shown_command(argv: Sequence[str]) -> str:
    """A command line as typed, with every absolute path cut to its last component."""
    words = []
    for word in argv:
        option, equals, value = word.partition("=")
        path = value if equals and option.startswith("-") else word
        if path.startswith(("/", "~")) or Path(path).is_absolute():
            path = Path(path).name or "/"
        words.append(f"{option}={path}" if equals and option.startswith("-") else path)
    return shlex.join(words)


def ratios_to_baseline(row: ModelRow, baseline: ModelRow) -> Ratios:
    """Divide one row's measurements by the baseline's."""

    def ratio(read: Callable[[ModelRow], float | None]) -> float | None:
        ours, theirs = read(row), read(baseline)
        return None if ours is None or not theirs else ours / theirs

    def paired(read: Callable[[Speed], tuple[float, ...]]) -> float | None:
        if row.speed is None or baseline.speed is None:
            return None
        pairs = zip(read(baseline.speed), read(row.speed), strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    return Ratios(
        perplexity=ratio(lambda r: r.accuracy.perplexity if r.accuracy else None),
        weights_bytes=ratio(lambda r: r.weights_bytes),
        tensor_bytes=ratio(lambda r: r.memory.tensor_bytes if r.memory else None),
        prefill_tokens_per_second=paired(lambda s: s.prefill_seconds),
        decode_tokens_per_second=paired(lambda s: s.decode_seconds),
    )


def report_from_json(text: str | bytes) -> EvalReport:
    """Read a report.json. Raises BadDataError that names the first wrong field."""
    try:
        return EvalReport.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"]) or "document"
        raise BadDataError(f"not a report of schema 1: {place}: {fault['msg']}") from error


def write_report(report: EvalReport, folder: Path) -> EvalReport:
    """Write report.json, report.md and, with matplotlib, pictures into a folder; returns the record that names them."""
    report = report.model_copy(update={"plots": tuple(_draw(report, folder))})
    (folder / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    return report


def to_markdown(report: EvalReport) -> str:
    """The report for a human reader; every number in it is a rounded field of the record."""
    data, env = report.data, report.environment
    facts = {"command": f"`{report.command}`", "created": report.created, "seed": report.seed, **dict(env)}
    sources = sorted({row.memory.peak_rss_source for row in report.rows if row.memory})
    candidates = [row.label for row in report.rows if row.role == "candidate"]
    cost, long, drawn = report.kv_cache, report.long_context, report.plots
    tables = _TABLES if long is None else {"Size": _TABLES["Size"]}
    reading = f"Peak RSS was read as {', '.join(sources) or NOT_MEASURED}." if long is None else _parameters(report)
    parts = [
        f"# Evaluation of {', '.join(candidates or [row.label for row in report.rows])}",
        f"Text `{data.name}` (sha256 `{data.sha256[:12]}…`), {data.tokens} tokens, windows of {data.seq_len}, "
        f"stride {data.stride}. All models ran in {report.compute_dtype} on {env.device}.",
        *(long_report.long_sections(long, picture=long_report.PICTURE in drawn) if long else []),
        *[f"## {title}\n\n{_models_table(report.rows, columns)}" for title, columns in tables.items()],
        f"1 MB is 10^6 bytes. {reading}",
        *_worst_layers(report.rows),
        *[f"![{name.removesuffix('.png')}]({name})" for name in drawn if name not in _PLACED],
        *(_kv_sections(cost, report) if cost else []),
        "## How it was run\n\n" + table(("what", "value"), [(name, str(value)) for name, value in facts.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _kv_sections(cost: KVCacheCost, report: EvalReport) -> list[str]:
    picture = kv_report.PICTURE in report.plots
    return kv_report.kv_sections(cost, compute_dtype=report.compute_dtype, picture=picture)


def _parameters(report: EvalReport) -> str:
    """How large the baseline is, so that nobody takes a small model's behaviour for a large one's."""
    base = report.rows[0]
    if not base.weights_bytes or not base.bits_per_weight:
        return f"Its parameters were {NOT_MEASURED}."
    return f"{base.label} stores {8 * base.weights_bytes / base.bits_per_weight / _MEGA:.2f} million parameters."


def _models_table(rows: Sequence[ModelRow], columns: Sequence[tuple[str, str, str]]) -> str:
    body = [[_name(row), _weights(row), *[_cell(row, path, spec) for _, path, spec in columns]] for row in rows]
    return table(["model", "stored as", *[heading for heading, _, _ in columns]], body)


def _cell(row: ModelRow, path: str, spec: str) -> str:
    if row.role == "baseline" and path.startswith(_COMPARISONS):
        return "-"
    return shown(field(row, path), spec)


def _worst_layers(rows: Sequence[ModelRow]) -> list[str]:
    body = []
    for row in rows:
        worst = sorted(row.layer_errors, key=lambda layer: -layer.relative_error)[:_WORST_LAYERS]
        body += [(_errors_of(row), f"`{layer.name}`", f"{layer.relative_error:.3g}") for layer in worst]
    head = ("model", "layer", "relative error")
    return [f"## Layers with the largest error\n\n{table(head, body)}"] if body else []


def _name(row: ModelRow) -> str:
    return row.label + (" (baseline)" if row.role == "baseline" else "")


def _errors_of(row: ModelRow) -> str:
    """The row's name, with a warning where errors are of another kind than the others'."""
    return row.label + (" (error of the weights: rtn uses no data)" if row.method == "rtn" else "")


def _weights(row: ModelRow) -> str:
    if row.bits is None:
        return row.checkpoint_dtype
    group = "" if row.group_size is None else ", whole row" if row.group_size == -1 else f", group {row.group_size}"
    return f"{row.bits}-bit {row.method or ''}".rstrip() + group


def _draw(report: EvalReport, folder: Path) -> list[str]:
    """Draw every picture the record has data for; say in the log which was not drawn and why."""
    pictures: dict[str, Callable[[Figure], str | None]] = {}
    if (long := report.long_context) is not None:
        pictures[long_report.PICTURE] = lambda figure: long_report.draw_long_context(figure, long)
    elif any(row.role == "candidate" for row in report.rows) or report.kv_cache is None:
        pictures["layer-error.png"] = lambda figure: _draw_layer_errors(figure, report)
        pictures["size-kl.png"] = lambda figure: _draw_size_kl(figure, report)
    if (cost := report.kv_cache) is not None:
        pictures[kv_report.PICTURE] = lambda figure: kv_report.draw_kv_outliers(figure, cost)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        _LOG.warning("not drawn: %s; matplotlib is missing, pip install 'qquant[plots]'", ", ".join(pictures))
        return []
    drawn = []
    for name, draw in pictures.items():
        # Not pyplot: it keeps global state and would pick a window system.
        figure = Figure(dpi=150, layout="constrained")

        reason = draw(figure)
        if reason:
            _LOG.warning("%s was not drawn: %s", name, reason)
            continue
        figure.savefig(folder / name, metadata={"Software": None})
        drawn.append(name)
    return drawn


def _draw_layer_errors(figure: Figure, report: EvalReport) -> str | None:
    """Heat maps on one colour scale, one per candidate: layer by kind of linear. Returns why it cannot be drawn."""
    grids = {_errors_of(row): grid for row in report.rows if (grid := _layer_grid(row.layer_errors))}
    if not grids:
        return "no candidate has a quant_log.json with errors above zero"
    found = {kind for grid in grids.values() for kind, _ in grid}
    kinds = [kind for kind in _KINDS if kind in found] + sorted(found.difference(_KINDS))
    layers = 1 + max(layer for grid in grids.values() for _, layer in grid)
    values = [value for grid in grids.values() for value in grid.values()]
    figure.set_size_inches(min(20, 5 + 0.2 * layers), 1 + len(grids) * (0.6 + 0.25 * len(kinds)))
    axes = figure.subplots(len(grids), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (label, grid) in zip(axes, grids.items(), strict=True):
        cells = [[grid.get((kind, layer), math.nan) for layer in range(layers)] for kind in kinds]
        image = axis.imshow(cells, cmap="cividis", norm="log", vmin=min(values), vmax=max(values), aspect="auto")
        axis.set(title=label, yticks=range(len(kinds)), yticklabels=kinds, facecolor="lightgrey")
    axes[-1].set(xlabel="layer", xticks=range(0, layers, 1 + layers // 20))
    figure.colorbar(image, ax=list(axes), label="relative error (share of energy)")
    return None


def _layer_grid(errors: Sequence[LayerError]) -> dict[tuple[str, int], float]:
    """(kind, layer) -> error, for the names that hold a layer's number; a log scale has no place for zeros."""
    grid = {}
    for error in errors:
        *path, leaf = error.name.split(".")
        layer = next((int(part) for part in path if part.isdecimal()), None)
        if layer is not None and error.relative_error > 0:
            kind = "o" if leaf == "c_proj" and "attn" in path else "down" if leaf == "c_proj" else leaf
            grid[_KIND_OF.get(leaf, kind), layer] = error.relative_error
    return grid


def _draw_size_kl(figure: Figure, report: EvalReport) -> str | None:
    """Size against divergence, a point per candidate, the baseline's size as a line. Returns why it cannot be drawn."""
    points = [
        (row.label, row.weights_bytes / _MEGA, row.accuracy.kl_mean_nats)
        for row in report.rows
        if row.weights_bytes is not None and row.accuracy and row.accuracy.kl_mean_nats
    ]
    if not points:
        return "no candidate has both a size and a KL divergence above zero"
    axis = figure.subplots()
    for number, (label, size, divergence) in enumerate(points):
        axis.semilogy(size, divergence, _MARKERS[number % len(_MARKERS)], color=f"C{number}", markersize=8)
        axis.annotate(label, (size, divergence), xytext=(7, 5), textcoords="offset points")
    for row in report.rows:
        if row.role == "baseline" and row.weights_bytes:
            axis.axvline(row.weights_bytes / _MEGA, color="grey", linestyle="--", label=f"{row.label} (baseline)")
            axis.legend(loc="best")
    axis.set(xlabel="weights on disk (MB, 1 MB = 10^6 bytes)", ylabel="mean KL(baseline || candidate) (nats per token)")
    axis.margins(x=0.2, y=0.2)
    axis.set_xlim(left=0)
    axis.grid(which="both", alpha=0.25)
    return None
