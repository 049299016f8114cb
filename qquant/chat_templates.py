"""Chat templates of a folder that nobody trusts: compiled and rendered within bounds of time and memory.

A template is a program. transformers runs it in Jinja's sandbox, which keeps it from everything but time and memory;
those are kept here. What is rendered, and what for, is for the rooms that ask.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qquant.errors import BadModelError

_SECONDS = 5.0  # of processor time; honest templates take milliseconds
_BYTES = 1 << 29
_MOST_CHARACTERS = 1 << 20
_MOST_TIMES = 16
"""A rendered text may have so many characters, and so many times those of what went into it."""
_TOKENIZED_PER_SECOND = 10_000.0  # characters that the slowest tokenizers manage
_REMEDY = "take the template from the model's own source, or remove it"
# Not passed on where only the text is wanted.
_OF_TOKENS = frozenset(("return_dict", "return_tensors", "sanitize_control_tokens", "tokenize", "tokenizer_kwargs"))


class _EndlessError(BaseException):
    """Raised inside a template by the timer; Jinja swallows exceptions of other kinds while it compiles."""


def apply_template(tokenizer: Any, messages: Any, **options: Any) -> Any:
    """``tokenizer.apply_chat_template``, by a template that may be made to go on for ever.

    Args:
        tokenizer: transformers', or ours of the original Qwen.
        messages: one conversation.
        **options: as ``apply_chat_template`` takes them.

    Returns:
        What it returns.

    Raises:
        BadModelError: the template takes more time or memory, or renders more text, than any honest one.
        Exception: whatever else the template raises.
    """
    shown = {name: value for name, value in options.items() if name not in _OF_TOKENS}
    with bounded():
        text = tokenizer.apply_chat_template(messages, **shown, tokenize=False)
    longest = _MOST_CHARACTERS + _MOST_TIMES * len(repr(messages))
    if len(text) > longest:
        raise BadModelError(f"a chat template may render {longest} characters of this, it rendered more; {_REMEDY}")
    if options.get("tokenize") is False:
        return text
    with bounded(seconds=_SECONDS + len(text) / _TOKENIZED_PER_SECOND, extra_bytes=None):
        return tokenizer.apply_chat_template(messages, **options)


@contextmanager
def bounded(seconds: float = _SECONDS, extra_bytes: int | None = _BYTES) -> Iterator[None]:
    """Let a template's work take so much processor time, and this process so much more memory.

    Time is bounded in the main thread only, where Python handles signals; memory on Linux only.

    Raises:
        BadModelError: it takes more.
    """
    try:
        with _memory(extra_bytes), _time(seconds):
            yield
    except _EndlessError:
        raise BadModelError(f"a chat template must end, this one ran for {seconds:.0f} s; {_REMEDY}") from None
    except MemoryError:
        if extra_bytes is None:
            raise
        raise BadModelError(
            f"a chat template must do with {extra_bytes >> 20} MiB of memory, this one takes more; {_REMEDY}"
        ) from None


@contextmanager
def _time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    running = True

    def end(*_: object) -> None:
        if running:
            raise _EndlessError

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _memory(extra_bytes: int | None) -> Iterator[None]:
    counts = Path("/proc/self/statm")
    if extra_bytes is None or not counts.exists():
        yield
        return
    import resource  # not on Windows

    taken = int(counts.read_text(encoding="ascii").split()[5]) * resource.getpagesize()
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = taken + extra_bytes
    for other in (before, hard):
        limit = limit if other == resource.RLIM_INFINITY else min(limit, other)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))
