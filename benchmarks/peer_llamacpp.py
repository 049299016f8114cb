"""llama.cpp's side of the decode attention benchmark: ggml's fused attention over a q8_0 or f16 cache, one thread.

Runs in an environment of its own with the package xllamacpp, whose library exports ggml's functions; they are called
through ctypes on random data, several caches in turn so that keys and values come from memory. Imports nothing of
qquant.
Prints one JSON object per shape.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

F32, F16, Q8_0 = 0, 1, 8
TYPES = {"q8_0": Q8_0, "f16": F16}
LLC_MULTIPLE = 192 << 20
"""Bytes of caches cycled through: several times any last-level cache of the machines we measure on."""


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def load() -> Any:
    """The library, with the signatures of what is called."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        sys.exit("this benchmark needs the package xllamacpp: pip install xllamacpp")
    lib = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
    pointer, i64, f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    for name, result, arguments in (
        ("ggml_init", pointer, [InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_cpu_init", None, []),
        ("ggml_new_tensor_4d", pointer, [pointer, ctypes.c_int, i64, i64, i64, i64]),
        ("ggml_nbytes", ctypes.c_size_t, [pointer]),
        ("ggml_get_data", pointer, [pointer]),
        ("ggml_quantize_chunk", ctypes.c_size_t, [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]),
        ("ggml_flash_attn_ext", pointer, [pointer, pointer, pointer, pointer, pointer, f32, f32, f32]),
        ("ggml_new_graph", pointer, [pointer]),
        ("ggml_build_forward_expand", None, [pointer, pointer]),
        ("ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.ggml_cpu_init()
    return lib


def measure(lib: Any, kind: int, batch: int, heads: int, kv_heads: int, tokens: int, dim: int, runs: int) -> float:
    """Median milliseconds of thread CPU time of one decoding step of one layer."""
    one = batch * kv_heads * tokens * dim * 2  # elements of keys and values
    width = {Q8_0: 34 / 32, F16: 2.0}[kind]
    sets = max(2, int(LLC_MULTIPLE / (one * width)) + 1)
    memory = int(sets * one * width * 1.02) + (512 << 20)
    context = lib.ggml_init(InitParams(memory, None, False))
    row = (ctypes.c_float * dim)(*[random.gauss(0, 1) for _ in range(dim)])
    query = lib.ggml_new_tensor_4d(context, F32, dim, 1, heads, batch)
    target = lib.ggml_get_data(query)
    for index in range(heads * batch):
        ctypes.memmove(target + index * dim * 4, row, dim * 4)
    graphs = []
    for _ in range(sets):
        pair = [lib.ggml_new_tensor_4d(context, kind, dim, tokens, kv_heads, batch) for _ in range(2)]
        for tensor in pair:
            fill(lib, kind, tensor, dim, batch * kv_heads * tokens)
        out = lib.ggml_flash_attn_ext(context, query, *pair, None, dim**-0.5, 0.0, 0.0)
        graph = lib.ggml_new_graph(context)
        lib.ggml_build_forward_expand(graph, out)
        graphs.append(graph)
    times = []
    for index in range(runs + 2):
        before = time.thread_time()
        lib.ggml_graph_compute_with_ctx(context, graphs[index % sets], 1)
        times.append(time.thread_time() - before)
    lib.ggml_free(context)
    return 1e3 * statistics.median(times[2:])


def fill(lib: Any, kind: int, tensor: int, dim: int, rows: int) -> None:
    """Random rows: 256 different ones, quantized once and repeated."""
    block = min(rows, 256)
    source = (ctypes.c_float * (dim * block))(*[random.gauss(0, 1) for _ in range(dim * block)])
    target, size = lib.ggml_get_data(tensor), lib.ggml_nbytes(tensor) // rows
    lib.ggml_quantize_chunk(kind, source, target, 0, block, dim, None)
    filled = block
    while filled < rows:
        more = min(filled, rows - filled)
        ctypes.memmove(target + filled * size, target, more * size)
        filled += more


def main() -> None:
    """Measure every shape given as B,Hq,H,T,D and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="+", help="batch,query heads,KV heads,tokens,head size")
    parser.add_argument("--cache", choices=sorted(TYPES), default="q8_0")
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    lib = load()
    random.seed(0)
    for shape in args.shapes:
        batch, heads, kv_heads, tokens, dim = (int(part) for part in shape.split(","))
        milliseconds = measure(lib, TYPES[args.cache], batch, heads, kv_heads, tokens, dim, args.runs)
        print(json.dumps({"shape": shape, "cache": args.cache, "ms": round(milliseconds, 4)}), flush=True)


if __name__ == "__main__":
    main()
