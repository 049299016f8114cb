"""The long-context section of a report: it survives JSON, says only what the record holds, and is drawn."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qquant import long_report
from qquant.long_report import (
    SHOWN,
    LongContext,
    LongDifference,
    LongModel,
    LongPoint,
    LongRow,
    LongScore,
    SettingName,
    long_sections,
)
from qquant.result_files import to_markdown, write_result
from qquant.results import Result, result_from_json
from tests.test_result_files import make_report

PNG = b"\x89PNG\r\n\x1a\n"
LENGTHS = (1024, 2048, 4096)


def make_score(nll: float, tokens: int, *, plain: bool, baseline: bool) -> LongScore:
    difference = LongDifference(mean_nats=-0.12345, stderr_nats=0.00678)
    return LongScore(
        tokens=tokens,
        nll_mean_nats=nll,
        perplexity=math.exp(nll),
        to_plain=None if plain else difference,
        to_baseline=None if baseline else LongDifference(mean_nats=0.0345, stderr_nats=None),
    )


def make_row(setting: SettingName, nll: float, *, baseline: bool) -> LongRow:
    plain = setting in ("plain", "as_configured")
    return LongRow(
        setting=setting,
        points=tuple(
            LongPoint(
                length_tokens=length,
                whole=make_score(nll + number, 8192, plain=plain, baseline=baseline),
                tail=make_score(nll + number / 2, 1024, plain=plain, baseline=baseline),
            )
            for number, length in enumerate(LENGTHS)
        ),
    )


def make_model(label: str = "big", *, baseline: bool = True, **changes: Any) -> LongModel:
    rows = tuple(make_row(name, 1 + 0.1 * i, baseline=baseline) for i, name in enumerate(SHOWN) if i < 4)
    return LongModel(**{"label": label, "made_for_tokens": 2048, "rows": rows, **changes})


def make_found(*models: LongModel) -> LongContext:
    return LongContext(lengths_tokens=LENGTHS, windows=2, tail_tokens=512, models=models or (make_model(),))


def report_of(found: LongContext) -> Result:
    return make_report().model_copy(update={"long_context": found})


def test_the_record_survives_json() -> None:
    report = report_of(make_found(make_model(), make_model("int4", baseline=False)))
    assert result_from_json(report.model_dump_json()) == report


def test_a_report_without_it_has_no_such_field() -> None:
    assert "long_context" not in make_report().model_dump()


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValidationError):
        make_row("window_attn", 1.0, baseline=True)  # type: ignore[arg-type]


def test_every_row_of_the_table_names_its_setting_and_has_a_cell_per_length() -> None:
    markdown = "\n\n".join(long_sections(make_found(), picture=False))
    assert "| model | setting | 1024 | 2048 | 4096 |" in markdown
    for name in ("plain", "+ dynamic_ntk", "+ dynamic_ntk + logn", "+ logn"):
        # Perplexity, that of the last tokens, and of all but the plain row the change against it.
        found = re.findall(rf"^\| big \| {re.escape(name)} \|( [^|]+ \|){{3}}$", markdown, re.MULTILINE)
        assert len(found) == (2 if name == "plain" else 3)


def test_numbers_of_the_section_are_rounded_fields() -> None:
    markdown = "\n\n".join(long_sections(make_found(make_model(), make_model("int4", baseline=False)), picture=False))
    assert f"| {math.exp(1):.4f} | {math.exp(2):.4f} | {math.exp(3):.4f} |" in markdown
    assert f"| {math.exp(1):.4f} | {math.exp(1.5):.4f} | {math.exp(2):.4f} |" in markdown
    assert "-0.1235 ± 0.0068" in markdown  # 0.12345 is a little more than it looks
    assert "| int4 | plain | +0.0345 | +0.0345 | +0.0345 |" in markdown  # no standard error, and none made up
    assert "the same 8192 tokens scored at every length" in markdown
    assert "The same 1024 tokens in every column" in markdown


def test_a_model_alone_in_one_setting_has_nothing_to_compare() -> None:
    lonely = make_model(rows=(make_row("as_configured", 1.0, baseline=True),))
    markdown = "\n\n".join(long_sections(make_found(lonely), picture=False))
    assert "What a setting changes" not in markdown
    assert "What a candidate loses" not in markdown


def test_the_length_a_model_was_made_for_is_said_or_said_to_be_unknown() -> None:
    found = make_found(make_model(), make_model("other", baseline=False, made_for_tokens=None))
    said = long_sections(found, picture=False)[1]
    assert "big was made for 2048 tokens" in said
    assert "the config of other names no length that it was made for" in said


def test_the_report_leaves_out_the_tables_of_what_was_not_measured() -> None:
    markdown = to_markdown(report_of(make_found()))
    headings = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert headings[:2] == ["Long context", "Size"]
    assert not {"Accuracy", "Memory", "Speed, one sequence at a time"} & set(headings)
    assert "Peak RSS" not in markdown


def test_the_report_says_how_large_the_baseline_is() -> None:
    # 100 MB at 4.8 bits per weight.
    assert "big stores 166.67 million parameters." in to_markdown(report_of(make_found()))


def test_rows_that_would_only_hold_dashes_are_left_out_and_no_difference_is_zero() -> None:
    model = make_model()
    point = model.rows[1].points[0]
    none = LongDifference(mean_nats=0.0, stderr_nats=0.0)
    same = point.model_copy(update={"whole": point.whole.model_copy(update={"to_plain": none})})
    row = model.rows[1].model_copy(update={"points": (same, *model.rows[1].points[1:])})
    sections = long_sections(make_found(make_model(rows=(model.rows[0], row))), picture=False)
    changes = sections[sections.index("### What a setting changes") + 2]
    assert "plain" not in changes
    assert "| big | + dynamic_ntk | 0 | -0.1235 ± 0.0068 |" in changes


def test_the_picture_is_drawn_and_stands_in_its_section(tmp_path: Path) -> None:
    written = write_result(report_of(make_found(make_model(), make_model("int4", baseline=False))), tmp_path)
    assert written.plots == (long_report.PICTURE,)
    assert (tmp_path / long_report.PICTURE).read_bytes().startswith(PNG)
    assert (tmp_path / "report.md").read_text(encoding="utf-8").count(f"({long_report.PICTURE})") == 1


def test_one_length_is_not_drawn_and_the_log_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = make_row("plain", 1.0, baseline=True)
    short = row.model_copy(update={"points": row.points[:1]})
    found = LongContext(lengths_tokens=LENGTHS[:1], windows=8, tail_tokens=512, models=(make_model(rows=(short,)),))
    with caplog.at_level(logging.WARNING, "qquant.result_files"):
        assert write_result(report_of(found), tmp_path).plots == ()
    assert "one length makes no line" in caplog.text
