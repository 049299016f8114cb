"""Tokens per second of whole models on a CPU: BF16, Int8 and Int4, with and without the Int8 cache, and llama.cpp's.

llama.cpp's Q8_0 and Q4_0 files keep the output projection in 6 to 8 bits, so that models with an int8 head are those to
compare with them. Weights are random, at the real shapes; what a model says means nothing. A run is a prompt of 64
tokens and then single greedy steps; models and caches take turns, llama.cpp in a process of its own among them, so that
all meet the same machine. With one thread the clock is that thread's CPU time, with more it is the wall's. The roofline
is what the weights that a token needs take to be read, at the read bandwidth of one thread probed in every round.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.turns import Peer, PeerError, Record, read_bandwidth, setting_of
from qquant import _native
from qquant.kv_cache_quant import Int8KVCache
from qquant.measure import step_fn
from qquant.models.sizes import size_config
from qquant.random_models import config_from_dict, random_model
from qquant.records import Precision
from qquant.rounded_head import group_of, round_head
from qquant.shapes import model_shapes
from qquant.stored_bytes import BITS, ModelShapes

LAYERS = {"qwen2.5-0.5b": None, "qwen-1.8b": None, "qwen-7b": 4}
"""Model -> blocks measured, None for all: 7B is too large for every precision to lie in memory at once."""
PRECISIONS: tuple[Precision, ...] = ("bf16", "int8", "int4")
CACHES = ("bf16", "int8")
FORMATS = {"BF16": "bf16", "Q8_0": "int8", "Q4_0": "int4"}
"""llama.cpp's formats, and the precision of ours that each stands beside."""
PROMPT_TOKENS = 64
GROUP = 128

Run = Callable[[int], dict[str, float]]
"""Number of new tokens -> figures of one run."""


@dataclass(frozen=True)
class Contestant:
    """A model with a cache, or a file of llama.cpp's."""

    name: str
    precision: str
    bytes_per_token: int
    run: Run


def our_contestants(config: dict[str, Any], threads: int) -> list[Contestant]:
    """Our models in all precisions; embedding and head are the same tensors in those that are quantized."""
    shapes = model_shapes(config_from_dict(config))
    found: list[Contestant] = []
    quantized: Any = None
    for precision in PRECISIONS:
        model: Any = random_model(
            config_from_dict(config),
            precision=precision,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            group_size=GROUP,
        )
        if precision in BITS:
            quantized = quantized or model
            model.get_input_embeddings().weight = quantized.get_input_embeddings().weight
            model.get_output_embeddings().weight = quantized.get_output_embeddings().weight
        needed = bytes_per_token(shapes, precision)
        for cache in CACHES:
            name = f"{precision} with int8 cache" if cache == "int8" else precision
            found.append(Contestant(name, precision, needed, our_run(model, cache, threads)))
        if precision in BITS:
            needed = bytes_per_token(shapes, precision, int8_head=True)
            name = f"{precision} with int8 head"
            found.append(Contestant(name, precision, needed, our_run(with_int8_head(model), "bf16", threads)))
        gc.collect()
    return found


def with_int8_head(model: Any) -> Any:
    """The model with its output projection in 8 bits; all else is shared with it."""
    other = copy.copy(model)
    other._modules = dict(model._modules)
    round_head(other)
    return other


def bytes_per_token(shapes: ModelShapes, precision: Precision, *, int8_head: bool = False) -> int:
    """What one step reads: linears of the blocks and the head, with a scale for each group of those in few bits."""
    columns = shapes.hidden
    head = shapes.vocabulary * (columns + 2 * columns // group_of(columns) if int8_head else 2 * columns)
    if precision not in BITS:
        return head + sum(2 * each.weights for each in shapes.linears)
    scales = sum(-(-each.inputs // GROUP) * each.outputs * 2 for each in shapes.linears)
    return head + scales + sum(each.weights * BITS[precision] // 8 for each in shapes.linears)


def our_run(model: Any, cache: str, threads: int) -> Run:
    """A run of one model with one kind of cache."""
    step = step_fn(model)
    vocabulary = model.config.vocab_size
    prompt = torch.randint(vocabulary, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    clock = time.thread_time if threads == 1 else time.process_time

    def run(new_tokens: int) -> dict[str, float]:
        held: Any = Int8KVCache(model.config) if cache == "int8" else DynamicCache(config=model.config)
        with torch.inference_mode():
            cpu, wall = clock(), time.perf_counter()
            logits, held = step(prompt, held)
            prompt_cpu, prompt_wall = clock() - cpu, time.perf_counter() - wall
            cpu, wall = clock(), time.perf_counter()
            for _ in range(new_tokens):
                logits, held = step(logits.argmax(-1, keepdim=True), held)
            cpu, wall = clock() - cpu, time.perf_counter() - wall
        return {
            "prompt_tokens_per_cpu_s": PROMPT_TOKENS / prompt_cpu,
            "prompt_tokens_per_s": PROMPT_TOKENS / prompt_wall,
            "decode_tokens_per_cpu_s": new_tokens / cpu,
            "decode_tokens_per_s": new_tokens / wall,
        }

    return run


def peer_contestants(peer: Peer, model: str, config: dict[str, Any], folder: Path, threads: int) -> list[Contestant]:
    """llama.cpp's files of one model; they are written where they are not there."""

    def contestant(form: str) -> Contestant:
        path = folder / f"{model}-{config['num_hidden_layers']}-{form}.gguf"
        sizes = peer.ask(do="load", config=config, format=form, path=str(path), threads=threads)
        return Contestant(
            f"llama.cpp {form}",
            FORMATS[form],
            sizes["bytes_per_token"],
            lambda new_tokens: dict(peer.ask(do="run", format=form, new_tokens=new_tokens)),
        )

    return [contestant(form) for form in FORMATS]


def measure(contestants: list[Contestant], host: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of one run of each, forwards and backwards by turns, and the medians over rounds."""
    for each in contestants:
        each.run(2)
    runs: dict[str, list[dict[str, float]]] = {each.name: [] for each in contestants}
    bandwidths = [read_bandwidth(host)]
    for number in range(args.rounds):
        for each in contestants if number % 2 == 0 else contestants[::-1]:
            runs[each.name].append(each.run(args.new_tokens))
        bandwidths.append(read_bandwidth(host))
    speed = "decode_tokens_per_cpu_s" if args.threads == 1 else "decode_tokens_per_s"
    bandwidth = statistics.median(bandwidths)
    cells = {}
    for each in contestants:
        found = runs[each.name]
        rate = statistics.median(run[speed] for run in found)
        pairs = zip(found, runs["bf16"], strict=True)
        cells[each.name] = {
            "precision": each.precision,
            "bytes_per_token": each.bytes_per_token,
            **{key: statistics.median(run[key] for run in found) for key in found[0]},
            "gb_per_s": 1e-9 * each.bytes_per_token * rate,
            "share_of_roofline": 1e-9 * each.bytes_per_token * rate / bandwidth,
            # Of runs in one round, so that a slow stretch of the machine counts for neither.
            "times_bf16": statistics.median(run[speed] / base[speed] for run, base in pairs),
            "runs": found,
        }
    return {"speed": speed, "read_bandwidth_gb_per_s": bandwidths, "contestants": cells}


def print_row(name: str, row: dict[str, Any]) -> None:
    """The lines of one model."""
    cells, speed = row["contestants"], row["speed"]
    for label, cell in cells.items():
        beside = next((key for key, form in FORMATS.items() if label in (form, f"{form} with int8 head")), None)
        other = cells.get(f"llama.cpp {beside}")
        against = "not measured" if beside else ""
        if other:
            pairs = zip(cell["runs"], other["runs"], strict=True)
            against = f"{statistics.median(ours[speed] / theirs[speed] for ours, theirs in pairs):.2f}"
        print(
            f"| {name} | {label} | {cell[speed]:.1f} | {cell['decode_tokens_per_s']:.1f} "
            f"| {cell['prompt_tokens_per_cpu_s']:.0f} | {1e-6 * cell['bytes_per_token']:.0f} | {cell['gb_per_s']:.1f} "
            f"| {cell['share_of_roofline']:.0%} | {cell['times_bf16']:.2f} | {against} |",
            flush=True,
        )


@contextlib.contextmanager
def files_folder(given: Path | None) -> Iterator[Path]:
    """Where llama.cpp's files go: the folder given, which keeps them, or one that is removed."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="bench-decode-") as made:
        yield Path(made)


def start_peer(python: Path | None, threads: int) -> Peer | None:
    """The process of llama.cpp, or None with a line that says why."""
    if python is None:
        print("llama.cpp: not measured (--llamacpp-python names the Python of an environment that has it)\n")
        return None
    try:
        return Peer(python, "peer_llamacpp_decode.py", environment={"OMP_NUM_THREADS": str(threads)})
    except PeerError as error:
        print(f"llama.cpp: not measured, {error}\n")
        return None


def bench_model(model: str, peer: Peer | None, folder: Path, host: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one model."""
    config = size_config(model)
    layers = LAYERS.get(model) if args.layers is None else args.layers
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    contestants = our_contestants(config, args.threads)
    if peer is not None:
        contestants += peer_contestants(peer, model, config, folder, args.threads)
    row = measure(contestants, host, args)
    if peer is not None:
        peer.ask(do="free")
    return {"model": model, "layers": config["num_hidden_layers"], "threads": args.threads, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest model, two rounds of 16 tokens")
    parser.add_argument("--model", nargs="+", help=f"names of qquant.models.sizes (default {' '.join(LAYERS)})")
    parser.add_argument("--layers", type=int, help="blocks (default: all, 4 of qwen-7b)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llamacpp-python", type=Path, help="Python of an environment with llama-cpp-python and gguf")
    parser.add_argument("--gguf-folder", type=Path, help="keep llama.cpp's files there, 12 GB for all models")
    parser.add_argument("--out", type=Path, help="JSON file, written model by model; those it has are kept")
    args = parser.parse_args()
    if args.quick:
        args.new_tokens, args.rounds, args.model = 16, 2, args.model or ["qwen2.5-0.5b"]
    host = _native.host()
    if host is None or not hasattr(torch.ops.qquant, "cpu_kernel_info"):
        sys.exit("the compiled modules _host and _C are needed; build them with: " + _native.REBUILD)
    torch.set_num_threads(args.threads)
    peer = start_peer(args.llamacpp_python, args.threads)
    setting = setting_of("bench_decode.py", host, peer=None if peer is None else peer.about)
    record = Record(args.out, setting)

    print("| model | precision | tokens / s | by the wall | prompt tokens / CPU s | MB / token | GB/s ", end="")
    print(f"| share of roofline | x bf16 | x llama.cpp |\n|{'---|' * 10}")
    began = time.perf_counter()
    with files_folder(args.gguf_folder) as folder:
        for model in args.model or LAYERS:
            key = f"{model} {args.layers or ''} {args.threads} threads"
            if key not in record.rows:
                record.add(key, bench_model(model, peer, folder, host, args))
            row = record.rows[key]
            print_row(f"{model}, {row['layers']} blocks", row)
    if peer is not None:
        peer.close()
    print(f"\nTokens per second of {'thread CPU' if args.threads == 1 else 'wall'} time, {args.threads} threads.")
    print(f"Made in {time.perf_counter() - began:.0f} s by: `{record.setting['commands'][-1]}`")


if __name__ == "__main__":
    main()
