"""What a person types in a terminal chat: commands, and settings by name with the values that each may have.

Pure functions of text. Nothing typed is ever evaluated. The conversation itself is conversation.py, the loop chat.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from qquant.errors import UsageError

Value = bool | int | float | None

COMMANDS = {
    "help": "list these commands and the settings",
    "clear": "forget the conversation",
    "history": "show the conversation",
    "seed": "show the seed of sampling; :seed N sets it",
    "conf": "show how answers are generated; :conf NAME=VALUE sets, :conf NAME=none undoes",
    "exit": "leave, as Ctrl-D does",
}
"""Commands without their colon, and what they do."""


@dataclass(frozen=True)
class Setting:
    """The values that one setting of generation may have."""

    kind: type[bool] | type[int] | type[float]
    low: float = -math.inf
    """Least value."""
    high: float = math.inf
    """Greatest value."""
    above: bool = False
    """Whether ``low`` itself is too low."""

    @property
    def rule(self) -> str:
        """The values in words."""
        if self.kind is bool:
            return "true or false"
        name = "a whole number" if self.kind is int else "a number"
        floor = "" if self.low == -math.inf else f" {'above' if self.above else 'from'} {self.low:g}"
        return name + floor + ("" if self.high == math.inf else f" to {self.high:g}")

    def allows(self, value: float) -> bool:
        """Whether a number of the right kind is within bounds."""
        return math.isfinite(value) and self.low <= value <= self.high and not (self.above and value == self.low)

    def takes(self, value: object) -> bool:
        """Whether a value that was read from a file is of the right kind and within bounds."""
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        if isinstance(value, int):
            return abs(value) < 10**18 and self.allows(value)  # as many digits as may be typed
        return self.kind is float and isinstance(value, float) and self.allows(value)


_LEAST_DIVISOR = 0.01  # logits are divided by it; far below that they would no longer be finite

SETTINGS = {
    "do_sample": Setting(bool),
    "temperature": Setting(float, _LEAST_DIVISOR),
    "top_k": Setting(int, 0),
    "top_p": Setting(float, 0, 1, above=True),
    "min_p": Setting(float, 0, 1),
    "typical_p": Setting(float, 0, 1, above=True),
    "repetition_penalty": Setting(float, _LEAST_DIVISOR),
    "no_repeat_ngram_size": Setting(int, 0),
    "max_new_tokens": Setting(int, 1),
    "min_new_tokens": Setting(int, 0),
    "max_time": Setting(float, 0, above=True),
    "max_window_size": Setting(int, 0),
}
"""Fields of transformers' ``GenerationConfig`` that a conversation may change, and Qwen's ``max_window_size``."""

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_DECIMAL = re.compile(r"[+-]?([0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18})([eE][+-]?[0-9]{1,3})?")


def parse_command(line: str) -> tuple[str, str] | None:
    """The command in a line and what follows it; None for a line that is to be sent.

    Args:
        line: what was typed. Only a colon as the very first character makes a command.

    Raises:
        UsageError: there is no such command.
    """
    if not line.startswith(":"):
        return None
    name, _, rest = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        raise UsageError(
            f"there is no command {':' + name!r}{_nearest(name, COMMANDS, ':')}; :help lists them, and a space before "
            "the colon sends the line"
        )
    return name, rest.strip()


def parse_settings(text: str) -> dict[str, Value]:
    """Settings such as ``top_p=0.5 do_sample=true``, all of them checked; none: a setting is to be undone.

    Raises:
        UsageError: no pair NAME=VALUE, an unknown name, or a value of another kind or out of bounds.
    """
    values: dict[str, Value] = {}
    for pair in text.split():
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"a setting is NAME=VALUE without spaces, got {pair!r}")
        if name not in SETTINGS:
            raise UsageError(
                f"there is no setting {name!r}{_nearest(name, SETTINGS, '')}; known: {', '.join(SETTINGS)}"
            )
        values[name] = _parse_value(name, value)
    return values


def parse_seed(text: str) -> int:
    """A seed of torch's generators: a whole number from 0 to 2**63 - 1."""
    if not re.fullmatch("[0-9]{1,19}", text) or int(text) >= 2**63:
        raise UsageError(f"a seed is a whole number from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def help_text() -> str:
    """The commands and settings, one per line."""
    commands = [f"  :{name:<9}{what}" for name, what in COMMANDS.items()]
    settings = [f"  {name:<22}{setting.rule}" for name, setting in SETTINGS.items()]
    return "\n".join([*commands, "settings of :conf", *settings])


def _parse_value(name: str, text: str) -> Value:
    setting = SETTINGS[name]
    if text == "none":
        return None
    if setting.kind is bool and text in ("true", "false"):
        return text == "true"
    if setting.kind is int and _WHOLE.fullmatch(text) and setting.allows(int(text)):
        return int(text)
    if setting.kind is float and _DECIMAL.fullmatch(text) and setting.allows(float(text)):
        return float(text)
    raise UsageError(f"{name} must be {setting.rule}, got {text!r}; none undoes an earlier setting")


def _nearest(name: str, known: Iterable[str], mark: str) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f", did you mean {mark}{close[0]}" if close else ""
