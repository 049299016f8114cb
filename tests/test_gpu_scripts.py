"""The benchmarks/gpu_*.py without a GPU: what they decode, count, choose and label. No speed of these is looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import gpu_decode, gpu_linear, gpu_profile, gpu_qwen_tables
from benchmarks.on_gpu import MOST_COPIES, copies_of, rate
from qquant.errors import UsageError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoding() -> gpu_decode.Decoding:
    with torch.inference_mode(False), torch.no_grad():
        model = gpu_decode.make_model(gpu_decode.TINY, gpu_decode.CONTESTANTS[2], CPU)
    with torch.inference_mode():
        return gpu_decode.Decoding(model)


@torch.inference_mode()
def test_a_round_is_what_the_model_generates(decoding: gpu_decode.Decoding) -> None:
    prompt = torch.randint(512, (1, gpu_decode.PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    want = decoding.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert decoding.answer(decoding.step)[:4] == want[0, gpu_decode.PROMPT_TOKENS + 1 :].tolist()


@torch.inference_mode()
def test_a_round_can_be_repeated(decoding: gpu_decode.Decoding) -> None:
    first = decoding.answer(decoding.step)
    assert len(first) == gpu_decode.ROUND_TOKENS
    assert decoding.answer(decoding.step) == first


@torch.inference_mode()
def test_a_step_writes_to_the_same_memory_again(decoding: gpu_decode.Decoding) -> None:
    """What a captured graph relies on."""
    layer = decoding.cache.layers[0]
    places = [one.data_ptr() for one in (decoding.token, layer.keys, layer.values, layer.cumulative_length)]
    decoding.rewind()
    decoding.step()
    assert [one.data_ptr() for one in (decoding.token, layer.keys, layer.values, layer.cumulative_length)] == places


def test_a_step_s_bytes_are_those_of_codes_scales_head_and_room(
    decoding: gpu_decode.Decoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_decode, "ROUND_TOKENS", 1)
    with torch.inference_mode():
        cell = gpu_decode.measured(decoding, gpu_decode.TINY, "int4", 1e-3)
    values = 2 * (256 * 768 + 256 * 256 + 3 * 256 * 512)  # c_attn, c_proj, w1, w2 and c_proj of two blocks
    room = 2 * 2 * 256 * gpu_decode.ROOM * 2  # keys and values of two blocks in bfloat16
    assert cell["bytes_per_token"] == values // 2 + values // 128 * 2 + 512 * 256 * 2 + room
    assert cell["status"] == "ok"
    assert cell["same_answer_as_without_graph"]
    assert cell["share_of_roofline"] == pytest.approx(cell["gb_s"] / 1e-3)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
        pytest.param(RuntimeError("operation not permitted when stream is capturing"), "not measured"),
        pytest.param(UsageError("kernel 'torch' needs a layer that torch serves"), "not measured"),
    ],
    ids=["memory", "capture", "no-such-kernel"],
)
def test_what_cannot_be_measured_is_a_label(
    error: Exception, status: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(gpu_decode, "random_model", refuse)
    row = gpu_decode.measure_model("qwen-7b", gpu_decode.TINY, 1.0, CPU, gpu_decode.CONTESTANTS)
    assert {cell["status"] for cell in row["contestants"].values()} == {status}
    assert {cell["reason"] for cell in row["contestants"].values()} == {str(error)}
    assert row["contestants"]["int4"]["published"]["tokens_per_second"] == 50.09
    assert row["goals"]["int4_times_torch_int4"] is None
    assert f"| qwen-7b | int4 | {status} | - | - | - | - | 50.09 |" in capsys.readouterr().out


def test_goals_compare_one_run_s_contestants() -> None:
    speeds = {"bf16": 10.0, "int8": 20.0, "int4": 30.0, "torch_int4": 15.0}
    cells = {name: {"tokens_per_second": speed, "share_of_roofline": 0.5} for name, speed in speeds.items()}
    found = gpu_decode.goals(cells)
    assert (found["int4_times_torch_int4"], found["int4_times_bf16"], found["int8_times_bf16"]) == (2.0, 3.0, 2.0)
    assert found["share_of_roofline"] == dict.fromkeys(speeds, 0.5)


def test_a_rate_is_that_of_one_of_the_calls_timed_together() -> None:
    found = rate({"median_ms": 4.0, "min_ms": 2.0, "max_ms": 8.0}, 1_000_000, 2.0, calls=4)
    assert found == {"median_ms": 1.0, "min_ms": 0.5, "max_ms": 2.0, "gb_s": 1.0, "share_of_copy": 0.5}


def test_small_inputs_are_copied_and_large_ones_are_not() -> None:
    assert [copies_of(size) for size in (1, 64 << 20, 1 << 30)] == [MOST_COPIES, 4, 1]


def test_the_readme_s_speed_table_is_measured_for_every_size_and_precision() -> None:
    grids = gpu_profile.chosen_grids(None, whole=True)
    assert list(grids) == ["qwen-1.8b", "qwen-7b", "qwen-14b", "qwen-72b"]
    assert {grid.precisions for _, grid in grids.values()} == {("bf16", "int8", "int4")}
    assert {(grid.prompt_tokens, grid.new_tokens) for _, grid in grids.values()} == {((1,), (2048,))}


def test_short_grids_end_at_as_many_tokens_as_the_readme_s() -> None:
    [grid] = [grid for _, grid in gpu_profile.chosen_grids(["qwen-72b"], whole=False).values()]
    assert grid.prompt_tokens[0] + grid.new_tokens[0] == 2048


def test_whole_generations_of_other_grids_are_refused() -> None:
    with pytest.raises(SystemExit, match=r"--whole is for the grids .*, got batches of 7B; leave one of the two out"):
        gpu_profile.chosen_grids(["qwen-7b", "batches of 7B"], whole=True)


def test_kv_tables_have_the_readme_s_rows_and_cells() -> None:
    assert len(gpu_qwen_tables.JOBS) == 11
    assert gpu_qwen_tables.published_gib("kv-batch", 64, 1024) == [None, 48.2]
    assert gpu_qwen_tables.published_gib("kv-length", 1, 8192) == [23.2, 17.6]


def test_what_serves_a_layer_is_compared_with_dense_bfloat16() -> None:
    """Up to 64 tokens our kernel, beyond them the unpacked weight; what has no time is left out."""
    times = {"int4": {"median_ms": 2.0}, "int4_unpacked": {"median_ms": 8.0}, "bf16": {"median_ms": 4.0}}
    failed = {**times, "int4_unpacked": "not measured: out of memory"}
    assert gpu_linear.as_served({64: times, 256: times, 1024: failed}, "int4") == {64: 2.0, 256: 0.5}
