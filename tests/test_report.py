"""``python -m qquant.report`` as a user runs it: what it writes, what it prints, and how it ends."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from qquant.report import report_command
from tests.joined_results import make_answers, make_plan_result, make_profile_result, make_result, make_tasks

LARGEST_PAGE_BYTES = 2_000_000

app = typer.Typer()
app.command()(report_command)


def run(*argv: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in argv])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    answers = make_answers("Once", ["The", " cat"], ["The", " dog"])
    found = {
        "eval": make_result(tasks=make_tasks(), answers=answers),
        "profile": make_profile_result(),
        "plan": make_plan_result(),
    }
    for name, result in found.items():
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "report.json").write_text(result.model_dump_json())
    return tmp_path / "results"


def test_only_the_path_of_the_page_goes_to_stdout(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "joined"
    done = run(results, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{out / 'report.html'}\n"
    assert done.stderr == ""
    assert {path.name for path in out.iterdir()} == {"report.html", "report.md", "results.json"}


def test_page_tables_and_data_tell_of_the_same_results(results: Path, tmp_path: Path) -> None:
    run(results, "--out", tmp_path / "joined")
    page = (tmp_path / "joined" / "report.html").read_text(encoding="utf-8")
    tables = (tmp_path / "joined" / "report.md").read_text(encoding="utf-8")
    data = json.loads((tmp_path / "joined" / "results.json").read_text(encoding="utf-8"))
    names = ["results/eval", "results/plan", "results/profile"]
    assert [entry["name"] for entry in data["results"]] == names
    for name in names:
        assert name in page
        assert name in tables
    for title in ("Accuracy by task, chat prompts", "Memory by batch: qwen-7b, BF16, 1+1024 tokens"):
        assert title in page
        assert title in tables
    assert len(page.encode()) < LARGEST_PAGE_BYTES


def test_nothing_tells_where_the_results_lay(results: Path, tmp_path: Path) -> None:
    run(results, "--out", tmp_path / "joined")
    for path in (tmp_path / "joined").iterdir():
        assert str(tmp_path) not in path.read_text(encoding="utf-8")


def test_a_joined_report_is_replaced_only_if_asked_for(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "joined"
    assert run(results, "--out", out).exit_code == 0
    before = (out / "report.html").read_bytes()
    assert run(results / "plan", "--out", out).exit_code == 2
    assert (out / "report.html").read_bytes() == before
    assert run(results / "plan", "--out", out, "--overwrite").exit_code == 0
    assert (out / "report.html").read_bytes() != before


def test_a_folder_of_another_kind_is_never_replaced(results: Path, tmp_path: Path) -> None:
    done = run(results / "plan", "--out", results / "eval", "--overwrite")
    assert done.exit_code == 2
    assert (results / "eval" / "report.json").exists()


def test_a_joined_report_is_not_taken_for_a_result(results: Path) -> None:
    assert run(results, "--out", results / "joined").exit_code == 0
    before = (results / "joined" / "results.json").read_text()
    assert run(results, "--out", results / "joined", "--overwrite").exit_code == 0
    assert (results / "joined" / "results.json").read_text() == before


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 5, "there must be a report.json in or below"),
        ("{}", 5, "is not a report of schema 1 or 2"),
        ("no json", 5, "is not a report of schema 1 or 2"),
    ],
    ids=["nothing", "empty", "no_json"],
)
def test_bad_results_end_with_one_line_and_leave_nothing(
    content: str | None, code: int, message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    if content is not None:
        (folder / "report.json").write_text(content)
    done = run(folder, "--out", tmp_path / "joined")
    assert done.exit_code == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_folder_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    assert run(tmp_path / "nowhere", "--out", tmp_path / "joined").exit_code == 2


def test_real_reports_of_both_schemas_join_without_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        done = run(Path(__file__).parent.parent / "reports", "--out", tmp_path / "joined")
    assert done.exit_code == 0, done.stderr
    assert not caplog.records
    assert (tmp_path / "joined" / "report.html").stat().st_size < LARGEST_PAGE_BYTES
