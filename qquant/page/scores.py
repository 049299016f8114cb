"""Task scores joined in the form of Qwen's README, paired differences, and the verdict on each candidate.

Tables of divergence and size are models.py's. Nothing here asks an item or tests a difference: task_report.py
says what the numbers are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

from qquant.charts.scales import disk_unit, signed_text
from qquant.page.joined import DTYPES, Fact, Verdict, identity, published_size, stored_as
from qquant.page.tables import NOT_KNOWN, PRECISIONS, Cell, Table, make_table, number, percent
from qquant.published import ACCURACY
from qquant.results import ModelRow, Result, overlap_warnings
from qquant.task_report import SHOWN as TASKS
from qquant.task_report import Style, TaskName, TaskScore

_METRICS = {
    "mmlu": "MMLU over questions", "ceval": "C-Eval and CMMLU over subjects", "cmmlu": "C-Eval and CMMLU over subjects",
    "gsm8k": "GSM8K by the exact number", "humaneval": "HumanEval pass@1",
}  # fmt: skip
_FIRST_FACTS = ("size", "perplexity", "same next token")


def tables(results: Sequence[Result]) -> list[Table]:
    """Scores by task with published ones beside them, then differences on the same items."""
    return [*_scores(results), *_differences(results)]


def verdicts(results: Sequence[Result]) -> tuple[Verdict, ...]:
    """A verdict per candidate and baseline, from all results that hold both."""
    pairs: dict[tuple[str, str, str, str], list[tuple[Result, ModelRow]]] = {}
    for result in results:
        for row in result.rows[1:]:
            base = result.rows[0]
            pairs.setdefault((row.label, stored_as(row), base.label, identity(base)), []).append((result, row))
    found = []
    for (label, stored, baseline, _), own in pairs.items():
        texts = {result.data.sha256 for result, row in own if result.data and row.accuracy}
        facts = [fact for result, row in own for fact in _facts(result, row, several_texts=len(texts) > 1)]
        ordered = sorted(dict.fromkeys(facts), key=lambda fact: fact.name not in _FIRST_FACTS)
        found.append(Verdict(label, stored, baseline, tuple(ordered)))
    return tuple(verdict for verdict in found if verdict.facts)


def _facts(result: Result, row: ModelRow, *, several_texts: bool) -> Iterator[Fact]:
    ratios, original = row.ratios, DTYPES.get(result.rows[0].checkpoint_dtype, "the baseline")
    text = f"on {result.data.name} in {result.compute_dtype}" if result.data and several_texts else ""
    if ratios and ratios.weights_bytes is not None:
        size = row.weights_bytes or 0
        yield Fact("size", f"{100 * ratios.weights_bytes:.0f} % of {original}", disk_unit([size]).text(size))
    if ratios and ratios.perplexity is not None:
        yield Fact("perplexity", f"{signed_text(100 * (ratios.perplexity - 1), 2)} %", text)
    if row.accuracy and row.accuracy.top1_agreement is not None:
        yield Fact("same next token", f"{percent(row.accuracy.top1_agreement)} %", text)
    if ratios and ratios.decode_tokens_per_second is not None:
        speed = f"{100 * ratios.decode_tokens_per_second:.0f} % of {original}"
        yield Fact("decoding speed", speed, f"on {result.environment.device}")
    for found in result.tasks.comparisons if result.tasks else ():
        if found.label == row.label:
            low, high = 100 * found.ci95_low, 100 * found.ci95_high
            chance = ", may be chance" if low <= 0 <= high else ""
            detail = f"95 %: {signed_text(low)} to {signed_text(high)}, {found.items:,} items{chance}"
            yield Fact(TASKS[found.task], f"{signed_text(100 * found.difference)} points", detail)


def _scores(results: Sequence[Result]) -> Iterator[Table]:
    """One table per style: rows are models, columns tasks; a score under other conditions than its column is marked."""
    for style in get_args(Style):
        lines = _score_lines(results, style)
        tasks = [task for task in TASKS if any(task in line.scores for line in lines)]
        if not tasks:
            continue
        columns: dict[TaskName, list[str]] = {task: [] for task in tasks}
        body: list[list[str | Cell]] = []
        for line in lines:
            places = ", ".join(str(place) for place in dict.fromkeys(place for place, _ in line.scores.values()))
            cells = [
                _score(
                    line.scores[task][1],
                    columns[task],
                    _condition(results[line.scores[task][0] - 1], line.scores[task][1]),
                )
                if task in line.scores
                else NOT_KNOWN
                for task in tasks
            ]
            body.append([_name(line.row), stored_as(line.row), f"measured [{places}]", *cells])
        body += _published_rows([line.row for line in lines], tasks) if style == "chat" else []
        metrics = "; ".join(dict.fromkeys(_METRICS[task] for task in tasks))
        intro = f"Per cent, ± the standard error over items; {style} prompts; {metrics}. "
        intro += " ".join(f"{TASKS[task]}: {columns[task][0]}." for task in tasks)
        notes = overlap_warnings([line.row for line in lines], "the questions'") + [
            f"{TASKS[task]}, mark {mark}: not to be compared with the others of its column: {condition}."
            for task in tasks
            for mark, condition in enumerate(columns[task][1:], 1)
        ]
        head = ("model", "stored as", "source", *[TASKS[task] for task in tasks])
        title = f"Accuracy by task, {style} prompts"
        yield make_table("accuracy", title, head, body, labels=3, intro=intro, notes=notes)


@dataclass
class _Line:
    """A model's scores, of all results that asked it different tasks."""

    row: ModelRow
    scores: dict[TaskName, tuple[int, TaskScore]]
    """Task -> number of the result, score."""


def _score_lines(results: Sequence[Result], style: Style) -> list[_Line]:
    """One line per model, or more where it was asked one task more than once."""
    lines: list[_Line] = []
    for place, result in enumerate(results, 1):
        for row in result.rows:
            scores = result.tasks.scores if result.tasks else ()
            own = {score.task: (place, score) for score in scores if (score.label, score.style) == (row.label, style)}
            same = [
                line for line in lines if identity(line.row) == identity(row) and not line.scores.keys() & own.keys()
            ]
            if own and same:
                same[0].scores.update(own)
            elif own:
                lines.append(_Line(row, own))
    return lines


def _name(row: ModelRow) -> str:
    return row.label + (" (baseline)" if row.role == "baseline" else "") + (
        ", random weights" if row.random_weights else ""
    )  # fmt: skip


def _condition(result: Result, score: TaskScore) -> str:
    """Everything that must be alike for two scores of one task to be compared."""
    data = next((data for data in result.tasks.data if data.task == score.task), None) if result.tasks else None
    identity_of_data = f", data sha256 {data.sha256[:12]}" if data else ""
    limit = f" (the first {data.limit}{' of each subject' if score.groups else ''})" if data and data.limit else ""
    return (
        f"{score.items} items{limit}, {score.shots} shots, {score.prompt_format} prompts, {score.backend}, "
        f"{result.compute_dtype} on {result.environment.device}{identity_of_data}"
    )


def _score(score: TaskScore, conditions: list[str], condition: str) -> Cell:
    """The score as published ones are counted; ``conditions`` of the column grow by a new one."""
    if condition not in conditions:
        conditions.append(condition)
    mark = conditions.index(condition)
    value = score.group_mean if score.group_mean is not None and score.task != "mmlu" else score.score
    error = f" ± {100 * score.score_stderr:.1f}"
    return Cell(percent(value) + error + (f" ({mark})" if mark else ""), unlike=mark > 0)


def _published_rows(rows: Sequence[ModelRow], tasks: Sequence[TaskName]) -> Iterator[list[str | Cell]]:
    """What Qwen's README says of the same sizes; never beside random weights."""
    for model in dict.fromkeys(published_size(row) for row in rows if not row.random_weights):
        own = [score for score in ACCURACY if score.model == f"{model}-chat"]
        for precision in dict.fromkeys(score.precision for score in own):
            value = {score.task: score.score_percent for score in own if score.precision == precision}
            cells = [Cell(number(value.get(task), ".1f"), "published") for task in tasks]
            name = (f"{model}-chat", PRECISIONS[precision], "Qwen's README")
            yield [*[Cell(text, "published") for text in name], *cells]


def _differences(results: Sequence[Result]) -> Iterator[Table]:
    body = [
        [
            f"{found.label} - {result.rows[0].label}", TASKS[found.task], str(place), str(found.items),
            f"{100 * found.difference:+.2f}", f"{100 * found.ci95_low:+.2f} .. {100 * found.ci95_high:+.2f}",
            str(found.only_baseline_items), str(found.only_candidate_items), f"{found.mcnemar_p:.3g}",
            percent(found.same_answer_items / found.items if found.items else None),
        ]
        for place, result in enumerate(results, 1)
        for found in (result.tasks.comparisons if result.tasks else ())
    ]  # fmt: skip
    if body:
        head = (
            "difference", "task", "result", "items", "points", "95 % interval", "lost", "won", "McNemar p",
            "same answer (%)",
        )  # fmt: skip
        intro = (
            "Candidate less baseline on the same items of one run. Lost: only the baseline was right; won: only the "
            "candidate. An interval that holds 0 may be chance."
        )
        yield make_table("accuracy", "Differences on the same items", head, body, labels=3, intro=intro)
