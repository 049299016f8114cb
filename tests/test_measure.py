"""Meters against what is known beforehand: sizes that were written, tensors that were made, clocks that are ours."""

from __future__ import annotations

import getpass
import itertools
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

from qquant import measure
from qquant.errors import UsageError
from qquant.measure import MemoryMeter, environment, folder_bytes, measure_speed, tensor_bytes, weights_bytes

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only moves when a model says so."""
    now = [0.0]
    monkeypatch.setattr(measure, "_now", lambda device: now[0])
    return now


def timed_model(clock: list[float], log: list[str], name: str, *, prefill: float, step: float) -> measure.StepFn:
    def run(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        log.append(name)
        clock[0] += step if cache is not None else prefill
        return torch.zeros(1, 5), (cache or 0) + ids.shape[1]

    return run


def test_speeds_are_tokens_by_median_seconds(clock: list[float]) -> None:
    model = timed_model(clock, [], "a", prefill=2.0, step=0.25)
    speed = measure_speed({"a": model}, torch.zeros(1, 10, dtype=torch.int64), decode_tokens=4, rounds=2, repeats=3)
    assert speed["a"].prefill_tokens_per_second == 5
    assert speed["a"].decode_tokens_per_second == 4
    assert speed["a"].prefill_seconds == (2.0,) * 3
    assert speed["a"].decode_seconds == (1.0,) * 6


def test_one_slow_turn_does_not_move_the_median(clock: list[float]) -> None:
    delays = itertools.chain([0.0, 0.0, 100.0], itertools.repeat(0.0))

    def hiccup(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        clock[0] += 1.0 + next(delays)
        return torch.zeros(1, 5), 1

    speed = measure_speed({"a": hiccup}, torch.zeros(1, 3, dtype=torch.int64), decode_tokens=1, rounds=1, warmups=0)
    assert speed["a"].prefill_tokens_per_second == 3
    assert max(speed["a"].prefill_seconds) == 101


def test_models_take_turns_and_change_places(clock: list[float]) -> None:
    log: list[str] = []
    models = {name: timed_model(clock, log, name, prefill=1, step=1) for name in "ab"}
    measure_speed(models, torch.zeros(1, 2, dtype=torch.int64), decode_tokens=1, rounds=2, repeats=2, warmups=0)
    assert "".join(log) == "abababbababa"


def test_decode_feeds_the_likeliest_token_and_the_cache(clock: list[float]) -> None:
    fed: list[tuple[list[int], Any]] = []

    def model(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        clock[0] += 1
        fed.append((ids[0].tolist(), cache))
        return torch.nn.functional.one_hot(ids[:, -1] + 1, 9).float(), len(fed)

    measure_speed({"m": model}, torch.tensor([[1, 2]]), decode_tokens=2, rounds=1, repeats=1, warmups=0)
    assert fed == [([1, 2], None), ([3], 1), ([4], 2)]


@pytest.mark.parametrize("counts", [{"decode_tokens": 0}, {"repeats": 0}, {"rounds": 0}, {"warmups": -1}], ids=str)
def test_a_speed_of_nothing_is_refused(counts: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        measure_speed({}, torch.zeros(1, 2, dtype=torch.int64), **counts)


def test_tensor_bytes_counts_shared_storage_once() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(4, 8))
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.zeros(3, dtype=torch.int16))
    assert tensor_bytes(model) == 4 * 32 + 4 * 8 + 2 * 3


def test_folder_and_weights_are_counted_in_bytes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, size in {"a.safetensors": 100, "b.safetensors": 23, "config.json": 7, "sub/x.safetensors": 5}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    assert weights_bytes(tmp_path) == 123
    assert folder_bytes(tmp_path) == 135


def test_the_peak_covers_memory_that_was_freed_again() -> None:
    meter = MemoryMeter(CPU)
    block = torch.ones(8_000_000, dtype=torch.float32)
    held = block.numel() * 4
    del block
    memory = meter.read()
    if memory.peak_rss_source == "unavailable":
        pytest.skip("this system has no peak counter")
    assert memory.peak_rss_bytes is not None
    if memory.peak_rss_source == "vmhwm_since_reset":
        assert memory.rss_before_bytes is not None
        assert memory.peak_rss_bytes - memory.rss_before_bytes > 0.8 * held  # some pages were there already
    assert memory.cuda_peak_bytes is None
    assert memory.tensor_bytes is None


def test_where_the_peak_cannot_be_reset_the_record_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_CLEAR_REFS", tmp_path / "no" / "clear_refs")
    assert MemoryMeter(CPU).read().peak_rss_source in ("vmhwm_since_process_start", "ru_maxrss_since_process_start")


def test_without_proc_the_peak_comes_from_rusage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_STATUS", tmp_path / "status")
    memory = MemoryMeter(CPU).read(nn.Linear(2, 2))
    assert memory.peak_rss_source == "ru_maxrss_since_process_start"
    assert memory.peak_rss_bytes is not None
    assert memory.peak_rss_bytes > 10_000_000  # python with torch, so the unit is right
    assert memory.rss_before_bytes is None
    assert memory.tensor_bytes == 24


@pytest.mark.gpu
def test_the_cuda_peak_covers_memory_that_was_freed_again() -> None:
    meter = MemoryMeter(torch.device("cuda"))
    block = torch.ones(8_000_000, device="cuda")
    del block
    memory = meter.read()
    assert memory.cuda_peak_bytes is not None
    assert memory.cuda_before_bytes is not None
    assert memory.cuda_peak_bytes - memory.cuda_before_bytes >= 32_000_000


def test_the_environment_names_versions_and_nothing_private() -> None:
    found = environment(CPU, qquant_version="1.2.3")
    assert found.qquant == "1.2.3"
    assert found.torch == torch.__version__
    assert found.threads == torch.get_num_threads()
    shown = " ".join(str(value) for value in asdict(found).values())
    assert "/" not in found.platform
    assert str(Path.home()) not in shown
    for private in (platform.node(), getpass.getuser()):
        assert private not in shown.split()


CGROUPS = {
    "version 2": (
        "0::/outer/inner\n",
        {
            "outer/memory.max": "9000",
            "outer/memory.current": "4000",
            "outer/inner/memory.max": "max",
            "outer/inner/memory.current": "1000",
        },
        5000,
    ),
    "files that can be dropped": (
        "0::/\n",
        {"memory.max": "9000", "memory.current": "4000", "memory.stat": "anon 3000\ninactive_file 700\n"},
        5700,
    ),
    "version 1": (
        "5:cpu:/box\n4:memory:/box\n",
        {"memory/box/memory.limit_in_bytes": "8000", "memory/box/memory.usage_in_bytes": "1000"},
        7000,
    ),
    "version 1 without a limit": (
        "4:memory:/\n",
        {"memory/memory.limit_in_bytes": str(2**63 - 4096), "memory/memory.usage_in_bytes": "1000"},
        None,
    ),
    "a container that sees only its own group": (
        "0::/of/the/host\n",
        {"memory.max": "9000", "memory.current": "9500"},
        0,
    ),
}


@pytest.mark.parametrize(("own", "files", "expected"), list(CGROUPS.values()), ids=list(CGROUPS))
def test_free_memory_is_what_the_control_group_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str, files: dict[str, str], expected: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(measure, "_CGROUP", tmp_path / "own")
    monkeypatch.setattr(measure, "_CGROUP_ROOT", tmp_path / "fs")
    if expected is None:
        assert measure.free_memory_bytes() > 10_000
    else:
        assert measure.free_memory_bytes() == expected


def test_without_control_groups_free_memory_is_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "_CGROUP", tmp_path / "none")
    assert 0 < measure.free_memory_bytes() <= psutil.virtual_memory().total


def test_a_cpu_has_no_device_meter() -> None:
    assert measure.device_used_bytes(CPU) is None
