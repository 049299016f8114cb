"""What a task is made of: items as published, questions as a model is asked them, verdicts on its answers.

Types, and which letter a model chose. Files are read by files.py, prompts made by choices.py, gsm8k.py, humaneval.py
and lm_eval_prompts.py, models run by runner.py; what a report keeps of all this is task_report.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from qquant.records import Style as Style
from qquant.records import TaskName as TaskName

PromptFormat = Literal["qwen", "lm-eval"]
"""Whose wording, examples and rules of judging: the original Qwen's evaluation, or lm-evaluation-harness's tasks."""
Metric = Literal["accuracy", "exact_number", "pass_at_1"]
"""What a task counts."""

LETTERS = "ABCD"


@dataclass(frozen=True)
class Item:
    """One question of a task, as it was published and before any wording."""

    id: str
    """Unique within the task: ``subject/number`` or ``number`` from 0, or the task's own, as ``HumanEval/0``."""
    group: str | None
    """Subject, where the task has any."""
    question: str
    """Without heading, choices or answer."""
    choices: tuple[str, ...]
    """Texts of the choices in the order of their letters; empty for tasks that generate."""
    truth: str
    """Letter, number as text, "" for HumanEval."""
    extra: Mapping[str, str]
    """HumanEval's ``prompt``, ``test`` and ``entry_point``; GSM8K's worked answer as ``answer``; empty otherwise."""


@dataclass(frozen=True)
class TaskSet:
    """What was read of a task's files."""

    task: TaskName
    items: tuple[Item, ...]
    """Asked in this order."""
    shots: Mapping[str | None, tuple[Item, ...]]
    """Worked examples by group (under None where the task has no groups), in the order of their file."""
    sha256: str
    """Over the names and contents of all files read."""


@dataclass(frozen=True)
class Question:
    """An item as one model is asked it.

    What the model reads is ``messages``, rendered by its chat template, where there are any; else the text
    ``heading + "".join(shots[k:]) + body``, where k is 0 unless the model has no room: the oldest shots go first.
    """

    id: str
    group: str | None
    truth: str
    heading: str
    """Comes first and is never dropped; may be empty."""
    shots: tuple[str, ...]
    """Worked examples with their answers, each with the separator that follows it."""
    body: str
    """The question itself, up to where the model goes on; never dropped."""
    choices: tuple[str, ...] = ()
    """Continuations whose log-likelihoods are compared, in the order of the letters; empty: generate."""
    stops: tuple[str, ...] = ()
    """Generated text ends before the first of these."""
    max_new_tokens: int = 0
    """Tokens that are generated at most; 0 with choices."""
    messages: tuple[Mapping[str, str], ...] = ()
    """``role`` and ``content`` of each turn, chat style; the answer is the assistant's next turn."""
    item: Item = field(kw_only=True)
    """What was published."""


@dataclass(frozen=True)
class Verdict:
    """What a model decided on one item."""

    answer: str | None
    """A letter, a number as text, "passed" or why not; None: it gave none that can be read."""
    correct: bool


def likeliest_letter(logprobs: Sequence[float]) -> str:
    """The letter of the largest log-likelihood; of equals, the first."""
    return LETTERS[max(range(len(logprobs)), key=logprobs.__getitem__)]


def judge_choices(question: Question, logprobs: Sequence[float] | None) -> Verdict:
    """The letter whose continuation is likeliest, against the truth.

    Args:
        question: with choices.
        logprobs: of each choice in the order of the letters, in nats.

    Raises:
        ValueError: not one log-likelihood per choice.
    """
    if logprobs is None or len(logprobs) != len(question.choices):
        raise ValueError(f"one log-likelihood per choice is needed, {len(question.choices)}, got {logprobs}")
    answer = likeliest_letter(logprobs)
    return Verdict(answer, answer == question.truth)
