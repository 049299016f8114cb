"""Evaluations on all five tasks, offline, from small files in the published layouts; killed and gone on with.

What a prompt is and how a model answers is tested in rooms of their own. The program of a killed run is KILLED.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qquant.checkpoint import load_model
from qquant.errors import BadDataError, BadModelError, QquantError, StoppedError, UsageError
from qquant.result_files import write_items
from qquant.results import Result, result_from_json
from qquant.task_evaluation import evaluate_tasks
from qquant.task_report import TaskItem
from qquant.tasks import asking
from qquant.tasks.items import TaskSet
from qquant.tasks.lm_eval_backend import LmEvalRun
from qquant.tasks.runner import Reply, answer
from qquant.tasks.sandbox import enforced
from tests.conftest import Factory
from tests.make_qwen_v1 import make_qwen_v1
from tests.task_files import ITEMS, write_tasks

ALL = ("mmlu", "ceval", "cmmlu", "gsm8k", "humaneval")
SAFE = ALL[:4]
"""Without the task that runs code."""

KILLED = """
import json, sys, time
from pathlib import Path
from qquant.task_evaluation import evaluate_tasks
from qquant.tasks import asking

options = json.loads(sys.argv[1])
asked = asking.answer

def slowly(*arguments, **named):
    time.sleep(0.1)  # the test needs a moment that is neither the beginning nor the end
    return asked(*arguments, **named)

asking.answer = slowly
evaluate_tasks(options.pop("baseline"), options.pop("candidates"), journal=Path(options.pop("journal")), **options)
"""
"""An evaluation in a process of its own, slowed down; its arguments come as JSON."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five tasks. Never write to it."""
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def models(checkpoint: Factory) -> tuple[Path, Path]:
    """Two models that answer differently, with room for the prompts."""
    options = {"max_position_embeddings": 2048}
    return checkpoint("qwen2", **options), checkpoint("qwen2", seed=1, **options)


@pytest.fixture
def confined() -> None:
    """Skips where no generated code can be run."""
    try:
        enforced()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models never stop by themselves: 8 tokens of an answer are enough of that."""
    from qquant.tasks import gsm8k, humaneval, lm_eval_prompts

    for room in (gsm8k, humaneval):
        monkeypatch.setattr(room, "MAX_NEW_TOKENS", {"base": 8, "chat": 8})
    for name in ("GSM8K_MAX_NEW_TOKENS", "HUMANEVAL_MAX_NEW_TOKENS"):
        monkeypatch.setattr(lm_eval_prompts, name, 8)


def by_score(result: Result) -> dict[tuple[str, str], tuple[int, int]]:
    assert result.tasks is not None
    return {(score.label, score.task): (score.items, score.correct_items) for score in result.tasks.scores}


@pytest.mark.usefixtures("confined")
def test_all_five_tasks_run_offline_from_published_files(root: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    baseline, candidate = models
    result, items = evaluate_tasks(baseline, [candidate], tasks=ALL, data=root, style="base", allow_code_execution=True)
    assert result.tasks is not None
    labels = [baseline.name, candidate.name]
    counts = dict.fromkeys(ALL[:3], 2 * ITEMS) | dict.fromkeys(ALL[3:], ITEMS)
    assert [(score.task, score.label) for score in result.tasks.scores] == [(t, label) for t in ALL for label in labels]
    assert [(row.label, row.role) for row in result.rows] == list(zip(labels, ("baseline", "candidate"), strict=True))
    for score in result.tasks.scores:
        own = [item for item in items if (item.label, item.task) == (score.label, score.task)]
        assert score.items == len(own) == counts[score.task]
        assert score.correct_items == sum(item.correct for item in own)
        assert score.style == "base"
        assert [group.items for group in score.groups] == ([ITEMS, ITEMS] if score.task in ALL[:3] else [])
    assert [score.shots for score in result.tasks.scores[::2]] == [5, 5, 5, 8, 0]
    assert [(one.task, one.label) for one in result.tasks.comparisons] == [(task, candidate.name) for task in ALL]
    for one in result.tasks.comparisons:
        scores = by_score(result)
        difference = scores[candidate.name, one.task][1] - scores[baseline.name, one.task][1]
        assert one.difference == pytest.approx(difference / one.items, abs=1e-12)
        assert one.only_candidate_items - one.only_baseline_items == difference
    assert [(data.task, data.items, data.limit) for data in result.tasks.data] == [(t, counts[t], None) for t in ALL]
    assert result_from_json(result.model_dump_json()) == result
    write_items(items, tmp_path)
    lines = (tmp_path / "items.jsonl").read_text(encoding="utf-8").splitlines()
    assert [TaskItem.model_validate_json(line) for line in lines] == items


@pytest.mark.parametrize("task", SAFE)
def test_a_model_that_knows_the_answers_gets_all_of_them(
    root: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    def knowing(model: Any, tokenizer: Any, questions: Any, *, batch_size: int) -> list[Reply]:
        scored = [tuple(0.0 if choice.strip() == q.truth else -1.0 for choice in q.choices) for q in questions]
        texts = [f"So he has {q.truth} pens." for q in questions]
        pairs = zip(scored, texts, strict=True)
        return [Reply(logprobs or None, None if logprobs else text, False) for logprobs, text in pairs]

    monkeypatch.setattr(asking, "answer", knowing)
    result, _ = evaluate_tasks(models[0], [], tasks=[task], data=root, style="base")
    assert result.tasks is not None
    (score,) = result.tasks.scores
    assert (score.score, score.unreadable_items, score.score_stderr) == (1.0, 0, 0.0)
    assert score.group_mean == (None if task == "gsm8k" else 1.0)


@pytest.mark.usefixtures("confined")
def test_a_function_that_is_right_passes_its_tests_and_a_wrong_one_does_not(
    root: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def writing(model: Any, tokenizer: Any, questions: Any, *, batch_size: int) -> list[Reply]:
        body = {"add": "    return a + b\n", "double": "    return a\n", "largest": "    return max(items)\n"}
        return [Reply(None, body[q.item.extra["entry_point"]], False) for q in questions]

    monkeypatch.setattr(asking, "answer", writing)
    result, items = evaluate_tasks(
        models[0], [], tasks=["humaneval"], data=root, style="base", allow_code_execution=True
    )
    assert [(item.answer, item.correct) for item in items] == [
        ("passed", True),
        ("failed: AssertionError", False),
        ("passed", True),
    ]
    assert by_score(result) == {(models[0].name, "humaneval"): (3, 2)}


def test_a_model_against_itself_differs_nowhere(root: Path, models: tuple[Path, Path]) -> None:
    result, _ = evaluate_tasks(models[0], [models[0]], tasks=["mmlu"], data=root, limit=1)
    assert result.tasks is not None
    (one,) = result.tasks.comparisons
    assert (one.difference, one.same_answer_items, one.only_baseline_items, one.mcnemar_p) == (0.0, 2, 0, 1.0)
    assert [row.label for row in result.rows] == [models[0].name, f"{models[0].name}#2"]


def test_batch_size_changes_no_decision(root: Path, models: tuple[Path, Path]) -> None:
    found = [
        evaluate_tasks(models[0], [], tasks=("mmlu", "gsm8k"), data=root, style="base", batch_size=size)[1]
        for size in (1, 5)
    ]
    for one, other in zip(*found, strict=True):
        assert (one.id, one.answer, one.output) == (other.id, other.answer, other.output)


def test_shots_and_limit_are_followed(root: Path, models: tuple[Path, Path]) -> None:
    result, items = evaluate_tasks(models[0], [], tasks=["cmmlu"], data=root, style="base", shots=2, limit=1)
    assert result.tasks is not None
    assert [item.id for item in items] == ["agronomy/0", "world_history/0"]
    assert result.tasks.scores[0].shots == 2
    assert result.tasks.data[0].limit == 1


def test_a_baseline_loaded_by_bitsandbytes_is_one_more_candidate(
    root: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(folder: Path, kind: str, **options: Any) -> Any:
        assert (folder, kind) == (models[0], "nf4")
        return load_model(models[1], **options)

    monkeypatch.setattr("qquant.eval_models.check_bitsandbytes", lambda folder, kind: None)
    monkeypatch.setattr("qquant.eval_models.load_bitsandbytes", load)
    result, items = evaluate_tasks(models[0], [], tasks=["mmlu"], data=root, bitsandbytes=["nf4"], limit=1)
    label = f"{models[0].name}-nf4"
    assert [(row.label, row.method, row.weights_bytes is None) for row in result.rows] == [
        (models[0].name, None, False),
        (label, "nf4", True),
    ]
    assert result.tasks is not None
    assert [one.label for one in result.tasks.comparisons] == [label]
    assert sum(item.label == label for item in items) == 2


def test_the_harness_gets_the_loaded_model_once_and_its_decisions_are_kept(
    root: Path, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def harness(model: Any, tokenizer: Any, data: TaskSet, *, label: str, shots: int, **options: Any) -> LmEvalRun:
        calls.append((data.task, shots, type(model).__name__))
        fields: dict[str, Any] = {"label": label, "task": data.task, "choice_logprobs_nats": None, "output": None}
        items = [
            TaskItem(id=item.id, group=item.group, truth=item.truth, answer="A", correct=item.truth == "A", **fields)
            for item in data.items
        ]
        return LmEvalRun(items, truncated=1)

    monkeypatch.setattr("qquant.tasks.lm_eval_backend.require_lm_eval", lambda: "0.4.13")
    monkeypatch.setattr(asking, "run_lm_eval", harness)
    options: dict[str, Any] = {"tasks": ["mmlu"], "data": root, "backend": "lm-eval", "journal": tmp_path / "journal"}
    result, items = evaluate_tasks(models[0], [], **options)
    assert result.tasks is not None
    (score,) = result.tasks.scores
    assert (score.backend, score.style, score.shots) == ("lm-eval", "base", 0)
    assert (score.truncated_items, score.correct_items) == (1, 2)
    assert evaluate_tasks(models[0], [], **options, resume=True)[1] == items
    assert calls == [("mmlu", 0, "Qwen2ForCausalLM")]


# ---- style


def test_auto_style_is_chat_where_the_tokenizer_has_a_template(root: Path, models: tuple[Path, Path]) -> None:
    result, items = evaluate_tasks(models[0], [], tasks=("mmlu", "gsm8k"), data=root, limit=1)
    assert result.tasks is not None
    assert [(score.style, score.shots) for score in result.tasks.scores] == [("chat", 0), ("chat", 0)]
    assert all(item.answer in "ABCD" for item in items if item.task == "mmlu" and item.answer)


@pytest.mark.parametrize(("chat", "style"), [(True, "chat"), (False, "base")], ids=["chat", "base"])
def test_an_original_qwen_says_itself_whether_it_chats(root: Path, tmp_path: Path, chat: bool, style: str) -> None:
    folder = make_qwen_v1(tmp_path / "qwen", chat=chat, seq_length=2048)
    result, _ = evaluate_tasks(folder, [], tasks=["ceval"], data=root, limit=1, shots=0)
    assert result.tasks is not None
    assert result.tasks.scores[0].style == style


def test_lm_eval_s_format_is_of_base_style(root: Path, models: tuple[Path, Path]) -> None:
    result, _ = evaluate_tasks(models[0], [], tasks=("mmlu", "gsm8k"), data=root, prompt_format="lm-eval", limit=1)
    assert result.tasks is not None
    assert [(score.style, score.shots) for score in result.tasks.scores] == [("base", 0), ("base", 5)]


# ---- killed and resumed


@pytest.mark.slow  # starts an interpreter and imports torch
def test_a_run_killed_midway_goes_on_to_the_same_items(root: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    journal = tmp_path / "out.unfinished.jsonl"
    options: dict[str, Any] = {"tasks": ["mmlu"], "data": str(root), "shots": 0, "limit": 1, "batch_size": 1}
    whole, expected = evaluate_tasks(models[0], [models[1]], **options)
    arguments = {"baseline": str(models[0]), "candidates": [str(models[1])], "journal": str(journal), **options}
    child = subprocess.Popen([sys.executable, "-c", KILLED, json.dumps(arguments)], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and child.poll() is None and _pieces(journal) < 2:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    saved = _pieces(journal)
    assert 2 <= saved < 4  # 2 items of two models, one to a batch

    result, items = evaluate_tasks(models[0], [models[1]], **options, journal=journal, resume=True)
    assert items == expected
    assert by_score(result) == by_score(whole)
    assert result.tasks is not None
    assert whole.tasks is not None
    assert result.tasks.comparisons == whole.tasks.comparisons
    assert _pieces(journal) == 4


def _pieces(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


def test_nothing_is_asked_twice(
    root: Path, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"tasks": SAFE, "data": root, "limit": 1, "journal": tmp_path / "journal"}
    whole, expected = evaluate_tasks(models[0], [], **options)

    def never(*arguments: Any, **named: Any) -> list[Reply]:
        raise AssertionError("a finished batch was asked again")

    monkeypatch.setattr(asking, "answer", never)
    result, items = evaluate_tasks(models[0], [], **options, resume=True)
    assert items == expected
    assert by_score(result) == by_score(whole)


def test_ctrl_c_says_how_many_batches_are_saved(
    root: Path, models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def interrupted(*arguments: Any, **named: Any) -> list[Reply]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*arguments, **named)

    monkeypatch.setattr(asking, "answer", interrupted)
    options: dict[str, Any] = {"tasks": ["mmlu"], "data": root, "batch_size": 1}
    with pytest.raises(StoppedError, match="2 finished batches of items are saved"):
        evaluate_tasks(models[0], [], **options, journal=tmp_path / "journal")


@pytest.mark.parametrize(
    "changed",
    [{"limit": 2}, {"shots": 1}, {"batch_size": 3}, {"style": "base"}],
    ids=lambda changed: next(iter(changed)),
)
def test_a_journal_of_another_run_is_refused(
    root: Path, models: tuple[Path, Path], tmp_path: Path, changed: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"tasks": ["mmlu"], "data": root, "limit": 1, "journal": tmp_path / "journal"}
    evaluate_tasks(models[0], [], **options)
    with pytest.raises(UsageError, match=f"is of another: .*{next(iter(changed))} was"):
        evaluate_tasks(models[0], [], **{**options, **changed}, resume=True)


# ---- what is refused before a model is loaded

REFUSED: dict[str, tuple[dict[str, Any], type[QquantError], str]] = {
    "an unknown task": ({"tasks": ["arc"]}, UsageError, "tasks must be some of mmlu, .*got arc"),
    "no task": ({"tasks": []}, UsageError, "tasks must be some of .*got none"),
    "a task twice": ({"tasks": ["mmlu", "mmlu"]}, UsageError, "each once"),
    "code without leave": ({"tasks": ["humaneval"]}, UsageError, "--allow-code-execution"),
    "an unknown style": ({"style": "raw"}, UsageError, "style must be one of auto, base, chat, got 'raw'"),
    "an unknown format": ({"prompt_format": "x"}, UsageError, "prompt format must be one of qwen, lm-eval"),
    "an unknown backend": ({"backend": "x"}, UsageError, "backend must be one of qquant, lm-eval"),
    "lm-eval's format to chat": ({"prompt_format": "lm-eval", "style": "chat"}, UsageError, "is for base style"),
    "batch size 0": ({"batch_size": 0}, UsageError, "must be at least 1"),
    "too many shots": ({"shots": 6, "style": "base"}, BadDataError, "6 worked examples were asked for"),
    "an unknown bitsandbytes": ({"bitsandbytes": ["int3"]}, UsageError, "nf4, llm-int8, got 'int3'"),
}


@pytest.mark.parametrize(("changed", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_options_are_refused_before_a_model_is_loaded(
    root: Path,
    models: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    kind: type[QquantError],
    message: str,
) -> None:
    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("qquant.eval_models.load_model", never)
    with pytest.raises(kind, match=message):
        evaluate_tasks(models[0], [], **{"tasks": ["mmlu"], "data": root, **changed})


def test_a_folder_without_a_tokenizer_is_refused(root: Path, models: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((models[0] / name).read_bytes())
    with pytest.raises(BadModelError, match="holds no tokenizer"):
        evaluate_tasks(models[0], [tmp_path], tasks=["mmlu"], data=root)
