"""Markdown of task scores: every number is a field of the record, and nothing is shown that was not measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qquant.task_report import TaskComparison, TaskData, TaskGroup, TaskName, Tasks, TaskScore, task_sections

SUBJECTS = ("algebra", "biology", "chess", "dance", "economy", "film", "geology", "history")


def _score(label: str, task: TaskName, correct: int, items: int, **fields: Any) -> TaskScore:
    share = correct / items
    default: dict[str, Any] = {
        "style": "base",
        "shots": 5,
        "metric": "accuracy",
        "backend": "qquant",
        "prompt_format": "qwen",
        "unreadable_items": 0,
        "score": share,
        "score_stderr": math.sqrt(share * (1 - share) / items),
        "group_mean": None,
        "groups": (),
        "truncated_items": 0,
        "seconds": 12.34,
    }
    return TaskScore(label=label, task=task, items=items, correct_items=correct, **default | fields)


def _grouped(label: str, task: TaskName, correct: dict[str, int], items: int = 10) -> TaskScore:
    groups = tuple(TaskGroup(name=name, items=items, correct_items=count) for name, count in correct.items())
    mean = sum(group.correct_items / group.items for group in groups) / len(groups)
    return _score(label, task, sum(correct.values()), items * len(groups), groups=groups, group_mean=mean)


def _comparison(label: str, task: TaskName, **fields: Any) -> TaskComparison:
    default: dict[str, Any] = {
        "items": 80,
        "difference": -0.0375,
        "ci95_low": -0.1052,
        "ci95_high": 0.0251,
        "only_baseline_items": 5,
        "only_candidate_items": 2,
        "mcnemar_p": 0.453125,
        "same_answer_items": 71,
    }
    return TaskComparison(label=label, task=task, **default | fields)


def _data(task: TaskName, items: int, limit: int | None = None) -> TaskData:
    return TaskData(task=task, sha256="0123456789abcdef" * 4, items=items, limit=limit)


def _tasks() -> Tasks:
    base = dict.fromkeys(SUBJECTS, 5)
    exact: dict[str, Any] = {"shots": 8, "metric": "exact_number"}
    moved = dict(zip(SUBJECTS, (5, 1, 9, 4, 6, 3, 5, 4), strict=True))
    return Tasks(
        data=(_data("cmmlu", 80, limit=10), _data("gsm8k", 50, limit=50)),
        scores=(
            _grouped("qwen", "cmmlu", base),
            _grouped("qwen-int4", "cmmlu", moved),
            _score("qwen", "gsm8k", 25, 50, **exact, unreadable_items=3, truncated_items=2, seconds=None),
            _score("qwen-int4", "gsm8k", 24, 50, **exact),
        ),
        comparisons=(_comparison("qwen-int4", "gsm8k", mcnemar_p=1.0), _comparison("qwen-int4", "cmmlu")),
    )


def _text(tasks: Tasks) -> str:
    return "\n\n".join(task_sections(tasks))


def test_models_are_rows_and_tasks_columns_as_in_qwens_readme() -> None:
    text = _text(_tasks())
    assert "| model | CMMLU, 5-shot | GSM8K, 8-shot |\n| --- | --- | --- |\n" in text
    assert "| qwen (baseline) | 50.0 ± 5.6 | 50.0 ± 7.1 |" in text
    assert "| qwen-int4 | 46.2 ± 5.6 | 48.0 ± 7.1 |" in text


def test_columns_follow_qwens_order_whatever_was_measured_first() -> None:
    names: tuple[TaskName, ...] = ("humaneval", "gsm8k", "cmmlu", "ceval", "mmlu")
    scores = tuple(_score("qwen", name, 1, 2) for name in names)
    text = _text(Tasks(data=tuple(_data(name, 2) for name in names), scores=scores, comparisons=()))
    assert "| model | MMLU, 5-shot | C-Eval, 5-shot | CMMLU, 5-shot | GSM8K, 5-shot | HumanEval, 5-shot |" in text


def test_means_over_subjects_stand_in_a_table_of_their_own() -> None:
    text = _text(_tasks())
    assert "| model | CMMLU |\n| --- | --- |\n| qwen (baseline) | 50.0 |\n| qwen-int4 | 46.2 |" in text


def test_differences_have_intervals_flips_and_a_p() -> None:
    text = _text(_tasks())
    assert "### Against qwen, on the same items" in text
    cmmlu = text.index("| CMMLU | qwen-int4 | 80 | -3.8 | -10.5 to +2.5 | 5 | 2 | 0.45 | 71 |")
    assert cmmlu < text.index("| GSM8K | qwen-int4 | 80 | -3.8 | -10.5 to +2.5 | 5 | 2 | 1 | 71 |")


def test_three_subjects_at_either_end_are_shown_and_unchanged_ones_never() -> None:
    section = _text(_tasks()).split("### Subjects that changed most")[1].split("###")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| CMMLU")]
    assert [row[2:] for row in rows] == [
        ["biology", "10", "5", "1", "-40.0"],
        ["film", "10", "5", "3", "-20.0"],
        ["dance", "10", "5", "4", "-10.0"],
        ["economy", "10", "5", "6", "+10.0"],
        ["chess", "10", "5", "9", "+40.0"],
    ]


def test_conditions_name_data_shots_prompts_and_what_went_wrong() -> None:
    text = _text(_tasks())
    assert "| CMMLU | `0123456789ab…` | 80 | the first 10 of each subject |" in text
    assert "| GSM8K | `0123456789ab…` | 50 | the first 50 |" in text
    assert "| GSM8K | qwen | base | 8 | exact number | qwen | qquant | 50 | 3 | 2 | not measured |" in text
    assert "| CMMLU | qwen-int4 | base | 5 | accuracy | qwen | qquant | 80 | 0 | 0 | 12.3 |" in text


def test_one_model_alone_is_compared_with_nothing() -> None:
    found = _tasks()
    alone = found.model_copy(update={"scores": found.scores[::2], "comparisons": ()})
    text = _text(alone)
    assert "Against" not in text
    assert "Subjects that changed" not in text
    assert "| qwen (baseline) | 50.0 ± 5.6 | 50.0 ± 7.1 |" in text


def test_a_task_that_a_model_was_not_asked_is_a_dash() -> None:
    found = _tasks()
    text = _text(found.model_copy(update={"scores": found.scores[:3], "comparisons": found.comparisons[1:]}))
    assert "| qwen-int4 | 46.2 ± 5.6 | - |" in text


def test_a_model_asked_with_other_shots_shows_in_the_heading() -> None:
    scores = (_score("qwen", "mmlu", 1, 2), _score("chat", "mmlu", 1, 2, shots=0, style="chat"))
    text = _text(Tasks(data=(_data("mmlu", 2),), scores=scores, comparisons=()))
    assert "MMLU, 0 and 5-shot" in text
    assert "| MMLU | chat | chat | 0 |" in text


def test_subjects_of_which_one_model_answered_fewer_items_are_not_compared() -> None:
    scores = (_grouped("a", "ceval", {"art": 5}), _grouped("b", "ceval", {"art": 1}, items=5))
    text = _text(Tasks(data=(_data("ceval", 10),), scores=scores, comparisons=()))
    assert "Subjects that changed" not in text


def test_record_goes_through_json_unchanged() -> None:
    found = _tasks()
    assert Tasks.model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize("p", [0.0, 1e-12, 0.00049, 0.05])
def test_small_p_values_keep_two_digits(p: float) -> None:
    found = _tasks()
    one = found.model_copy(update={"comparisons": (_comparison("qwen-int4", "cmmlu", mcnemar_p=p),)})
    assert f"| 5 | 2 | {p:.2g} | 71 |" in _text(one)
