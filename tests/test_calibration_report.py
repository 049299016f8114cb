"""The report of the calibration benchmark: a function of its record, with pictures that stand alone."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.calibration_report import CHATS, MIXTURE, SAMPLES, Record, Run, write_report

TEXTS = ("English", "Chinese", "code", "mathematics", CHATS)
PLAN = {
    "mixture": ["all four", "all four", "only English", "without code"],
    "template": ["only questions, as chats"],
    "samples": ["8 x 256", "512 x 256"],
    "length": ["512 x 64"],
    "selection": ["spread", "spread", "most different tokens"],
    "copies": ["random, three quarters copies", "spread, three quarters copies", "random, no copies"],
}
TOKENS = {"8 x 256": 2048, "512 x 256": 131_072}


def make_record(method: str, *groups: str) -> dict[str, Any]:
    runs = [
        Run(group, name, 1, TOKENS.get(name, 32_768), seed, dict.fromkeys(TEXTS, 0.01 * (1 + 0.1 * seed)), 9.5)
        for group in groups
        for seed, name in enumerate(PLAN[group])
    ]
    shares = dict.fromkeys(TEXTS, 0.001)
    return {
        "schema_version": 2, "created": "2026-01-01T00:00:00+00:00", "command": "python -m x", "git_commit": None,
        "environment": {"device": "a processor", "torch": "2"}, "model": "tiny", "method": method, "cpu_seconds": 10.0,
        "evaluated_tokens_per_text": 4096, "overlap_share": shares, "shared_runs_share": shares,
        "runs": [asdict(run) for run in runs],
    }  # fmt: skip


@pytest.fixture
def records() -> list[dict[str, Any]]:
    return [make_record("best", "mixture", "template"), make_record("gptq", *PLAN)]


def test_pictures_stand_alone(records: list[dict[str, Any]], tmp_path: Path) -> None:
    write_report(records, tmp_path)
    for name in (MIXTURE, SAMPLES):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in text  # colours that only a page around it would define
        assert "href" not in text


def test_a_picture_says_which_method_it_is_of(records: list[dict[str, Any]], tmp_path: Path) -> None:
    write_report(records, tmp_path)
    assert "method best" in (tmp_path / MIXTURE).read_text(encoding="utf-8")
    assert "method gptq" in (tmp_path / SAMPLES).read_text(encoding="utf-8")


def test_the_markdown_has_a_row_for_every_set_of_runs_of_a_method(
    records: list[dict[str, Any]], tmp_path: Path
) -> None:
    write_report(records, tmp_path)
    text = (tmp_path / "calibration.md").read_text(encoding="utf-8")
    for group, given in PLAN.items():
        for name in set(given) - {"all four"}:
            assert text.count(f"\n| {name} |") == (2 if group in ("mixture", "template") else 1)
    assert text.count("\n| all four | 32768 | 2 | 10.50 |") == 2
    assert text.count("\n| all four, no template | 32768 | 2 | 10.50 |") == 2


def test_what_only_one_method_measured_stands_alone(records: list[dict[str, Any]], tmp_path: Path) -> None:
    write_report(records[:1], tmp_path)
    text = (tmp_path / "calibration.md").read_text(encoding="utf-8")
    assert "## Number of samples" not in text
    assert not (tmp_path / SAMPLES).exists()


def test_draws_of_one_kind_are_averaged() -> None:
    record = Record(make_record("gptq", *PLAN))
    assert record.mean_kl("selection", "spread") == pytest.approx(dict.fromkeys(TEXTS, 0.0105))


def test_one_draw_says_nothing_of_chance() -> None:
    content = make_record("gptq", "mixture")
    content["runs"] = content["runs"][1:]
    assert Record(content).chance() == "`gptq`: not known"
