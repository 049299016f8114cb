"""What the process of one cell of a profile runs: make the model, generate, read the meters, answer, and end.

One process per cell, so that a cell that runs out of memory or crashes ends nothing else, and no cell inherits what
another left in memory. The grid of cells is profile_grid.py's; it starts ``main`` and reads lines of JSON from it.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen2Config

from qquant.baselines import load_bitsandbytes, unlisted_bytes_of
from qquant.checkpoint import load_model
from qquant.code_keys import ignoring_code
from qquant.heap import keep_freed_memory
from qquant.kv_cache_quant import enable_kv_quant
from qquant.measure import MemoryMeter, device_used_bytes, free_memory_bytes, tensor_bytes
from qquant.model_folder import read_config, skeleton
from qquant.profile_report import CellKey, CellMemory, CellRequest, CellSpeed, ProfileCell, out_of_memory_line
from qquant.random_models import BITS, config_from_dict, random_model
from qquant.text_sources import one_line

OnStep = Callable[[], None]
"""Called once the model is there, and after every generation."""

MARGIN_BYTES = 512 << 20
"""Of free memory, left to everyone else: what is free when a cell begins may be a little less later."""
_WANTED = re.compile(r"DefaultCPUAllocator: .*you tried to allocate (\d+) bytes", re.DOTALL)
"""In what torch's CPU allocator says, beside a place in its source."""


class _Clock:
    """Takes the time of every token of a generation: transformers gives a streamer each one as soon as it is known.

    The token is on the CPU by then, so on a GPU the time includes all work for it.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: Tensor) -> None:
        """Called with the prompt, then with one token per sequence after each step."""
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        """Called once after the last token."""


def main() -> None:
    """Read a ``CellRequest`` as one line from stdin; write ``{"step": true}`` lines, then one ``{"cell": ...}``.

    Everything that libraries print goes to stderr. When stdin ends, whoever asked is gone, and so is this process.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    request = CellRequest.model_validate_json(_first_line(0))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with ignoring_code(request.ignore_code):
        cell = run_cell(request, lambda: answer({"step": True}))
    answer({"cell": cell.model_dump(mode="json")})
    answers.close()
    # Nothing is left to do, and tearing down a device context or worker threads can fail after a good answer.
    os._exit(0)


def run_cell(request: CellRequest, on_step: OnStep = lambda: None) -> ProfileCell:
    """Measure one cell in this process, or say why not; limits this process's memory and threads for good."""
    empty: dict[str, Any] = {"memory": None, "speed": None, "predicted": None, "measured_peak_bytes": None}
    made = False

    def step() -> None:
        nonlocal made
        made = True
        on_step()

    try:
        limit_memory(torch.device(request.device), request.memory_limit_bytes)
        return _measured(request, step)
    except Exception as error:
        _lift_limit()  # enough to answer with
        reason = memory_reason(error)
        status = "failed" if reason is None else "out-of-memory"
        shown = (
            f"{'generating' if made else 'making the model'}: {reason or f'{type(error).__name__}: {one_line(error)}'}"
        )
        return ProfileCell.model_validate({"key": request.key, "status": status, "reason": shown, **empty})


def memory_reason(error: BaseException) -> str | None:
    """One line if this error, or what it was raised from, says that memory ran out; else None."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, MemoryError | torch.OutOfMemoryError) or out_of_memory_line(str(link)):
            wanted = _WANTED.search(str(link))
            return (
                f"no room for another {int(wanted[1]) / 2**20:.1f} MiB" if wanted else one_line(link) or "MemoryError"
            )
        link = link.__cause__ or link.__context__
    return None


def limit_memory(device: torch.device, limit_bytes: int | None) -> None:
    """Let allocations fail that there is no memory for, before the kernel has to end a process.

    On a CPU the limit is on RLIMIT_DATA: private writable memory, which is what allocators take. Memory counts when it
    is asked for, touched or not, so a cell that is far too large fails at once. RLIMIT_AS would count libraries and
    mapped files of weights too, which the kernel can drop. Should it still have to end a process, it is asked to choose
    this one. On a GPU torch's allocator is limited, if a limit was stated.

    Args:
        device: what the cell runs on.
        limit_bytes: stated limit; None: what is free, less a margin. More than that is never taken.
    """
    if device.type == "cuda":
        if limit_bytes is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device.index)
        return
    try:
        import resource  # not on Windows

        Path("/proc/self/oom_score_adj").write_text("1000")
    except (ImportError, OSError):
        pass  # the limit alone has to do, or there is none on this system: docs/profile.md says so
    free = max(MARGIN_BYTES, free_memory_bytes() - MARGIN_BYTES)
    if sys.platform == "linux":
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = free if limit_bytes is None else min(free, limit_bytes)
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _lift_limit() -> None:
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _measured(request: CellRequest, on_step: OnStep) -> ProfileCell:
    """The cell's figures: one generation for the memory, the warm-ups, and the repetitions for the times."""
    key, device = request.key, torch.device(request.device)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    torch.manual_seed(request.seed)
    if device.type == "cuda":
        _begin_with_device(request, device)
    _import_family(request)
    loading = MemoryMeter(device)
    model = _make_model(request, device)
    loaded = loading.read(model)
    on_step()

    drawn = torch.Generator().manual_seed(request.seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(vocabulary, (key.batch, key.prompt_tokens), generator=drawn).to(device)
    running = MemoryMeter(device)
    _, cache = _generate(model, prompt, key.new_tokens)
    held = cache_bytes(cache)
    del cache
    used = running.read()
    memory = CellMemory(
        tensor_bytes=(loaded.tensor_bytes or tensor_bytes(model)) + unlisted_bytes_of(model),
        cache_bytes=held,
        rss_before_bytes=loaded.rss_before_bytes,
        rss_loaded_bytes=used.rss_before_bytes,
        rss_peak_loading_bytes=loaded.peak_rss_bytes,
        rss_peak_bytes=used.peak_rss_bytes,
        allocator_peak_bytes=used.cuda_peak_bytes,
        allocator_reserved_bytes=torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None,
        # torch gives nothing back to the device by itself, so what is in use after the generation was its peak.
        device_peak_bytes=device_used_bytes(device),
    )
    on_step()
    keep_freed_memory()  # timed as a user's process runs
    times = []
    for number in range(request.warmups + request.repeats):
        taken, _ = _generate(model, prompt, key.new_tokens)
        times += [taken] if number >= request.warmups else []
        on_step()
    return ProfileCell(
        key=key,
        status="ok",
        reason=None,
        memory=memory,
        speed=cell_speed(times, key),
        predicted=None,
        measured_peak_bytes=_peak_beyond_process(memory),
    )


def _peak_beyond_process(memory: CellMemory) -> int | None:
    if memory.allocator_peak_bytes is not None:
        return memory.allocator_peak_bytes
    if memory.rss_peak_bytes is None or memory.rss_before_bytes is None:
        return None
    return memory.rss_peak_bytes - memory.rss_before_bytes


def cell_speed(times: list[list[float]], key: CellKey) -> CellSpeed:
    """Rates out of times.

    Args:
        times: for each repetition the seconds from the call to every token.
        key: how many tokens they were.
    """
    first = tuple(taken[0] for taken in times)
    decode = tuple(taken[-1] - taken[0] for taken in times)
    steps = sorted(after - before for taken in times for before, after in pairwise(taken))
    rate = key.batch * (key.new_tokens - 1) / statistics.median(decode) if steps else None
    return CellSpeed(
        first_token_seconds=first,
        decode_seconds=decode,
        prefill_tokens_per_second=key.batch * key.prompt_tokens / statistics.median(first),
        decode_tokens_per_second=rate,
        token_p50_seconds=statistics.median(steps) if steps else None,
        # The smallest that 95 % of all steps do not exceed.
        token_p95_seconds=steps[math.ceil(0.95 * len(steps)) - 1] if steps else None,
    )


def cache_bytes(cache: Any) -> int | None:
    """What a cache holds; None for a kind that is not known."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    states = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(state.untyped_storage().nbytes() for state in states if isinstance(state, Tensor))


def _make_model(request: CellRequest, device: torch.device) -> Any:
    """The cell's model in eval mode, its cache switched on, and nothing of its folder's ways of generating."""
    dtype: torch.dtype = getattr(torch, request.compute_dtype)
    key = request.key
    if request.config is not None:
        options: dict[str, Any] = {"group_size": request.group_size, "seed": request.seed}
        config = config_from_dict(request.config)
        model: Any = random_model(config, precision=key.precision, dtype=dtype, device=device, **options)
    elif key.precision == "nf4" or key.precision == "llm-int8":
        model = load_bitsandbytes(Path(request.folder or ""), key.precision, dtype=dtype, device=device)
    else:
        model = load_model(Path(request.folder or ""), dtype=dtype, device=device)
    return _ready(model, key)


def _import_family(request: CellRequest) -> None:
    """Import the modules of the model's type by building it without weights: they are libraries and not the model."""
    folder = Path(request.folder or "")
    config = read_config(folder) if request.config is None else config_from_dict(request.config)
    skeleton(config, folder)


def _ready(model: Any, key: CellKey) -> Any:
    if key.kv_cache in BITS:
        enable_kv_quant(model, value_bits=8 if key.kv_cache == "int8" else 4)
    # Sampling, penalties and ends of text in a folder's generation_config.json would change what is measured.
    model.generation_config = GenerationConfig()
    return model.eval()


def _generate(model: Any, prompt: Tensor, new_tokens: int) -> tuple[list[float], Any]:
    """One greedy generation as a user calls it; seconds from the call to each token, and the cache after the last.

    Raises:
        RuntimeError: the model ended by itself.
    """
    clock = _Clock()
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, return_dict_in_generate=True, use_cache=True
    )
    began = time.perf_counter()
    with torch.inference_mode():
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=settings, streamer=clock
        )
    seconds = [moment - began for moment in clock.seconds[1:]]  # the first is the prompt's
    if len(seconds) != new_tokens:
        raise RuntimeError(f"the model gave {len(seconds)} tokens of {new_tokens}")
    return seconds, output.past_key_values


def _begin_with_device(request: CellRequest, device: torch.device) -> None:
    """Generate with a tiny model, so that the device's context and kernels are there before the first meter is read.

    On a CPU nothing of the kind is done: what torch brings in on first use is some 20 MB, and predictions count it.
    """
    key = request.key
    config = Qwen2Config(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=256,
    )  # fmt: skip
    dtype: torch.dtype = getattr(torch, request.compute_dtype)
    kind = key.precision if key.precision in BITS else _PRECISION_OF[dtype]
    model = _ready(random_model(config, precision=kind, dtype=dtype, device=device), key)
    _generate(model, torch.zeros(1, 8, dtype=torch.int64, device=device), 3)
    del model
    gc.collect()
    torch.cuda.empty_cache()


_PRECISION_OF: dict[torch.dtype, Any] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _first_line(descriptor: int) -> bytes:
    """One line, read without a buffer, because the thread below reads the same pipe."""
    line = bytearray()
    while (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        line += byte
    return bytes(line)


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)
