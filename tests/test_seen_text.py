"""From quantizing to evaluating by command: several sources, and a text that calibration had seen."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qquant.calibrate import samples_from_ids
from qquant.cli import app
from qquant.config import QuantizeConfig
from qquant.eval import evaluate_checkpoints
from qquant.evaluation import evaluate_long_context
from qquant.model_folder import load_tokenizer
from qquant.quantizing import quantize_checkpoint
from qquant.result_files import to_markdown
from qquant.results import result_from_json
from qquant.seen_text import seen_questions
from qquant.task_evaluation import evaluate_tasks
from qquant.tasks.runner import Reply
from tests.task_files import write_lines

OPTIONS: dict[str, Any] = {"seq_len": 32, "speed": False}


def words(seed: int, count: int = 600) -> str:
    drawn = random.Random(seed)
    return " ".join("".join(drawn.choices("abcdefghijklmnop", k=drawn.randint(2, 6))) for _ in range(count))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is calibrated on, another text of the same kind, and one that is half of each."""
    folder = tmp_path_factory.mktemp("texts")
    contents = {"seen": words(0), "other": words(1), "half": f"{words(0, 300)} {words(1, 300)}"}
    for name, content in contents.items():
        (folder / f"{name}.txt").write_text(content, encoding="utf-8")
    return {name: folder / f"{name}.txt" for name in contents}


@pytest.fixture(scope="module")
def int4(tiny_qwen2: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was calibrated on all of one text, in windows of 200 tokens."""
    tokenizer = load_tokenizer(tiny_qwen2)
    ids = tokenizer.encode(texts["seen"].read_text(encoding="utf-8"), add_special_tokens=False)
    samples = samples_from_ids([ids[at : at + 200] for at in range(5, len(ids) - 1, 200)])
    out = tmp_path_factory.mktemp("quantized") / "int4"
    quantize_checkpoint(tiny_qwen2, samples, QuantizeConfig(method="gptq", bits=4, group_size=32), out)
    return out


def test_the_manifest_holds_a_sketch_and_no_ids(int4: Path) -> None:
    data = json.loads((int4 / "manifest.json").read_text())["data"]
    assert data.keys() == {"sha256", "samples", "sketch"}
    assert data["sketch"].keys() == {"ngram_tokens", "shift_bits", "limit", "hashes"}
    assert len(json.dumps(data)) < 6200


@pytest.mark.parametrize(("name", "low", "high"), [("seen", 0.9, 1), ("half", 0.4, 0.55)], ids=["all", "half"])
def test_evaluating_on_what_was_calibrated_on_is_warned_of_once(
    name: str, low: float, high: float, int4: Path, tiny_qwen2: Path, texts: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    found = evaluate_checkpoints(tiny_qwen2, [int4, int4], texts[name], **OPTIONS)
    base, *shares = (row.calibration_overlap for row in found.rows)
    assert base is None
    share = shares[0]
    assert share is not None
    assert shares == [share, share]
    assert low <= share <= high
    (warning,) = (record.getMessage() for record in caplog.records if "overlap" in record.getMessage())
    assert warning.startswith("calibration and evaluation text overlap: of the evaluation's runs of 16 tokens, ")
    assert f"{share:.0%} by int4 had been seen" in warning
    assert "evaluate on another text" in warning
    assert f"calibration had seen about {share:.1%} (int4), " in to_markdown(found)
    assert result_from_json(found.model_dump_json()) == found


def test_another_text_of_the_same_kind_is_not_warned_of(
    int4: Path, tiny_qwen2: Path, texts: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    found = evaluate_checkpoints(tiny_qwen2, [int4], texts["other"], **OPTIONS)
    assert found.rows[1].calibration_overlap == 0
    assert "overlap" not in caplog.text
    assert "calibration had seen" not in to_markdown(found)


def test_long_context_is_warned_of_too(
    int4: Path, tiny_qwen2: Path, texts: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    found = evaluate_long_context(tiny_qwen2, [int4], texts["seen"], lengths=[32, 64], max_tokens=300)
    assert found.rows[1].calibration_overlap is not None
    assert found.rows[1].calibration_overlap > 0.8
    assert "calibration and evaluation text overlap" in caplog.text


@pytest.mark.parametrize("change", ["no sketch", "no data", "no manifest"])
def test_checkpoints_without_a_sketch_say_nothing(
    change: str, int4: Path, tiny_qwen2: Path, texts: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "older"
    shutil.copytree(int4, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["data"] = {"sha256": "0", "samples": 3} if change == "no sketch" else {}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    if change == "no manifest":
        (folder / "manifest.json").unlink()
    found = evaluate_checkpoints(tiny_qwen2, [folder], texts["seen"], max_tokens=100, **OPTIONS)
    assert found.rows[1].calibration_overlap is None
    assert "overlap" not in caplog.text


def test_a_sketch_that_cannot_be_read_is_said_and_nothing_more(
    int4: Path, tiny_qwen2: Path, texts: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(int4, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["data"]["sketch"] = 5
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = evaluate_checkpoints(tiny_qwen2, [folder], texts["seen"], max_tokens=100, **OPTIONS)
    assert found.rows[1].calibration_overlap is None
    assert "whether it was calibrated on the evaluation text is not known" in caplog.text


def test_the_command_says_it_on_stderr(
    run_eval: Callable[..., Result], int4: Path, tiny_qwen2: Path, texts: dict[str, Path], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    done = run_eval("--baseline", tiny_qwen2, "--candidate", int4, "--data", texts["seen"], "--seq-len", 32,
                    "--max-tokens", 200, "--no-speed", "--out", tmp_path / "report")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert caplog.text.count("calibration and evaluation text overlap") == 1
    row = json.loads((tmp_path / "report" / "report.json").read_text())["rows"][1]
    assert row["calibration_overlap"] > 0.8


# --- questions of tasks


def asked(text: str) -> list[str]:
    """Questions of 40 words each."""
    found = text.split()
    return [" ".join(found[at : at + 40]) for at in range(0, len(found), 40)]


def test_questions_that_were_calibrated_on_are_warned_of_task_by_task(
    int4: Path, tiny_qwen2: Path, texts: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    tasks = {name: asked(file.read_text(encoding="utf-8")) for name, file in texts.items()}
    tokenizer = load_tokenizer(tiny_qwen2)
    labels = {"tiny": tiny_qwen2, "int4": int4}
    shares = seen_questions(labels, dict.fromkeys(labels, tokenizer), tasks)
    assert shares.keys() == {"int4"}  # the original has no sketch
    assert shares["int4"] > 0.5  # of the task "seen"; windows of calibration cut some questions in two
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("calibration and questions of seen overlap: of the evaluation's runs of 16 tokens, ")
    assert f"{shares['int4']:.0%} by int4" in first
    assert second.startswith("calibration and questions of half overlap")
    assert second.endswith("leave that task out, or calibrate on other data")


def test_questions_too_short_for_a_run_say_nothing(int4: Path, tiny_qwen2: Path) -> None:
    assert seen_questions({"int4": int4}, {"int4": load_tokenizer(tiny_qwen2)}, {"mmlu": ["a b", "c d"]}) == {}


def test_an_evaluation_on_tasks_warns_and_records_it(
    int4: Path, tiny_qwen2: Path, texts: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def silent(model: Any, tokenizer: Any, questions: Any, *, batch_size: int) -> list[Reply]:
        return [Reply(None, "", False) for _ in questions]

    monkeypatch.setattr("qquant.tasks.asking.answer", silent)
    questions = asked(texts["seen"].read_text(encoding="utf-8"))
    write_lines(tmp_path / "test.jsonl", [{"question": one, "answer": "So it is.\n#### 1"} for one in questions])
    found, _ = evaluate_tasks(tiny_qwen2, [int4], tasks=["gsm8k"], data={"gsm8k": tmp_path}, shots=0, style="base")
    base, candidate = (row.calibration_overlap for row in found.rows)
    assert base is None
    assert candidate is not None
    assert candidate > 0.5
    assert "calibration and questions of gsm8k overlap" in caplog.text
    assert f"calibration had seen about {candidate:.1%} (int4)" in to_markdown(found)


# --- several sources on the command line


def quantize(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def test_sources_and_weights_are_told_in_a_dry_run(tiny_qwen2: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    done = quantize("--model", tiny_qwen2, "--data", texts["seen"], "--data", f"{texts['other']}=3", "--out",
                    tmp_path / "q", "--seq-len", 32, "--n-samples", 8, "--group-size", 32, "--dry-run")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert f"source    {texts['seen']}: 2 samples, 64 tokens (25%), plain text\n" in done.stdout
    assert f"source    {texts['other']}: 6 samples, 192 tokens (75%), plain text\n" in done.stdout
    assert "template  the model has a chat template and none of the data went through it" in done.stdout


def test_sources_are_told_on_stderr_and_stdout_stays_the_path(
    tiny_qwen2: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    done = quantize("--model", tiny_qwen2, "--data", texts["seen"], "--data", texts["other"], "--out", tmp_path / "q",
                    "--seq-len", 64, "--n-samples", 4, "--group-size", 32, "--chat-template", "--select",
                    "spread")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'q'}\n"
    assert done.stderr.count("2 samples, 128 tokens (50%), plain text in the chat template") == 2
    assert json.loads((tmp_path / "q" / "manifest.json").read_text())["data"]["samples"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "a.txt", "--data", "a.txt"], "a source must be named once"),
        (["--data", "a.txt=0"], "a weight must be a number above zero"),
        (["--select", "best"], "select must be random or spread"),
    ],
    ids=["twice", "no weight", "select"],
)
def test_what_makes_no_mixture_is_a_usage_error(
    options: list[str], message: str, tiny_qwen2: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    if "--data" not in options:
        options = [*options, "--data", str(texts["seen"])]
    done = quantize("--model", tiny_qwen2, "--out", tmp_path / "q", *options)
    assert done.exit_code == 2
    assert message in done.stderr
