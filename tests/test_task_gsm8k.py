"""GSM8K's prompts, and how its numbers are read; on self-written problems, and on the published ones where they are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qquant.errors import BadDataError
from qquant.tasks import gsm8k
from qquant.tasks.files import read_task
from qquant.tasks.items import Item, Question, TaskSet

PUBLISHED = Path(__file__).parent.parent.parent / "shared" / "data" / "gsm8k"

TRAIN = [
    ("Ann has 3 pens and buys 4. How many now?", "3 + 4 = <<3+4=7>>7 pens.\n\nThat is all.\n#### 7"),
    ("A car costs $1,000 and a house 2 times that. The house?", "1,000 * 2 = $<<1000*2=2000>>2,000.\n#### 2,000"),
]
TEST = [("Half of 5?", "5 / 2 = <<5/2=2.5>>2.5\n#### 2.5"), ("1100 less 100?", "It is 1,000.\n#### 1,000")]

NUMBERS = {
    "plain": ("The answer is 18", "18"),
    "the last of several": ("3 eggs and 4 eggs are 7 eggs", "7"),
    "thousands": ("1,000", "1000"),
    "millions": ("109,200,000 people", "109200000"),
    "thousands with decimals": ("1,234.50", "1234.5"),
    "groups of two": ("1,00,000", "100000"),
    "a list": ("1, 2, 3", "3"),
    "a year after a comma": ("in May, 2020", "2020"),
    "decimals": ("2.5", "2.5"),
    "zeros behind": ("5.00", "5"),
    "zeros before": ("007", "7"),
    "no whole part": ("it is .75", "0.75"),
    "full stop": ("The answer is 18.", "18"),
    "full stop and quote": ('"18."', "18"),
    "currency, separator, full stop": ("$1,000.", "1000"),
    "euro": ("€2.50", "2.5"),
    "percent": ("that is 50%", "50"),
    "unit": ("5km", "5"),
    "hyphen as sign": ("-5", "-5"),
    "minus as sign": ("−5", "-5"),
    "plus": ("+5", "5"),
    "sign before currency": ("-$5", "-5"),
    "sign behind currency": ("$-5", "-5"),
    "sign behind equals": ("x=-5", "-5"),
    "minus zero": ("-0.0", "0"),
    "subtraction": ("10-4", "4"),
    "subtraction with spaces": ("10 - 4", "4"),
    "range": ("3-4 days", "4"),
    "hyphenated word": ("covid-19", "19"),
    "bullet": ("- 5 apples", "5"),
    "fraction": ("3/4", "0.75"),
    "fraction that is whole": ("8/2", "4"),
    "negative fraction": ("-1/2", "-0.5"),
    "fraction without end": ("2/6", "1/3"),
    "division by zero": ("1/0", None),
    "division that is worked out": ("48/2 = 24", "24"),
    "date": ("on 1/2/2020", "2020"),
    "bold": ("**18**", "18"),
    "boxed": (r"\boxed{18}", "18"),
    "a very long one": ("9" * 10_000, "9" * 10_000),
    "chinese": ("答案是18。", "18"),
    "words only": ("eighteen", None),
    "nothing": ("", None),
    "a point alone": ("...", None),
}
MISREAD = {"thousands": ("1,000", 0), "decimals": ("2.5", 5), "zeros behind": ("5.00", 0), "sign": ("-5", 5)}


def published_layout(folder: Path, train: list[tuple[str, str]] = TRAIN) -> Path:
    for name, rows in (("train", train), ("test", TEST)):
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> TaskSet:
    return read_task("gsm8k", published_layout(tmp_path))


def published_rule(text: str) -> int:
    """What the original's evaluation of base models reads: the last run of digits, whatever stands around it."""
    return int(re.findall(r"[0-9]+", text)[-1])


def asked(truth: str) -> Question:
    item = Item("0", None, "How many?", (), truth, {"answer": f"#### {truth}"})
    return gsm8k.questions(TaskSet("gsm8k", (item,), {}, ""), style="base", shots=0)[0]


@pytest.mark.parametrize(("text", "number"), list(NUMBERS.values()), ids=list(NUMBERS))
def test_a_number_is_read_as_it_is_written(text: str, number: str | None) -> None:
    assert gsm8k.last_number(text) == number


@pytest.mark.parametrize(("text", "digits"), list(MISREAD.values()), ids=list(MISREAD))
def test_the_published_rule_for_base_models_reads_another_number(text: str, digits: int) -> None:
    assert published_rule(text) == digits
    assert gsm8k.last_number(text) != str(digits)
    assert gsm8k.judge(asked(text), output=f"The answer is {text}").correct


def test_equal_numbers_are_equal_however_they_are_written() -> None:
    for output in ("5", "5.00", "$5.", "10/2", "5%"):
        assert gsm8k.judge(asked("5"), output=output).correct


def test_a_number_that_is_only_near_is_wrong() -> None:
    """The original takes a difference under 1e-4 for none."""
    verdict = gsm8k.judge(asked("5"), output="5.00009")
    assert (verdict.answer, verdict.correct) == ("5.00009", False)


def test_an_answer_without_a_number_has_no_answer() -> None:
    verdict = gsm8k.judge(asked("5"), output="I do not know.")
    assert (verdict.answer, verdict.correct) == (None, False)


def test_a_base_model_goes_on_behind_worked_examples(data: TaskSet) -> None:
    question = gsm8k.questions(data, style="base", shots=2)[0]
    assert question.heading + "".join(question.shots) + question.body == (
        "Question: Ann has 3 pens and buys 4. How many now?\n"
        "Let's think step by step\n"
        "3 + 4 = 7 pens.\n"
        "That is all.\n"
        "The answer is 7\n"
        "\n"
        "Question: A car costs $1,000 and a house 2 times that. The house?\n"
        "Let's think step by step\n"
        "1,000 * 2 = $2,000.\n"
        "The answer is 2000\n"
        "\n"
        "Question: Half of 5?\n"
        "Let's think step by step\n"
    )
    assert question.stops == ("\n\n", "Question:")
    assert not question.messages


def test_no_example_ends_within_itself(data: TaskSet) -> None:
    """A blank line inside a published answer would teach the model to stop there, and would cut it."""
    for shot in gsm8k.questions(data, style="base", shots=2)[0].shots:
        assert shot.index("\n\n") == len(shot) - 2


def test_a_chat_model_is_asked_the_problem_alone(data: TaskSet) -> None:
    question = gsm8k.questions(data, style="chat", shots=0)[1]
    assert question.messages == ({"role": "user", "content": "1100 less 100?"},)
    assert not question.stops
    assert gsm8k.judge(question, output="First, 1,100 - 100.\n\nThat is **1,000**.").correct


def test_examples_of_a_chat_are_earlier_turns(data: TaskSet) -> None:
    question = gsm8k.questions(data, style="chat", shots=1)[0]
    assert [turn["role"] for turn in question.messages] == ["user", "assistant", "user"]
    assert question.messages[1]["content"] == "3 + 4 = 7 pens.\nThat is all.\nThe answer is 7"


def test_too_few_examples_are_said(data: TaskSet) -> None:
    with pytest.raises(BadDataError, match="8 worked examples were asked for, gsm8k has 2"):
        gsm8k.questions(data, style="base", shots=gsm8k.DEFAULT_SHOTS["base"])


def test_a_truth_that_is_no_number_is_refused() -> None:
    with pytest.raises(BadDataError, match="the answer of gsm8k's 0 must be a number, got 'many'"):
        asked("many")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published problems are not here")
def test_every_published_answer_is_right() -> None:
    data = read_task("gsm8k", PUBLISHED)
    asked_all = gsm8k.questions(data, style="base", shots=8)
    assert len(asked_all) == 660
    for question in asked_all:
        assert gsm8k.judge(question, output=question.item.extra["answer"]).correct, question.id
        assert len(question.shots) == 8
