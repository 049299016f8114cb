"""llama.cpp's side of the decode benchmark: GGUF files with random weights at a model's shapes, one thread.

Runs in an environment of its own with the packages llama-cpp-python (built from its source distribution, so that it
uses this processor's instructions) and gguf. Imports nothing of qquant. With --serve it answers requests, a line of
JSON each, so that the sides take turns; alone it measures one model and prints a line for each format. Weights mean
nothing here, so quantized blocks are drawn as they are stored and never quantized: a file takes seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf  # type: ignore[import-not-found]
import llama_cpp  # type: ignore[import-not-found]
import numpy as np

FORMATS = ("BF16", "Q8_0", "Q4_0")
PROMPT_TOKENS = 64
UBATCH_TOKENS = 64
PATTERN_BLOCKS = 65_537
"""Random blocks of a format, drawn once and repeated through a matrix: a prime, so that no two rows begin alike."""
STD = 0.02

Kind: Any = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file; a vector is kept in float32 and is all one or all zero."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    value: float = 0.0


def kind_of(form: str, columns: int, *, output: bool) -> Any:
    """The format of a matrix, as llama.cpp's own quantizer chooses it (compared with a file that it wrote).

    A Q4_0 file keeps the output projection in Q6_K, or in Q8_0 where rows do not fill its blocks of 256.
    """
    if form == "Q4_0" and output:
        return Kind.Q6_K if columns % 256 == 0 else Kind.Q8_0
    return Kind[form]


def tensors_of(config: dict[str, Any], form: str) -> Iterator[Tensor]:
    """The tensors of a file in the order in which they are written.

    Args:
        config: content of a config.json of model type ``qwen`` (Qwen v1) or ``qwen2``.
        form: BF16, Q8_0 or Q4_0.
    """
    old = config["model_type"] == "qwen"
    hidden, tied = config["hidden_size"], bool(config.get("tie_word_embeddings"))
    inner = config["intermediate_size"] // (2 if old else 1)
    heads = config["num_attention_heads"]
    kv = hidden // heads * config.get("num_key_value_heads", heads)

    def matrix(name: str, rows: int, columns: int, *, output: bool = False) -> Tensor:
        return Tensor(name, (rows, columns), kind_of(form, columns, output=output))

    def vector(name: str, length: int, value: float) -> Tensor:
        return Tensor(name, (length,), Kind.F32, value)

    # A tied embedding is the output projection, and llama.cpp gives it the output's format.
    yield matrix("token_embd.weight", config["vocab_size"], hidden, output=tied)
    for number in range(config["num_hidden_layers"]):
        at = f"blk.{number}."
        yield vector(at + "attn_norm.weight", hidden, 1.0)
        for name, rows in (("attn_qkv", 3 * hidden),) if old else (("attn_q", hidden), ("attn_k", kv), ("attn_v", kv)):
            yield matrix(f"{at}{name}.weight", rows, hidden)
            yield vector(f"{at}{name}.bias", rows, 0.0)
        yield matrix(at + "attn_output.weight", hidden, hidden)
        yield vector(at + "ffn_norm.weight", hidden, 1.0)
        yield matrix(at + "ffn_gate.weight", inner, hidden)
        yield matrix(at + "ffn_up.weight", inner, hidden)
        yield matrix(at + "ffn_down.weight", hidden, inner)
    yield vector("output_norm.weight", hidden, 1.0)
    if not tied:
        yield matrix("output.weight", config["vocab_size"], hidden, output=True)


def bytes_of(tensor: Tensor) -> int:
    """What a tensor takes in the file."""
    size, width = gguf.GGML_QUANT_SIZES[tensor.kind]
    return math.prod(tensor.shape) // int(size) * int(width)


def stored(tensor: Tensor, generator: np.random.Generator) -> Any:
    """Content of a tensor as the file holds it, [rows, bytes of a row] uint8 for matrices, float32 for vectors."""
    if len(tensor.shape) == 1:
        return np.full(tensor.shape, tensor.value, np.float32)
    size, width = gguf.GGML_QUANT_SIZES[tensor.kind]
    blocks = tensor.shape[0] * tensor.shape[1] // size
    count = min(PATTERN_BLOCKS * (1 if width > 2 else 16), blocks)
    if tensor.kind == Kind.BF16:
        drawn = generator.standard_normal(count, np.float32) * np.float32(STD)
        pattern = (drawn.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        raw = generator.integers(0, 256, (count, width), np.uint8)
        if tensor.kind == Kind.Q6_K:  # ..., 16 scales of one byte, one float16
            raw[:, -18:-2] = 32
            scale, at = STD / (32 * 18.5), slice(-2, None)
        else:  # one float16, codes
            scale, at = STD / {Kind.Q8_0: 73.9, Kind.Q4_0: 4.61}[tensor.kind], slice(0, 2)
        raw[:, at] = np.array([scale], np.float16).view(np.uint8)
        pattern = raw.reshape(-1)
    return np.resize(pattern, (tensor.shape[0], tensor.shape[1] // size * width))


def write_file(path: Path, config: dict[str, Any], form: str) -> None:
    """Write a GGUF file of random weights, a tensor at a time."""
    architecture = config["model_type"]
    writer = gguf.GGUFWriter(path, architecture)
    heads = config["num_attention_heads"]
    writer.add_context_length(2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_rope_freq_base(10000.0 if architecture == "qwen" else 1e6)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type({"BF16": 32, "Q8_0": 7, "Q4_0": 2}[form])
    tensors = list(tensors_of(config, form))
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), bytes_of(tensor), tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for tensor in tensors:
        writer.write_tensor_data(stored(tensor, generator))
    writer.close()


class Loaded:
    """A file that is loaded, with one context."""

    def __init__(self, path: Path, threads: int) -> None:
        self.threads = threads
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_load_model_from_file(str(path).encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 512, 512, UBATCH_TOKENS
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = False
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context for {path}")

    def decode(self, tokens: list[int]) -> None:
        """Run the next tokens through the model, and wait for it."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        llama_cpp.llama_synchronize(self.context)

    def run(self, new_tokens: int) -> dict[str, float]:
        """One prompt and one decode: tokens per second of CPU time, of wall time and by ggml's own timing.

        With one thread ggml computes in the calling one, and CPU time is that thread's; with more it is the process's.
        """
        clock = time.thread_time if self.threads == 1 else time.process_time
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        llama_cpp.llama_perf_context_reset(self.context)
        cpu, wall = clock(), time.perf_counter()
        self.decode([7 + 13 * number for number in range(PROMPT_TOKENS)])
        prompt_cpu, prompt_wall = clock() - cpu, time.perf_counter() - wall
        cpu, wall = clock(), time.perf_counter()
        for number in range(new_tokens):
            self.decode([100 + 17 * number])
        cpu, wall = clock() - cpu, time.perf_counter() - wall
        own = llama_cpp.llama_perf_context(self.context)
        return {
            "prompt_tokens_per_cpu_s": PROMPT_TOKENS / prompt_cpu,
            "prompt_tokens_per_s": PROMPT_TOKENS / prompt_wall,
            "decode_tokens_per_cpu_s": new_tokens / cpu,
            "decode_tokens_per_s": new_tokens / wall,
            "decode_tokens_per_s_by_ggml": 1e3 * own.n_eval / own.t_eval_ms,
        }

    def close(self) -> None:
        """Give the memory back."""
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_free_model(self.model)


def load(config: dict[str, Any], form: str, path: Path, threads: int) -> tuple[Loaded, dict[str, int]]:
    """A loaded file, written first where it is not there, and its bytes: all, and those that one token reads."""
    if not path.exists():
        part = path.with_name(path.name + ".part")
        write_file(part, config, form)
        part.replace(path)
    tied = bool(config.get("tie_word_embeddings"))
    read = sum(bytes_of(tensor) for tensor in tensors_of(config, form) if tied or tensor.name != "token_embd.weight")
    return Loaded(path, threads), {"file_bytes": path.stat().st_size, "bytes_per_token": read}


def answer(request: dict[str, Any], loaded: dict[str, Loaded]) -> dict[str, Any]:
    """What one request gives; ``loaded`` holds the files by format."""
    if request["do"] == "load":
        form = request["format"]
        loaded[form], sizes = load(request["config"], form, Path(request["path"]), request["threads"])
        return dict(sizes)
    if request["do"] == "free":
        for each in loaded.values():
            each.close()
        loaded.clear()
        return {}
    return dict(loaded[request["format"]].run(request["new_tokens"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="answer requests on standard input")
    parser.add_argument("--config", type=Path, help="config.json of the shapes, model type qwen or qwen2")
    parser.add_argument("--folder", type=Path, help="where the files are made; one that is there is used again")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    # llama.cpp may print; standard output is for answers only.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    loaded: dict[str, Loaded] = {}
    if args.serve:
        system = llama_cpp.llama_print_system_info().decode()
        print(json.dumps({"llama_cpp_python": llama_cpp.__version__, "system": system}), file=answers, flush=True)
        for line in sys.stdin:
            try:
                found = answer(json.loads(line), loaded)
            except Exception as error:  # whatever it is, the benchmark names it and goes on without this peer
                found = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(found), file=answers, flush=True)
        return
    if args.config is None or args.folder is None:
        parser.error("--config and --folder are needed without --serve")
    config = json.loads(args.config.read_text(encoding="utf-8"))
    sizes: dict[str, dict[str, int]] = {}
    runs: dict[str, list[dict[str, float]]] = {}
    for form in args.formats:
        path = args.folder / f"{args.config.stem}-{form}.gguf"
        loaded[form], sizes[form] = load(config, form, path, args.threads)
        loaded[form].run(2)
        runs[form] = []
    for _ in range(args.runs):
        for form in args.formats:
            runs[form].append(loaded[form].run(args.new_tokens))
    for form, measured in runs.items():
        middle = {key: round(statistics.median(run[key] for run in measured), 2) for key in measured[0]}
        print(json.dumps({"format": form, **sizes[form], **middle}), file=answers, flush=True)


if __name__ == "__main__":
    main()
