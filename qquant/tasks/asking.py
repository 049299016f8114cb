"""A task put to one model from its files to its decisions: worded, asked in batches, judged, kept in a journal.

What a batch is and how a model answers it is runner.py's; wording and judging are the tasks' own; several models and
the record of it all are task_evaluation.py's.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qquant.errors import NumericError
from qquant.journal import Journal
from qquant.task_report import TaskItem
from qquant.tasks import choices, gsm8k, humaneval, lm_eval_prompts
from qquant.tasks.files import read_task
from qquant.tasks.items import PromptFormat, Question, Style, TaskName, TaskSet, Verdict
from qquant.tasks.lm_eval_backend import run_lm_eval
from qquant.tasks.runner import Reply, answer, batches
from qquant.tasks.sandbox import Limits
from qquant.telling import OnProgress


@dataclass(frozen=True)
class AskedTask:
    """A task as every model is asked it."""

    data: TaskSet
    style: Style
    shots: int
    """Worked examples per question."""
    questions: tuple[Question, ...]
    """In the order of the items."""
    batches: tuple[tuple[Question, ...], ...]
    """The same as they go through a model; alike for every model and every run."""
    judge: Callable[[Question, Reply], Verdict]

    def sha256(self) -> str:
        """Over the files, and over all that a model is shown."""
        digest = hashlib.sha256(self.data.sha256.encode())
        for one in self.questions:
            shown = (one.id, one.heading, one.shots, one.body, one.choices, one.stops, one.max_new_tokens, one.truth)
            digest.update(repr((*shown, [sorted(turn.items()) for turn in one.messages])).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Decisions:
    """What one model made of one task."""

    items: tuple[TaskItem, ...]
    """In the order of the task's items."""
    truncated: int
    """Prompts that were shortened."""
    seconds: float
    """That were spent on it in this run."""


def ask(
    name: TaskName,
    source: Path | str,
    *,
    prompt_format: PromptFormat,
    style: Style,
    shots: int | None,
    limit: int | None,
    batch_size: int,
) -> AskedTask:
    """Read a task and word its questions.

    Args:
        name: of the task. Judging humaneval runs what models wrote: whoever asks it was allowed that.
        source: see ``files.read_task``.
        prompt_format: lm-eval's is of base style.
        style: see ``Style``.
        shots: worked examples per question; None: the format's own number.
        limit: see ``files.read_task``.
        batch_size: questions per batch.

    Raises:
        BadDataError, UsageError: as ``files.read_task`` and the task's own ``questions``.
    """
    data = read_task(name, source, limit=limit)
    judge: Callable[[Question, Reply], Verdict]
    if prompt_format == "lm-eval":
        count = lm_eval_prompts.SHOTS[name] if shots is None else shots
        worded = lm_eval_prompts.questions(data, shots=count)
        judge = _judge_as_lm_eval
    else:
        room: Any = {"gsm8k": gsm8k, "humaneval": humaneval}.get(name, choices)
        count = room.DEFAULT_SHOTS[style] if shots is None else shots
        worded = room.questions(data, style=style, shots=count)
        judge = partial(_judge_as_qwen, name)
    return AskedTask(data, style, count, tuple(worded), tuple(map(tuple, batches(worded, batch_size))), judge)


def put(
    task: AskedTask,
    model: Callable[[], Any],
    tokenizer: Any,
    *,
    label: str,
    batch_size: int,
    finished: Journal | None,
    on_progress: OnProgress,
) -> Decisions:
    """Put a task to a model, batch by batch; what the journal holds already is not asked again.

    Args:
        task: what is asked.
        model: returns the model; not called where everything is in the journal.
        tokenizer: the model's.
        label: the model's.
        batch_size: see ``runner.answer``.
        finished: where each batch's decisions are kept; None: nowhere.
        on_progress: told how many items are done.
    """
    name, total = task.data.task, len(task.questions)
    found: dict[str, TaskItem] = {}
    truncated, seconds = 0, 0.0
    piece: dict[str, Any]
    for number, batch in enumerate(task.batches):
        on_progress(f"{name} ({task.style}) of {label}", len(found), total)
        key = f"{label}/{name}/{number}"
        if finished is None or key not in finished:
            ready = model()
            began = time.monotonic()
            with _named(label):
                replies = answer(ready, tokenizer, batch, batch_size=batch_size)
            items = [_item(label, task, *pair) for pair in zip(batch, replies, strict=True)]
            seconds += time.monotonic() - began
            piece = {"items": [item.model_dump_json() for item in items], "truncated": _shortened(replies)}
            if finished is not None:
                finished.add(key, piece)
        else:
            piece = finished[key]
            items = [TaskItem.model_validate_json(text) for text in piece["items"]]
        truncated += piece["truncated"]
        found.update({item.id: item for item in items})
    on_progress(f"{name} ({task.style}) of {label}", total, total)
    ordered = tuple(found[question.id] for question in task.questions)
    return Decisions(ordered, truncated, seconds)


def put_with_lm_eval(
    task: AskedTask,
    model: Callable[[], Any],
    tokenizer: Any,
    *,
    label: str,
    batch_size: int,
    finished: Journal | None,
    on_progress: OnProgress,
) -> Decisions:
    """``put`` by lm-evaluation-harness, which sees a whole task at once: that is also what the journal keeps."""
    key, seconds = f"{label}/{task.data.task}", 0.0
    piece: dict[str, Any]
    if finished is None or key not in finished:
        ready = model()
        began = time.monotonic()
        with _named(label):
            found = run_lm_eval(
                ready,
                tokenizer,
                task.data,
                label=label,
                shots=task.shots,
                batch_size=batch_size,
                allow_code_execution=True,  # as ``ask`` says
                on_progress=on_progress,
            )
        seconds = time.monotonic() - began
        piece = {"items": [item.model_dump_json() for item in found.items], "truncated": found.truncated}
        if finished is not None:
            finished.add(key, piece)
    else:
        piece = finished[key]
    kept = tuple(TaskItem.model_validate_json(text) for text in piece["items"])
    return Decisions(kept, piece["truncated"], seconds)


@contextmanager
def _named(label: str) -> Iterator[None]:
    """An error of numbers with the label of the model whose they are; several models are evaluated in one run."""
    try:
        yield
    except NumericError as error:
        raise NumericError(f"{label}: {error}") from error


def _shortened(replies: list[Reply]) -> int:
    return sum(reply.truncated for reply in replies)


def _item(label: str, task: AskedTask, question: Question, reply: Reply) -> TaskItem:
    verdict = task.judge(question, reply)
    return TaskItem(
        label=label,
        task=task.data.task,
        id=question.id,
        group=question.group,
        answer=verdict.answer,
        truth=question.truth,
        correct=verdict.correct,
        choice_logprobs_nats=reply.logprobs_nats,
        output=reply.output,
    )


def _judge_as_qwen(name: TaskName, question: Question, reply: Reply) -> Verdict:
    if name == "gsm8k":
        return gsm8k.judge(question, output=reply.output or "")
    if name == "humaneval":
        return humaneval.judge(question, output=reply.output or "", limits=Limits())
    return choices.judge(question, logprobs=reply.logprobs_nats)


def _judge_as_lm_eval(question: Question, reply: Reply) -> Verdict:
    return lm_eval_prompts.judge(question, logprobs=reply.logprobs_nats, output=reply.output)
