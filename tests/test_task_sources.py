"""Where each task's data is, from what a command line says."""

from __future__ import annotations

from pathlib import Path

import pytest

from qquant.errors import BadDataError, QquantError, UsageError
from qquant.task_evaluation import TASKS, task_sources
from tests.task_files import write_tasks


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


def test_a_root_folder_has_a_folder_or_file_for_each_task(root: Path, tmp_path: Path) -> None:
    assert task_sources(TASKS, [str(root)]) == {task: root / task for task in TASKS}
    (tmp_path / "HumanEval.jsonl").write_text("")
    (tmp_path / "C-Eval").mkdir()
    found = task_sources(["humaneval", "ceval"], [str(tmp_path)])
    assert found == {"humaneval": tmp_path / "HumanEval.jsonl", "ceval": tmp_path / "C-Eval"}


def test_a_place_of_its_own_goes_before_the_root(root: Path) -> None:
    found = task_sources(["mmlu", "gsm8k"], ["mmlu=some/hub-id", str(root)])
    assert found == {"mmlu": "some/hub-id", "gsm8k": root / "gsm8k"}


SOURCES = {
    "nothing": ([], UsageError, "mmlu needs data"),
    "two roots": (["a", "b"], UsageError, "got 2 folders"),
    "no such folder": (["absent"], BadDataError, "absent is none"),
    "a place twice": (["mmlu=a", "mmlu=b"], UsageError, "one place, got 'mmlu=b'"),
    "an empty place": (["mmlu="], UsageError, "one place, got 'mmlu='"),
    "nobody's home": (["~nobody-of-this-name/data"], BadDataError, "home folder"),
}


@pytest.mark.parametrize(("given", "kind", "message"), SOURCES.values(), ids=SOURCES.keys())
def test_missing_places_are_errors(given: list[str], kind: type[QquantError], message: str) -> None:
    with pytest.raises(kind, match=message):
        task_sources(["mmlu"], given)


def test_a_root_without_the_task_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="one folder or file called mmlu, it has none; write mmlu=PATH"):
        task_sources(["mmlu"], [str(tmp_path)])
