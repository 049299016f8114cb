"""The record of an evaluation as JSON, and the Markdown and pictures that are drawn from that record alone.

Pydantic models only: strict, frozen, JSON in and out. Nothing here measures; a field that was not measured is None
and is printed as such, never guessed.
"""

from __future__ import annotations

import logging
import os
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qquant.errors import BadDataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCHEMA_VERSION = 1
NOT_MEASURED = "not measured"

_LOG = logging.getLogger("qquant.report")
_MEGA = 1e6
_WORST_LAYERS = 5
_KINDS = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
"""Rows of the layer picture from top to bottom; other names follow in their own order."""
_KIND_OF = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up",
    "down_proj": "down", "c_attn": "qkv", "w2": "gate", "w1": "up",
}  # fmt: skip
_MARKERS = "osD^vP*X"


class Strict(BaseModel):
    """A frozen record in which an unknown, mistyped or non-finite field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Accuracy(Strict):
    """See ``qquant.accuracy.Accuracy``, which this stores field by field."""

    tokens: int
    nll_mean_nats: float
    perplexity: float
    nll_difference_nats: float | None
    nll_difference_stderr_nats: float | None
    kl_mean_nats: float | None
    kl_p99_nats: float | None
    kl_max_nats: float | None
    top1_agreement: float | None


class Speed(Strict):
    """See ``qquant.measure.Speed``, which this stores field by field."""

    prompt_tokens: int
    decode_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]


class Memory(Strict):
    """See ``qquant.measure.Memory``, which this stores field by field."""

    tensor_bytes: int | None
    rss_before_bytes: int | None
    peak_rss_bytes: int | None
    peak_rss_source: str
    cuda_before_bytes: int | None
    cuda_peak_bytes: int | None


class Environment(Strict):
    """See ``qquant.measure.Environment``, which this stores field by field."""

    python: str
    torch: str
    transformers: str
    qquant: str
    platform: str
    cpu: str
    threads: int
    device: str


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
    """Share of the layer's output energy that is error, on the calibration data."""


class Ratios(Strict):
    """Candidate divided by baseline, so 1 is no change; None where either side was not measured."""

    perplexity: float | None
    weights_bytes: float | None
    tensor_bytes: float | None
    prefill_tokens_per_second: float | None
    """Median of the ratios of neighbouring repetitions, not the ratio of the medians."""
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

    schema_version: Literal[1] = SCHEMA_VERSION
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
        raise BadDataError(f"not a report of schema {SCHEMA_VERSION}: {place}: {fault['msg']}") from error


def write_report(report: EvalReport, folder: Path) -> EvalReport:
    """Write report.json, report.md and, where matplotlib is installed, the pictures into an existing folder.

    Returns:
        The record as written: ``report`` with the names of the pictures filled in.
    """
    report = report.model_copy(update={"plots": tuple(_draw(report, folder))})
    (folder / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(to_markdown(report), encoding="utf-8")
    return report


def to_markdown(report: EvalReport) -> str:
    """The report for a human reader; every number in it is a rounded field of the record."""
    data, env = report.data, report.environment
    parts = [
        f"# Evaluation of {', '.join(row.label for row in report.rows if row.role == 'candidate')}",
        f"Text `{data.name}` (sha256 `{data.sha256[:12]}…`), {data.tokens} tokens, windows of {data.seq_len}, "
        f"stride {data.stride}. All models ran in {report.compute_dtype} on {env.device}.",
        "## Accuracy\n\n" + _accuracy_table(report.rows),
        "## Size and memory\n\n" + _size_table(report.rows),
        "## Speed, one sequence at a time\n\n" + _speed_table(report.rows),
        *_worst_layers(report.rows),
        *[f"![{name.removesuffix('.png')}]({name})" for name in report.plots],
        "## How it was run\n\n"
        + _table(
            ("what", "value"),
            [
                ("command", f"`{report.command}`"),
                ("created", report.created),
                ("seed", str(report.seed)),
                *[(field, str(value)) for field, value in env],
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _accuracy_table(rows: Sequence[ModelRow]) -> str:
    head = ("model", "weights", "perplexity", "PPL ratio", "NLL difference (nats)", "mean KL (nats)",
            "p99 KL (nats)", "max KL (nats)", "same top-1")  # fmt: skip
    body = []
    for row in rows:
        score, base = row.accuracy, row.role == "baseline"
        shift = _number(score and score.nll_difference_nats, "+.5f")
        if score and score.nll_difference_stderr_nats is not None:
            shift += f" ± {score.nll_difference_stderr_nats:.5f}"
        compared = (
            ("1", "0", "0", "0", "0", "100 %")
            if base
            else (
                _number(row.ratios and row.ratios.perplexity, ".4f"),
                shift,
                _number(score and score.kl_mean_nats, ".3g"),
                _number(score and score.kl_p99_nats, ".3g"),
                _number(score and score.kl_max_nats, ".3g"),
                _number(score and score.top1_agreement, ".2%").replace("%", " %"),
            )
        )
        body.append((_name(row), _weights(row), _number(score and score.perplexity, ".4f"), *compared))
    return _table(head, body)


def _size_table(rows: Sequence[ModelRow]) -> str:
    head = ("model", "weights on disk (MB)", "ratio", "bits per weight", "folder (MB)", "tensors in memory (MB)",
            "ratio", "RSS before (MB)", "peak RSS (MB)", "peak CUDA (MB)")  # fmt: skip
    body = []
    for row in rows:
        memory, ratios = row.memory, row.ratios
        body.append(
            (
                _name(row),
                _mega(row.weights_bytes),
                "1" if row.role == "baseline" else _number(ratios and ratios.weights_bytes, ".3f"),
                _number(row.bits_per_weight, ".2f"),
                _mega(row.folder_bytes),
                _mega(memory and memory.tensor_bytes),
                "1" if row.role == "baseline" else _number(ratios and ratios.tensor_bytes, ".3f"),
                _mega(memory and memory.rss_before_bytes),
                _mega(memory and memory.peak_rss_bytes),
                _mega(memory and memory.cuda_peak_bytes),
            )
        )
    sources = sorted({row.memory.peak_rss_source for row in rows if row.memory})
    note = f"\n\n1 MB is 10^6 bytes. Peak RSS was read as {', '.join(sources)}." if sources else ""
    return _table(head, body) + note


def _speed_table(rows: Sequence[ModelRow]) -> str:
    head = ("model", "prompt tokens", "prefill (tokens/s)", "ratio", "new tokens", "decode (tokens/s)", "ratio")
    body = []
    for row in rows:
        speed, ratios = row.speed, row.ratios
        unit = "1" if row.role == "baseline" and speed else None
        body.append(
            (
                _name(row),
                _number(speed and speed.prompt_tokens, "d"),
                _number(speed and speed.prefill_tokens_per_second, ".1f"),
                unit or _number(ratios and ratios.prefill_tokens_per_second, ".3f"),
                _number(speed and speed.decode_tokens, "d"),
                _number(speed and speed.decode_tokens_per_second, ".1f"),
                unit or _number(ratios and ratios.decode_tokens_per_second, ".3f"),
            )
        )
    return _table(head, body)


def _worst_layers(rows: Sequence[ModelRow]) -> list[str]:
    body = []
    for row in rows:
        worst = sorted(row.layer_errors, key=lambda layer: -layer.relative_error)[:_WORST_LAYERS]
        body += [(_name(row), f"`{layer.name}`", f"{layer.relative_error:.3g}") for layer in worst]
    head = ("model", "layer", "relative output error")
    return [f"## Layers with the largest error\n\n{_table(head, body)}"] if body else []


def _name(row: ModelRow) -> str:
    return row.label + (" (baseline)" if row.role == "baseline" else "")


def _weights(row: ModelRow) -> str:
    if row.bits is None:
        return row.checkpoint_dtype
    group = "" if row.group_size is None else ", whole row" if row.group_size == -1 else f", group {row.group_size}"
    return f"{row.bits}-bit {row.method or ''}".rstrip() + group


def _number(value: float | None, spec: str) -> str:
    return NOT_MEASURED if value is None else format(value, spec)


def _mega(value: int | None) -> str:
    return _number(None if value is None else value / _MEGA, ".2f")


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
