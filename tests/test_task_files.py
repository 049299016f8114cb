"""Tasks read from files in their published layouts: nothing lost, nothing guessed, and every bad row named."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qquant.errors import BadDataError, UsageError
from qquant.tasks.files import read_task
from qquant.tasks.items import TaskName
from tests.task_files import (
    ITEMS,
    SHOTS,
    SUBJECTS,
    choice_row,
    word_problem,
    write_choices,
    write_csv,
    write_gsm8k,
    write_humaneval,
    write_lines,
    write_tasks,
)

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
CHOICES: tuple[TaskName, ...] = ("mmlu", "ceval", "cmmlu")
ROW = ["What?", "1", "2", "3", "4", "B"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five tasks. Never write to it."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.mark.parametrize("task", CHOICES)
def test_choices_come_from_the_published_layout_subject_by_subject(root: Path, task: TaskName) -> None:
    data = read_task(task, root / task)
    assert [item.group for item in data.items] == [name for name in SUBJECTS[task] for _ in range(ITEMS)]
    assert {name: len(found) for name, found in data.shots.items()} == dict.fromkeys(SUBJECTS[task], SHOTS)
    for item in data.items:
        assert item.group is not None
        number = int(item.id.removeprefix(f"{item.group}/"))
        question, *choices, letter = choice_row(item.group, number, chinese=task != "mmlu")
        assert (item.question, item.choices, item.truth) == (question, tuple(choices), letter)


def test_a_cell_that_reads_none_stays_that_text(root: Path) -> None:
    assert all(item.choices[2] == "None" for item in read_task("mmlu", root / "mmlu").items)


def test_gsm8k_gives_the_number_without_separators_and_the_worked_answer(root: Path) -> None:
    data = read_task("gsm8k", root / "gsm8k")
    assert [item.truth for item in data.items] == ["1000", "1001", "1002"]
    assert [item.id for item in data.items] == ["0", "1", "2"]
    assert data.items[0].extra == {"answer": word_problem(0)["answer"]}
    assert len(data.shots[None]) == 8


def test_humaneval_keeps_its_own_names_and_programs(root: Path) -> None:
    data = read_task("humaneval", root / "humaneval")
    assert [item.id for item in data.items] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    assert data.items[0].extra.keys() == {"prompt", "test", "entry_point"}
    assert data.items[0].truth == ""
    assert not data.items[0].choices
    assert not data.shots


@pytest.mark.parametrize(("limit", "count"), [(1, 2), (2, 4), (99, 6)], ids=["one", "two", "more than there are"])
def test_limit_takes_the_first_items_of_each_subject(root: Path, limit: int, count: int) -> None:
    whole, cut = read_task("mmlu", root / "mmlu"), read_task("mmlu", root / "mmlu", limit=limit)
    assert cut.items == tuple(item for item in whole.items if int(item.id.split("/")[1]) < limit)
    assert len(cut.items) == count


def test_limit_below_one_is_refused(root: Path) -> None:
    with pytest.raises(UsageError, match="limit must be at least 1 item, got 0"):
        read_task("mmlu", root / "mmlu", limit=0)


def test_a_folder_whose_name_begins_with_test_will_do(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "cmmlu", tmp_path / "cmmlu")
    (tmp_path / "cmmlu" / "test").rename(tmp_path / "cmmlu" / "test_first_half")
    assert read_task("cmmlu", tmp_path / "cmmlu").items == read_task("cmmlu", root / "cmmlu").items


def test_two_such_folders_are_refused_until_there_is_one(root: Path, tmp_path: Path) -> None:
    for half in ("test_1", "test_2"):
        shutil.copytree(root / "mmlu" / "test", tmp_path / half)
    with pytest.raises(BadDataError, match="called test, it has test_1, test_2; give as TASK=PATH a folder with"):
        read_task("mmlu", tmp_path)
    shutil.rmtree(tmp_path / "test_1")
    assert len(read_task("mmlu", tmp_path).items) == 6


def _as_json_lines(path: Path, found: list[dict[str, Any]]) -> Path:
    return write_lines(path.with_suffix(".jsonl"), found)


def _as_json_list(path: Path, found: list[dict[str, Any]]) -> Path:
    path.with_suffix(".json").write_text(json.dumps(found), encoding="utf-8")
    return path.with_suffix(".json")


def _as_packed_lines(path: Path, found: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(item) + "\n\n" for item in found)
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return path.with_suffix(".jsonl.gz")


WRITERS = {"lines": _as_json_lines, "list": _as_json_list, "packed lines": _as_packed_lines}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_json_of_every_kind_gives_the_same_items(
    root: Path, tmp_path: Path, write: Callable[[Path, list[dict[str, Any]]], Path]
) -> None:
    path = write(tmp_path / "test", [word_problem(number) for number in range(ITEMS)])
    assert read_task("gsm8k", path).items == read_task("gsm8k", root / "gsm8k").items


def test_choices_as_a_list_and_the_answer_as_a_number_are_the_same_item(root: Path, tmp_path: Path) -> None:
    rows = [choice_row("global_facts", number, chinese=False) for number in range(ITEMS)]
    found = [
        {"question": row[0], "subject": "global_facts", "choices": row[1:5], "answer": "ABCD".index(row[5])}
        for row in rows
    ]
    ours = read_task("mmlu", write_lines(tmp_path / "test.jsonl", found)).items
    assert ours == tuple(item for item in read_task("mmlu", root / "mmlu").items if item.group == "global_facts")


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": "#### 1"}\n', encoding="utf-8")
    assert read_task("gsm8k", path).items[0].question == "a\u2028b"


def test_identity_follows_contents_and_names_and_not_the_place(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "gsm8k", tmp_path / "elsewhere")
    before = read_task("gsm8k", root / "gsm8k").sha256
    assert read_task("gsm8k", tmp_path / "elsewhere").sha256 == before
    train = tmp_path / "elsewhere" / "train.jsonl"
    train.write_text(train.read_text() + "\n")
    assert read_task("gsm8k", tmp_path / "elsewhere").sha256 != before


BAD_ROWS = {
    "too few cells": (ROW[:5], "line 2: a row needs 6 cells, got 5"),
    "too many cells": ([*ROW, "C"], "line 2: a row needs 6 cells, got 7"),
    "no letter": ([*ROW[:5], "E"], "line 2: 'answer' must be one of A, B, C and D, got 'E'"),
    "no answer": ([*ROW[:5], ""], r"line 2: 'answer' must be .* got ''.*C-Eval's test split"),
    "no question": (["", *ROW[1:]], "line 2: 'question' must be a text that is not empty, got ''"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: list[str], message: str) -> None:
    write_csv(tmp_path / "test" / "law_test.csv", [ROW, row])
    with pytest.raises(BadDataError, match=rf"law_test\.csv, {message}"):
        read_task("mmlu", tmp_path)


BAD_FILES = {
    "no header": ("ceval", "val/law_val.csv", "What?,1,2,3,4,B\n", "line 1: the first row must name the columns"),
    "quotes": ("mmlu", "test/a_test.csv", '"What?"x,1,2,3,4,B\n', "line 1: not CSV"),
    "no JSON": ("gsm8k", "test.jsonl", '{"question": 1\n', "line 1, column"),
    "no object": ("gsm8k", "test.jsonl", "[1]\n", "item must be an object, got list"),
    "no number": ("gsm8k", "test.jsonl", '{"question": "a", "answer": "many"}', "line 1: 'answer' must end in"),
    "no tests": ("humaneval", "humaneval.jsonl", '{"task_id": "x", "prompt": "y"}', "line 1: 'test' must be a text"),
    "nothing": ("gsm8k", "test.jsonl", "\n\n", "has no items of gsm8k"),
}


@pytest.mark.parametrize(("task", "name", "text", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_bad_file_is_refused(tmp_path: Path, task: TaskName, name: str, text: str, message: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(BadDataError, match=message):
        read_task(task, tmp_path)


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = write_humaneval(tmp_path) / "HumanEval.jsonl"
    path.write_text(path.read_text() * 2)
    with pytest.raises(BadDataError, match=r"line 4: .*HumanEval/0 came before"):
        read_task("humaneval", tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe bad", gzip.compress(b"x")[:-4]], ids=["no UTF-8", "torn gzip"])
def test_unreadable_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ("test.jsonl.gz" if content[:2] == b"\x1f\x8b" else "test.jsonl")
    path.write_bytes(content)
    with pytest.raises(BadDataError, match="must be"):
        read_task("gsm8k", path)


HALVES = {
    "a question": {"question": "a\ud800", "choices": list("abcd"), "answer": 0},
    "a choice": {"question": "a", "choices": ["a", "b", "c", "\udfff"], "answer": 0},
    "a subject": {"question": "a", "choices": list("abcd"), "answer": 0, "subject": "law\ud800"},
    "a subject of two lines": {"question": "a", "choices": list("abcd"), "answer": 0, "subject": "law\n# logic"},
}


@pytest.mark.parametrize("row", HALVES.values(), ids=HALVES.keys())
def test_text_that_cannot_be_asked_or_shown_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    write_lines(tmp_path / "test.jsonl", [row])
    with pytest.raises(BadDataError, match=r"test\.jsonl, line 1: .* mend"):
        read_task("mmlu", tmp_path)


def test_a_name_that_is_no_text_is_refused_as_a_subject(tmp_path: Path) -> None:
    name = os.fsdecode(b"law\xff_test.csv")
    try:
        write_csv(tmp_path / "test" / name, [ROW])
    except OSError:
        pytest.skip("this file system takes only names that are text")
    with pytest.raises(BadDataError, match="name of a subject"):
        read_task("mmlu", tmp_path)
    assert read_task("gsm8k", write_lines(tmp_path / os.fsdecode(b"\xff.jsonl"), [word_problem(1)])).sha256


def test_a_link_that_leads_nowhere_is_not_left_out(tmp_path: Path) -> None:
    write_csv(tmp_path / "test" / "law_test.csv", [ROW])
    (tmp_path / "test" / "logic_test.csv").symlink_to(tmp_path / "absent.csv")
    with pytest.raises(BadDataError, match=r"logic_test\.csv: the file must be readable"):
        read_task("mmlu", tmp_path)


@pytest.mark.parametrize("name", ["test.jsonl", "test/a.jsonl", "items.jsonl"], ids=["part", "in a part", "itself"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(BadDataError, match=r"jsonl: must be a file"):
        read_task("gsm8k", path if name == "items.jsonl" else tmp_path)


def test_a_column_that_comes_twice_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "test" / "law.csv", [["question", *"abcd", "answer", "Answer"], [*ROW, "D"]])
    with pytest.raises(BadDataError, match=r"line 1: a column's name must come once, got \['answer'\]"):
        read_task("cmmlu", tmp_path)


def test_missing_data_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="there is no folder or file"):
        read_task("mmlu", tmp_path / "absent")
    write_choices(tmp_path, "ceval")
    with pytest.raises(BadDataError, match="folder or file called test, it has dev, val"):
        read_task("mmlu", tmp_path)


def test_without_worked_examples_items_are_read_all_the_same(tmp_path: Path) -> None:
    write_gsm8k(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    assert not read_task("gsm8k", tmp_path).shots


def test_a_hub_id_needs_datasets_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadDataError, match=r"no file or folder of that name.*pip install 'qquant\[data\]'"):
        read_task("gsm8k", "openai/gsm8k")


def test_a_hub_data_set_is_read_configuration_by_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str, split: str) -> list[dict[str, Any]]:
        assert name == "some/ceval-exam"
        row = choice_row(config, {"val": 0, "dev": 10}[split], chinese=True)
        return [dict(zip(("question", "A", "B", "C", "D", "answer"), row, strict=True))]

    fake = SimpleNamespace(load_dataset=load, get_dataset_config_names=lambda name: ["law", "logic"])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    data = read_task("ceval", "some/ceval-exam")
    assert [(item.id, item.choices[0]) for item in data.items] == [("law/0", "0"), ("logic/0", "0")]
    assert data.shots["logic"][0].truth == "C"
    assert [item.id for item in read_task("ceval", "some/ceval-exam:law").items] == ["law/0"]


def test_a_parquet_file_goes_through_datasets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(name: str, split: str, data_files: str) -> list[dict[str, Any]]:
        assert (name, split, data_files) == ("parquet", "train", str(tmp_path / "test.parquet"))
        return [word_problem(number) for number in range(ITEMS)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    assert [item.truth for item in read_task("gsm8k", tmp_path).items] == ["1000", "1001", "1002"]


REAL = {
    "mmlu": (7032, 57, "abstract_algebra/0"),
    "cmmlu": (5808, 67, "agronomy/0"),
    "gsm8k": (660, 1, "0"),
    "humaneval": (164, 0, "HumanEval/0"),
}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the published task files beside the checkout")
@pytest.mark.parametrize("task", REAL)
def test_published_files_are_read_whole(task: TaskName) -> None:
    data = read_task(task, SHARED / task)
    assert (len(data.items), len(data.shots), data.items[0].id) == REAL[task]
