"""Names in the one record of results: each number's says its unit, and reports with the names of schema 1 are read.

What the fields of a section hold is for the tests of its report; how a wrong one is refused, test_result_files.py's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from qquant.kv_report import KVCacheCost, KVNeedle, KVRange
from qquant.long_report import LongContext, LongModel, LongPoint
from qquant.results import Data, Result, result_from_json
from qquant.task_report import TaskItem

REPORTS = sorted((Path(__file__).resolve().parents[1] / "reports").glob("*/report.json"))
kept_reports = pytest.mark.parametrize("path", REPORTS, ids=[path.parent.name for path in REPORTS])

BEFORE: dict[type[BaseModel], dict[str, str]] = {
    Data: {"window_tokens": "seq_len", "stride_tokens": "stride"},
    LongPoint: {"length_tokens": "length"},
    LongModel: {"made_for_tokens": "made_for"},
    LongContext: {"lengths_tokens": "lengths"},
    KVCacheCost: {"window_tokens": "window", "prompt_tokens": "prompt"},
    KVNeedle: {"length_tokens": "length"},
    KVRange: {"first_tokens": "first", "last_tokens": "last"},
}
"""Record -> field -> its name in schema 1."""

UNITS = {"bits", "bytes", "items", "nats", "percent", "seconds", "tokens"}
"""Words of a name, between its underscores, that say what a number is counted in."""

NO_UNIT = {
    "a share, 0 to 1, or the difference or the limits of one, -1 to 1": """
        Accuracy.top1_agreement KVScheme.share_of_bfloat16 KVNeedle.agreement KVRecall.hit_rate TaskScore.score
        TaskScore.score_stderr TaskScore.group_mean TaskComparison.difference TaskComparison.ci95_low
        TaskComparison.ci95_high ModelRow.calibration_overlap""",
    "a probability": "TaskComparison.mcnemar_p",
    "one norm by another of the same kind, or one magnitude by another": """
        LayerError.relative_error KVStates.relative_error KVStates.channel_error KVPeaks.outlier_ratio""",
    "exp of nats per token, known by this name alone; divided by the baseline's in Ratios": """
        Accuracy.perplexity KVPoint.perplexity LongScore.perplexity Ratios.perplexity""",
    "magnitudes of keys and values, which have no unit": "KVPeaks.largest",
    "a count of what the name says": """
        Environment.threads ModelRow.parameters Plan.parameters Plan.positions KVCacheCost.windows LongContext.windows
        KVPeaks.heads KVPeaks.channels_per_peak KVNeedle.trials TaskScore.shots Profile.warmups Profile.repeats
        PlanQuantizing.samples PlanTensorParallel.ranks""",
    "a count of sequences, by the name that everyone gives it": "CellKey.batch PlanCell.batch PlanLimit.largest_batch",
    "an option as typed: so many items of each subject": "TaskData.limit",
    "a key of quantization_config under its own name, or all of them": """
        ModelRow.group_size Plan.group_size PlanQuantizing.group_size ModelRow.quantization""",
    "a number that names something and measures nothing": """
        Result.schema_version Result.seed KVCacheCost.seed KVLayer.layer""",
}
"""Why a number's name needs no unit -> record.field of those that have none."""


def records_below(kind: Any) -> Iterator[type[BaseModel]]:
    """Every record class that an annotation holds, itself included; one that is held twice comes twice."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for entry in kind.model_fields.values():
            yield from records_below(entry.annotation)
    for part in get_args(kind):
        yield from records_below(part)


def holds_numbers(kind: Any) -> bool:
    """Whether a field of this annotation may be, or be made of, numbers; what may be anything may be one, too."""
    if get_origin(kind) is Literal:
        return any(type(value) in (int, float) for value in get_args(kind))
    return kind in (int, float, Any) or any(holds_numbers(part) for part in get_args(kind))


def numbers() -> dict[str, str]:
    """``record.field`` -> name of the field, for all numbers of a report and of its items.jsonl."""
    return {
        f"{record.__name__}.{name}": name
        for record in dict.fromkeys([*records_below(Result), *records_below(TaskItem)])
        for name, entry in record.model_fields.items()
        if holds_numbers(entry.annotation)
    }


def values_below(value: Any) -> Iterator[BaseModel]:
    """Every record that a value holds, itself included."""
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from values_below(getattr(value, name))
    elif isinstance(value, tuple):
        for one in value:
            yield from values_below(one)


def under_old_names(value: Any) -> Any:
    """A record as JSON's objects, with the names of schema 1."""
    if isinstance(value, BaseModel):
        before = BEFORE.get(type(value), {})
        return {before.get(name, name): under_old_names(getattr(value, name)) for name in type(value).model_fields}
    return [under_old_names(one) for one in value] if isinstance(value, tuple) else value


def test_the_name_of_every_number_says_its_unit_or_why_it_needs_none() -> None:
    without = {place for place, name in numbers().items() if UNITS.isdisjoint(name.split("_"))}
    listed = " ".join(NO_UNIT.values()).split()
    assert len(listed) == len(set(listed))
    assert without == set(listed)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (int, True),
        (float | None, True),
        (tuple[tuple[float, ...], ...] | None, True),
        (Literal[1, 2], True),
        (dict[str, Any], True),
        (bool, False),
        (Literal["int8"] | None, False),
        (tuple[str, ...], False),
    ],
    ids=str,
)
def test_numbers_are_found_inside_of_other_types(kind: Any, expected: bool) -> None:
    assert holds_numbers(kind) is expected


@kept_reports
def test_kept_reports_are_read_and_written_with_todays_names(path: Path) -> None:
    result = result_from_json(path.read_bytes())
    assert result_from_json(result.model_dump_json()) == result
    for one in values_below(result):
        old = set(BEFORE.get(type(one), {}).values())
        for content in (one.model_dump(), json.loads(one.model_dump_json())):
            assert old.isdisjoint(content)
            assert set(BEFORE.get(type(one), {})) <= set(content)


@kept_reports
def test_a_report_under_the_names_of_schema_1_is_the_same_record(path: Path) -> None:
    result = result_from_json(path.read_bytes())
    assert result_from_json(json.dumps(under_old_names(result))) == result


def test_kept_reports_hold_every_record_that_was_renamed() -> None:
    found = {type(one) for path in REPORTS for one in values_below(result_from_json(path.read_bytes()))}
    assert set(BEFORE) <= found


DATA: dict[str, Any] = {"name": "eval.txt", "sha256": "ab" * 32, "tokens": 1000, "window_tokens": 512}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "stride_tokens"),
        ({"stride_tokens": 256, "stride": 256}, "stride"),
        ({"stride": "256"}, "stride"),
        ({"stride_tokens": 256, "length": 512}, "length"),
    ],
    ids=["missing", "both names", "mistyped", "another record's name"],
)
def test_a_renamed_field_is_checked_as_any_other(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Data.model_validate_json(json.dumps(DATA | changes))
    assert [error["loc"] for error in refused.value.errors()] == [(named,)]
