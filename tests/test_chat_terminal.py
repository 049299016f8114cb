"""What is typed in a terminal chat, and what may be shown there: commands, settings, seeds, harmless text."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from qquant.chat_terminal import SETTINGS, parse_command, parse_seed, parse_settings
from qquant.console import printable
from qquant.errors import UsageError


def test_only_a_colon_in_front_makes_a_command() -> None:
    assert parse_command(":conf top_p=1  ") == ("conf", "top_p=1")
    assert parse_command(" :conf") is None
    assert parse_command("is this: a command") is None


def test_an_unknown_command_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean :history"):
        parse_command(":histroy")


SETTINGS_TYPED: dict[str, tuple[str, dict[str, Any]]] = {
    "several": ("top_p=0.5 do_sample=false", {"top_p": 0.5, "do_sample": False}),
    "a whole number": ("top_k=20", {"top_k": 20}),
    "a number with an exponent": ("temperature=1e-2", {"temperature": 0.01}),
    "a whole number for a number": ("temperature=1", {"temperature": 1.0}),
    "undone": ("top_p=none", {"top_p": None}),
    "nothing": ("", {}),
}


@pytest.mark.parametrize(("typed", "values"), list(SETTINGS_TYPED.values()), ids=list(SETTINGS_TYPED))
def test_settings_are_read_by_their_kind(typed: str, values: dict[str, Any]) -> None:
    read = parse_settings(typed)
    assert read == values
    assert [type(value) for value in read.values()] == [type(value) for value in values.values()]


SETTINGS_REFUSED: dict[str, tuple[str, str]] = {
    "code": ("top_p=__import__('os')", "a number above 0 to 1"),
    "an expression": ("top_k=1+1", "a whole number from 0"),
    "underscores": ("top_k=1_000", "a whole number"),
    "other digits": ("top_k=١", "a whole number"),
    "not finite": ("temperature=inf", "a number from 0.01"),
    "too large to be finite": ("temperature=1e999", "a number from 0.01"),
    "out of bounds": ("top_p=1.5", "above 0 to 1"),
    "the lower bound itself": ("top_p=0", "above 0"),
    "what logits cannot be divided by": ("temperature=0", "from 0.01"),
    "a number for a truth": ("do_sample=1", "true or false"),
    "Python's spelling": ("do_sample=True", "true or false"),
    "a near name": ("top_pp=1", "did you mean top_p"),
    "an attribute that is no setting": ("__class__=1", "no setting '__class__'"),
    "no value": ("top_p", "NAME=VALUE"),
    "one bad among good": ("top_k=5 top_p=2", "top_p must be"),
}


@pytest.mark.parametrize(("typed", "message"), list(SETTINGS_REFUSED.values()), ids=list(SETTINGS_REFUSED))
def test_a_setting_that_is_none_is_refused(typed: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_settings(typed)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "max_window_size"])
def test_every_setting_is_one_of_transformers(name: str) -> None:
    assert hasattr(GenerationConfig(), name)


@pytest.mark.parametrize("typed", ["-1", "1.5", "9223372036854775808", "x", "²"])
def test_a_seed_that_is_none_is_refused(typed: str) -> None:
    with pytest.raises(UsageError, match="a seed is a whole number"):
        parse_seed(typed)


SHOWN: dict[str, tuple[str, str]] = {
    "a colour": ("\x1b[31mred", "\\x1b[31mred"),
    "a title": ("\x1b]0;x\x07", "\\x1b]0;x\\x07"),
    "one-byte escape": ("\x9b2J", "\\x9b2J"),
    "back to the start": ("safe\rgone\x08", "safe\\x0dgone\\x08"),
    "turned around": ("\u202etxt", "\\u202etxt"),
    "half a pair": ("\ud83d", "\\ud83d"),
    "text": ("a\n\tb 你好 👩\u200d💻 é", "a\n\tb 你好 👩\u200d💻 é"),
}


@pytest.mark.parametrize(("text", "shown"), list(SHOWN.values()), ids=list(SHOWN))
def test_nothing_a_terminal_would_obey_is_shown_raw(text: str, shown: str) -> None:
    assert printable(text) == shown
