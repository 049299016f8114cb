"""HumanEval: functions to be written from their description, asked as the original Qwen's evaluation asks for them.

A function is right when the item's own tests run through, in sandbox.py's process; one greedy sample each is pass@1.
Code that a model wrote is run by ``judge`` alone, which needs ``Limits``: only a caller whose user said in so many
words that code may be run makes one.

One thing differs from the original on purpose. It cuts what a base model writes at the first blank line or "def ",
which ends a function in its middle: cut so, 37 of the 164 published solutions fail their own tests. Here the function
ends where a statement at the left margin begins.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Mapping
from itertools import takewhile

from qquant.errors import BadDataError, UsageError
from qquant.tasks.items import Item, Question, Style, TaskSet, Verdict
from qquant.tasks.sandbox import Limits, run_untrusted

DEFAULT_SHOTS: Mapping[Style, int] = {"base": 0, "chat": 0}
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\nassert", "\nfrom", "\nimport", "\n@", "\n```")
"""Base style: what begins at the left margin is no more part of the function. The first five are the Codex paper's
(arXiv:2107.03374, section 3.2); the others begin what models write then as well, and what would be run with it."""
MAX_NEW_TOKENS: Mapping[Style, int] = {"base": 512, "chat": 1024}

_FENCED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
"""A code block; the last one may lack its end where the answer was cut off."""


def questions(data: TaskSet, *, style: Style, shots: int) -> list[Question]:
    """Every function as a model is asked for it, in their order.

    Args:
        data: of humaneval.
        style: base goes on with the prompt as published; chat is asked to write the function.
        shots: 0: the task has no worked examples.

    Raises:
        UsageError: ``shots`` is not 0.
        BadDataError: a prompt that is not the beginning of the function it names.
    """
    if shots:
        raise UsageError(f"humaneval is asked without worked examples, got {shots}; leave --shots away")
    return [_base(item) if style == "base" else _chat(item) for item in data.items]


def program_of(question: Question, output: str) -> str | None:
    """The whole program that decides about an answer: the item's code, the model's, and the tests.

    A base model's answer goes on with the prompt. In a chat model's the code is looked for in this order:

    1. the last code block that defines the function at its left margin;
    2. the last code block that begins indented: the function's body, which goes on with the prompt;
    3. without any code block, the function's definition in the plain text, as far as it is indented.

    Imports and helpers that the prompt gives before the function stay before it, whether the answer repeats them or
    not.

    Args:
        question: one of ``questions``'s.
        output: what was generated, up to the first stop. Never run here.

    Returns:
        Python source, or None where an answer holds no code that could be the function.
    """
    extra = question.item.extra
    prompt, name = extra["prompt"], extra["entry_point"]
    tests = f"\n\n{extra['test']}\n\ncheck({name})\n"
    if not question.messages:
        return prompt + output + tests
    blocks: list[str] = _FENCED.findall(output)
    definition = _definition(name)
    whole = [block for block in map(textwrap.dedent, blocks) if definition.search(block)]
    if whole:
        return _before(prompt, name) + whole[-1] + tests
    bodies = [block for block in blocks if block.lstrip("\n")[:1] in (" ", "\t")]
    if bodies:
        return prompt + bodies[-1] + tests
    found = None if blocks else definition.search(output)
    if found is None:
        return None
    first, *rest = output[found.start() :].splitlines()
    # A parenthesis at the left margin closes a signature of several lines.
    indented = takewhile(lambda line: not line.strip() or line[0] in " \t)", rest)
    return _before(prompt, name) + "\n".join([first, *indented]) + tests


def judge(question: Question, *, output: str, limits: Limits) -> Verdict:
    """Run what a model wrote, with its item's tests, in a process that can do nothing but compute.

    It may be called from several threads.

    Args:
        question: one of ``questions``'s.
        output: what was generated, up to the first stop.
        limits: of that process; to be made only where the user has allowed to run generated code.

    Returns:
        The answer is "passed"; why not, as "failed: AssertionError"; or None where there was no code to run.

    Raises:
        UsageError: generated code cannot be confined here, so it was not run.
    """
    program = program_of(question, output)
    if program is None:
        return Verdict(None, False)
    outcome = run_untrusted(program, limits=limits)
    answer = f"{outcome.status}: {outcome.detail}" if outcome.detail else outcome.status
    return Verdict(answer, outcome.status == "passed")


def _definition(name: str) -> re.Pattern[str]:
    return re.compile(rf"^(?:async\s+)?def\s+{re.escape(name)}\s*\(", re.MULTILINE)


def _before(prompt: str, name: str) -> str:
    """What a prompt has before the function that it asks for: imports and helpers."""
    found = _definition(name).search(prompt)
    return prompt[: found.start()] if found else ""


def _base(item: Item) -> Question:
    _function(item)
    return Question(
        item.id,
        item.group,
        item.truth,
        heading="",
        shots=(),
        body=item.extra["prompt"],
        stops=STOPS,
        max_new_tokens=MAX_NEW_TOKENS["base"],
        item=item,
    )


def _chat(item: Item) -> Question:
    function = _function(item)
    texts = [ast.get_docstring(function)] + [
        part.value.value.strip()
        for part in function.body
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)
    ]
    described = next((text for text in texts if text), "")
    returned = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    signature = f"{function.name}({ast.unparse(function.args)}){returned}"
    asked = (
        f"Write a Python function `{signature}` to solve the following problem:\n{described}\n{item.extra['prompt']}"
    )
    return Question(
        item.id,
        item.group,
        item.truth,
        heading="",
        shots=(),
        body="",
        max_new_tokens=MAX_NEW_TOKENS["chat"],
        messages=({"role": "user", "content": asked},),
        item=item,
    )


def _function(item: Item) -> ast.FunctionDef:
    """The function that an item's prompt begins; read as a tree, not run."""
    name = item.extra["entry_point"]
    try:
        body = ast.parse(item.extra["prompt"]).body
    except (SyntaxError, ValueError) as error:
        raise BadDataError(
            f"the prompt of {item.id} must be Python up to a function's description, got: {error}"
        ) from error
    found = [part for part in body if isinstance(part, ast.FunctionDef) and part.name == name]
    if not found or found[-1] is not body[-1]:
        raise BadDataError(f"the prompt of {item.id} must end in the function {name}, and it does not; mend the file")
    return found[-1]
