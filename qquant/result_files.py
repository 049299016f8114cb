"""The files of one result: report.json, the Markdown drawn from that record alone, and its pictures.

Nothing here measures; what is None in the record is printed as not measured, never guessed. Each section has a room of
its own: kv_report.py, long_report.py, answer_report.py, task_report.py, profile_report.py, plan_report.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qquant import answer_report, kv_report, long_report, plan_report, profile_report, task_report
from qquant.kv_report import KVCacheCost
from qquant.layer_names import error_grid, in_order
from qquant.records import MB, NOT_MEASURED, PERCENT, field, shown, table
from qquant.results import Data, ModelRow, Result, overlap_warnings
from qquant.task_report import TaskItem

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOG = logging.getLogger("qquant.result_files")
ITEMS_NAME = "items.jsonl"

_MEGA = 1e6
_WORST_LAYERS = 3
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


def write_result(report: Result, folder: Path) -> Result:
    """Write report.json, report.md and, with matplotlib, pictures into a folder; returns the record that names them."""
    report = report.model_copy(update={"plots": tuple(_draw(report, folder))})
    (folder / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    return report


def write_items(items: Sequence[TaskItem], folder: Path) -> None:
    """Write every decision of an evaluation on tasks into items.jsonl, one JSON object per line."""
    lines = [item.model_dump_json() + "\n" for item in items]
    (folder / ITEMS_NAME).write_text("".join(lines), encoding="utf-8")


def to_markdown(report: Result) -> str:
    """The report for a human reader; every number in it is a rounded field of the record."""
    data, env = report.data, report.environment
    facts: dict[str, Any] = {"command": f"`{report.command}`", "created": report.created}
    facts |= {
        "commit": report.git_commit,
        "seed": report.seed,
        **dict(env),
        "libraries": ", ".join(map(" ".join, env.libraries.items())),
    }
    parts = [
        f"# {_title(report)}",
        *(_text(data) if data else []),
        *([] if report.plan else [f"All models ran in {report.compute_dtype} on {env.device}."]),
        *_sections(report),
        "## How it was run\n\n"
        + table(("what", "value"), [(name, str(value)) for name, value in facts.items() if value not in (None, "")]),
    ]
    return "\n\n".join(parts) + "\n"


def _title(report: Result) -> str:
    names = ", ".join(row.label for row in report.rows if row.role == "candidate" or len(report.rows) == 1)
    if report.plan:
        return f"Plan for {report.plan.model}"
    return f"Profile of {', '.join(row.label for row in report.rows)}" if report.profile else f"Evaluation of {names}"


def _sections(report: Result) -> list[str]:
    """All that was asked for; a report on one question has no tables of others."""
    if report.plan:
        return plan_report.plan_sections(report.plan)
    if report.profile:
        return [*profile_report.profile_sections(report.profile), *_models(report.rows)]
    if report.tasks:
        seen = overlap_warnings(report.rows, "the questions'")
        return [*task_report.task_sections(report.tasks), *seen, *_models(report.rows)]
    if report.long_context:
        picture = long_report.PICTURE in report.plots
        return [
            *long_report.long_sections(report.long_context, picture=picture),
            *overlap_warnings(report.rows),
            *_models(report.rows),
        ]
    sources = sorted({row.memory.peak_rss_source for row in report.rows if row.memory})
    cost = report.kv_cache
    return [
        *[f"## {title}\n\n{_models_table(report.rows, columns)}" for title, columns in _TABLES.items()],
        *_rounded(report.rows),
        *overlap_warnings(report.rows),
        f"1 MB is 10^6 bytes. Peak RSS was read as {', '.join(sources) or NOT_MEASURED}.",
        *_worst_layers(report.rows),
        *[f"![{name.removesuffix('.png')}]({name})" for name in report.plots if name not in _PLACED],
        *(answer_report.answer_sections(report.answers) if report.answers else []),
        *(_kv_sections(cost, report) if cost else []),
    ]


def _models(rows: Sequence[ModelRow]) -> list[str]:
    return [f"## Size\n\n{_models_table(rows, _TABLES['Size'])}", f"1 MB is 10^6 bytes. {_parameters(rows[0])}"]


def _rounded(rows: Sequence[ModelRow]) -> list[str]:
    """What sets rows apart that have the same weights."""
    activations = sorted({row.activation_bits for row in rows if row.activation_bits})
    heads = sorted({row.head_bits for row in rows if row.head_bits})
    return [
        *(
            f"*With int{bits} activations*: the same weights, and the input of every packed linear rounded to {bits} "
            "bits, one scale per token and 128 features. It is off unless asked for."
            for bits in activations
        ),
        *(
            f"*With an int{bits} head*: the same packed weights, and the output projection rounded to {bits} bits when "
            "the model was loaded; sizes are those of the folder, which keeps it as it was. It is off unless asked for."
            for bits in heads
        ),
    ]


def _text(data: Data) -> list[str]:
    return [
        f"Text `{data.name}` (sha256 `{data.sha256[:12]}…`), {data.tokens} tokens, windows of {data.window_tokens}, "
        f"stride {data.stride_tokens}."
    ]


def _kv_sections(cost: KVCacheCost, report: Result) -> list[str]:
    picture = kv_report.PICTURE in report.plots
    return kv_report.kv_sections(cost, compute_dtype=report.compute_dtype, picture=picture)


def _parameters(base: ModelRow) -> str:
    """How large the baseline is, so that nobody takes a small model's behaviour for a large one's."""
    if base.parameters is None and not (base.weights_bytes and base.bits_per_weight):
        return f"Its parameters were {NOT_MEASURED}."
    found = base.parameters or 8 * (base.weights_bytes or 0) / (base.bits_per_weight or 1)
    return f"{base.label} stores {found / _MEGA:.2f} million parameters."


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


def _draw(report: Result, folder: Path) -> list[str]:
    """Draw every picture the record has data for; say in the log which was not drawn and why."""
    pictures: dict[str, Callable[[Figure], str | None]] = {}
    if report.plan or report.profile or report.tasks:
        return []  # the page that joins results draws these
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


def _draw_layer_errors(figure: Figure, report: Result) -> str | None:
    """Heat maps on one colour scale, one per candidate: layer by kind of linear. Returns why it cannot be drawn."""
    grids = {
        _errors_of(row): grid
        for row in report.rows
        if (grid := error_grid((error.name, error.relative_error) for error in row.layer_errors))
    }
    if not grids:
        return "no candidate has a quant_log.json with errors above zero"
    found = {kind for grid in grids.values() for kind, _ in grid}
    kinds = in_order(found)
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


def _draw_size_kl(figure: Figure, report: Result) -> str | None:
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
