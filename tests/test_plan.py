"""``qquant plan`` answers without weights, and ends with code 3 where nothing fits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from typer.testing import Result as Outcome

from qquant.cli import app
from qquant.errors import BadModelError, UsageError
from qquant.plan_report import Plan
from qquant.planning import Question, plan_model, what_would_fit
from qquant.results import Result
from tests.conftest import Factory


def run(*words: Any) -> Outcome:
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def plan(model: str, **options: Any) -> Plan:
    found = plan_model(model, Question(**options), command="qquant plan").plan
    assert found is not None
    return found


def test_every_combination_is_a_cell() -> None:
    found = plan("qwen-1.8b", kv_caches=("bf16", "int8", "int4"), batches=(1, 4), new_tokens=(64, 128))
    assert len(found.cells) == 3 * 3 * 2 * 2
    assert found.limits == ()
    assert {row.bits for row in found.quantizing} == {4, 8}


def test_a_folder_without_weights_is_enough(tiny_qwen2: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_qwen2 / "config.json").read_bytes())
    with_weights = plan(str(tiny_qwen2), group_size=32)
    assert plan(str(tmp_path), group_size=32).cells == with_weights.cells
    assert plan(str(tmp_path / "config.json"), group_size=32).cells == with_weights.cells


def test_a_model_that_is_nowhere_is_one_clear_error() -> None:
    with pytest.raises(BadModelError, match=r"is none; sizes: qwen-1\.8b"):
        plan("no-such-model")


def test_without_a_network_a_hub_id_is_one_clear_error() -> None:
    # Tests run with HF_HUB_OFFLINE=1.
    done = run("nobody/no-such-model")
    assert done.exit_code == 4
    assert "the hub did not give its config.json" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_is_said_to_fit_fits_and_one_more_does_not() -> None:
    card = 24 * 2**30
    options: dict[str, Any] = {"precisions": ("int4",), "kv_caches": ("int8",), "device_bytes": card}
    limit = plan("qwen-14b", **options).limits[0]
    for batch, fits in ((limit.largest_batch, True), (limit.largest_batch + 1, False)):
        assert plan("qwen-14b", **options, batches=(batch,)).cells[0].fits is fits
    longest = limit.largest_tokens - 512
    for prompt, fits in ((longest, True), (longest + 1, False)):
        assert plan("qwen-14b", **options, prompt_tokens=(prompt,)).cells[0].fits is fits
    assert limit.beyond_model is (limit.largest_tokens > 8192)


def test_nothing_fits_says_what_would() -> None:
    found = plan("qwen-72b", device_bytes=24 * 2**30)
    said = what_would_fit(found)
    assert said is not None
    assert "nothing fits 24.00 GiB: qwen-72b in int4 with an int8 cache" in said
    assert "or 2 of them" in said


def test_a_cell_too_large_names_the_batch_that_fits() -> None:
    found = plan("qwen-7b", precisions=("int4",), kv_caches=("int8",), batches=(512,), device_bytes=24 * 2**30)
    assert found.cells[0].fits is False
    said = what_would_fit(found)
    assert said is not None
    assert f"int4 with an int8 cache fits at batch {found.limits[0].largest_batch}" in said


EXIT_CODES: dict[str, tuple[tuple[str, ...], int]] = {
    "fits": (("qwen-7b", "--gpu", "24GiB"), 0),
    "something_fits": (("qwen-72b", "--gpu", "80GiB"), 0),
    "nothing_fits": (("qwen-72b", "--gpu", "24GB"), 3),
    "asked_cell_does_not": (("qwen-7b", "--gpu", "24GB", "--precision", "bf16", "--batch", "64"), 3),
    "no_card": (("qwen-72b",), 0),
    "bad_size": (("qwen-72b", "--gpu", "24 apples"), 2),
    "bad_precision": (("qwen-72b", "--precision", "int5"), 2),
    "bad_number": (("qwen-72b", "--batch", "1;4"), 2),
    "bad_count": (("qwen-72b", "--batch", "0"), 2),
    "bad_runtime": (("qwen-72b", "--runtime", "qwen-2022"), 2),
    "empty_list": (("qwen-7b", "--kv", ""), 2),
    "more_than_a_report_can_show": (("qwen-7b", "--batch", "9" * 400, "--gpu", "24GiB"), 2),
    "plain_cache_of_another_dtype": (("qwen-7b", "--precision", "fp32", "--kv", "bf16"), 2),
    "group_does_not_divide": (("qwen-7b", "--group-size", "48"), 2),
}


@pytest.mark.parametrize(("words", "code"), EXIT_CODES.values(), ids=list(EXIT_CODES))
def test_the_exit_code_tells_whether_it_fits(words: tuple[str, ...], code: int) -> None:
    done = run(*words)
    assert done.exit_code == code, done.output
    assert done.stderr.startswith("error: ") is (code != 0)


def test_quantizing_is_planned_for_the_method_that_is_named() -> None:
    best, gptq = (plan("qwen-1.8b", method=method).quantizing[0] for method in ("best", "gptq"))
    assert plan("qwen-1.8b").quantizing[0] == best
    assert (best.method, gptq.method) == ("best", "gptq")
    assert gptq.least_bytes is not None
    assert gptq.least_bytes < gptq.device_bytes < best.device_bytes
    assert "tokens, method gptq. With less" in run("qwen-1.8b", "--method", "gptq").stdout
    assert run("qwen-1.8b", "--method", "bestest").exit_code == 2


def test_a_plain_cache_is_in_what_is_computed_in() -> None:
    found = plan("qwen-1.8b", precisions=("fp32", "fp16", "int4"))
    kinds = [(cell.precision, cell.kv_cache) for cell in found.cells]
    assert kinds == [
        (p, kv) for p, own in (("fp32", "fp32"), ("fp16", "fp16"), ("int4", "bf16")) for kv in (own, "int8")
    ]


def test_values_in_4_bits_need_heads_of_32_channels(tiny_qwen2: Path) -> None:
    with pytest.raises(UsageError, match=r"a head of qwen2 here has 16; leave int4 out of --kv"):
        plan(str(tiny_qwen2), group_size=32, kv_caches=("int4",))


def test_sizes_are_printed_in_a_unit_that_shows_them(tiny_qwen2: Path) -> None:
    small, large = run(tiny_qwen2, "--group-size", 32), run("qwen-1.8b")
    assert "In MiB (2^20 bytes)." in small.stdout
    assert "GiB (" not in small.stdout
    assert "In GiB (2^30 bytes)." in large.stdout
    assert "MiB" not in large.stdout
    assert "nothing fits 2.00 MiB" in run("qwen-1.8b", "--gpu", "2MiB").stderr


def test_more_tokens_than_positions_are_said(tiny_qwen2: Path) -> None:
    said = "are more than the 256 positions"
    assert said in run(tiny_qwen2, "--group-size", 32, "--prompt-tokens", 250, "--new-tokens", 7).stdout
    assert said not in run(tiny_qwen2, "--group-size", 32, "--prompt-tokens", 250, "--new-tokens", 6).stdout


def test_json_is_the_whole_record() -> None:
    done = run("qwen-1.8b", "--json", "--gpu", "24GiB")
    record = Result.model_validate_json(done.stdout)
    assert record.plan is not None
    assert record.plan.device_bytes == 24 * 2**30
    assert record.rows[0].parameters == 1_836_828_672


def test_out_makes_a_report_folder(tmp_path: Path) -> None:
    done = run("qwen-1.8b", "--out", tmp_path / "plan")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "plan" / "report.json").read_text())["plan"]["model"] == "qwen-1.8b"
    assert "## Tensor parallel" in (tmp_path / "plan" / "report.md").read_text()
    assert run("qwen-1.8b", "--out", tmp_path / "plan").exit_code == 2


def test_tables_are_narrow_enough_to_read() -> None:
    lines = [line for line in run("qwen-7b", "--gpu", "24GiB").stdout.splitlines() if line.startswith("|")]
    assert max(map(len, lines)) <= 100


DIVIDES: dict[str, tuple[str, str, int, str | None]] = {
    "one_card": ("qwen2.5-72b", "int4", 1, None),
    "odd_groups": ("qwen2.5-72b", "int4", 2, "model.layers.0.mlp.down_proj: 29568 / 128 = 231 groups by 2"),
    "even_groups": ("qwen-72b", "int4", 8, None),
    "plain": ("qwen2.5-72b", "bf16", 8, None),
    "heads": ("qwen2.5-7b", "bf16", 8, "28 query heads by 8"),
    "groups_of_14b": ("qwen-14b", "int8", 2, "transformer.h.0.mlp.c_proj: 13696 / 128 = 107 groups by 2"),
}


@pytest.mark.parametrize(("model", "precision", "ranks", "reason"), DIVIDES.values(), ids=list(DIVIDES))
def test_the_first_matrix_that_cannot_be_cut_is_named(
    model: str, precision: Any, ranks: int, reason: str | None
) -> None:
    found = plan(model, precisions=(precision,))
    row = next(row for row in found.tensor_parallel if row.ranks == ranks)
    assert (row.fits, row.reason) == (reason is None, reason)


def test_a_smaller_group_that_divides_lets_it_be_cut() -> None:
    rows = plan("qwen2.5-72b", precisions=("int4",), group_size=32).tensor_parallel
    assert [row.fits for row in rows] == [True, True, True, False]  # 924 groups


def test_cards_are_offered_only_where_the_matrices_can_be_cut() -> None:
    # 48 GiB of Int4 on two cards of 40 would have room, but 29568 / 128 = 231 groups cannot be cut.
    found = plan("qwen2.5-72b", precisions=("int4",), device_bytes=30 * 2**30)
    said = what_would_fit(found)
    assert said is not None
    assert "of them" not in said


def test_key_and_value_heads_may_lie_on_several_cards_but_not_in_part(checkpoint: Factory) -> None:
    few = checkpoint("llama", num_attention_heads=12, num_key_value_heads=3, hidden_size=96)
    rows = plan(str(few), precisions=("bf16",)).tensor_parallel
    assert [(row.ranks, row.fits) for row in rows[:3]] == [(1, True), (2, False), (4, False)]
    assert rows[1].reason == "3 key and value heads by 2"
    shared = plan(str(checkpoint("llama")), precisions=("bf16",)).tensor_parallel  # 4 query heads, 2 of keys and values
    assert [row.fits for row in shared] == [True, True, True, False]


def test_a_group_size_that_divides_nothing_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"transformer\.h\.0\.attn\.c_attn.*48 does not divide 4096"):
        plan("qwen-7b", group_size=48)


def test_the_original_code_cannot_be_planned_for_a_cpu() -> None:
    with pytest.raises(UsageError, match="leave out --device cpu"):
        Question(runtime="qwen-2023", device="cpu")


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, qquant.plan; print(sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
