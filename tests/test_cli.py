"""The console script's table of commands, and how a command ends when something is wrong."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import qquant
from qquant.cli import app
from qquant.console import user_errors
from qquant.errors import BadModelError, QquantError, UsageError

COMMANDS = ("quantize", "eval", "chat", "inspect", "doctor")


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "--debug" in result.stdout


def test_version_is_the_packages() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout == f"qquant {qquant.__version__}\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["quantise"])
    assert result.exit_code == 2


def test_the_package_runs_as_a_module() -> None:
    result = subprocess.run([sys.executable, "-m", "qquant", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"qquant {qquant.__version__}\n"


ENDINGS: dict[str, tuple[BaseException, int, str]] = {
    "usage": (UsageError("bits must be 4, got 5"), 2, "error: bits must be 4, got 5\n"),
    "bad model": (BadModelError("no config.json\n  in m"), 4, "error: no config.json; in m\n"),
    "without a message": (QquantError(), 1, "error: QquantError\n"),
    "disk full": (OSError(errno.ENOSPC, "No space left", "o"), 7, "error: [Errno 28] No space left: 'o'\n"),
    "out of memory": (MemoryError(), 3, "error: out of memory; free some, or ask for less at a time\n"),
    "out of memory in torch": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        3,
        "error: out of memory: DefaultCPUAllocator: can't allocate memory; free some, or ask for less at a time\n",
    ),
    "interrupted": (KeyboardInterrupt(), 130, "error: interrupted\n"),
}


@pytest.mark.parametrize(("error", "code", "line"), list(ENDINGS.values()), ids=list(ENDINGS))
def test_an_expected_error_is_one_line_and_its_code(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, user_errors():
        raise error
    assert end.value.code == code
    captured = capsys.readouterr()
    assert captured.err == line
    assert captured.out == ""


def test_debug_adds_the_traceback_and_keeps_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, user_errors(debug=True):
        raise UsageError("bits must be 4, got 5")
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("error: bits must be 4, got 5\n")


@pytest.mark.parametrize("bug", [ZeroDivisionError(), ValueError("ours"), BrokenPipeError()], ids=repr)
def test_a_bug_of_ours_keeps_its_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)), user_errors():
        raise bug
