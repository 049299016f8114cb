"""The record of task scores and of what changed against the baseline, and the Markdown drawn from it.

Pydantic models only, as in results.py, which holds one of these. How items are asked and judged is tasks/'s; how a
difference is tested is paired.py's.
"""

from __future__ import annotations

from typing import Literal

from qquant.records import Strict

TaskName = Literal["mmlu", "ceval", "cmmlu", "gsm8k", "humaneval"]
Style = Literal["base", "chat"]


class TaskItem(Strict):
    """One model's decision on one item; a line of items.jsonl beside the report, not part of report.json."""

    label: str
    """The model's."""
    task: TaskName
    id: str
    """``subject/number`` or ``number`` from 0, or the task's own id, as ``HumanEval/0``."""
    group: str | None
    """Subject, where the task has any."""
    answer: str | None
    """The decision: a letter, a number as text, "passed" or why not; None: the model gave none that can be read."""
    truth: str
    correct: bool
    choice_logprobs_nats: tuple[float, ...] | None
    """Log-likelihood of each choice in their order; None for tasks that generate."""
    output: str | None
    """Text that was generated; None for tasks that score choices."""


class TaskGroup(Strict):
    """A subject of a task."""

    name: str
    items: int
    correct: int


class TaskScore(Strict):
    """One model on one task."""

    label: str
    task: TaskName
    style: Style
    shots: int
    metric: Literal["accuracy", "exact_number", "pass_at_1"]
    backend: Literal["qquant", "lm-eval"]
    items: int
    correct: int
    unreadable: int
    """Items whose answer could not be read; they count as wrong."""
    score: float
    """correct / items."""
    score_stderr: float
    """sqrt(score * (1 - score) / items)."""
    group_mean: float | None
    """Mean over subjects of each subject's score: what C-Eval and CMMLU publish; None without subjects."""
    groups: tuple[TaskGroup, ...]
    truncated: int
    """Items whose prompt lost its oldest tokens or shots to fit the model."""
    seconds: float | None
    """Time it took; of a resumed run, of the part that was run last."""


class TaskComparison(Strict):
    """A candidate against the baseline on the same items."""

    label: str
    task: TaskName
    items: int
    difference: float
    """Candidate's score less the baseline's."""
    ci95_low: float
    """Of the difference, see ``qquant.paired``."""
    ci95_high: float
    only_baseline_correct: int
    """Items that the candidate lost."""
    only_candidate_correct: int
    """Items that it won."""
    mcnemar_p: float
    """Exact, two-sided."""
    same_answer: int
    """Items on which both decided alike, right or wrong."""


class TaskData(Strict):
    """What a task was run on, by its identity."""

    task: TaskName
    sha256: str
    """Over the names and contents of all files read."""
    items: int
    limit: int | None
    """Only this many items of each subject (of the task where it has none); None: all."""


class Tasks(Strict):
    """What ``--tasks`` measured; scores by task and within a task by model, the baseline first."""

    data: tuple[TaskData, ...]
    scores: tuple[TaskScore, ...]
    comparisons: tuple[TaskComparison, ...]
