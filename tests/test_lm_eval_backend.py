"""What the lm-eval backend refuses, without the harness; tests/lm_eval runs it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from qquant.errors import UsageError
from qquant.tasks import lm_eval_backend
from qquant.tasks.items import Item, TaskSet
from qquant.tasks.lm_eval_backend import require_lm_eval, run_harness, run_lm_eval

MATHS = TaskSet("gsm8k", (Item("0", None, "1 + 1?", (), "2", {"answer": "#### 2"}),), {}, "0" * 64)
CODE = TaskSet("humaneval", (Item("HumanEval/0", None, "def f():\n", (), "", {}),), {}, "0" * 64)


def install(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def found(name: str) -> str:
        if version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr(lm_eval_backend, "version", found)


def test_without_the_harness_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    with pytest.raises(UsageError, match=r"not installed: pip install 'qquant\[eval\]'"):
        run_harness(None, None, MATHS, shots=0, batch_size=1)


@pytest.mark.parametrize("version", ["0.4.9.1", "0.4.12", "0.3.0"])
def test_a_harness_that_builds_its_tasks_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, version)
    with pytest.raises(UsageError, match=rf"0\.4\.13 or newer, got {version}"):
        require_lm_eval()


@pytest.mark.parametrize("version", ["0.4.13", "0.4.13.1", "0.5.0", "1.0"])
def test_newer_harnesses_are_let_through(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    install(monkeypatch, version)
    assert require_lm_eval() == version


def test_code_of_the_model_needs_a_word_before_anything_is_run() -> None:
    with pytest.raises(UsageError, match="--allow-code-execution"):
        run_lm_eval(None, None, CODE, label="m", shots=0, batch_size=1)
