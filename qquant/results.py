"""The one record that every command's result is kept in: who ran what where, a row per model, a section per question.

Pydantic models only: strict, frozen, versioned, JSON in and out. A section that was not asked for is absent, a field
that was not measured is None. Nothing here measures or draws; files are made of it by result_files.py and page/.
"""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import SerializerFunctionWrapHandler, ValidationError, model_serializer

from qquant.answer_report import Answers
from qquant.errors import BadDataError
from qquant.kv_report import KVCacheCost
from qquant.long_report import LongContext
from qquant.plan_report import Plan
from qquant.profile_report import Profile
from qquant.records import COMMON_SHARE, NGRAM_TOKENS, Accuracy, Environment, Memory, Speed, Strict, renamed
from qquant.task_report import Tasks

SECTIONS = ("kv_cache", "long_context", "answers", "tasks", "profile", "plan")
"""Fields of a ``Result`` that are absent from the JSON of a command that was not asked for them."""

_NAMED = re.compile(r"((?:[\w-]+=)*)(.*)", re.DOTALL)
"""``--name=`` or ``task=`` in front of a value."""


class Data(Strict):
    """The text that was evaluated, by its identity and not by its content or place."""

    name: str
    """Last component of the file's path."""
    sha256: str
    """Of the file's bytes as they lie on disk."""
    tokens: int
    """Tokens that were used, the unscored first one included."""
    window_tokens: Annotated[int, renamed("window_tokens", "seq_len")]
    """Fed at once."""
    stride_tokens: Annotated[int, renamed("stride_tokens", "stride")]
    """Newly scored per window, but for the first."""


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
    model_type: str | None = None
    """As config.json names it."""
    parameters: int | None = None
    """Of the model before it was quantized."""
    sha256: str | None = None
    """Identity of config.json and the weights, see ``qquant.identity``; None for random weights."""
    random_weights: bool = False
    """Weights were drawn at random at the model's shapes: speed and memory are real, answers would not be."""
    quantization: dict[str, Any] | None = None
    """The folder's quantization_config, less what names no number; None for a model that is not quantized."""
    method: str | None = None
    """How it was quantized; None for a model that is not."""
    bits: int | None = None
    group_size: int | None = None
    activation_bits: int | None = None
    """That the inputs of packed linears were rounded to; None: they were not."""
    head_bits: int | None = None
    """That the output projection was rounded to after loading; None: it was not."""
    calibration_overlap: float | None = None
    """Share of the evaluated text's runs of 16 tokens that its calibration had seen, estimated from a sketch in the
    manifest; of tasks: of the questions of the one where it is largest; None: not known."""
    checkpoint_dtype: str
    """The dtype its config.json names; the report's compute_dtype says what it was run in."""
    weights_bytes: int | None = None
    folder_bytes: int | None = None
    bits_per_weight: float | None = None
    """8 * weights_bytes by the baseline's parameters: embeddings, scales and all."""
    accuracy: Accuracy | None = None
    speed: Speed | None = None
    memory: Memory | None = None
    ratios: Ratios | None = None
    layer_errors: tuple[LayerError, ...] = ()


class Result(Strict):
    """What one command found: what was run, where, on what, and what came out; the first row is the baseline."""

    schema_version: Literal[1, 2] = 2
    """1 had no git_commit, no identity of models, none of the sections tasks, answers, profile and plan, and shorter
    names for some fields that hold tokens, see ``records.renamed``."""
    created: str
    """UTC, ISO 8601."""
    command: str
    """As typed, with absolute paths cut to their last component."""
    git_commit: str | None = None
    """Of the qquant checkout that ran, with ``-dirty`` where it was changed; None for an installed package."""
    seed: int
    compute_dtype: str
    """One dtype for all rows, so that only the weights differ; where rows differ, "mixed"."""
    environment: Environment
    data: Data | None = None
    """The text that was evaluated; None where there was none."""
    rows: tuple[ModelRow, ...]
    plots: tuple[str, ...] = ()
    """File names of the pictures that lie beside the report."""
    kv_cache: KVCacheCost | None = None
    long_context: LongContext | None = None
    """A result that was asked for it measured nothing else."""
    answers: Answers | None = None
    tasks: Tasks | None = None
    profile: Profile | None = None
    plan: Plan | None = None

    @model_serializer(mode="wrap")
    def _without_what_was_not_asked_for(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        for name in SECTIONS:
            if getattr(self, name) is None:
                content.pop(name, None)
        return content


def shown_command(argv: Sequence[str], *, module: str | None = None) -> str:
    """A command line as typed, with every absolute path cut to its last component, also in ``--name=PATH``.

    Args:
        argv: the program and its arguments.
        module: ``qquant.eval`` and the like, for a program that may have been started as ``python -m`` of it.
    """
    program = [Path(argv[0]).name]
    if module and program == [f"{module.rpartition('.')[2]}.py"]:
        program = ["python", "-m", module]
    words = []
    for word in argv[1:] if module else argv:
        named, path = _NAMED.fullmatch(word).groups()  # type: ignore[union-attr]
        absolute = path.startswith(("/", "~")) or Path(path).is_absolute()
        words.append(named + (Path(path).name or "/") if absolute else word)
    return shlex.join([*program, *words] if module else words)


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


def overlap_warnings(rows: Sequence[ModelRow], whose: str = "the text's") -> list[str]:
    """A warning of what calibration had seen of the text, where that is more than texts of one kind have in common."""
    shares = [(row.label, row.calibration_overlap) for row in rows]
    much = dict.fromkeys(f"{share:.1%} ({label})" for label, share in shares if share and share > COMMON_SHARE)
    if not much:
        return []
    return [
        f"Of {whose} runs of {NGRAM_TOKENS} tokens calibration had seen about {', '.join(much)}: what "
        "quantizing costs on another text is more than this report says."
    ]


def result_from_json(text: str | bytes) -> Result:
    """Read a report.json. Raises BadDataError that names the first wrong field."""
    try:
        return Result.model_validate_json(text)
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(str(part) for part in fault["loc"]) or "document"
        raise BadDataError(f"not a report of schema 1 or 2: {place}: {fault['msg']}") from error
