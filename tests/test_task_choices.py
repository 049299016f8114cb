"""Multiple choice in the original Qwen's wording: every character of a prompt, and how a letter wins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qquant.errors import BadDataError
from qquant.tasks.choices import DEFAULT_SHOTS, judge, questions
from qquant.tasks.files import read_task
from qquant.tasks.items import Question, TaskName, TaskSet
from tests.task_files import write_choices

MMLU = """\
The following are multiple choice questions (with answers) about global facts.

Question: Which number is "number 10", in global_facts?
A. 10
B. 11
C. None
D. two, three
Answer: C

Question: Which number is "number 1", in global_facts?
A. 1
B. 2
C. None
D. two, three
Answer:"""

CEVAL = """\
问题：logic里第10个数是几？
A. 10
B. 11
C. None
D. two, three
答案：C

问题：logic里第1个数是几？
A. 1
B. 2
C. None
D. two, three
答案："""


@pytest.fixture
def mmlu(tmp_path: Path) -> TaskSet:
    return read_task("mmlu", write_choices(tmp_path / "mmlu", "mmlu"))


def asked(data: TaskSet, name: str, **options: object) -> Question:
    found = questions(data, **{"style": "base", "shots": 1, **options})  # type: ignore[arg-type]
    return next(question for question in found if question.id == name)


def text_of(question: Question) -> str:
    return question.heading + "".join(question.shots) + question.body


def test_mmlu_has_heading_examples_and_letters_with_a_space(mmlu: TaskSet) -> None:
    question = asked(mmlu, "global_facts/1")
    assert text_of(question) == MMLU
    assert question.choices == (" A", " B", " C", " D")


@pytest.mark.parametrize("task", ["ceval", "cmmlu"])
def test_chinese_tasks_have_no_heading_and_letters_without_a_space(tmp_path: Path, task: TaskName) -> None:
    data = read_task(task, write_choices(tmp_path / task, task))
    subject = data.items[-1].group
    question = asked(data, f"{subject}/1")
    assert text_of(question) == CEVAL.replace("logic", str(subject))
    assert question.choices == ("A", "B", "C", "D")


def test_defaults_are_five_examples_for_base_and_none_for_chat_models() -> None:
    assert DEFAULT_SHOTS == {"base": 5, "chat": 0}


def test_questions_keep_the_order_of_the_items(mmlu: TaskSet) -> None:
    found = questions(mmlu, style="base", shots=5)
    assert [question.item for question in found] == list(mmlu.items)
    assert all(len(question.shots) == 5 for question in found)


def test_too_few_examples_are_refused_by_name(mmlu: TaskSet) -> None:
    with pytest.raises(BadDataError, match=r"6 worked examples were asked for, abstract_algebra has 5"):
        questions(mmlu, style="base", shots=6)


def test_a_chat_model_is_instructed_and_answers_with_a_letter_alone(mmlu: TaskSet) -> None:
    question = asked(mmlu, "global_facts/1", style="chat", shots=0)
    (turn,) = question.messages
    assert turn["role"] == "user"
    assert "about global facts" in turn["content"]
    assert turn["content"].endswith(MMLU.rpartition("Question: ")[2].removesuffix("\nAnswer:"))
    assert question.choices == ("A", "B", "C", "D")
    assert not text_of(question)


def test_examples_of_a_chat_are_earlier_turns(mmlu: TaskSet) -> None:
    question = asked(mmlu, "global_facts/1", style="chat", shots=2)
    assert [turn["role"] for turn in question.messages] == ["user", "assistant", "user", "assistant", "user"]
    assert [turn["content"] for turn in question.messages[1::2]] == ["C", "D"]


def test_braces_in_a_question_are_text(mmlu: TaskSet) -> None:
    first = replace(mmlu.items[0], question="What is {subject} in {0}?")
    data = replace(mmlu, items=(first,))
    assert "{subject} in {0}" in questions(data, style="chat", shots=0)[0].messages[0]["content"]
    assert "{subject} in {0}" in questions(data, style="base", shots=0)[0].body


CASES = {
    "likeliest": ((-3.0, -1.0, -2.0, -9.0), "B", True),
    "wrong": ((-1.0, -3.0, -2.0, -9.0), "A", False),
    "of equals the first": ((-3.0, -2.0, -2.0, -9.0), "B", True),
}


@pytest.mark.parametrize(("logprobs", "answer", "correct"), CASES.values(), ids=CASES.keys())
def test_the_likeliest_letter_wins(mmlu: TaskSet, logprobs: tuple[float, ...], answer: str, correct: bool) -> None:
    verdict = judge(asked(mmlu, "global_facts/1"), logprobs=logprobs)
    assert (verdict.answer, verdict.correct) == (answer, correct)


def test_a_likelihood_per_choice_is_needed(mmlu: TaskSet) -> None:
    with pytest.raises(ValueError, match="one log-likelihood per choice is needed, 4"):
        judge(asked(mmlu, "global_facts/1"), logprobs=(-1.0,))
