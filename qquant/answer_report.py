"""The record of sample answers, token by token, and the part of a report's Markdown drawn from it.

Pydantic models only, as in results.py, which holds one of these. How the answers come about is answers.py's.
"""

from __future__ import annotations

from qquant.records import Strict


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
    """Tokens before the first that differs from the baseline's answer; None: this is the baseline."""


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
