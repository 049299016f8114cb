"""The grid and its door: which cells there are, what is kept when it stops, what is refused, what the report says."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from qquant import profile_grid
from qquant.errors import BadModelError, StoppedError, UsageError
from qquant.footprint import footprint
from qquant.journal import journal_of
from qquant.model_folder import read_config
from qquant.models.sizes import size_config
from qquant.profile_grid import Grid, profile_models
from qquant.profile_report import (
    CellKey,
    CellMemory,
    CellRequest,
    CellSpeed,
    Profile,
    ProfileCell,
    deviation,
    profile_sections,
)
from qquant.random_models import config_from_dict
from qquant.records import Footprint
from qquant.result_files import to_markdown
from qquant.results import result_from_json
from qquant.shapes import model_shapes
from tests.packed import pack_by_hand

Asked = list[CellRequest]
GIB = 2**30


def cell_of(key: CellKey, *, peak: int = 3 * GIB, predicted: int | None = None) -> ProfileCell:
    memory = CellMemory(
        tensor_bytes=2 * GIB,
        cache_bytes=GIB // 2,
        rss_before_bytes=GIB,
        rss_loaded_bytes=3 * GIB,
        rss_peak_loading_bytes=3 * GIB,
        rss_peak_bytes=peak + GIB,
        allocator_peak_bytes=None,
        allocator_reserved_bytes=None,
        device_peak_bytes=None,
    )
    speed = CellSpeed(
        first_token_seconds=(0.5, 0.25, 1.0),
        decode_seconds=(2.0, 1.0, 4.0),
        prefill_tokens_per_second=key.batch * key.prompt_tokens / 0.5,
        decode_tokens_per_second=key.batch * (key.new_tokens - 1) / 2.0,
        token_p50_seconds=0.125,
        token_p95_seconds=0.25,
    )
    parts = dict.fromkeys(("weights_bytes", "cache_bytes", "activations_bytes", "overhead_bytes"), 0)
    said = None if predicted is None else Footprint(**parts, peak_bytes=predicted)
    return ProfileCell(
        key=key, status="ok", reason=None, memory=memory, speed=speed, predicted=said, measured_peak_bytes=peak
    )


def empty_cell(key: CellKey, status: Any, reason: str) -> ProfileCell:
    nothing: dict[str, Any] = dict.fromkeys(("memory", "speed", "predicted", "measured_peak_bytes"))
    return ProfileCell(key=key, status=status, reason=reason, **nothing)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Cells are not measured; the requests for them are listed."""
    log: Asked = []

    def measure(request: CellRequest, on_step: Callable[[int, int], None]) -> ProfileCell:
        log.append(request)
        on_step(1, 2)
        return cell_of(request.key)

    monkeypatch.setattr(profile_grid, "measure_apart", measure)
    return log


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``qquant.profile`` in this process."""
    import typer

    from qquant.profile import profile_command

    app = typer.Typer()
    app.command()(profile_command)

    def invoke(*arguments: Any) -> Result:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["/somewhere/qquant/profile.py", *words])
        return CliRunner().invoke(app, words)

    return invoke


def test_the_grid_is_every_combination_once(asked: Asked, tmp_path: Path, tiny_qwen2: Path) -> None:
    grid = Grid(
        precisions=("bf16", "int4"),
        kv_caches=("plain", "int8"),
        batches=(1, 4),
        prompt_tokens=(8,),
        new_tokens=(2, 3),
        group_size=32,
    )
    result = profile_models([], [str(tiny_qwen2)], grid, journal=tmp_path / "j")
    assert result.profile is not None
    assert len({cell.key.name for cell in result.profile.cells}) == len(asked) == 2 * 2 * 2 * 2
    assert {request.compute_dtype for request in asked} == {"bfloat16", "float32"}  # int4 computes as config.json says
    (row,) = result.rows
    assert (row.random_weights, row.sha256, row.weights_bytes) == (True, None, None)
    assert result.profile.random_weights == (row.label,)


def test_plain_and_its_own_name_are_one_cache(asked: Asked, tmp_path: Path, tiny_qwen2: Path) -> None:
    profile_models([tiny_qwen2], [], Grid(kv_caches=("plain", "fp32", "int8")), journal=tmp_path / "j")
    assert [request.key.kv_cache for request in asked] == ["fp32", "int8"]


def test_a_size_by_name_and_a_folder_stand_in_one_report(asked: Asked, tmp_path: Path, tiny_qwen2: Path) -> None:
    result = profile_models([tiny_qwen2], ["qwen2.5-0.5b"], Grid(), journal=tmp_path / "j")
    folder, size = result.rows
    assert (folder.role, size.role) == ("baseline", "candidate")
    assert folder.sha256 is not None
    assert size.parameters == model_shapes(config_from_dict(size_config("qwen2.5-0.5b"))).parameters
    assert [request.key.precision for request in asked] == ["fp32", "bf16"]
    assert result.compute_dtype == "mixed"


def test_a_quantized_folder_is_measured_in_its_own_bits(asked: Asked, tmp_path: Path, tiny_qwen2: Path) -> None:
    folder = tmp_path / "packed"
    pack_by_hand(tiny_qwen2, folder)
    result = profile_models([folder], [], Grid(), journal=tmp_path / "j")
    assert asked[0].key.precision == "int4"
    assert asked[0].folder == str(folder.resolve())
    assert result.rows[0].bits == 4


def test_a_folder_and_its_shapes_have_rows_of_their_own(asked: Asked, tmp_path: Path, tiny_qwen2: Path) -> None:
    result = profile_models([tiny_qwen2], [str(tiny_qwen2)], Grid(precisions=("fp32",)), journal=tmp_path / "j")
    stored, drawn = result.rows
    assert drawn.label == f"{stored.label} (random)"
    assert [request.folder is None for request in asked] == [False, True]


def test_predictions_are_the_planners(asked: Asked, tmp_path: Path, tiny_qwen2: Path) -> None:
    result = profile_models([tiny_qwen2], [], Grid(batches=(3,)), journal=tmp_path / "j")
    expected = footprint(
        model_shapes(read_config(tiny_qwen2)),
        precision="fp32",
        kv_cache="fp32",
        batch=3,
        prompt_tokens=128,
        new_tokens=32,
        device="cpu",
        compute_dtype="fp32",
    )
    assert result.profile is not None
    assert result.profile.cells[0].predicted == expected


def test_a_model_without_a_prediction_is_measured_all_the_same(
    asked: Asked, tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(config: Any) -> Any:
        raise BadModelError("layers of another kind")

    monkeypatch.setattr(profile_grid, "model_shapes", refuse)
    result = profile_models([tiny_qwen2], [], Grid(), journal=tmp_path / "j")
    assert result.profile is not None
    assert result.profile.cells[0].status == "ok"
    assert result.profile.cells[0].predicted is None
    assert result.rows[0].parameters == model_shapes(read_config(tiny_qwen2)).parameters
    assert "layers of another kind" in caplog.text


def stop_after(log: Asked, count: int, how: Callable[[], None]) -> Callable[..., ProfileCell]:
    def measure(request: CellRequest, on_step: Callable[[int, int], None]) -> ProfileCell:
        if len(log) == count:
            how()
        log.append(request)
        return cell_of(request.key)

    return measure


def interrupt() -> None:
    raise KeyboardInterrupt


STOPS = {"ctrl-c": interrupt, "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM)}


@pytest.mark.parametrize("how", list(STOPS.values()), ids=list(STOPS))
def test_a_stopped_run_keeps_its_cells_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_qwen2: Path, run: Callable[..., Result], how: Any
) -> None:
    log: Asked = []
    monkeypatch.setattr(profile_grid, "measure_apart", stop_after(log, 2, how))
    out = tmp_path / "out"
    words = ["--random-weights", tiny_qwen2, "--precision", "fp32", "--batch", "1,2,3", "--out", out]
    stopped = run(*words)
    assert stopped.exit_code == StoppedError.exit_code
    assert "2 finished cells" in stopped.stderr
    assert "--resume" in stopped.stderr
    assert not out.exists()

    monkeypatch.setattr(profile_grid, "measure_apart", stop_after(log, -1, how))
    assert run(*words).exit_code == UsageError.exit_code  # unfinished work is not thrown away unasked
    done = run(*words, "--resume")
    assert done.exit_code == 0, done.output
    assert [request.key.batch for request in log] == [1, 2, 3]
    assert done.stdout.strip() == str(out / "report.md")
    assert not journal_of(out).exists()


def test_other_options_do_not_go_on_with_that_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_qwen2: Path, run: Callable[..., Result]
) -> None:
    monkeypatch.setattr(profile_grid, "measure_apart", stop_after([], 1, interrupt))
    words = ["--random-weights", tiny_qwen2, "--precision", "fp32", "--batch", "1,2", "--out", tmp_path / "out"]
    assert run(*words).exit_code == StoppedError.exit_code
    other = run(*words, "--resume", "--repeats", "7")
    assert other.exit_code == UsageError.exit_code
    assert "another" in other.stderr


def test_cells_without_memory_end_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_qwen2: Path, run: Callable[..., Result]
) -> None:
    def measure(request: CellRequest, on_step: Callable[[int, int], None]) -> ProfileCell:
        if request.key.batch == 2:
            return empty_cell(request.key, "out-of-memory", "you tried to allocate 7 bytes")
        if request.key.batch == 3:
            return empty_cell(request.key, "failed", "it fell over")
        return cell_of(request.key)

    monkeypatch.setattr(profile_grid, "measure_apart", measure)
    done = run(tiny_qwen2, "--batch", "1,2,3,4", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    result = result_from_json((tmp_path / "out" / "report.json").read_bytes())
    assert result.profile is not None
    assert [cell.status for cell in result.profile.cells] == ["ok", "out-of-memory", "failed", "ok"]
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| OOM |" in text
    assert "you tried to allocate 7 bytes" in text
    assert "it fell over" in text


REFUSED = {
    "no model": ([], "--random-weights"),
    "another precision of a folder": (["{folder}", "--precision", "int4"], "quantize it first"),
    "a cache in another dtype": (["{folder}", "--kv", "bf16"], "--kv plain"),
    "an unknown precision": (["{folder}", "--precision", "int5"], "int4"),
    "an unknown cache": (["{folder}", "--kv", "int5"], "int8"),
    "an unknown size": (["--random-weights", "qwen-8t"], "qwen-7b"),
    "a size as a folder": (["qwen-7b"], "--random-weights qwen-7b"),
    "a size twice in other letters": (["--random-weights", "qwen-7b,QWEN-7B"], "twice"),
    "no precision": (["{folder}", "--precision", ""], "--precision"),
    "a batch beyond counting": (["{folder}", "--batch", "9" * 400], "2^40"),
    "a seed beyond 64 bits": (["{folder}", "--seed", "9" * 40], "64 bits"),
    "groups of nothing": (
        ["--random-weights", "{folder}", "--precision", "int4", "--group-size", "0"],
        "at least 1",
    ),
    "groups that divide no row": (
        ["--random-weights", "{folder}", "--precision", "int4", "--group-size", "48"],
        "48 does not divide 64",
    ),
    "a size twice": (["--random-weights", "qwen-7b,qwen-7b"], "twice"),
    "a batch of nothing": (["{folder}", "--batch", "0"], "batch"),
    "no batch": (["{folder}", "--batch", ","], "--batch"),
    "a batch twice": (["{folder}", "--batch", "1,1"], "repetitions"),
    "a batch in words": (["{folder}", "--batch", "one"], "whole numbers"),
    "a limit without a size": (["{folder}", "--memory-limit", "much"], "24GiB"),
}


@pytest.mark.parametrize(("words", "said"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_cannot_be_measured_is_refused_with_a_remedy(
    asked: Asked, tmp_path: Path, tiny_qwen2: Path, run: Callable[..., Result], words: list[str], said: str
) -> None:
    out = tmp_path / "out"
    done = run(*[word.format(folder=tiny_qwen2) for word in words], "--out", out)
    assert done.exit_code == UsageError.exit_code, done.output
    assert said in done.stderr
    assert not asked
    assert not list(tmp_path.iterdir())


def test_a_baseline_that_cannot_be_loaded_is_refused_before_the_first_cell(
    asked: Asked, tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, kind: str) -> None:
        raise UsageError(f"{kind} needs the package bitsandbytes")

    monkeypatch.setattr(profile_grid, "check_bitsandbytes", refuse)
    with pytest.raises(UsageError, match="nf4 needs the package"):
        profile_models([tiny_qwen2], [], Grid(precisions=("fp32", "nf4")), journal=tmp_path / "j")
    assert not asked
    assert not (tmp_path / "j").exists()


def test_sizes_are_read_with_their_units(asked: Asked, tmp_path: Path, tiny_qwen2: Path, run: Any) -> None:
    sizes = {"2GiB": 2 * GIB, "1.5 gib": 3 * GIB // 2, "800MB": 800_000_000, "2000000": 2_000_000}
    for text, expected in sizes.items():
        assert run(tiny_qwen2, "--memory-limit", text, "--out", tmp_path / str(expected)).exit_code == 0
        assert asked[-1].memory_limit_bytes == expected


def test_nothing_local_is_in_the_report(asked: Asked, tmp_path: Path, tiny_qwen2: Path, run: Any) -> None:
    assert run(tiny_qwen2, "--out", tmp_path / "out").exit_code == 0
    for file in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
        assert str(tiny_qwen2.parent).encode() not in file.read_bytes()
    json.loads((tmp_path / "out" / "report.json").read_text())


KEY = CellKey(label="m", precision="bf16", kv_cache="bf16", batch=2, prompt_tokens=10, new_tokens=5)


def test_tables_show_medians_spread_and_deviation() -> None:
    cells = (
        cell_of(KEY, peak=4 * GIB, predicted=5 * GIB),
        empty_cell(KEY.model_copy(update={"precision": "int8"}), "out-of-memory", "no room"),
    )
    profile = Profile(device_memory_bytes=24 * GIB, random_weights=("m",), warmups=1, repeats=3, cells=cells)
    assert deviation(cells[0]) == 0.25
    text = "\n\n".join(profile_sections(profile))
    assert "m (random weights at its shapes)" in text
    # 2 sequences of 5 tokens in 0.5 + 2 seconds
    assert "| m | bf16 | 4.00 | 4.000 |" in text
    assert "| m | int8 | OOM | OOM |" in text
    decode = "4.00 (2.00 to 8.00)"
    assert f"| bf16 | bf16 | 2 | 10 | 5 | 500.0 (250.0 to 1000.0) | 40.0 | {decode} | 125.00 | 250.00 | 4.000" in text
    assert "| 5.000 | +25.0 % |" in text
    assert "allocator" not in text.partition("Where the memory is")[2]  # a meter that is not there has no column


def test_markdown_of_a_whole_result_has_the_section(asked: Asked, tmp_path: Path, tiny_qwen2: Path) -> None:
    result = profile_models([tiny_qwen2], [], Grid(), journal=tmp_path / "j")
    assert "## Memory and speed" in to_markdown(result)
