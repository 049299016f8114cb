"""``--measure long-context`` at the door: what it writes for a Qwen v1 model and for others, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from qquant.errors import UsageError
from qquant.eval import evaluate_long_context
from qquant.results import result_from_json
from tests.make_qwen_v1 import make_qwen_v1


def test_the_door_measures_a_v1_folder_on_its_own_text(
    run_eval: Callable[..., Result], held_out: Path, tmp_path: Path
) -> None:
    model, out = make_qwen_v1(tmp_path / "model"), tmp_path / "report"
    shutil.copy(held_out, model / "eval.txt")
    words = ["--measure", "long-context", "--baseline", model, "--lengths", "32,8,16", "--out", out]
    result = run_eval(*words, "--max-tokens", 100)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out / 'report.md'}\n"
    report = result_from_json((out / "report.json").read_bytes())
    assert report.long_context is not None
    assert report.kv_cache is None
    assert report.long_context.lengths_tokens == (8, 16, 32)
    assert [row.setting for row in report.long_context.models[0].rows] == ["plain", "ntk", "ntk_logn", "logn"]
    assert report.data is not None
    assert (report.data.name, report.data.tokens, report.data.window_tokens) == ("eval.txt", 97, 32)
    (row,) = report.rows
    assert (row.checkpoint_dtype, row.accuracy, row.speed) == ("float32", None, None)
    markdown = (out / "report.md").read_text(encoding="utf-8")
    assert "### Perplexity by sequence length" in markdown
    assert "## Speed" not in markdown
    assert str(tmp_path) not in markdown + (out / "report.json").read_text()
    assert json.loads((out / "report.json").read_text())["command"].startswith("python -m qquant.eval --measure ")


def test_the_door_compares_a_quantized_candidate_of_another_family(
    run_eval: Callable[..., Result], tiny_qwen2: Path, held_out: Path, tmp_path: Path
) -> None:
    from qquant.config import QuantizeConfig
    from qquant.quantizing import quantize_checkpoint

    quantized, out = tmp_path / "int4", tmp_path / "report"
    quantize_checkpoint(tiny_qwen2, None, QuantizeConfig(method="rtn", bits=4, group_size=32), quantized)
    words = ["--measure", "long-context", "--baseline", tiny_qwen2, "--candidate", quantized, "--data", held_out]
    result = run_eval(*words, "--lengths", "32,64", "--max-tokens", 200, "--out", out)
    assert result.exit_code == 0, result.stderr
    report = result_from_json((out / "report.json").read_bytes())
    assert report.long_context is not None
    base, candidate = report.long_context.models
    assert (base.made_for_tokens, [row.setting for row in base.rows]) == (256, ["as_configured"])
    assert candidate.label == "int4"
    assert candidate.rows[0].points[0].whole.to_baseline is not None
    assert report.rows[1].bits == 4


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--measure long-context", 2, "give --lengths 1024,2048,4096"),
        ("--measure speed", 2, "measure must be one of accuracy, long-context, tasks, got 'speed'"),
        ("--lengths 8,16", 2, "--lengths belongs to --measure long-context, got --measure accuracy"),
        ("--measure long-context --lengths 8 --kv-cache int8", 2, "--kv-cache belongs to --measure accuracy"),
        ("--measure long-context --lengths 8 --kv-tokens 9", 2, "--kv-tokens belongs to"),
        ("--measure long-context --lengths 8 --seq-len 512", 2, "--seq-len belongs to"),
        ("--measure long-context --lengths 8 --stride 4", 2, "--stride belongs to"),
        ("--measure long-context --lengths 8 --no-speed", 2, "--speed belongs to"),
        ("--measure long-context --lengths 8,x", 2, "lengths must be whole numbers"),
        ("--measure long-context --lengths 8192", 5, "lower --lengths or give a longer text with --data"),
    ],
)
def test_the_door_refuses_in_one_line_and_leaves_nothing(
    run_eval: Callable[..., Result], tiny_qwen2: Path, held_out: Path, tmp_path: Path, words: str, code: int, said: str
) -> None:
    result = run_eval("--baseline", tiny_qwen2, "--data", held_out, "--out", tmp_path / "r", *words.split())
    assert result.exit_code == code, result.stderr
    assert said in next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert list(tmp_path.iterdir()) == []


def test_counts_below_one_are_refused(tiny_qwen2: Path, held_out: Path) -> None:
    with pytest.raises(UsageError, match="max_tokens and threads"):
        evaluate_long_context(tiny_qwen2, [], held_out, lengths=(8,), max_tokens=0)
