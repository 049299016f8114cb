"""An evaluation at the command line that cannot be done as asked: one clear line, the right exit code, nothing lost.

Faults of task files one by one are in test_task_files.py, those of a journal in test_journal.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qquant.errors import NumericError, StoppedError, UsageError
from qquant.eval import evaluate_checkpoints
from qquant.journal import Journal, journal_of
from qquant.task_evaluation import evaluate_tasks
from qquant.tasks import asking
from qquant.tasks.lm_eval_backend import LmEvalRun
from tests.task_files import write_tasks

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five tasks. Never write to it."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def error_of(result: Any) -> str:
    """The one line that tells what was wrong."""
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return str(line)


MISUSED = {
    "the text's option": (["--tasks", "mmlu", "--data", "x"], "--data belongs to --measure accuracy"),
    "answers on tasks": (["--tasks", "mmlu", "--answers", 2], "--answers belongs to --measure accuracy"),
    "tasks on a text": (["--tasks", "mmlu", "--measure", "accuracy"], "--tasks belongs to --measure tasks"),
    "length of no answer": (["--answer-tokens", 8], "--answers was not asked for; leave --answer-tokens out"),
    "length of no cache": (["--kv-tokens", 64], "--kv-cache was not asked for; leave --kv-tokens out"),
    "no kind": (["--bitsandbytes", ","], "--bitsandbytes must name nf4, llm-int8 or both"),
    "no data": (["--tasks", "mmlu"], "give --task-data DIR"),
    "two places": (["--tasks", "mmlu", "--task-data", "mmlu=a", "--task-data", "mmlu=b"], "mmlu=b'; name it once"),
    "no place": (["--tasks", "mmlu", "--task-data", "mmlu="], "must name one place, got 'mmlu='"),
}


@pytest.mark.parametrize(("words", "said"), MISUSED.values(), ids=MISUSED.keys())
def test_options_that_do_not_go_together_are_refused(
    run_eval: Run, tiny_qwen2: Path, tmp_path: Path, words: list[Any], said: str
) -> None:
    result = run_eval("--baseline", tiny_qwen2, "--out", tmp_path / "r", *words)
    assert result.exit_code == 2
    assert said in error_of(result)
    assert not list(tmp_path.iterdir())


def test_an_answer_longer_than_the_models_were_made_for_is_refused(tiny_qwen2: Path, held_out: Path) -> None:
    options: dict[str, Any] = {"seq_len": 16, "max_tokens": 60, "speed": False, "answers": 1}
    with pytest.raises(UsageError, match="behind a prompt of 16 tokens into what the models were made for, 256 tokens"):
        evaluate_checkpoints(tiny_qwen2, [tiny_qwen2], held_out, **options, answer_tokens=241)


def test_too_many_answers_are_refused_before_a_model_is_loaded(
    run_eval: Run, tiny_qwen2: Path, held_out: Path, tmp_path: Path
) -> None:
    words = ["--baseline", tiny_qwen2, "--candidate", tiny_qwen2, "--data", held_out, "--out", tmp_path / "r"]
    result = run_eval(*words, "--seq-len", 16, "--max-tokens", 60, "--answers", 1000)
    assert result.exit_code == 5
    assert "1000 prompts of 16 tokens need a text of 16000 tokens" in error_of(result)
    assert not list(tmp_path.iterdir())


def test_no_folder_of_the_user_is_in_a_report_on_tasks(
    run_eval: Run, tiny_qwen2: Path, root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r"
    words = ["--baseline", tiny_qwen2, "--out", out, "--tasks", "mmlu,cmmlu", "--shots", 0, "--limit", 1]
    result = run_eval(*words, "--task-data", f"mmlu={root / 'mmlu'}", f"--task-data=cmmlu={root / 'cmmlu'}")
    assert result.exit_code == 0, result.stderr
    for path in out.iterdir():
        assert str(root.parent) not in path.read_text(encoding="utf-8")
    assert "--task-data mmlu=mmlu --task-data=cmmlu=cmmlu" in json.loads((out / "report.json").read_text())["command"]


def test_a_disk_that_fills_up_ends_with_7_and_the_run_can_go_on(
    run_eval: Run, tiny_qwen2: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r"
    words = ["--baseline", tiny_qwen2, "--out", out, "--tasks", "mmlu", "--task-data", root, "--shots", 0]
    words += ["--style", "base", "--batch-size", 1]
    synced: list[int] = []
    fsync = os.fsync

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr("qquant.journal.os.fsync", full)
    result = run_eval(*words)
    assert result.exit_code == 7
    assert "No space left on device; mend that, and go on with --resume" in error_of(result)
    assert [path.name for path in tmp_path.iterdir()] == [journal_of(out).name]
    assert run_eval(*words, "--resume").exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_two_runs_into_one_folder_do_not_mix(run_eval: Run, tiny_qwen2: Path, root: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    words = ["--baseline", tiny_qwen2, "--out", out, "--tasks", "mmlu", "--task-data", root, "--resume"]
    first = Journal(journal_of(out), {}, resume=False)
    before = journal_of(out).read_bytes()
    with first.alone():
        result = run_eval(*words)
    assert result.exit_code == 2
    assert "another run is at work" in error_of(result)
    assert journal_of(out).read_bytes() == before


def test_a_model_that_computes_no_numbers_is_named(tiny_qwen2: Path, root: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_qwen2, damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    journal = tmp_path / "r.unfinished.jsonl"
    options: dict[str, Any] = {"tasks": ["mmlu"], "data": root, "shots": 0, "journal": journal, "style": "base"}
    with pytest.raises(NumericError, match="damaged: the model's logits must be finite"):
        evaluate_tasks(damaged, [], **options)
    assert not journal.exists()  # nothing was finished, so the next run is not told of an earlier one


def test_a_run_by_another_version_of_the_harness_is_refused(
    tiny_qwen2: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any, **options: Any) -> LmEvalRun:
        if options["label"] != tiny_qwen2.name:
            raise KeyboardInterrupt
        return LmEvalRun([], truncated=0)

    journal = tmp_path / "r.unfinished.jsonl"
    options: dict[str, Any] = {"tasks": ["mmlu"], "data": root, "backend": "lm-eval", "journal": journal}
    monkeypatch.setattr("qquant.tasks.lm_eval_backend.require_lm_eval", lambda: "0.4.13")
    monkeypatch.setattr(asking, "run_lm_eval", stopped)
    with pytest.raises(StoppedError, match="1 finished"):
        evaluate_tasks(tiny_qwen2, [tiny_qwen2], **options)
    monkeypatch.setattr("qquant.tasks.lm_eval_backend.require_lm_eval", lambda: "0.4.14")
    with pytest.raises(UsageError, match=r"lm_eval was '0\.4\.13' and is '0\.4\.14'"):
        evaluate_tasks(tiny_qwen2, [tiny_qwen2], **options, resume=True)


def test_the_current_folder_can_be_a_report_that_is_replaced(
    run_eval: Run, tiny_qwen2: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r"
    words = ["--baseline", tiny_qwen2, "--tasks", "mmlu", "--task-data", root, "--shots", 0, "--limit", 1]
    assert run_eval(*words, "--out", out).exit_code == 0
    monkeypatch.chdir(out)
    result = run_eval(*words, "--out", ".", "--overwrite")
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    assert (out / "report.json").exists()
