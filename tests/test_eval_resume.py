"""An evaluation on a text that was stopped goes on where it ended, with the same scores to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qquant.errors import StoppedError, UsageError
from qquant.eval import evaluate_checkpoints, evaluate_long_context
from qquant.journal import Journal, journal_of
from qquant.results import Result

WINDOWS: dict[str, Any] = {"seq_len": 16, "max_tokens": 100, "speed": False}
LENGTHS: dict[str, Any] = {"lengths": [8, 16, 32], "max_tokens": 100}


def stop_at(step: str, count: int) -> Callable[[str, int, int], None]:
    """Ctrl-C the ``count``th time that some step is told of."""
    heard = 0

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal heard
        heard += step in what
        if heard == count:
            raise KeyboardInterrupt

    return on_progress


CASES = {
    "text": (evaluate_checkpoints, WINDOWS, "scoring", "windows of the text"),
    "long_context": (evaluate_long_context, LENGTHS, "16 tokens", "lengths"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_goes_on_to_the_same_scores(
    name: str, tiny_qwen2: Path, checkpoint: Any, held_out: Path, tmp_path: Path
) -> None:
    recipe, options, step, pieces = CASES[name]
    names = (tiny_qwen2, [checkpoint("qwen2", seed=1)], held_out)
    whole: Result = recipe(*names, **options)  # type: ignore[operator]
    journal = journal_of(tmp_path / "report")
    with pytest.raises(StoppedError, match=rf"[1-9]\d* finished {pieces} are saved.*--resume"):
        recipe(*names, **options, journal=journal, on_progress=stop_at(step, 3))  # type: ignore[operator]
    kept = journal.read_bytes()
    steps: list[str] = []
    resumed: Result = recipe(  # type: ignore[operator]
        *names, **options, journal=journal, resume=True, on_progress=lambda what, done, total: steps.append(what)
    )
    assert [row.accuracy for row in resumed.rows] == [row.accuracy for row in whole.rows]
    assert resumed.long_context == whole.long_context
    assert journal.read_bytes().startswith(kept)  # what was finished was not done again
    assert len(journal.read_bytes()) > len(kept)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seq_len": 8}, "seq_len was 16 and is 8"), ({"dtype": "bfloat16"}, "dtype was"), ({"max_tokens": 90}, "tokens")],
    ids=["window", "dtype", "text"],
)
def test_scores_of_another_run_are_not_taken(
    tiny_qwen2: Path, held_out: Path, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    journal = journal_of(tmp_path / "report")
    with pytest.raises(StoppedError):
        evaluate_checkpoints(
            tiny_qwen2, [tiny_qwen2], held_out, **WINDOWS, journal=journal, on_progress=stop_at("scoring", 1)
        )
    with pytest.raises(UsageError, match=named):
        evaluate_checkpoints(tiny_qwen2, [tiny_qwen2], held_out, **{**WINDOWS, **change}, journal=journal, resume=True)


def test_the_door_removes_the_journal_once_the_report_is_there(
    run_eval: Callable[..., Any], tiny_qwen2: Path, held_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    words = ["--baseline", tiny_qwen2, "--candidate", tiny_qwen2, "--data", held_out, "--out", out]
    result = run_eval(*words, "--seq-len", 16, "--max-tokens", 60, "--no-speed")
    assert result.exit_code == 0, result.stderr
    assert not journal_of(out).exists()


def test_the_door_ends_with_75_and_says_how_to_go_on(
    run_eval: Callable[..., Any], tiny_qwen2: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "report"
    add = Journal.add
    added: list[str] = []

    def add_two(self: Journal, key: str, piece: Any) -> None:
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(key)
        add(self, key, piece)

    monkeypatch.setattr(Journal, "add", add_two)
    words = ["--baseline", tiny_qwen2, "--candidate", tiny_qwen2, "--data", held_out, "--out", out]
    words += ["--seq-len", 16, "--max-tokens", 60, "--no-speed"]
    result = run_eval(*words)
    assert (result.exit_code, result.stdout) == (75, "")
    assert "2 finished windows of the text are saved" in result.stderr
    assert not out.exists()
    monkeypatch.setattr(Journal, "add", add)
    assert run_eval(*words).exit_code == 2
    assert run_eval(*words, "--resume").exit_code == 0
    assert not journal_of(out).exists()
