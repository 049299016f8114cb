"""Small task files in the layouts that the five tasks were published in, with items of our own.

Imported by tests only.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qquant.tasks.items import LETTERS, TaskName

SUBJECTS: Mapping[TaskName, Sequence[str]] = {
    "mmlu": ("abstract_algebra", "global_facts"),
    "ceval": ("law", "logic"),
    "cmmlu": ("agronomy", "world_history"),
}
ITEMS = 3
"""Of each subject."""
SHOTS = 5

FUNCTIONS = (
    ("add", "a, b", "Sum of a and b.", "return a + b", "(2, 3) == 5"),
    ("double", "a", "Twice a.", "return 2 * a", "(4) == 8"),
    ("largest", "items", "The largest of items.", "return max(items)", "([3, 9, 4]) == 9"),
)


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


def write_lines(path: Path, items: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def choice_row(subject: str, number: int, *, chinese: bool) -> list[str]:
    """Question, four choices and the letter of an item; one choice reads None, and one question has a comma."""
    asked = f"{subject}里第{number}个数是几？" if chinese else f'Which number is "number {number}", in {subject}?'
    return [asked, str(number), str(number + 1), "None", "two, three", LETTERS[number % 4]]


def write_choices(folder: Path, task: TaskName) -> Path:
    """MMLU, C-Eval or CMMLU as published, two subjects of three items and five worked examples."""
    items = "val" if task == "ceval" else "test"
    for subject in SUBJECTS[task]:
        for part, count, first in (("dev", SHOTS, 10), (items, ITEMS, 0)):
            rows = [choice_row(subject, first + number, chinese=task != "mmlu") for number in range(count)]
            name = f"{subject}.csv" if task == "cmmlu" else f"{subject}_{part}.csv"
            if task == "ceval":
                rows = [["id", "question", *LETTERS, "answer"], *([str(n), *row] for n, row in enumerate(rows))]
            elif task == "cmmlu":
                rows = [["", "Question", *LETTERS, "Answer"], *([str(n), *row] for n, row in enumerate(rows))]
            write_csv(folder / part / name, rows)
    return folder


def word_problem(number: int) -> dict[str, str]:
    steps = f"He has {number} + 1000 = <<{number}+1000={number + 1000}>>{number + 1000} pens."
    return {
        "question": f"Tom has {number} pens and buys 1,000. How many?",
        "answer": f"{steps}\n#### {number + 1000:,}",
    }


def write_gsm8k(folder: Path) -> Path:
    write_lines(folder / "train.jsonl", [word_problem(number) for number in range(10, 18)])
    write_lines(folder / "test.jsonl", [word_problem(number) for number in range(ITEMS)])
    return folder


def write_humaneval(folder: Path) -> Path:
    items = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def {name}({given}):\n    """{meaning}"""\n',
            "entry_point": name,
            "canonical_solution": f"    {body}\n",
            "test": f"def check(candidate):\n    assert candidate{expected}\n",
        }
        for number, (name, given, meaning, body, expected) in enumerate(FUNCTIONS)
    ]
    write_lines(folder / "HumanEval.jsonl", items)
    return folder


def write_tasks(root: Path) -> Path:
    """A folder with all five tasks."""
    for task in SUBJECTS:
        write_choices(root / task, task)
    write_gsm8k(root / "gsm8k")
    write_humaneval(root / "humaneval")
    return root
