"""GSM8K: word problems worked out step by step, asked as the original Qwen's evaluation asks; the last number counts.

Three things differ from that evaluation, on purpose. Its fixed file of 8 worked examples is not part of this project:
the examples are the first ones of the training problems that lie beside the test problems. Its rule for base models
takes the last run of digits, which reads "1,000" as 0 and "2.5" as 5; here both styles read numbers as they are
written. And two numbers are equal when they are the same number, not when they differ by less than 1e-4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from qquant.errors import BadDataError
from qquant.tasks.items import Item, Question, Style, TaskSet, Verdict

DEFAULT_SHOTS: Mapping[Style, int] = {"base": 8, "chat": 0}
STOPS = ("\n\n", "Question:")
"""Base style. Worked examples end in a blank line, so a model that has read them ends its own answer with one."""
MAX_NEW_TOKENS: Mapping[Style, int] = {"base": 512, "chat": 1024}

_CALCULATOR = re.compile(r"<<.*?>>")
"""Marks of the published answers, for a calculator that no model has here."""
_NUMBER = re.compile(
    r"""
    (?P<sign>(?<![\w.,)\]%])[-+−])?  # a sign follows nothing that it could be taken from: 10-4 ends in 4
    [$€£¥]?
    (?:
        (?<![0-9]/)(?P<over>[0-9]{1,9})/(?P<under>[0-9]{1,9})(?![0-9/]|[.,][0-9])
        | (?P<number>(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)
    )
    """,
    re.VERBOSE,
)
_DECIMALS = 9
"""Of a fraction that is written as a decimal number; one that needs more stays a fraction."""


def questions(data: TaskSet, *, style: Style, shots: int) -> list[Question]:
    """Every problem as a model is asked it, in their order.

    Args:
        data: of gsm8k.
        style: see ``Style``; in chat style worked examples are earlier turns.
        shots: worked examples, the first ones of the training problems.

    Raises:
        BadDataError: fewer worked examples than asked for, or a problem whose answer is no number.
    """
    examples = data.shots.get(None, ())[:shots]
    if len(examples) < shots:
        raise BadDataError(
            f"{shots} worked examples were asked for, gsm8k has {len(examples)} (in its train file); lower --shots, or "
            "put the published train.jsonl beside the test file"
        )
    return [_base(item, examples) if style == "base" else _chat(item, examples) for item in data.items]


def judge(question: Question, *, output: str) -> Verdict:
    """The last number of an answer, right when it is exactly the published one.

    Args:
        question: one of ``questions``'s.
        output: what was generated, up to the first stop.
    """
    answer = last_number(output)
    return Verdict(answer, answer is not None and answer == question.truth)


def last_number(text: str) -> str | None:
    """The last number that is written in a text, in one spelling for every way to write it; None without a number.

    Thousands are separated by commas (3,500 and 1,00,000), decimals by a point; a sign is a hyphen or a minus, not the
    dash of "3-4"; a currency before and "%" or a full stop behind change nothing. ``3/4`` without spaces is one number,
    0.75. What is not read as one number: powers of ten, "2 1/2", words, and numbers in other than ASCII digits.

    Returns:
        As ``-1234.5``: no separators, no zeros that mean nothing. A fraction that is no decimal number of up to 9
        places stays one, in lowest terms.
    """
    found = list(_NUMBER.finditer(text))[-1:]
    if not found:
        return None
    last = found[0]
    spelt = _plain(last["number"]) if last["number"] else _divided(int(last["over"]), int(last["under"]))
    return f"-{spelt}" if last["sign"] in ("-", "−") and spelt not in ("0", None) else spelt


def _plain(number: str) -> str:
    """A number without what means nothing: separators, zeros before it and at the end of its decimals."""
    # On the text: a number of a thousand digits, which a looping model does write, is compared as well as any other.
    whole, _, decimals = number.replace(",", "").partition(".")
    decimals = decimals.rstrip("0")
    return (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")


def _divided(over: int, under: int) -> str | None:
    """A fraction as a decimal number where it is one; None for a division by zero."""
    if not under:
        return None
    value = Fraction(over, under)
    scaled = value * 10**_DECIMALS
    if scaled.denominator != 1:
        return str(value)
    digits = f"{scaled.numerator:0{_DECIMALS + 1}d}"
    return _plain(f"{digits[:-_DECIMALS]}.{digits[-_DECIMALS:]}")


def _truth(item: Item) -> str:
    truth = last_number(item.truth)
    if truth is None:
        raise BadDataError(f"the answer of gsm8k's {item.id} must be a number, got {item.truth[:40]!r}; mend the file")
    return truth


def _worked(example: Item) -> str:
    """A published answer in the words of the prompt."""
    steps = _CALCULATOR.sub("", example.extra["answer"]).partition("####")[0]
    lines = [line.strip() for line in steps.splitlines() if line.strip()]  # a blank line would end the example
    return "\n".join([*lines, f"The answer is {example.truth}"])


def _asked(item: Item) -> str:
    return f"Question: {item.question}\nLet's think step by step\n"


def _base(item: Item, examples: Sequence[Item]) -> Question:
    return Question(
        item.id,
        item.group,
        _truth(item),
        heading="",
        shots=tuple(f"{_asked(example)}{_worked(example)}\n\n" for example in examples),
        body=_asked(item),
        stops=STOPS,
        max_new_tokens=MAX_NEW_TOKENS["base"],
        item=item,
    )


def _chat(item: Item, examples: Sequence[Item]) -> Question:
    turns = [
        turn
        for example in examples
        for turn in (
            {"role": "user", "content": example.question},
            {"role": "assistant", "content": _worked(example)},
        )
    ]
    return Question(
        item.id,
        item.group,
        _truth(item),
        heading="",
        shots=(),
        body="",
        max_new_tokens=MAX_NEW_TOKENS["chat"],
        messages=(*turns, {"role": "user", "content": item.question}),
        item=item,
    )
