"""One cell: what its process measures, and what becomes of it when memory runs out or the process ends badly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from qquant import cell_process, profile_cell
from qquant.cell_process import measure_apart
from qquant.errors import BadModelError
from qquant.kv_cache_quant import Int8KVCache
from qquant.profile_cell import cache_bytes, cell_speed, memory_reason, run_cell
from qquant.profile_report import CellKey, CellRequest
from qquant.random_models import config_from_dict
from tests.conftest import TINY, Factory

CONFIG = {**TINY, "model_type": "qwen2", "tie_word_embeddings": False}


def request_of(folder: Path | None = None, **changes: Any) -> CellRequest:
    """A cell of random weights, or of a folder; ``changes`` are fields of the key or of the request."""
    key: dict[str, Any] = {
        "label": "tiny", "precision": "fp32", "kv_cache": "fp32", "batch": 2, "prompt_tokens": 8, "new_tokens": 4,
    }  # fmt: skip
    rest: dict[str, Any] = {
        "folder": None if folder is None else str(folder), "config": CONFIG if folder is None else None,
        "compute_dtype": "float32", "group_size": 32, "device": "cpu", "threads": 1, "seed": 0, "warmups": 1,
        "repeats": 3, "memory_limit_bytes": None,
    }  # fmt: skip
    for name, value in changes.items():
        (key if name in key else rest)[name] = value
    return CellRequest(key=CellKey(**key), **rest)


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell runs in the process of the tests, which must not be limited for good."""
    for name in ("limit_memory", "_lift_limit", "keep_freed_memory"):
        monkeypatch.setattr(profile_cell, name, lambda *_: None)


@pytest.mark.usefixtures("unlimited")
def test_every_repetition_is_kept_and_warm_ups_are_not() -> None:
    steps: list[int] = []
    cell = run_cell(request_of(), lambda: steps.append(1))
    assert cell.status == "ok", cell.reason
    assert cell.speed is not None
    assert len(cell.speed.first_token_seconds) == len(cell.speed.decode_seconds) == 3
    assert len(steps) == 1 + 1 + 1 + 3  # loading, the generation for memory, the warm-up, the repetitions


@pytest.mark.usefixtures("unlimited")
def test_the_cache_has_the_bytes_of_its_tokens() -> None:
    full = run_cell(request_of()).memory
    assert full is not None
    layers, batch, heads, width = 2, 2, 2, 64 // 4
    tokens = 8 + 4 - 1  # the last token is never fed
    assert full.cache_bytes == layers * 2 * batch * heads * tokens * width * 4


@pytest.mark.usefixtures("unlimited")
def test_a_folder_neither_samples_nor_ends_early(checkpoint: Factory) -> None:
    cell = run_cell(request_of(checkpoint("qwen2"), new_tokens=40, repeats=1))
    assert cell.status == "ok", cell.reason
    assert cell.memory is not None
    assert cell.memory.allocator_peak_bytes is None


@pytest.mark.usefixtures("unlimited")
def test_a_single_new_token_has_no_decoding() -> None:
    speed = run_cell(request_of(new_tokens=1)).speed
    assert speed is not None
    assert speed.decode_tokens_per_second is None
    assert speed.decode_seconds == (0.0,) * 3


@pytest.mark.usefixtures("unlimited")
def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path: Path) -> None:
    cell = run_cell(request_of(tmp_path))
    assert cell.status == "failed"
    assert cell.reason is not None
    assert "\n" not in cell.reason
    assert "BadModelError" in cell.reason


def test_rates_are_tokens_by_medians() -> None:
    key = request_of(batch=4, prompt_tokens=10, new_tokens=3).key
    speed = cell_speed([[2.0, 2.5, 3.0], [1.0, 1.25, 9.0], [4.0, 4.25, 4.5]], key)
    assert speed.first_token_seconds == (2.0, 1.0, 4.0)
    assert speed.prefill_tokens_per_second == 4 * 10 / 2.0
    assert speed.decode_tokens_per_second == 4 * 2 / 1.0
    assert speed.token_p50_seconds == pytest.approx((0.25 + 0.5) / 2)
    assert speed.token_p95_seconds == 7.75


def wrapped(error: BaseException) -> BaseException:
    """As ``load_model`` passes on what transformers ran into."""
    try:
        raise BadModelError("the model cannot be loaded") from error
    except BadModelError as outer:
        return outer


MEMORY = {
    "python": MemoryError(),
    "torch on a CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"),
    "torch on a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "c++": RuntimeError("std::bad_alloc"),
    "system": OSError(12, "Cannot allocate memory"),
    "wrapped": wrapped(RuntimeError("can't allocate memory")),
}


@pytest.mark.parametrize("error", list(MEMORY.values()), ids=list(MEMORY))
def test_every_way_to_run_out_of_memory_is_known(error: BaseException) -> None:
    reason = memory_reason(error)
    assert reason
    assert "\n" not in reason


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), BadModelError("no config.json")], ids=str)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert memory_reason(error) is None


@pytest.mark.usefixtures("unlimited")
def test_it_says_when_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 3145728 bytes. Error code 12"
    )

    def fail(*_: object, **__: object) -> Any:
        raise RuntimeError(text)

    for part, said in {"_generate": "generating", "_make_model": "making the model"}.items():
        monkeypatch.setattr(profile_cell, part, fail)
        assert run_cell(request_of()).reason == f"{said}: no room for another 3.0 MiB"


def test_an_unknown_cache_has_no_size() -> None:
    assert cache_bytes(object()) is None


def test_caches_say_their_bytes() -> None:
    config = config_from_dict({**CONFIG, "head_dim": 16})
    states = torch.zeros(1, 2, 5, 16)
    plain, small = DynamicCache(config=config), Int8KVCache(config)
    for cache in (plain, small):
        cache.update(states, states, 0)
    assert cache_bytes(plain) == 2 * states.nbytes
    assert cache_bytes(small) == small.nbytes


ENDINGS = {
    "killed": ("import os; os.kill(os.getpid(), 9)", "out-of-memory", "SIGKILL"),
    "c++": ("import sys; sys.exit('terminate called: std::bad_alloc')", "out-of-memory", "bad_alloc"),
    "crashed": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed", "SIGSEGV"),
    "gave up": ("import sys; sys.exit('no such thing')", "failed", "no such thing"),
    "silent": ("pass", "failed", "said nothing"),
}


@pytest.mark.parametrize(("code", "status", "reason"), list(ENDINGS.values()), ids=list(ENDINGS))
def test_a_process_that_ends_without_an_answer_is_a_cell_all_the_same(
    monkeypatch: pytest.MonkeyPatch, code: str, status: str, reason: str
) -> None:
    monkeypatch.setattr(cell_process, "_COMMAND", (sys.executable, "-c", code))
    cell = measure_apart(request_of())
    assert cell.status == status
    assert reason in (cell.reason or "")
    assert "\n" not in (cell.reason or "")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's RLIMIT_DATA")
@pytest.mark.slow  # starts an interpreter and imports torch
def test_a_cell_that_is_too_large_says_so() -> None:
    """In a real process, which asks for 2 GiB of token ids where it may take 1 GiB in all."""
    cell = measure_apart(request_of(memory_limit_bytes=1 << 30, batch=1 << 21, prompt_tokens=128))
    assert cell.status == "out-of-memory", cell.reason
    # The libraries and the model had room under the limit: what was refused is these ids.
    assert "generating: no room for another 2048.0 MiB" in (cell.reason or "")


@pytest.mark.gpu
def test_a_gpu_has_meters_of_its_own_and_runs_out_of_memory_too() -> None:
    found = measure_apart(request_of(device="cuda"))
    assert found.status == "ok", found.reason
    assert found.memory is not None
    peak, reserved = found.memory.allocator_peak_bytes, found.memory.allocator_reserved_bytes
    assert peak is not None
    assert reserved is not None
    assert found.memory.device_peak_bytes is not None
    assert found.memory.tensor_bytes <= peak <= reserved <= found.memory.device_peak_bytes
    assert found.measured_peak_bytes == peak
    assert measure_apart(request_of(device="cuda", memory_limit_bytes=1 << 20)).status == "out-of-memory"
