"""HumanEval's prompts, how code is found in an answer, and verdicts; on self-written functions, and published ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qquant.errors import BadDataError, UsageError
from qquant.tasks import humaneval
from qquant.tasks.files import read_task
from qquant.tasks.items import Item, Question, Style, TaskSet, Verdict
from qquant.tasks.sandbox import Limits

PUBLISHED = Path(__file__).parent.parent.parent / "shared" / "data" / "humaneval"
LIMITS = Limits(processor_seconds=1)
linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's")

PROMPT = (
    "from typing import List\n"
    "\n"
    "\n"
    "def half(x: float) -> float:\n"
    "    return x / 2\n"
    "\n"
    "\n"
    "def halves(xs: List[float], twice: bool = False) -> List[float]:\n"
    '    """ Half of every number.\n'
    "    >>> halves([2.0])\n"
    "    [1.0]\n"
    '    """\n'
)
TESTS = """def check(candidate):
    assert candidate([2.0, 4.0]) == [1.0, 2.0]
    assert candidate([4.0], True) == [1.0]
"""
BODY = (
    "    found = []\n\n    # one by one\n    for x in xs:\n        x = half(x)\n\n"
    "        found.append(half(x) if twice else x)\n    return found\n"
)
WHOLE = "def halves(xs: List[float], twice=False):\n" + BODY
ROW = {"task_id": "HumanEval/0", "prompt": PROMPT, "test": TESTS, "entry_point": "halves", "canonical_solution": BODY}


def published_cut(text: str) -> str:
    """The original's end of a function, which is not ours."""
    return text[: min((at for at in (text.find("\n\n"), text.find("def ")) if at >= 0), default=len(text))]


def our_cut(text: str) -> str:
    """What the runner makes of ``STOPS``."""
    return text[: min((at for stop in humaneval.STOPS if (at := text.find(stop)) >= 0), default=len(text))]


def judge_all(questions: Sequence[Question], outputs: Sequence[str]) -> list[Verdict]:
    """Two at a time."""
    with ThreadPoolExecutor(2) as pool:
        judged = [
            pool.submit(humaneval.judge, question, output=output, limits=Limits())
            for question, output in zip(questions, outputs, strict=True)
        ]
    return [one.result() for one in judged]


def one(style: Style = "base", **changed: str) -> Question:
    extra = {"prompt": PROMPT, "test": TESTS, "entry_point": "halves"} | changed
    item = Item("HumanEval/0", None, extra["prompt"], (), "", extra)
    return humaneval.questions(TaskSet("humaneval", (item,), {}, ""), style=style, shots=0)[0]


ANSWERS = {
    "a block with the function": f"Sure!\n\n```python\n{WHOLE}```\nThat halves.",
    "a block without a language": f"```\n{WHOLE}```",
    "the prompt again": f"```python\n{PROMPT}{BODY}```",
    "a block that was cut off": f"```python\n{WHOLE}",
    "a block in a list": "1. So:\n" + "".join(f"   {line}\n" for line in f"```python\n{WHOLE}```".splitlines()),
    "the function, then how to call it": f"```python\n{WHOLE}```\nUse it:\n```python\nhalves([1.0])\n```",
    "a first try and a better one": f"```python\ndef halves(xs):\n    return xs\n```\nBetter:\n```py\n{WHOLE}```",
    "the body alone": f"```python\n{BODY}```",
    "the body alone after a blank line": f"```python\n\n{BODY}```",
    "no block": f"Here it is:\n\n{WHOLE}\nIt halves every number.",
    "no block, nothing else": WHOLE,
    "no block, a signature of lines": (
        f"def halves(\n    xs: List[float],\n    twice: bool = False,\n) -> List[float]:\n{BODY}I hope this helps."
    ),
    "windows lines": f"```python\n{WHOLE}```".replace("\n", "\r\n"),
}
NO_ANSWERS = {
    "words": "I cannot do that.",
    "nothing": "",
    "another function": "```python\ndef doubles(xs):\n    return xs\n```",
    "a method": "```python\nclass Solution:\n    def halves(self, xs):\n        return xs\n```",
    "the name in words": "Call halves(xs) twice.",
}
WRONG = {
    "a wrong result": ("    return xs\n", "failed: AssertionError"),
    "no Python": ("    return (\n", "failed: SyntaxError"),
    "an early end": ("    import os\n    os._exit(0)\n", "failed: ended before its last line"),
    "an early exit": ("    raise SystemExit(0)\n", "failed: SystemExit"),
    "a loop": ("    while True:\n        pass\n", "timed out: after 1 processor seconds"),
    "the network": ("    import socket\n    socket.socket()\n", "failed: PermissionError"),
    "nothing": ("", "failed: AssertionError"),
}


def test_a_base_model_goes_on_with_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(ROW) + "\n", encoding="utf-8")
    data = read_task("humaneval", tmp_path)
    (question,) = humaneval.questions(data, style="base", shots=humaneval.DEFAULT_SHOTS["base"])
    assert question.heading + "".join(question.shots) + question.body == PROMPT
    assert question.id == "HumanEval/0"
    assert question.max_new_tokens == 512


def test_a_chat_model_is_told_the_signature_the_problem_and_the_prompt() -> None:
    (turn,) = one("chat").messages
    assert turn["content"] == (
        "Write a Python function `halves(xs: List[float], twice: bool=False) -> List[float]` to solve the following "
        f"problem:\nHalf of every number.\n>>> halves([2.0])\n[1.0]\n{PROMPT}"
    )


def test_a_description_behind_an_import_is_found() -> None:
    """One published prompt has its description as the second statement of the function."""
    prompt = 'def halves(xs):\n    import math\n    """\n    Half of it.\n    """\n'
    assert "problem:\nHalf of it.\ndef halves" in one("chat", prompt=prompt).messages[0]["content"]


@linux
def test_a_right_function_passes_and_blank_lines_do_not_end_it() -> None:
    assert humaneval.judge(one(), output=our_cut(BODY + "\n\ndef more():\n    pass\n"), limits=LIMITS).correct
    assert not humaneval.judge(one(), output=published_cut(BODY), limits=LIMITS).correct


@pytest.mark.parametrize(
    "rest", ["def f():", "class A:", "# Test", "if __name__:", "print(1)", "assert 0", "@f", "import os", "```"]
)
def test_what_begins_at_the_left_margin_is_cut(rest: str) -> None:
    assert our_cut(f"    return 1\n\n\n{rest}\n") == "    return 1\n\n"


@linux
@pytest.mark.parametrize("output", list(ANSWERS.values()), ids=list(ANSWERS))
def test_code_is_found_in(output: str) -> None:
    assert humaneval.judge(one("chat"), output=output, limits=LIMITS).answer == "passed"


@pytest.mark.parametrize("output", list(NO_ANSWERS.values()), ids=list(NO_ANSWERS))
def test_no_code_is_no_answer(output: str) -> None:
    verdict = humaneval.judge(one("chat"), output=output, limits=LIMITS)
    assert (verdict.answer, verdict.correct) == (None, False)


@linux
@pytest.mark.parametrize(("output", "answer"), list(WRONG.values()), ids=list(WRONG))
def test_wrong_is(output: str, answer: str) -> None:
    verdict = humaneval.judge(one(), output=output, limits=LIMITS)
    assert (verdict.answer, verdict.correct) == (answer, False)


def test_worked_examples_are_refused() -> None:
    with pytest.raises(UsageError, match="without worked examples, got 3"):
        humaneval.questions(TaskSet("humaneval", (), {}, ""), style="base", shots=3)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("def halves(xs:\n", "must be Python"), ("def other(x):\n    ''\n", "must end in the function halves")],
    ids=["no Python", "another function"],
)
def test_a_prompt_that_does_not_begin_its_function_is_refused(prompt: str, message: str) -> None:
    with pytest.raises(BadDataError, match=message):
        one(prompt=prompt)


@linux
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published functions are not here")
def test_published_solutions_pass_and_empty_ones_do_not() -> None:
    """Every sixteenth; each is a process of its own."""
    lines = (PUBLISHED / "HumanEval.jsonl").read_text(encoding="utf-8").splitlines()
    solutions = {row["task_id"]: row["canonical_solution"] for row in map(json.loads, lines)}
    base = humaneval.questions(read_task("humaneval", PUBLISHED), style="base", shots=0)
    assert len(base) == 164
    some = base[::16]
    verdicts = judge_all(some, [our_cut(solutions[question.id]) for question in some])
    assert [question.id for question, verdict in zip(some, verdicts, strict=True) if not verdict.correct] == []
    verdicts = judge_all(some, ["    return None\n"] * len(some))
    assert not [question.id for question, verdict in zip(some, verdicts, strict=True) if verdict.correct]


@linux
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published functions are not here")
def test_the_published_cut_fails_37_published_solutions() -> None:
    """Asked of the 40 solutions that the cut changes; the others are whole."""
    lines = (PUBLISHED / "HumanEval.jsonl").read_text(encoding="utf-8").splitlines()
    solutions = {row["task_id"]: row["canonical_solution"] for row in map(json.loads, lines)}
    base = humaneval.questions(read_task("humaneval", PUBLISHED), style="base", shots=0)
    changed = [question for question in base if published_cut(solutions[question.id]) != solutions[question.id]]
    verdicts = judge_all(changed, [published_cut(solutions[q.id]) for q in changed])
    assert sum(not verdict.correct for verdict in verdicts) == 37
