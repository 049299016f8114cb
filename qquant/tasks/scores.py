"""Decisions on items added up: a model's score on a task, and what changed against the baseline on the same items.

What is counted as right was decided before; how a difference is tested is paired.py's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from qquant.errors import UsageError
from qquant.paired import compare
from qquant.task_report import TaskComparison, TaskGroup, TaskItem, TaskScore
from qquant.tasks.items import Metric, PromptFormat, Style, TaskName

METRICS: Mapping[TaskName, Metric] = {
    "mmlu": "accuracy",
    "ceval": "accuracy",
    "cmmlu": "accuracy",
    "gsm8k": "exact_number",
    "humaneval": "pass_at_1",
}


def score_of(
    items: Sequence[TaskItem],
    *,
    style: Style,
    shots: int,
    backend: Literal["qquant", "lm-eval"] = "qquant",
    prompt_format: PromptFormat = "qwen",
    truncated: int,
    seconds: float | None,
) -> TaskScore:
    """One model's score.

    Args:
        items: all of one model on one task, at least one.
        style: how it was asked.
        shots: worked examples per question.
        backend: who ran it.
        prompt_format: whose wording and rules.
        truncated: items whose prompt was shortened.
        seconds: that it took.
    """
    first = items[0]
    correct = sum(item.correct for item in items)
    score = correct / len(items)
    by_group: dict[str, list[bool]] = {}
    for item in items:
        if item.group is not None:
            by_group.setdefault(item.group, []).append(item.correct)
    groups = tuple(TaskGroup(name=name, items=len(own), correct_items=sum(own)) for name, own in by_group.items())
    return TaskScore(
        label=first.label,
        task=first.task,
        style=style,
        shots=shots,
        metric=METRICS[first.task],
        backend=backend,
        prompt_format=prompt_format,
        items=len(items),
        correct_items=correct,
        unreadable_items=sum(item.answer is None for item in items),
        score=score,
        score_stderr=math.sqrt(score * (1 - score) / len(items)),
        group_mean=sum(group.correct_items / group.items for group in groups) / len(groups) if groups else None,
        groups=groups,
        truncated_items=truncated,
        seconds=seconds,
    )


def comparison_of(baseline: Sequence[TaskItem], candidate: Sequence[TaskItem]) -> TaskComparison:
    """A candidate against the baseline.

    Args:
        baseline: its decisions on one task.
        candidate: the same of the candidate, on the same items in the same order.

    Raises:
        UsageError: the items are not the same.
    """
    if [item.id for item in baseline] != [item.id for item in candidate]:
        raise UsageError("a paired comparison needs the same items of both models in the same order, these differ")
    pairs = list(zip(baseline, candidate, strict=True))
    found = compare([one.correct for one in baseline], [one.correct for one in candidate])
    return TaskComparison(
        label=candidate[0].label,
        task=candidate[0].task,
        items=found.items,
        difference=found.difference,
        ci95_low=found.ci95_low,
        ci95_high=found.ci95_high,
        only_baseline_items=found.only_baseline_correct,
        only_candidate_items=found.only_candidate_correct,
        mcnemar_p=found.mcnemar_p,
        same_answer_items=sum(theirs.answer == ours.answer for theirs, ours in pairs),
    )
