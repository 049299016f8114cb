"""Multiple choice, MMLU, C-Eval and CMMLU, worded as the original Qwen's evaluation words it; the likelier letter wins.

Base models go on with worked examples. Chat models get an instruction through their chat template, and there too the
letters' likelihoods decide: an answer in free words would have to be guessed from, and a guess is no measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qquant.errors import BadDataError
from qquant.tasks.items import LETTERS, Item, Question, Style, TaskName, TaskSet, Verdict, judge_choices

DEFAULT_SHOTS: Mapping[Style, int] = {"base": 5, "chat": 0}


@dataclass(frozen=True)
class _Wording:
    """The words around an item."""

    heading: str
    """Before everything, base style; ``{subject}`` stands for the subject in words."""
    question: str
    answer: str
    """What the answer follows, base style."""
    space: str
    """Between that and the letter: the token of a letter differs with and without."""
    instruction: str
    """Before an item, chat style."""


_ENGLISH = _Wording(
    heading="The following are multiple choice questions (with answers) about {subject}.\n\n",
    question="Question: ",
    answer="\nAnswer:",
    space=" ",
    instruction=(
        "Here is a multiple choice question about {subject}. Exactly one of A, B, C and D is right. "
        "Reply with its letter and nothing else.\n\n"
    ),
)
_CHINESE = _Wording(
    heading="",
    question="问题：",
    answer="\n答案：",
    space="",
    instruction="下面是一道单项选择题，A、B、C、D 中只有一个正确。请只回答正确选项的字母。\n\n",
)
_WORDINGS: Mapping[TaskName, _Wording] = {"mmlu": _ENGLISH, "ceval": _CHINESE, "cmmlu": _CHINESE}


def questions(data: TaskSet, *, style: Style, shots: int) -> list[Question]:
    """Every item as a model is asked it, in the order of the items.

    Args:
        data: of mmlu, ceval or cmmlu.
        style: see ``Style``; in chat style worked examples are earlier turns.
        shots: worked examples of the item's own subject, the first ones of their file.

    Raises:
        BadDataError: a subject has fewer worked examples.
    """
    wording = _WORDINGS[data.task]
    found = []
    for item in data.items:
        examples = data.shots.get(item.group, ())[:shots]
        if len(examples) < shots:
            raise BadDataError(
                f"{shots} worked examples were asked for, {item.group or data.task} has {len(examples)} (in its dev "
                "file); lower --shots, or add them"
            )
        make = _base if style == "base" else _chat
        found.append(make(wording, item, examples))
    return found


def judge(question: Question, *, logprobs: Sequence[float] | None) -> Verdict:
    """The letter whose continuation is likeliest; of equals, the first.

    Args:
        question: one of ``questions``'s.
        logprobs: of each choice in the order of the letters, in nats.
    """
    return judge_choices(question, logprobs)


def _base(wording: _Wording, item: Item, examples: Sequence[Item]) -> Question:
    def asked(one: Item) -> str:
        return wording.question + _listed(one) + wording.answer

    return Question(
        id=item.id,
        group=item.group,
        truth=item.truth,
        heading=wording.heading.format(subject=_in_words(item.group)),
        shots=tuple(f"{asked(example)}{wording.space}{example.truth}\n\n" for example in examples),
        body=asked(item),
        choices=tuple(wording.space + letter for letter in LETTERS),
        item=item,
    )


def _chat(wording: _Wording, item: Item, examples: Sequence[Item]) -> Question:
    def asked(one: Item) -> Mapping[str, str]:
        instruction = wording.instruction.format(subject=_in_words(one.group))
        return {"role": "user", "content": instruction + _listed(one)}

    turns = [turn for one in examples for turn in (asked(one), {"role": "assistant", "content": one.truth})]
    messages = (*turns, asked(item))
    return Question(
        id=item.id,
        group=item.group,
        truth=item.truth,
        heading="",
        shots=(),
        body="",
        choices=tuple(LETTERS),
        messages=messages,
        item=item,
    )


def _listed(item: Item) -> str:
    lines = (f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=True))
    return item.question + "".join(lines)


def _in_words(subject: str | None) -> str:
    return " ".join((subject or "various subjects").split("_"))
