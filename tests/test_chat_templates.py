"""Templates of somebody else's end, in bounded memory, and give back the process as it was."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qquant import chat_templates
from qquant.chat_templates import apply_template, bounded
from qquant.errors import BadModelError
from qquant.model_folder import load_tokenizer

MESSAGES = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]


def test_an_honest_template_gives_what_transformers_gives(tiny_qwen2: Path) -> None:
    tokenizer = load_tokenizer(tiny_qwen2)
    options: list[dict[str, Any]] = [
        {"return_dict": False},
        {"tokenize": False},
        {"return_dict": False, "add_generation_prompt": True, "sanitize_control_tokens": True},
        {"return_dict": True, "return_tensors": "pt"},
    ]
    for chosen in options:
        found, expected = (call(MESSAGES, **chosen) for call in (partial_of(tokenizer), tokenizer.apply_chat_template))
        assert str(found) == str(expected)


def partial_of(tokenizer: Any) -> Callable[..., Any]:
    return lambda messages, **options: apply_template(tokenizer, messages, **options)


def for_ever() -> None:
    while True:
        with suppress(Exception):
            sum(range(1000))


def test_a_template_that_does_not_end_is_ended() -> None:
    """Jinja catches every Exception of a constant part while it compiles, so it is none."""
    with pytest.raises(BadModelError, match="must end, this one ran for 0 s"), bounded(seconds=0.05):
        for_ever()


def test_a_template_that_takes_memory_gets_none() -> None:
    with pytest.raises(BadModelError, match="must do with 512 MiB"), bounded():
        bytes(1 << 36)


def test_too_much_text_is_refused(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_templates, "_MOST_CHARACTERS", 10)
    tokenizer = load_tokenizer(tiny_qwen2)
    tokenizer.chat_template = "{% for i in range(9000) %}x{% endfor %}"
    with pytest.raises(BadModelError, match="it rendered more"):
        apply_template(tokenizer, MESSAGES, tokenize=False)


@pytest.mark.parametrize("fails", [False, True])
def test_limits_and_timers_are_as_they_were(fails: bool) -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGVTALRM)
    with suppress(KeyError), bounded():
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] > 0
        if fails:
            raise KeyError
    assert (resource.getrlimit(resource.RLIMIT_DATA), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def test_another_thread_renders_without_the_timer() -> None:
    done: list[bool] = []

    def work() -> None:
        with bounded():
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
