"""``--activation-bits 8``: a row beside each quantized candidate, its cost in the report, and where it is refused.

No kernel is needed here: the operator's reference rounds activations, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from qquant import _native, linear_kernels, results
from qquant.config import QuantizeConfig
from qquant.errors import UsageError
from qquant.eval import evaluate_checkpoints
from qquant.eval_models import with_rounded
from qquant.quantizing import quantize_checkpoint
from qquant.result_files import to_markdown
from qquant.results import result_from_json

NAME = "int4 with int8 activations"


@pytest.fixture(scope="session")
def int4(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized candidate with a log of its layers."""
    out = tmp_path_factory.mktemp("quantized") / "int4"
    quantize_checkpoint(tiny_qwen2, None, QuantizeConfig(method="rtn", bits=4, group_size=32), out)
    return out


@pytest.fixture(scope="module")
def kernels() -> Iterator[None]:
    """As if the compiled kernels were here; where they are not, the reference does their work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_kernels, "_missing", lambda module, key: "")
        if _native._load("qquant._C")[0] is None:
            patch.setattr(_native, "describe", lambda name: "panel_linear: avx2")
        patch.setattr(linear_kernels, "_place_of", linear_kernels._place_of.__wrapped__)
        yield


@pytest.fixture(scope="module")
def report(tiny_qwen2: Path, int4: Path, held_out: Path, kernels: None) -> results.Result:
    """One evaluation that several tests look at."""
    options: dict[str, Any] = {"seq_len": 32, "max_tokens": 80, "speed": False, "activation_bits": 8}
    return evaluate_checkpoints(tiny_qwen2, [tiny_qwen2, int4], held_out, **options)


def test_every_quantized_candidate_has_a_second_row_behind_its_own(report: results.Result) -> None:
    assert [row.label for row in report.rows[2:]] == ["int4", NAME]
    assert [row.activation_bits for row in report.rows] == [None, None, None, 8]
    exact, rounded = report.rows[2:]
    assert (rounded.sha256, rounded.weights_bytes, rounded.bits) == (exact.sha256, exact.weights_bytes, 4)


def test_the_cost_of_rounding_stands_in_the_report(report: results.Result) -> None:
    exact, rounded = (row.accuracy for row in report.rows[2:])
    assert exact is not None
    assert rounded is not None
    assert exact.kl_mean_nats is not None
    assert rounded.kl_mean_nats is not None
    assert rounded.kl_mean_nats > 0
    assert rounded.nll_mean_nats != exact.nll_mean_nats
    # Steps of 1 / 127 of the largest in 32 are an error of a few thousandths: far less than 4 bits make of weights.
    assert abs(rounded.kl_mean_nats - exact.kl_mean_nats) < exact.kl_mean_nats
    markdown = to_markdown(report)
    assert f"| {NAME} |" in markdown
    assert "*With int8 activations*: the same weights" in markdown


def test_errors_of_layers_are_shown_once(report: results.Result) -> None:
    assert len(report.rows[2].layer_errors) == 14
    assert report.rows[3].layer_errors == ()


def test_no_row_is_added_unless_asked_for(tiny_qwen2: Path, int4: Path, held_out: Path) -> None:
    found = evaluate_checkpoints(tiny_qwen2, [int4], held_out, seq_len=32, max_tokens=40, speed=False)
    assert [row.activation_bits for row in found.rows] == [None, None]
    assert "int8 activations" not in to_markdown(found)


def test_a_record_keeps_the_bits_of_activations(report: results.Result) -> None:
    assert result_from_json(report.model_dump_json()) == report


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("bits", "quantized", "device", "said"),
    [
        (8, False, "cpu", "no candidate is quantized"),
        (4, True, "cpu", "activation_bits must be 8, .*, got 4"),
        (8, True, "cuda:0", "on cuda"),
    ],
    ids=["plain_candidate", "other_width", "gpu"],
)
def test_what_cannot_be_rounded_is_refused(
    tiny_qwen2: Path,
    int4: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    quantized: bool,
    device: str,
    said: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    folders = {"base": tiny_qwen2, "other": int4 if quantized else tiny_qwen2}
    with pytest.raises(UsageError, match=said):
        with_rounded(folders, torch.bfloat16, torch.device(device), activation_bits=bits)


def test_a_missing_kernel_is_one_line(
    run_eval: Callable[..., Result],
    tiny_qwen2: Path,
    int4: Path,
    held_out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = linear_kernels.Place("cpu", "portable", "portable", "qquant._C: not built")
    monkeypatch.setattr(linear_kernels, "_place_of", lambda kind, index: place)
    words = ["--baseline", tiny_qwen2, "--candidate", int4, "--data", held_out, "--out", tmp_path / "r"]
    result = run_eval(*words, "--seq-len", 32, "--activation-bits", 8)
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "activation_bits 8 needs our CPU kernels, qquant._C: not built" in line
    assert not (tmp_path / "r").exists()


def test_the_option_belongs_to_texts(run_eval: Callable[..., Result], tiny_qwen2: Path, tmp_path: Path) -> None:
    words = ["--baseline", tiny_qwen2, "--tasks", "mmlu", "--task-data", tmp_path, "--out", tmp_path / "r"]
    result = run_eval(*words, "--activation-bits", 8)
    assert result.exit_code == 2
    assert "--activation-bits belongs to --measure accuracy" in result.stderr


@pytest.mark.usefixtures("kernels")
def test_the_command_writes_the_row(
    run_eval: Callable[..., Result], tiny_qwen2: Path, int4: Path, held_out: Path, tmp_path: Path
) -> None:
    words = ["--baseline", tiny_qwen2, "--candidate", int4, "--data", held_out, "--out", tmp_path / "r", "--no-speed"]
    result = run_eval(*words, "--seq-len", 16, "--max-tokens", 40, "--activation-bits", 8)
    assert result.exit_code == 0, result.stderr
    report = result_from_json((tmp_path / "r" / "report.json").read_bytes())
    assert [row.label for row in report.rows][1:] == ["int4", NAME]
