"""A journal is gone on with by the same run only: each thing that figures depend on, changed, is refused by its name.

For all recipes that keep one; and what is taken from a journal counts as it did when it was kept. How the file itself
behaves is test_journal.py's and test_journal_pieces.py's.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qquant import profile_grid
from qquant.errors import UsageError
from qquant.evaluation import evaluate_checkpoints, evaluate_long_context
from qquant.journal import checksum
from qquant.profile_grid import Grid, profile_models
from qquant.profile_report import CellRequest, ProfileCell
from qquant.results import Result
from qquant.task_evaluation import evaluate_tasks
from qquant.task_report import TaskItem
from qquant.tasks import asking
from qquant.tasks.items import TaskSet
from qquant.tasks.lm_eval_backend import LmEvalRun
from tests.conftest import Factory
from tests.task_files import word_problem, write_csv, write_lines
from tests.weight_files import write_shards

Edit = Callable[["Setting"], None]
Run = Callable[..., Any]
"""A recipe put to a setting, ``resume`` said by name."""


class Setting:
    """Folders, files and options of a run, all of which a test may change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = folder / "journal.jsonl"
        self.baseline, self.candidate = folder / "original", folder / "quantized"
        self.text = folder / "text.txt"
        self.tasks = folder / "tasks"
        self.options: dict[str, Any] = {}


def made(folder: Path, model: Path) -> Setting:
    """A setting whose two models are copies of one."""
    folder.mkdir()
    setting = Setting(folder)
    for name in (setting.baseline, setting.candidate):
        twin(model, name)
    setting.text.write_text("The quick brown fox jumps over the lazy dog. " * 4, encoding="utf-8")
    write_csv(setting.tasks / "mmlu" / "test" / "facts_test.csv", [["Which?", "1", "2", "3", "4", "B"]])
    write_csv(setting.tasks / "mmlu" / "dev" / "facts_dev.csv", [["What?", "1", "2", "3", "4", "C"]])
    write_lines(setting.tasks / "gsm8k" / "test.jsonl", [word_problem(1)])
    return setting


def twin(model: Path, folder: Path) -> Path:
    """A copy of a model's folder."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def other_weights(folder: Path) -> None:
    """One number of one tensor, and nothing else."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    write_shards(folder, tensors, 1)


def baseline_weights(setting: Setting) -> None:
    other_weights(setting.baseline)


def candidate_weights(setting: Setting) -> None:
    other_weights(setting.candidate)


def baseline_config(setting: Setting) -> None:
    file = setting.baseline / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, "rms_norm_eps": 1e-5}), encoding="utf-8")


def candidate_name(setting: Setting) -> None:
    setting.candidate = setting.candidate.rename(setting.folder / "renamed")


def text(setting: Setting) -> None:
    # As many tokens as before.
    setting.text.write_text(setting.text.read_text(encoding="utf-8").replace("fox", "cat", 1), encoding="utf-8")


def options(**changes: Any) -> Edit:
    return lambda setting: setting.options.update(changes)


def kept_as(**identity: Any) -> Edit:
    """The journal is of a run on another machine or of another kind: its first line says so."""

    def edit(setting: Setting) -> None:
        first, *rest = setting.journal.read_text(encoding="utf-8").splitlines(keepends=True)
        head = json.loads(first)
        assert head["identity"].keys() >= identity.keys()
        head["identity"].update(identity)
        del head["crc32"]
        head["crc32"] = checksum(head)
        setting.journal.write_text(json.dumps(head) + "\n" + "".join(rest), encoding="utf-8")

    return edit


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Callable[[Run], Path]:
    """``begun(run)``: a setting's folder with the journal of that run, which went on to its end. Never write to it."""
    folder = tmp_path_factory.mktemp("begun")
    done: dict[str, Path] = {}

    def get(run: Run) -> Path:
        if run.__name__ not in done:
            setting = made(folder / run.__name__, tiny_qwen2)
            with pytest.MonkeyPatch.context() as patch:
                simulate(patch, {})
                run(setting, resume=False)
            assert setting.journal.exists()
            done[run.__name__] = setting.folder
        return done[run.__name__]

    return get


def refused_for(begun: Path, here: Path, run: Run, edit: Edit, key: str) -> None:
    """Change one thing and see that exactly this is named."""
    setting = Setting(shutil.copytree(begun, here / "setting"))
    edit(setting)
    with pytest.raises(UsageError, match="--resume goes on with the same run only") as refused:
        run(setting, resume=True)
    said = str(refused.value)
    assert f"is of another: {key} was " in said
    assert said.count(" was ") == 1
    assert "and is None" not in said  # the key is there now, too


@pytest.fixture
def setting(tmp_path: Path, tiny_qwen2: Path) -> Setting:
    return made(tmp_path / "setting", tiny_qwen2)


# ---- a text


def run_text(setting: Setting, *, resume: bool) -> Result:
    taken: dict[str, Any] = {"seq_len": 16, "max_tokens": 20, "speed": False, **setting.options}
    names = (setting.baseline, [setting.candidate], setting.text)
    return evaluate_checkpoints(*names, **taken, journal=setting.journal, resume=resume)


FOLDERS: dict[str, tuple[Edit, str]] = {
    "the baseline's weights": (baseline_weights, "sha256"),
    "a candidate's weights": (candidate_weights, "sha256"),
    "the baseline's config": (baseline_config, "sha256"),
}
TEXT: dict[str, tuple[Edit, str]] = {
    **FOLDERS,
    "the text": (text, "text"),
    "how much of it": (options(max_tokens=19), "tokens"),
    "dtype": (options(dtype="bfloat16"), "dtype"),
    "window": (options(seq_len=8, stride=8), "seq_len"),
    "stride": (options(stride=4), "stride"),
    "device": (kept_as(device="cuda"), "device"),
    "another measure": (kept_as(measure="long-context"), "measure"),
    "another order": (kept_as(models=["quantized", "original"]), "models"),
}


@pytest.mark.parametrize(("edit", "key"), TEXT.values(), ids=list(TEXT))
def test_windows_of_another_run_are_refused(begun: Callable[[Run], Path], tmp_path: Path, edit: Edit, key: str) -> None:
    refused_for(begun(run_text), tmp_path, run_text, edit, key)


def test_a_model_of_another_name_is_another_run(setting: Setting) -> None:
    run_text(setting, resume=False)
    candidate_name(setting)
    with pytest.raises(UsageError, match=r"models was \['original', 'quantized'\] and is \['original', 'renamed'\]"):
        run_text(setting, resume=True)


# ---- long contexts


def run_lengths(setting: Setting, *, resume: bool) -> Result:
    taken: dict[str, Any] = {"lengths": [8, 16], "max_tokens": 20, **setting.options}
    names = (setting.baseline, [setting.candidate], setting.text)
    return evaluate_long_context(*names, **taken, journal=setting.journal, resume=resume)


LENGTHS: dict[str, tuple[Edit, str]] = {
    **FOLDERS,
    "the text": (text, "text"),
    "how much of it": (options(max_tokens=19), "tokens"),
    "dtype": (options(dtype="bfloat16"), "dtype"),
    "lengths": (options(lengths=[4, 8, 16]), "lengths"),
    "device": (kept_as(device="cuda"), "device"),
    "another measure": (kept_as(measure="accuracy"), "measure"),
    "another order": (kept_as(models=["quantized", "original"]), "models"),
}


@pytest.mark.parametrize(("edit", "key"), LENGTHS.values(), ids=list(LENGTHS))
def test_lengths_of_another_run_are_refused(begun: Callable[[Run], Path], tmp_path: Path, edit: Edit, key: str) -> None:
    refused_for(begun(run_lengths), tmp_path, run_lengths, edit, key)


# ---- tasks


def run_tasks(setting: Setting, *, resume: bool) -> tuple[Result, list[TaskItem]]:
    taken: dict[str, Any] = {
        "tasks": ["mmlu"],
        "style": "base",
        "shots": 0,
        "limit": 2,
        "threads": 1,
        **setting.options,
    }
    names = (setting.baseline, [setting.candidate])
    return evaluate_tasks(*names, data=setting.tasks, **taken, journal=setting.journal, resume=resume)


def question_changed(setting: Setting) -> None:
    write_csv(setting.tasks / "mmlu" / "test" / "facts_test.csv", [["Who?", "1", "2", "3", "4", "B"]])


def truth_changed(setting: Setting) -> None:
    write_csv(setting.tasks / "mmlu" / "test" / "facts_test.csv", [["Which?", "1", "2", "3", "4", "D"]])


TASKS: dict[str, tuple[Edit, str]] = {
    **FOLDERS,
    "a question": (question_changed, "questions"),
    "a right answer": (truth_changed, "questions"),
    "dtype": (options(dtype="bfloat16"), "dtype"),
    "limit": (options(limit=1), "limit"),
    "batch size": (options(batch_size=3), "batch_size"),
    "threads": (kept_as(threads=2), "threads"),
    "device": (kept_as(device="cuda"), "device"),
    "another measure": (kept_as(measure="accuracy"), "measure"),
    "another order": (kept_as(models=["quantized", "original"]), "models"),
    "other tasks": (kept_as(tasks=["cmmlu"]), "tasks"),
    "style": (kept_as(style="chat"), "style"),
    "shots": (kept_as(shots=[5]), "shots"),
    "whose wording": (kept_as(prompt_format="lm-eval"), "prompt_format"),
    "backend": (kept_as(backend="lm-eval"), "backend"),
}


@pytest.mark.parametrize(("edit", "key"), TASKS.values(), ids=list(TASKS))
def test_items_of_another_run_are_refused(begun: Callable[[Run], Path], tmp_path: Path, edit: Edit, key: str) -> None:
    refused_for(begun(run_tasks), tmp_path, run_tasks, edit, key)


def harness(model: Any, tokenizer: Any, data: TaskSet, *, label: str, **options: Any) -> LmEvalRun:
    fields: dict[str, Any] = {"label": label, "task": data.task, "choice_logprobs_nats": None, "output": None}
    items = [TaskItem(id=i.id, group=i.group, truth=i.truth, answer="A", correct=False, **fields) for i in data.items]
    return LmEvalRun(items, truncated=1)


def test_another_version_of_the_harness_is_another_run(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.options["backend"] = "lm-eval"
    monkeypatch.setattr(asking, "run_lm_eval", harness)
    monkeypatch.setattr("qquant.tasks.lm_eval_backend.require_lm_eval", lambda: "0.4.13")
    run_tasks(setting, resume=False)
    monkeypatch.setattr("qquant.tasks.lm_eval_backend.require_lm_eval", lambda: "0.4.14")
    with pytest.raises(UsageError, match=r"is of another: lm_eval was '0\.4\.13' and is '0\.4\.14';"):
        run_tasks(setting, resume=True)


def never(*arguments: Any, **named: Any) -> Any:
    raise AssertionError("a finished piece was done again")


def test_shortened_prompts_of_finished_batches_still_count(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, checkpoint: Factory
) -> None:
    room = checkpoint("qwen2", max_position_embeddings=32)  # less than the question and its example take
    setting.baseline = setting.candidate = twin(room, setting.folder / "short")
    setting.options = {"shots": 1, "batch_size": 1}
    whole, items = run_tasks(setting, resume=False)
    assert whole.tasks is not None
    assert [score.truncated_items for score in whole.tasks.scores] == [1, 1]
    monkeypatch.setattr(asking, "answer", never)
    again, same = run_tasks(setting, resume=True)
    assert again.tasks is not None
    assert [score.truncated_items for score in again.tasks.scores] == [1, 1]
    assert same == items


def test_shortened_prompts_that_the_harness_had_still_count(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.options["backend"] = "lm-eval"
    monkeypatch.setattr(asking, "run_lm_eval", harness)
    monkeypatch.setattr("qquant.tasks.lm_eval_backend.require_lm_eval", lambda: "0.4.13")
    run_tasks(setting, resume=False)
    monkeypatch.setattr(asking, "run_lm_eval", never)
    again, _ = run_tasks(setting, resume=True)
    assert again.tasks is not None
    assert [score.truncated_items for score in again.tasks.scores] == [1, 1]


# ---- a profile


def simulate(monkeypatch: pytest.MonkeyPatch, ends: dict[int, Any]) -> list[int]:
    """Cells are not measured; by their batch they end as ``ends`` says, else well. Lists the batches asked for."""
    asked: list[int] = []

    def measure(request: CellRequest, on_step: Callable[[int, int], None]) -> ProfileCell:
        asked.append(request.key.batch)
        status = ends.get(request.key.batch, "ok")
        nothing: dict[str, Any] = dict.fromkeys(("memory", "speed", "predicted", "measured_peak_bytes"))
        return ProfileCell(key=request.key, status=status, reason=None if status == "ok" else "why", **nothing)

    monkeypatch.setattr(profile_grid, "measure_apart", measure)
    return asked


def run_cells(setting: Setting, *, resume: bool) -> Result:
    with contextlib.chdir(setting.folder):  # a configuration says which path it was read from
        names = [setting.baseline], [setting.candidate.name]
        return profile_models(*names, Grid(**setting.options), journal=setting.journal, resume=resume)


def candidate_config(setting: Setting) -> None:
    file = setting.candidate / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, "intermediate_size": 192}), encoding="utf-8")


CELLS: dict[str, tuple[Edit, str]] = {
    "a folder's weights": (baseline_weights, "models"),
    "a folder's config": (baseline_config, "models"),
    "the shapes of random weights": (candidate_config, "models"),
    "another batch": (options(batches=(1, 2)), "profile"),
    "another cache": (options(kv_caches=("plain", "int8")), "profile"),
    "repeats": (options(repeats=3), "profile"),
    "warm-ups": (options(warmups=2), "profile"),
    "seed": (options(seed=1), "profile"),
    "group size": (options(group_size=64), "profile"),
    "memory limit": (options(memory_limit_bytes=2**30), "profile"),
    "threads": (options(threads=1), "profile"),
    "device": (kept_as(device="cuda"), "device"),
    **{name: (kept_as(**{name: "another"}), name) for name in ("python", "torch", "transformers", "qquant", "cpu")},
    "libraries": (kept_as(libraries={"safetensors": "0"}), "libraries"),
}


@pytest.mark.parametrize(("edit", "key"), CELLS.values(), ids=list(CELLS))
def test_cells_of_another_run_are_refused(begun: Callable[[Run], Path], tmp_path: Path, edit: Edit, key: str) -> None:
    refused_for(begun(run_cells), tmp_path, run_cells, edit, key)


def test_only_cells_that_failed_are_tried_again(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*, resume: bool) -> list[str]:
        grid = Grid(batches=(1, 2, 3, 4))
        found = profile_models([setting.baseline], [], grid, journal=setting.journal, resume=resume).profile
        assert found is not None
        return [cell.status for cell in found.cells]

    asked = simulate(monkeypatch, {2: "out-of-memory", 3: "failed"})
    assert run(resume=False) == ["ok", "out-of-memory", "failed", "ok"]
    assert asked == [1, 2, 3, 4]
    asked = simulate(monkeypatch, {3: "failed"})
    assert run(resume=True) == ["ok", "out-of-memory", "failed", "ok"]
    assert asked == [3]
    asked = simulate(monkeypatch, {})
    assert run(resume=True) == ["ok", "out-of-memory", "ok", "ok"]
    assert asked == [3]
    asked = simulate(monkeypatch, {})
    assert run(resume=True) == ["ok", "out-of-memory", "ok", "ok"]
    assert asked == []
