"""lm-eval's wording and rules as we have them, without the harness; tests/lm_eval holds them against the harness."""

from __future__ import annotations

import re
import string

import pytest

from qquant.errors import BadDataError, UsageError
from qquant.tasks.items import Item, Question, TaskName, TaskSet
from qquant.tasks.lm_eval_prompts import CHINESE_SUBJECTS, humaneval_program, judge, judge_gsm8k, questions


def choice_item(number: int, group: str, truth: str = "B") -> Item:
    return Item(f"{group}/{number}", group, f" What is {number}? ", ("one", " two", "three", "4"), truth, {})


def choice_set(task: TaskName, group: str, *, shots: int = 5) -> TaskSet:
    examples = tuple(choice_item(10 + number, group, "ABCD"[number % 4]) for number in range(shots))
    return TaskSet(task, (choice_item(0, group), choice_item(1, group)), {group: examples}, "0" * 64)


def maths_item(number: int) -> Item:
    return Item(str(number), None, f"What is q{number}?", (), str(number), {"answer": f"It is.\n#### {number}"})


def maths_set(items: int = 4, shots: int = 20) -> TaskSet:
    examples = tuple(maths_item(number) for number in range(shots))
    return TaskSet("gsm8k", tuple(maths_item(100 + number) for number in range(items)), {None: examples}, "0" * 64)


def code_set() -> TaskSet:
    extra = {"prompt": 'def one():\n    """Return 1."""\n', "test": "def check(f):\n    assert f() == 1\n"}
    item = Item("HumanEval/0", None, extra["prompt"], (), "", {**extra, "entry_point": "one"})
    return TaskSet("humaneval", (item,), {}, "0" * 64)


def text_of(question: Question) -> str:
    return question.heading + "".join(question.shots) + question.body


def test_mmlu_is_worded_as_lm_eval_words_it() -> None:
    question = questions(choice_set("mmlu", "us_foreign_policy"), shots=1)[0]
    assert text_of(question) == (
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        "What is 10?\nA. one\nB.  two\nC. three\nD. 4\nAnswer: A\n\n"
        "What is 0?\nA. one\nB.  two\nC. three\nD. 4\nAnswer:"
    )
    assert question.choices == (" A", " B", " C", " D")


CHINESE_HEADINGS = {
    "ceval": ("physician", "以下是中国关于医师资格的单项选择题，请选出其中的正确答案。\n\n"),
    "cmmlu": ("ancient_chinese", "以下是关于古汉语的单项选择题，请直接给出正确答案的选项。\n\n"),
}


@pytest.mark.parametrize("task", ["ceval", "cmmlu"])
def test_chinese_tasks_have_a_heading_and_a_space_before_the_letter(task: TaskName) -> None:
    subject, heading = CHINESE_HEADINGS[task]
    question = questions(choice_set(task, subject), shots=1)[1]
    asked = "A. one\nB.  two\nC. three\nD. 4\n答案："
    assert text_of(question) == f"{heading}What is 10?\n{asked} A\n\nWhat is 1?\n{asked}"
    assert question.choices == (" A", " B", " C", " D")


def test_all_subjects_of_the_chinese_tasks_have_a_name_of_their_own() -> None:
    # 52 and 67 subjects are what the two data sets publish.
    assert {task: len(set(names.values())) for task, names in CHINESE_SUBJECTS.items()} == {"ceval": 52, "cmmlu": 67}
    plain = set(string.ascii_lowercase + "_")
    assert all(set(subject) <= plain for names in CHINESE_SUBJECTS.values() for subject in names)


@pytest.mark.parametrize("task", ["ceval", "cmmlu"])
def test_a_subject_that_lm_eval_does_not_have_is_refused(task: TaskName) -> None:
    with pytest.raises(BadDataError, match="'gardening'"):
        questions(choice_set(task, "gardening"), shots=0)


def test_the_first_examples_of_the_subject_are_taken() -> None:
    one, two = questions(choice_set("mmlu", "anatomy"), shots=3)
    assert [shot.splitlines()[0] for shot in one.shots] == ["What is 10?", "What is 11?", "What is 12?"]
    assert one.shots == two.shots


def test_gsm8k_draws_the_examples_that_the_harness_draws() -> None:
    # What lm-eval 0.4.13 drew of 20 training problems for four questions with its own seed.
    drawn = [re.findall(r"What is q(\d+)", "".join(asked.shots)) for asked in questions(maths_set(), shots=3)]
    assert drawn == [["14", "3", "0"], ["2", "18", "1"], ["2", "3", "11"], ["7", "0", "18"]]


def test_gsm8k_is_worded_as_lm_eval_words_it() -> None:
    question = questions(maths_set(), shots=1)[0]
    number = re.findall(r"q(\d+)", question.shots[0])[0]
    assert text_of(question) == (
        f"Question: What is q{number}?\nAnswer: It is.\n#### {number}\n\nQuestion: What is q100?\nAnswer:"
    )
    assert question.stops == ("Question:", "</s>", "<|im_end|>")
    assert question.max_new_tokens == 256


def test_a_limit_on_items_does_not_change_the_examples_of_those_that_stay() -> None:
    assert questions(maths_set(items=2), shots=3) == questions(maths_set(items=4), shots=3)[:2]


def test_humaneval_is_the_prompt_alone() -> None:
    question = questions(code_set(), shots=0)[0]
    assert text_of(question) == question.item.extra["prompt"]
    assert question.stops == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@pytest.mark.parametrize("data", [choice_set("mmlu", "anatomy"), maths_set(shots=5)], ids=["mmlu", "gsm8k"])
def test_more_examples_than_there_are_is_an_error_that_says_how_many(data: TaskSet) -> None:
    with pytest.raises(BadDataError, match=r"6 examples were asked for .* hold 5"):
        questions(data, shots=6)


BAD_SHOTS = {"negative": (maths_set(), -1), "humaneval": (code_set(), 1)}


@pytest.mark.parametrize(("data", "shots"), list(BAD_SHOTS.values()), ids=list(BAD_SHOTS))
def test_numbers_of_examples_that_make_no_sense_are_refused(data: TaskSet, shots: int) -> None:
    with pytest.raises(UsageError, match="examples"):
        questions(data, shots=shots)


def test_the_likeliest_letter_is_the_answer_and_of_equals_the_first() -> None:
    question = questions(choice_set("mmlu", "anatomy"), shots=0)[0]  # B is right
    assert judge(question, logprobs=[-3.0, -1.0, -2.0, -1.0]).answer == "B"
    assert judge(question, logprobs=[-3.0, -1.0, -2.0, -1.0]).correct
    assert not judge(question, logprobs=[-1.0, -1.0, -2.0, -1.0]).correct


READINGS = {
    "strict": ("So it is.\n#### 1,234.", ("1234", "1234")),
    "the first mark counts": ("#### 5\n\n#### 6", ("5", "6")),
    "no mark": ("The answer is $1,234.50", (None, "1234.50")),
    "minus": ("#### -7", ("-7", "-7")),
    "a range": ("#### 3-4", ("3", "-4")),
    "nothing": ("I do not know", (None, None)),
    # The last thing that looks like a number is a full stop after a comma.
    "no digit": ("#### none.,", (None, "")),
}


@pytest.mark.parametrize(("output", "numbers"), list(READINGS.values()), ids=list(READINGS))
def test_numbers_are_read_as_lm_evals_two_filters_read_them(output: str, numbers: tuple[str | None, str]) -> None:
    question = questions(maths_set(), shots=0)[0]
    strict = judge_gsm8k(question, output, rule="strict-match")
    flexible = judge_gsm8k(question, output, rule="flexible-extract")
    assert (strict.answer, flexible.answer) == numbers


def test_gsm8k_compares_text_and_not_numbers() -> None:
    question = questions(maths_set(), shots=0)[0]  # 100 is right
    verdicts = {text: judge(question, output=f"#### {text}").correct for text in ("100", "100.", "100.0", "0100")}
    assert verdicts == {"100": True, "100.": True, "100.0": False, "0100": False}


def test_a_program_is_the_prompt_then_the_output_then_the_tests() -> None:
    question = questions(code_set(), shots=0)[0]
    assert humaneval_program(question, "    return 1\n") == (
        'def one():\n    """Return 1."""\n    return 1\n\ndef check(f):\n    assert f() == 1\n\ncheck(one)'
    )
