"""The hashes that say what a task was run on: names and contents of its files, and every word that a model is shown."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qquant.tasks.asking import AskedTask, ask
from qquant.tasks.files import read_task
from qquant.tasks.items import Question
from tests.task_files import write_choices, write_gsm8k


@pytest.fixture
def mmlu(tmp_path: Path) -> Path:
    return write_choices(tmp_path / "mmlu", "mmlu")


def test_it_is_what_sha256sum_says_of_names_and_contents(tmp_path: Path) -> None:
    folder = write_gsm8k(tmp_path / "gsm8k")
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in ("test.jsonl", "train.jsonl")]
    assert read_task("gsm8k", folder).sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("part", ["test", "dev"])
def test_the_name_of_a_file_changes_it(mmlu: Path, part: str) -> None:
    before = read_task("mmlu", mmlu).sha256
    (mmlu / part / f"global_facts_{part}.csv").rename(mmlu / part / f"facts_{part}.csv")
    assert read_task("mmlu", mmlu).sha256 != before


def test_two_files_that_change_names_change_it(mmlu: Path) -> None:
    before = read_task("mmlu", mmlu).sha256
    one, other = (mmlu / "test" / f"{subject}_test.csv" for subject in ("abstract_algebra", "global_facts"))
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    assert read_task("mmlu", mmlu).sha256 != before


@pytest.mark.parametrize("part", ["test", "dev"])
def test_a_byte_of_a_file_changes_it(mmlu: Path, part: str) -> None:
    before = read_task("mmlu", mmlu).sha256
    file = mmlu / part / f"global_facts_{part}.csv"
    file.write_bytes(file.read_bytes() + b"\n")
    assert read_task("mmlu", mmlu).sha256 != before


def test_where_the_folder_lies_does_not_change_it(mmlu: Path, tmp_path: Path) -> None:
    before = read_task("mmlu", mmlu).sha256
    assert read_task("mmlu", mmlu.rename(tmp_path / "elsewhere")).sha256 == before


def asked_of(folder: Path, **options: Any) -> AskedTask:
    taken: dict[str, Any] = {"prompt_format": "qwen", "style": "base", "shots": 1, "limit": None, "batch_size": 2}
    return ask("mmlu", folder, **{**taken, **options})


CHANGES: dict[str, Callable[[Question], dict[str, Any]]] = {
    "its id": lambda one: {"id": "x"},
    "its heading": lambda one: {"heading": one.heading + " "},
    "its worked examples": lambda one: {"shots": (*one.shots[::-1], "x")},
    "its body": lambda one: {"body": one.body + " "},
    "its choices": lambda one: {"choices": one.choices[::-1]},
    "its stops": lambda one: {"stops": ("x",)},
    "its length": lambda one: {"max_new_tokens": one.max_new_tokens + 1},
    "the right answer": lambda one: {"truth": "x"},
    "its messages": lambda one: {"messages": ({"role": "user", "content": "x"},)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_all_that_makes_a_question_changes_the_hash_of_a_run(mmlu: Path, change: Callable[..., dict[str, Any]]) -> None:
    task = asked_of(mmlu)
    first, *others = task.questions
    changed = replace(task, questions=(replace(first, **change(first)), *others))
    assert changed.sha256() != task.sha256()
    assert asked_of(mmlu).sha256() == task.sha256()


@pytest.mark.parametrize("options", [{"shots": 2}, {"style": "chat"}, {"prompt_format": "lm-eval"}, {"limit": 1}])
def test_other_wording_changes_the_hash_of_a_run(mmlu: Path, options: dict[str, Any]) -> None:
    assert asked_of(mmlu, **options).sha256() != asked_of(mmlu).sha256()
