"""Scores and comparisons of two subjects of unequal size, worked out by hand."""

from __future__ import annotations

import math

import pytest

from qquant.errors import UsageError
from qquant.task_report import TaskItem
from qquant.tasks.scores import comparison_of, score_of

# Item, its truth, and the letters of two models: seven items, one answer of each model right or wrong in its own way.
DECIDED = (
    ("law/0", "A", "A", "A"),  # both right
    ("law/1", "B", "B", "C"),  # lost
    ("law/2", "C", "D", "B"),  # both wrong, with two different letters
    ("law/3", "D", None, "D"),  # won where nothing could be read
    ("law/4", "B", "B", "B"),  # both right
    ("law/5", "C", "A", "C"),  # won
    ("logic/0", "A", "C", "C"),  # both wrong, with one letter
)


def items_of(label: str, column: int) -> list[TaskItem]:
    return [
        TaskItem(
            label=label,
            task="ceval",
            id=row[0] or "",
            group=(row[0] or "").split("/")[0],
            answer=row[column],
            truth=row[1] or "",
            correct=row[column] == row[1],
            choice_logprobs_nats=None,
            output=None,
        )
        for row in DECIDED
    ]


BASELINE, CANDIDATE = items_of("original", 2), items_of("quantized", 3)


def test_a_score_is_worked_out_over_all_items_and_over_subjects() -> None:
    found = score_of(BASELINE, style="base", shots=5, truncated=2, seconds=1.5)
    assert (found.label, found.task, found.metric) == ("original", "ceval", "accuracy")
    assert (found.items, found.correct_items, found.unreadable_items) == (7, 3, 1)
    assert found.score == pytest.approx(3 / 7, abs=1e-15)
    assert found.score_stderr == pytest.approx(0.18704390591656488, abs=1e-15)  # sqrt(3/7 * 4/7 / 7)
    # law 3 of 6, logic 0 of 1: each subject counts once, whatever its size.
    assert found.group_mean == pytest.approx(0.25, abs=1e-15)
    groups = [(group.name, group.items, group.correct_items) for group in found.groups]
    assert groups == [("law", 6, 3), ("logic", 1, 0)]
    assert (found.style, found.shots, found.truncated_items, found.seconds) == ("base", 5, 2, 1.5)
    assert (found.backend, found.prompt_format) == ("qquant", "qwen")


def test_a_task_without_subjects_has_no_mean_over_them() -> None:
    items = [item.model_copy(update={"group": None, "task": "gsm8k"}) for item in BASELINE]
    found = score_of(items, style="chat", shots=0, truncated=0, seconds=None)
    assert (found.group_mean, found.groups, found.metric) == (None, (), "exact_number")


def test_a_single_subject_is_its_own_mean() -> None:
    found = score_of(BASELINE[:6], style="base", shots=0, truncated=0, seconds=None)
    assert found.group_mean == found.score == 0.5


def test_a_comparison_is_worked_out_item_by_item() -> None:
    found = comparison_of(BASELINE, CANDIDATE)
    assert (found.label, found.task, found.items) == ("quantized", "ceval", 7)
    assert found.difference == pytest.approx(4 / 7 - 3 / 7, abs=1e-15)
    assert (found.only_baseline_items, found.only_candidate_items) == (1, 2)
    # law/0, law/4 and logic/0: right together or wrong with one letter. Wrong with two letters is no same answer.
    assert found.same_answer_items == 3
    # Of 3 items that changed sides 1 or fewer lost: 2 * (1 + 3) / 2**3.
    assert found.mcnemar_p == pytest.approx(1.0, abs=1e-12)
    assert found.ci95_low < found.difference < found.ci95_high


def test_the_other_way_round_the_signs_turn() -> None:
    there, back = comparison_of(BASELINE, CANDIDATE), comparison_of(CANDIDATE, BASELINE)
    assert back.label == "original"
    assert math.isclose(back.difference, -there.difference)
    assert (back.only_baseline_items, back.only_candidate_items, back.same_answer_items) == (2, 1, 3)


@pytest.mark.parametrize(
    "items", [CANDIDATE[::-1], CANDIDATE[:-1], [*CANDIDATE[1:], CANDIDATE[1]]], ids=["turned", "fewer", "others"]
)
def test_other_items_are_not_compared(items: list[TaskItem]) -> None:
    with pytest.raises(UsageError, match="the same items of both models in the same order"):
        comparison_of(BASELINE, items)
