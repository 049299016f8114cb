"""The record of sample answers, token by token, and the part of a report's Markdown drawn from it.

Pydantic models and text only, as in results.py, which holds one of these. How the answers come about is answers.py's.
"""

from __future__ import annotations

import re

from qquant.records import Strict, table

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal or a browser would obey; line feeds and tabs are text."""


class AnswerToken(Strict):
    """One generated token."""

    text: str
    """What it adds to the decoded text; may be empty where a character ends only with the next token."""
    logprob_nats: float
    """ln p of the token under the model that generated it; at most 0."""


class ModelAnswer(Strict):
    """What one model wrote."""

    label: str
    tokens: tuple[AnswerToken, ...]
    same_tokens: int | None
    """Tokens before the first that differs from the baseline's answer, or that only one of them has; None: this is
    the baseline."""


class Answer(Strict):
    """One prompt and every model's greedy continuation, the baseline's first."""

    prompt: str
    """The last characters of the prompt, as shown; evaluation text, never calibration text."""
    prompt_tokens: int
    models: tuple[ModelAnswer, ...]


class Answers(Strict):
    """What ``--answers`` recorded."""

    new_tokens: int
    """The most tokens of one answer; an end-of-text token may come earlier."""
    samples: tuple[Answer, ...]


def answer_sections(answers: Answers) -> list[str]:
    """The section of a report's Markdown, paragraph by paragraph; every number is a field of the record or counts one.

    Text of prompts and models is shown in code blocks, where Markdown and HTML mean nothing.
    """
    first = answers.samples[0]
    parts = [
        "## Sample answers",
        f"Every model continued the same {len(answers.samples)} prompts, always by its likeliest token, with at most "
        f"{answers.new_tokens} of them. After the first different token two models no longer read the same text, so "
        "what follows may differ however small the cause.",
    ]
    if len(first.models) > 1:
        head = ["model", *[f"answer {number}" for number, _ in enumerate(answers.samples, 1)]]
        body = [
            [row.label, *[_agreement(sample.models[0], sample.models[place]) for sample in answers.samples]]
            for place, row in enumerate(first.models[1:], 1)
        ]
        parts += [f"Tokens that are {first.models[0].label}'s, up to the first that differs:", table(head, body)]
    for number, sample in enumerate(answers.samples, 1):
        parts += [
            f"### Answer {number}",
            f"The end of a prompt of {sample.prompt_tokens} tokens:",
            _block(sample.prompt),
        ]
        baseline, *others = sample.models
        parts += [f"{baseline.label} (baseline):", _block(_joined(baseline))]
        for other in others:
            parts += _against(baseline, other)
    return parts


def _agreement(baseline: ModelAnswer, other: ModelAnswer) -> str:
    longest = max(len(baseline.tokens), len(other.tokens))
    return "all" if _identical(baseline, other) else f"{other.same_tokens} of {longest}"


def _identical(baseline: ModelAnswer, other: ModelAnswer) -> bool:
    return other.same_tokens == len(baseline.tokens) == len(other.tokens)


def _against(baseline: ModelAnswer, other: ModelAnswer) -> list[str]:
    """Where a candidate leaves the baseline's answer, and what it writes from there on."""
    if _identical(baseline, other):
        return [f"{other.label}: the same {_tokens(len(other.tokens))}."]
    place = other.same_tokens or 0
    return [
        f"{other.label}: the same {_tokens(place)}, then {_token(other, place)} where {baseline.label} has "
        f"{_token(baseline, place)}:",
        _block(_joined(other, place)),
    ]


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def _token(answer: ModelAnswer, place: int) -> str:
    if place >= len(answer.tokens):
        return "no further token"
    token = answer.tokens[place]
    text = _harmless(token.text).replace("\n", "\\n").replace("\t", "\\t")
    return f"{_inline(text) if text else 'a part of a character'} (ln p {token.logprob_nats:.2f})"


def _joined(answer: ModelAnswer, begin: int = 0) -> str:
    return "".join(token.text for token in answer.tokens[begin:])


def _inline(text: str) -> str:
    """A text as inline code: the marks are longer than any row of them in it, and a space keeps them apart."""
    marks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{marks} {text} {marks}"


def _block(text: str) -> str:
    """A text as a code block that nothing in it can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{_harmless(text)}\n{fence}"


def _harmless(text: str) -> str:
    """The text with control characters, and marks that turn its direction, as the picture of an unknown character."""
    return _OBEYED.sub("\ufffd", text)
