"""The record of task scores and of what changed against the baseline, and the Markdown drawn from it.

Pydantic models and text only, as in results.py, which holds one of these. How items are asked and judged is tasks/'s;
how a difference is tested is paired.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from qquant.records import NOT_MEASURED, Strict, shown, table
from qquant.records import Style as Style
from qquant.records import TaskName as TaskName

SHOWN: dict[TaskName, str] = {
    "mmlu": "MMLU", "ceval": "C-Eval", "cmmlu": "CMMLU", "gsm8k": "GSM8K", "humaneval": "HumanEval",
}  # fmt: skip
"""Tasks in the order of Qwen's README, as it writes them."""

_METRICS = {"accuracy": "accuracy", "exact_number": "exact number", "pass_at_1": "pass@1"}
_MOST_CHANGED = 3
"""Subjects shown at either end."""


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
    correct_items: int


class TaskScore(Strict):
    """One model on one task."""

    label: str
    task: TaskName
    style: Style
    shots: int
    metric: Literal["accuracy", "exact_number", "pass_at_1"]
    backend: Literal["qquant", "lm-eval"]
    prompt_format: Literal["qwen", "lm-eval"]
    """Whose wording and rules of judging."""
    items: int
    correct_items: int
    unreadable_items: int
    """Items whose answer could not be read; they count as wrong."""
    score: float
    """correct_items / items: a share, 0 to 1."""
    score_stderr: float
    """sqrt(score * (1 - score) / items): a share, too, 0 to 0.5."""
    group_mean: float | None
    """Mean over subjects of each subject's share, 0 to 1: what C-Eval and CMMLU publish; None without subjects."""
    groups: tuple[TaskGroup, ...]
    truncated_items: int
    """Items whose prompt lost its oldest tokens or shots to fit the model."""
    seconds: float | None
    """Time it took; of a resumed run, of the part that was run last."""


class TaskComparison(Strict):
    """A candidate against the baseline on the same items."""

    label: str
    task: TaskName
    items: int
    difference: float
    """Candidate's score less the baseline's, -1 to 1."""
    ci95_low: float
    """Lower limit of the difference, -1 to 1, see ``qquant.paired``."""
    ci95_high: float
    """Upper limit, -1 to 1."""
    only_baseline_items: int
    """Items that the candidate lost."""
    only_candidate_items: int
    """Items that it won."""
    mcnemar_p: float
    """Probability, 0 to 1; exact, two-sided."""
    same_answer_items: int
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
    code_confinement: str | None = None
    """What held back the code that models wrote; None where none was run."""


def task_sections(tasks: Tasks) -> list[str]:
    """The section of a report's Markdown, paragraph by paragraph; every number is a rounded field of the record."""
    labels = list(dict.fromkeys(score.label for score in tasks.scores))
    asked = {score.task for score in tasks.scores}
    names = [name for name in SHOWN if name in asked]
    scores = {(score.label, score.task): score for score in tasks.scores}
    return [
        "## Tasks",
        "Share of items that were right, in per cent, ± its standard error.",
        table(
            ["model", *[_heading(tasks, name) for name in names]],
            [[_name(label, labels), *[_score(scores.get((label, name))) for name in names]] for label in labels],
        ),
        *_subject_means(scores, labels, names),
        *_comparisons(tasks, labels[0], names),
        *_changed_subjects(scores, labels, names),
        *_conditions(tasks, names),
        *([tasks.code_confinement] if tasks.code_confinement else []),
    ]


def _heading(tasks: Tasks, task: TaskName) -> str:
    """A task with its shots; a model that was asked in another way than the others has its own line in Conditions."""
    found = sorted({score.shots for score in tasks.scores if score.task == task})
    return f"{SHOWN[task]}, {' and '.join(map(str, found))}-shot"


def _name(label: str, labels: Sequence[str]) -> str:
    return label + (" (baseline)" if label == labels[0] else "")


def _score(score: TaskScore | None) -> str:
    return "-" if score is None else f"{100 * score.score:.1f} ± {100 * score.score_stderr:.1f}"


def _subject_means(
    scores: dict[tuple[str, TaskName], TaskScore], labels: Sequence[str], names: Sequence[TaskName]
) -> list[str]:
    """The mean that counts every subject alike, for tasks that have subjects."""
    means = {key: score.group_mean for key, score in scores.items() if score.group_mean is not None}
    grouped = [name for name in names if any((label, name) in means for label in labels)]
    if not grouped:
        return []
    body = []
    for label in labels:
        found = [means.get((label, name)) for name in grouped]
        body.append([_name(label, labels), *["-" if mean is None else f"{100 * mean:.1f}" for mean in found]])
    return [
        "Mean over subjects, each counted alike, in per cent; this is what C-Eval and CMMLU are published as:",
        table(["model", *[SHOWN[name] for name in grouped]], body),
    ]


def _comparisons(tasks: Tasks, baseline: str, names: Sequence[TaskName]) -> list[str]:
    if not tasks.comparisons:
        return []
    head = ("task", "model", "items", "difference", "95 % interval", "lost", "won", "McNemar p", "same answer")
    body = [
        (
            SHOWN[found.task],
            found.label,
            str(found.items),
            _points(found.difference),
            f"{_points(found.ci95_low)} to {_points(found.ci95_high)}",
            str(found.only_baseline_items),
            str(found.only_candidate_items),
            shown(found.mcnemar_p, ".2g"),
            str(found.same_answer_items),
        )
        for found in sorted(tasks.comparisons, key=lambda found: names.index(found.task))
    ]
    return [
        f"### Against {baseline}, on the same items",
        f"Difference and interval are in points of per cent. Lost are items that only {baseline} got right, won those "
        "that only the other did; both had the same answer, right or wrong, on as many as the last column says. Where "
        "the interval holds 0 or p is above 0.05, chance alone often makes equal models differ as much.",
        table(head, body),
    ]


def _changed_subjects(
    scores: dict[tuple[str, TaskName], TaskScore], labels: Sequence[str], names: Sequence[TaskName]
) -> list[str]:
    """The subjects that lost and won most, of each candidate; none where nothing changed."""
    body = []
    for task in names:
        base = scores.get((labels[0], task))
        for label in labels[1:]:
            ours = scores.get((label, task))
            changes = _changes(base, ours) if base and ours else []
            lost = [change for change in changes if change[0] < 0][:_MOST_CHANGED]
            won = [change for change in changes if change[0] > 0][-_MOST_CHANGED:]
            for change, theirs, group in [*lost, *won]:
                counts = (str(group.items), str(theirs.correct_items), str(group.correct_items))
                body.append((SHOWN[task], label, group.name, *counts, _points(change)))
    if not body:
        return []
    head = ("task", "model", "subject", "items", f"right: {labels[0]}", "right: model", "change")
    return [
        "### Subjects that changed most",
        f"At most {_MOST_CHANGED} that lost and {_MOST_CHANGED} that won, in points. Subjects have few items: the "
        "largest of many changes is large by chance, too.",
        table(head, body),
    ]


def _changes(base: TaskScore, ours: TaskScore) -> list[tuple[float, TaskGroup, TaskGroup]]:
    """(change of the share, baseline's, candidate's) of subjects that both have whole, the greatest loss first."""
    theirs = {group.name: group for group in base.groups}
    pairs = [(theirs[group.name], group) for group in ours.groups if group.name in theirs]
    whole = [(old, new) for old, new in pairs if new.items == old.items > 0]
    changes = [((new.correct_items - old.correct_items) / new.items, old, new) for old, new in whole]
    return sorted(changes, key=lambda change: (change[0], change[2].name))


def _conditions(tasks: Tasks, names: Sequence[TaskName]) -> list[str]:
    """On what, and how, each model was asked, and what went wrong."""
    data = [
        (SHOWN[found.task], f"`{found.sha256[:12]}…`", str(found.items), _limit(found, tasks))
        for found in sorted(
            tasks.data, key=lambda found: names.index(found.task) if found.task in names else len(names)
        )
    ]
    asked = [
        (
            SHOWN[score.task],
            score.label,
            score.style,
            str(score.shots),
            _METRICS[score.metric],
            score.prompt_format,
            score.backend,
            str(score.items),
            str(score.unreadable_items),
            str(score.truncated_items),
            NOT_MEASURED if score.seconds is None else f"{score.seconds:.1f}",
        )
        for score in sorted(tasks.scores, key=lambda score: names.index(score.task))
    ]
    head = (
        "task", "model", "style", "shots", "metric", "prompts", "backend", "items", "unreadable", "truncated",
        "seconds",
    )  # fmt: skip
    return [
        "### Conditions",
        table(("task", "data sha256", "items", "used"), data),
        "An unreadable answer counts as wrong. A truncated prompt lost its oldest shots or tokens to fit the model.",
        table(head, asked),
    ]


def _limit(data: TaskData, tasks: Tasks) -> str:
    if data.limit is None:
        return "all"
    subjects = any(score.groups for score in tasks.scores if score.task == data.task)
    return f"the first {data.limit}" + (" of each subject" if subjects else "")


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
