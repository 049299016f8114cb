"""Meters: peak memory, generation speed, sizes on disk, and the machine they were read on.

Every result is a frozen dataclass whose field names carry the unit. Nothing here loads a model, compares two
results or writes a report; a model comes in as a function.
"""

from __future__ import annotations

import inspect
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from qquant.errors import UsageError

PeakSource = Literal["vmhwm_since_reset", "vmhwm_since_process_start", "ru_maxrss_since_process_start", "unavailable"]

StepFn = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(ids [1, new] int64, cache or None) -> (logits [1, vocab] after the last id, cache that holds the ids as well)."""

DECODE_TOKENS, DECODE_ROUNDS = 8, 4
"""Steps that are timed together, long enough for the clock; and how often, so that models still take turns soon."""

_LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "flash-attn", "lm-eval", "numpy", "safetensors", "tokenizers")
_NOT_INSTALLED = "not installed"
_STATUS_WORDS = ("status", "--porcelain", "--untracked-files=no")
_PATIENCE_SECONDS = 10
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CGROUP_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_RESET_PEAK_RSS = "5"
"""Written to clear_refs, resets VmHWM to the current VmRSS; see proc_pid_clear_refs(5)."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of this process around one piece of work, such as loading a model and running it once."""

    tensor_bytes: int | None
    """Parameters and buffers of the model alone, counted once where they are shared."""
    rss_before_bytes: int | None
    """Resident set when the work began: what else the process already held."""
    peak_rss_bytes: int | None
    """Largest resident set, including what was held before."""
    peak_rss_source: PeakSource
    """Which counter was read, and since when: only vmhwm_since_reset belongs to this work alone."""
    cuda_before_bytes: int | None
    """Allocated on the CUDA device when the work began."""
    cuda_peak_bytes: int | None
    """Largest allocation on the CUDA device, by torch's allocator (not what nvidia-smi shows)."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast one model reads a prompt and writes tokens, one sequence at a time."""

    prompt_tokens: int
    decode_tokens: int
    """Single steps that were timed together: the tokens behind one entry of decode_seconds."""
    prefill_tokens_per_second: float
    """prompt_tokens by the median of prefill_seconds."""
    decode_tokens_per_second: float
    """decode_tokens by the median of decode_seconds."""
    prefill_seconds: tuple[float, ...]
    """Every repetition, in order; warm-ups are left out."""
    decode_seconds: tuple[float, ...]
    """Every turn, in order; each is decode_tokens single steps with a KV cache, the likeliest token taken."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The software and the machine, without anything that names its owner: no host, user or path."""

    python: str
    torch: str
    transformers: str
    qquant: str
    platform: str
    cpu: str
    threads: int
    device: str
    device_memory_bytes: int | None
    """Of the GPU; of the machine on a CPU."""
    driver: str | None
    """The GPU driver's version; None on a CPU, and where nvidia-smi does not say."""
    cuda: str | None
    """The CUDA version that torch was built for."""
    libraries: dict[str, str]
    """Versions of what else the numbers may depend on, installed ones only."""


class MemoryMeter:
    """Reads what a piece of work cost: make one, do the work, ask ``read``.

    Where the kernel lets us, the peak is reset when the meter is made; where not, the record says since when it counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._was_reset = _reset_peak_rss()
        self._rss_before = _status_bytes("VmRSS")
        self._cuda_before: int | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._cuda_before = torch.cuda.memory_allocated(device)

    def read(self, model: torch.nn.Module | None = None) -> Memory:
        """The memory since the meter was made; with a model also the bytes of its tensors."""
        peak, source = _peak_rss(was_reset=self._was_reset)
        return Memory(
            tensor_bytes=None if model is None else tensor_bytes(model),
            rss_before_bytes=self._rss_before,
            peak_rss_bytes=peak,
            peak_rss_source=source,
            cuda_before_bytes=self._cuda_before,
            cuda_peak_bytes=torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None,
        )


def free_memory_bytes() -> int:
    """Memory that a new process could take before the kernel has to end one: what is free or can be made free.

    The least of what the machine has and what the control groups leave that this process is in.
    """
    return min([psutil.virtual_memory().available, *_cgroup_free()])


def device_used_bytes(device: torch.device) -> int | None:
    """What is in use on the whole GPU, other processes included, as nvidia-smi shows it; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def step_fn(model: Any) -> StepFn:
    """A transformers causal language model as a ``StepFn``."""
    partial = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if partial else {}

    def step(ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, **options)
        return output.logits[:, -1], output.past_key_values

    return step


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers; storage that two names share counts once."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storage = tensor.untyped_storage()
        storages[(tensor.device, storage.data_ptr())] = storage.nbytes()
    return sum(storages.values())


def measure_speed(
    models: Mapping[str, StepFn],
    prompt: Tensor,
    *,
    decode_tokens: int = DECODE_TOKENS,
    rounds: int = DECODE_ROUNDS,
    repeats: int = 5,
    warmups: int = 1,
) -> dict[str, Speed]:
    """Time prefill and decode of several models in turns, so that a noisy machine slows all of them alike.

    In every repetition each model reads the prompt, then the models take turns of ``decode_tokens`` steps. The order
    is turned round at every repetition, so that no model always follows the same neighbour.

    Args:
        models: label -> one step of that model.
        prompt: [1, prompt] int64 on the models' device. Read, never written.
        decode_tokens: greedy single steps that are timed together.
        rounds: how often in a repetition that happens.
        repeats: repetitions that count.
        warmups: repetitions before them that do not.

    Raises:
        UsageError: one of the counts is too small.
    """
    if min(prompt.shape[-1], decode_tokens, rounds, repeats) < 1 or warmups < 0:
        raise UsageError(
            "a speed needs a prompt, decode_tokens, rounds and repeats of at least 1 and warmups of at least 0, "
            f"got {prompt.shape[-1]}, {decode_tokens}, {rounds}, {repeats} and {warmups}"
        )
    prefill: dict[str, list[float]] = {label: [] for label in models}
    decode: dict[str, list[float]] = {label: [] for label in models}
    with torch.inference_mode():
        for turn in range(warmups + repeats):
            if turn == warmups:
                prefill, decode = {label: [] for label in models}, {label: [] for label in models}
            labels = list(models) if turn % 2 == 0 else list(models)[::-1]
            states = {}
            for label in labels:
                start = _now(prompt.device)
                states[label] = models[label](prompt, None)
                prefill[label].append(_now(prompt.device) - start)
            for label in labels * rounds:
                logits, cache = states[label]
                start = _now(prompt.device)
                for _ in range(decode_tokens):
                    logits, cache = models[label](logits.argmax(-1, keepdim=True), cache)
                decode[label].append(_now(prompt.device) - start)
                states[label] = logits, cache
    return {label: _speed(prefill[label], decode[label], prompt.shape[-1], decode_tokens) for label in models}


def folder_bytes(folder: Path) -> int:
    """Bytes of every file below a folder, links followed."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def weights_bytes(folder: Path) -> int:
    """Bytes of the ``*.safetensors`` files that lie directly in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def environment(device: torch.device, *, qquant_version: str) -> Environment:
    """Describe the software and the machine; none of it names a host, a user or a path."""
    cpu = _cpu_name()
    return Environment(
        python=platform.python_version(),
        torch=str(torch.__version__),
        transformers=_version("transformers"),
        qquant=qquant_version,
        # Not platform.platform(): it carries the kernel's build name, which people put machine names in.
        platform=f"{platform.system()} {platform.machine()}",
        cpu=cpu,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        device_memory_bytes=_device_memory(device),
        driver=_driver() if device.type == "cuda" else None,
        cuda=torch.version.cuda,
        libraries={name: version for name in _LIBRARIES if (version := _version(name)) != _NOT_INSTALLED},
    )


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``-dirty`` if files differ; None for an install."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit, changed = (_output(["git", "-C", str(root), *words]) for words in (("rev-parse", "HEAD"), _STATUS_WORDS))
    if not commit:
        return None
    return commit + ("-dirty" if changed else "")


def _speed(prefill: list[float], decode: list[float], prompt_tokens: int, decode_tokens: int) -> Speed:
    return Speed(
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        prefill_tokens_per_second=prompt_tokens / statistics.median(prefill),
        decode_tokens_per_second=decode_tokens / statistics.median(decode),
        prefill_seconds=tuple(prefill),
        decode_seconds=tuple(decode),
    )


def _now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak_rss() -> bool:
    """Ask Linux to forget this process's peak; False where it does not know how or does not let us."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK_RSS)
    except OSError:
        return False
    return True


def _peak_rss(*, was_reset: bool) -> tuple[int | None, PeakSource]:
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak, "vmhwm_since_reset" if was_reset else "vmhwm_since_process_start"
    try:
        import resource  # not on Windows
    except ImportError:
        return None, "unavailable"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "ru_maxrss_since_process_start"


def _status_bytes(field: str) -> int | None:
    """One ``kB`` line of /proc/self/status in bytes; None where there is no such file or line."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def _cgroup_free() -> list[int]:
    """What each control group around this process leaves, version 2 and 1; a group without a limit is left out."""
    try:
        lines = _CGROUP.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers not in ("", "memory"):
            continue
        root = _CGROUP_ROOT / controllers
        names = ("memory.max", "memory.current") if not controllers else _CGROUP_V1_FILES
        # In a container the path may be the host's, and the group itself is the root.
        group = Path(path.lstrip("/"))
        for folder in dict.fromkeys([root / group, *(root / parent for parent in group.parents), root]):
            limit, used = (_number(folder / name) for name in names)
            # Version 1 says "no limit" with a number that no machine has.
            if limit is not None and used is not None and limit < psutil.virtual_memory().total:
                found.append(max(0, limit - used + _cached_bytes(folder)))
    return found


def _cached_bytes(folder: Path) -> int:
    """What a control group holds of files that nobody has used for a while: the kernel drops it before it kills."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in lines if " " in line)
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such file, or the word "max"
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _NOT_INSTALLED


def _device_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return psutil.virtual_memory().total


def _driver() -> str | None:
    found = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found.splitlines()[0].strip() if found else None


def _output(command: list[str]) -> str | None:
    """What a short command prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
