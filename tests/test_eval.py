"""The door on tiny random checkpoints: what it prints, writes, refuses, and that nothing local leaks into a report."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from qquant import results
from qquant.errors import BadDataError, BadModelError, UsageError
from qquant.eval import evaluate_checkpoints
from qquant.results import result_from_json
from tests.conftest import Factory
from tests.make_qwen_v1 import make_qwen_v1


@pytest.fixture(scope="session")
def other(checkpoint: Factory) -> Path:
    """A second model of the same shape, with other weights."""
    return checkpoint("qwen2", seed=1)


@pytest.fixture(scope="session")
def report(tiny_qwen2: Path, other: Path, held_out: Path) -> results.Result:
    """One evaluation that several tests look at."""
    return evaluate_checkpoints(tiny_qwen2, [tiny_qwen2, other], held_out, seq_len=32, max_tokens=101)


def test_a_model_beside_itself_differs_by_nothing(report: results.Result) -> None:
    base, same, _ = report.rows
    assert base.accuracy is not None
    assert same.accuracy is not None
    assert (same.accuracy.kl_max_nats, same.accuracy.top1_agreement) == (0, 1)
    assert same.accuracy.perplexity == base.accuracy.perplexity
    assert same.label != base.label


def test_another_model_differs(report: results.Result) -> None:
    found = report.rows[2].accuracy
    assert found is not None
    assert found.kl_mean_nats is not None
    assert found.kl_mean_nats > 0
    assert found.tokens == 100


def test_sizes_and_bits_are_those_of_the_files(report: results.Result, tiny_qwen2: Path) -> None:
    base = report.rows[0]
    assert base.weights_bytes == (tiny_qwen2 / "model.safetensors").stat().st_size
    assert base.bits_per_weight == pytest.approx(32, rel=0.05)  # float32, and a header that counts in a tiny file
    assert base.bits is None
    assert report.rows[1].ratios is not None
    assert report.rows[1].ratios.weights_bytes == 1


def test_speed_and_memory_are_measured_for_every_model(report: results.Result) -> None:
    for row in report.rows:
        assert row.speed is not None
        assert row.speed.prompt_tokens == 32
        assert row.speed.decode_tokens_per_second > 0
        assert row.memory is not None
        assert row.memory.tensor_bytes is not None
        assert row.memory.tensor_bytes > 100_000


def test_the_stride_is_half_a_window_unless_given(report: results.Result) -> None:
    assert report.data is not None
    assert (report.data.window_tokens, report.data.stride_tokens, report.data.tokens) == (32, 16, 101)


def test_perplexity_is_that_of_the_model_called_by_hand(tiny_qwen2: Path, held_out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = evaluate_checkpoints(tiny_qwen2, [tiny_qwen2], held_out, seq_len=100, max_tokens=101, speed=False)
    ids = AutoTokenizer.from_pretrained(tiny_qwen2)(held_out.read_text(encoding="utf-8"))["input_ids"][:101]
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    with torch.inference_mode():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    assert found.rows[0].accuracy is not None
    assert found.rows[0].accuracy.nll_mean_nats == pytest.approx(expected.item(), rel=1e-5)
    assert found.rows[0].speed is None


def test_gzipped_text_gives_the_same_numbers(tiny_qwen2: Path, held_out: Path, tmp_path: Path) -> None:
    packed = tmp_path / "held-out.txt.gz"
    packed.write_bytes(gzip.compress(held_out.read_bytes()))
    options: dict[str, Any] = {"seq_len": 32, "max_tokens": 65, "speed": False}
    plain, zipped = (evaluate_checkpoints(tiny_qwen2, [tiny_qwen2], path, **options) for path in (held_out, packed))
    assert [row.accuracy for row in plain.rows] == [row.accuracy for row in zipped.rows]
    assert plain.data is not None
    assert zipped.data is not None
    assert plain.data.sha256 != zipped.data.sha256


@pytest.mark.parametrize(
    ("stored", "asked", "computed"),
    [
        (torch.float16, "auto", "float32"),
        (torch.bfloat16, "auto", "bfloat16"),
        (torch.float32, "auto", "float32"),
        (torch.float32, "bfloat16", "bfloat16"),
    ],
    ids=str,
)
def test_one_dtype_is_chosen_for_all_rows(
    checkpoint: Factory, held_out: Path, stored: torch.dtype, asked: str, computed: str
) -> None:
    folder = checkpoint("qwen2", dtype=stored)
    found = evaluate_checkpoints(
        folder, [folder], held_out, seq_len=16, max_tokens=20, dtype=asked, speed=False, device="cpu"
    )
    assert found.compute_dtype == computed
    assert found.rows[0].checkpoint_dtype == str(stored).removeprefix("torch.")


def test_a_quantized_candidate_is_read_by_its_own_keys_and_log(
    tiny_qwen2: Path, held_out: Path, tmp_path: Path
) -> None:
    from qquant.config import QuantizeConfig
    from qquant.quantizing import quantize_checkpoint

    out = tmp_path / "int4"
    quantize_checkpoint(tiny_qwen2, None, QuantizeConfig(method="rtn", bits=4, group_size=32), out)
    row = evaluate_checkpoints(tiny_qwen2, [out], held_out, seq_len=32, max_tokens=80, speed=False).rows[1]
    assert (row.label, row.method, row.bits, row.group_size) == ("int4", "rtn", 4, 32)
    assert len(row.layer_errors) == 14
    assert row.accuracy is not None
    assert row.accuracy.kl_mean_nats is not None
    assert 0 < row.accuracy.kl_mean_nats < 1
    assert row.ratios is not None
    assert row.ratios.weights_bytes is not None
    assert row.ratios.weights_bytes < 0.6


def test_a_log_that_is_no_log_is_refused(tiny_qwen2: Path, held_out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_qwen2, folder)
    (folder / "quant_log.json").write_text('{"modules": [1]}')
    with pytest.raises(BadModelError, match=r"quant_log\.json"):
        evaluate_checkpoints(tiny_qwen2, [folder], held_out, seq_len=16, max_tokens=20, speed=False)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"seq_len": 32, "stride": 33}, UsageError, "stride must be between"),
        ({"seq_len": 0}, UsageError, "seq_len must be at least 1"),
        ({"seq_len": 512}, UsageError, "256 tokens"),
        ({"max_tokens": 0}, UsageError, "max_tokens"),
        ({"threads": 0}, UsageError, "threads"),
        ({"kv_cache": "int4"}, UsageError, "kv_cache must be one of int8, got 'int4'"),
        ({"kv_cache": "int8", "kv_tokens": 0}, UsageError, "kv_tokens"),
        ({"seq_len": 256, "max_tokens": 256}, BadDataError, "lower --seq-len"),
        ({"dtype": "int4"}, UsageError, "dtype"),
        ({"device": "quantum"}, UsageError, "device"),
    ],
    ids=[
        "stride",
        "window",
        "positions",
        "max_tokens",
        "threads",
        "kv_cache",
        "kv_tokens",
        "short_text",
        "dtype",
        "device",
    ],
)
def test_an_option_that_cannot_be_followed_is_refused(
    tiny_qwen2: Path, held_out: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        evaluate_checkpoints(tiny_qwen2, [tiny_qwen2], held_out, **{"seq_len": 16, "speed": False, **options})


def test_an_evaluation_needs_a_candidate(tiny_qwen2: Path, held_out: Path) -> None:
    with pytest.raises(UsageError, match="candidate"):
        evaluate_checkpoints(tiny_qwen2, [], held_out)


def test_a_missing_folder_is_one_clear_error_and_no_look_at_a_hub(
    tiny_qwen2: Path, held_out: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadModelError, match="neither"):
        evaluate_checkpoints(tiny_qwen2, [tmp_path / "not-there"], held_out)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00broken", b"too short"], ids=["no_utf8", "short"])
def test_text_that_cannot_be_used_is_refused(tiny_qwen2: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(BadDataError):
        evaluate_checkpoints(tiny_qwen2, [tiny_qwen2], path, seq_len=32)


@pytest.mark.parametrize("cut", [20, 60], ids=["header", "body"])
def test_a_gzip_file_that_ends_early_is_refused(tiny_qwen2: Path, held_out: Path, tmp_path: Path, cut: int) -> None:
    path = tmp_path / "bad.txt.gz"
    path.write_bytes(gzip.compress(held_out.read_bytes())[:cut])
    with pytest.raises(BadDataError):
        evaluate_checkpoints(tiny_qwen2, [tiny_qwen2], path, seq_len=32)


def test_a_missing_tensor_is_refused_and_not_made_up(tiny_qwen2: Path, held_out: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_qwen2, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadModelError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is missing"):
        evaluate_checkpoints(tiny_qwen2, [folder], held_out, seq_len=16, max_tokens=20, speed=False)


def test_a_candidate_with_another_vocabulary_is_refused(tiny_qwen2: Path, checkpoint: Factory, held_out: Path) -> None:
    wide = checkpoint("qwen2", vocab_size=400)
    with pytest.raises(BadModelError, match="vocabulary"):
        evaluate_checkpoints(tiny_qwen2, [wide], held_out, seq_len=16, max_tokens=40, speed=False)


def test_the_kv_cache_of_a_model_alone_is_evaluated_on_its_own_text(
    run_eval: Callable[..., Result], tiny_qwen2: Path, held_out: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "model", tmp_path / "report"
    shutil.copytree(tiny_qwen2, folder)
    shutil.copy(held_out, folder / "eval.txt")
    words = ["--baseline", folder, "--kv-cache", "int8", "--out", out, "--seq-len", 80, "--max-tokens", 200]
    result = run_eval(*words, "--kv-tokens", 80, "--seed", 5, "--no-speed")
    assert result.exit_code == 0, result.stderr
    report = result_from_json((out / "report.json").read_bytes())
    assert [row.label for row in report.rows] == ["model"]
    assert report.kv_cache is not None
    assert [scheme.name for scheme in report.kv_cache.models[0].schemes] == ["published", "none", "hadamard", "fold"]
    assert (report.kv_cache.windows, report.kv_cache.window_tokens, report.kv_cache.seed) == (1, 80, 5)
    assert {row.length_tokens for row in report.kv_cache.needles} == {80}
    markdown = (out / "report.md").read_text()
    assert "## KV cache" in markdown
    assert str(tmp_path) not in markdown + (out / "report.json").read_text()


def test_the_kv_cache_of_every_candidate_is_measured(tiny_qwen2: Path, other: Path, held_out: Path) -> None:
    options: dict[str, Any] = {"seq_len": 32, "max_tokens": 65, "speed": False}
    plain = evaluate_checkpoints(tiny_qwen2, [other], held_out, **options)
    found = evaluate_checkpoints(tiny_qwen2, [other], held_out, kv_cache="int8", **options)
    assert found.kv_cache is not None
    assert [model.label for model in found.kv_cache.models] == [row.label for row in found.rows]
    assert [row.accuracy for row in found.rows] == [row.accuracy for row in plain.rows]
    assert plain.kv_cache is None


def test_a_folder_that_asks_for_the_cache_is_measured_without_it_first(
    tiny_qwen2: Path, held_out: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_qwen2, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_cache_quantization": True}))
    options: dict[str, Any] = {"seq_len": 32, "max_tokens": 65, "speed": False, "kv_cache": "int8"}
    found = evaluate_checkpoints(tiny_qwen2, [folder], held_out, **options).kv_cache
    assert found is not None
    first, second = found.models
    assert first.schemes == second.schemes


def test_a_class_that_switches_the_cache_on_by_itself_is_switched_off(
    held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_qwen_v1(tmp_path / "model", use_cache_quantization=True)
    seen: list[Any] = []
    monkeypatch.setattr("qquant.kv_accuracy.measure_kv_cache", lambda models, *_, **__: seen.extend(models.values()))
    options: dict[str, Any] = {"seq_len": 16, "max_tokens": 20, "speed": False, "kv_cache": "int8"}
    evaluate_checkpoints(folder, [], held_out, **options)
    assert len(seen) == 1
    assert "_prepare_cache_for_generation" not in vars(seen[0])


def test_a_model_whose_layers_cannot_be_cached_is_refused_before_it_is_loaded(
    run_eval: Callable[..., Result], tiny_qwen2: Path, held_out: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((tiny_qwen2 / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_types": ["full_attention", "hybrid"]}))
    for file in tiny_qwen2.glob("token*"):
        shutil.copy(file, folder)
    words = ["--baseline", folder, "--kv-cache", "int8", "--data", held_out, "--out", tmp_path / "r", "--seq-len", 32]
    result = run_eval(*words)
    assert result.exit_code == 4
    assert "'hybrid'" in next(line for line in result.stderr.splitlines() if line.startswith("error: "))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kv-cache", "fp8"], "kv_cache must be one of int8, got 'fp8'"),
        ([], "give --candidate or --kv-cache int8"),
    ],
    ids=["unknown", "nothing_to_do"],
)
def test_a_kv_option_that_cannot_be_followed_is_one_line(
    run_eval: Callable[..., Result], tiny_qwen2: Path, held_out: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    result = run_eval("--baseline", tiny_qwen2, "--data", held_out, "--out", tmp_path / "r", *words)
    assert result.exit_code == 2
    assert said in next(line for line in result.stderr.splitlines() if line.startswith("error: "))


def test_a_model_without_a_text_of_its_own_needs_one(
    run_eval: Callable[..., Result], tiny_qwen2: Path, tmp_path: Path
) -> None:
    result = run_eval("--baseline", tiny_qwen2, "--kv-cache", "int8", "--out", tmp_path / "r")
    assert result.exit_code == 2
    assert "give --data" in result.stderr


def test_the_command_writes_a_report_and_prints_only_its_path(
    run_eval: Callable[..., Result], tiny_qwen2: Path, other: Path, held_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "reports" / "first"
    options = ["--data", held_out, "--out", out, "--seq-len", 16, "--max-tokens", 40, "--seed", 3, "--no-speed"]
    result = run_eval("--baseline", tiny_qwen2, "--candidate", tiny_qwen2, "--candidate", other, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out / 'report.md'}\n"
    report = result_from_json((out / "report.json").read_bytes())
    assert report.seed == 3
    assert len(report.rows) == 3
    assert report.command.startswith("python -m qquant.eval --baseline ")
    assert [path.name for path in out.parent.iterdir()] == ["first"]


def test_nothing_local_is_in_a_written_report(
    run_eval: Callable[..., Result], tiny_qwen2: Path, other: Path, held_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["--baseline", tiny_qwen2, f"--candidate={other}", "--data", held_out, "--out", out, "--no-speed"]
    assert run_eval(*words, "--seq-len", 16, "--max-tokens", 40).exit_code == 0
    for path in out.iterdir():
        content = path.read_bytes()
        for local in (tmp_path, tiny_qwen2.parent, held_out.parent, Path.home()):
            assert str(local).encode() not in content, path.name
        assert b"quick brown fox" not in content


def test_an_existing_report_is_replaced_only_if_asked_for(
    run_eval: Callable[..., Result], tiny_qwen2: Path, held_out: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("{}")
    options = ["--baseline", tiny_qwen2, "--candidate", tiny_qwen2, "--data", held_out, "--out", out, "--no-speed"]
    options += ["--seq-len", 16, "--max-tokens", 40]
    refused = run_eval(*options)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: the output must not exist yet")
    assert len(refused.stderr.splitlines()) == 1
    assert (out / "report.json").read_text() == "{}"
    assert run_eval(*options, "--overwrite").exit_code == 0
    assert len(json.loads((out / "report.json").read_text())["rows"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_replaces_a_folder_that_is_no_report(
    run_eval: Callable[..., Result], tiny_qwen2: Path, held_out: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    options = [
        "--baseline",
        tiny_qwen2,
        "--candidate",
        tiny_qwen2,
        "--data",
        held_out,
        "--out",
        tmp_path,
        "--overwrite",
    ]
    result = run_eval(*options)
    assert result.exit_code == 2
    assert "is not one" in result.stderr
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "code"),
    [({"--candidate": "/not/there"}, 4), ({"--data": "/not/there.txt"}, 5), ({"--stride": "99"}, 2)],
    ids=["model", "data", "usage"],
)
def test_an_error_is_one_line_with_its_exit_code_and_leaves_nothing(
    run_eval: Callable[..., Result], tiny_qwen2: Path, held_out: Path, tmp_path: Path, change: dict[str, str], code: int
) -> None:
    options = {"--baseline": tiny_qwen2, "--candidate": tiny_qwen2, "--data": held_out, "--out": tmp_path / "r"}
    result = run_eval(*[word for pair in {**options, "--seq-len": 16, **change}.items() for word in pair])
    assert result.exit_code == code
    assert [line for line in result.stderr.splitlines() if line.strip()][-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback_and_keeps_the_exit_code(
    run_eval: Callable[..., Result], tiny_qwen2: Path, tmp_path: Path
) -> None:
    options = ["--candidate", "/not/there", "--data", "x", "--out", tmp_path / "r", "--debug"]
    result = run_eval("--baseline", tiny_qwen2, *options)
    assert result.exit_code == 4
    assert "Traceback" in result.stderr


def test_damaged_numbers_end_with_the_numeric_exit_code(
    run_eval: Callable[..., Result], tiny_qwen2: Path, held_out: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_qwen2, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "r"
    options = ["--data", held_out, "--out", out, "--seq-len", 16, "--max-tokens", 40, "--no-speed"]
    result = run_eval("--baseline", tiny_qwen2, "--candidate", folder, *options)
    assert result.exit_code == 6
    assert "model returned a logit that is not finite" in result.stderr
    assert not out.exists()
