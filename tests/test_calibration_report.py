"""The report of the calibration benchmark: a function of its record, with pictures that stand alone."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.calibration_report import MIXTURE, SAMPLES, Run, mean_kl, write_report

DOMAINS = ("English", "Chinese", "code", "mathematics")
PLAN = {
    "mixture": ["all four", "all four", "only English", "without code"],
    "samples": ["8 x 256", "512 x 256"],
    "length": ["512 x 64"],
    "selection": ["spread", "spread", "most different tokens"],
    "copies": ["random, three quarters copies", "spread, three quarters copies", "random, no copies"],
}
TOKENS = {"8 x 256": 2048, "512 x 256": 131_072}


@pytest.fixture
def record() -> dict[str, Any]:
    runs = [
        Run(group, name, 1, TOKENS.get(name, 32_768), seed, dict.fromkeys(DOMAINS, 0.01 * (1 + 0.1 * seed)), 9.5)
        for group, given in PLAN.items()
        for seed, name in enumerate(given)
    ]
    shares = dict.fromkeys(DOMAINS, 0.001)
    return {
        "schema_version": 1, "created": "2026-01-01T00:00:00+00:00", "command": "python -m x", "git_commit": None,
        "environment": {"device": "a processor", "torch": "2"}, "model": "tiny", "cpu_seconds": 10.0,
        "evaluated_tokens_per_domain": 4096, "overlap_share": shares, "shared_runs_share": shares,
        "runs": [asdict(run) for run in runs],
    }  # fmt: skip


def test_pictures_stand_alone(record: dict[str, Any], tmp_path: Path) -> None:
    write_report(record, tmp_path)
    for name in (MIXTURE, SAMPLES):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in text  # colours that only a page around it would define
        assert "href" not in text


def test_the_markdown_has_a_row_for_every_set_of_runs(record: dict[str, Any], tmp_path: Path) -> None:
    write_report(record, tmp_path)
    text = (tmp_path / "calibration.md").read_text(encoding="utf-8")
    for given in PLAN.values():
        for name in set(given) - {"all four"}:
            assert text.count(f"\n| {name} |") == 1
    assert "\n| all four | 32768 | 2 | 10.50 |" in text


def test_draws_of_one_kind_are_averaged(record: dict[str, Any]) -> None:
    runs = [Run(**run) for run in record["runs"]]
    assert mean_kl(runs, "selection", "spread") == pytest.approx(dict.fromkeys(DOMAINS, 0.0105))
