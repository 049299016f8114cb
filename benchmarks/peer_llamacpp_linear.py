"""llama.cpp's side of bench_linear.py: ggml's matrix product with Q4_0 and Q8_0 weights, one thread.

Runs in an environment of its own with the package llama-cpp-python, built from its source distribution so that it uses
this processor's instructions; ggml is called through ctypes. Imports nothing of qquant. Weights lie where llama.cpp
puts them at load: in the first of the CPU's special buffers that supports their product (CPU_REPACK interleaves rows of
Q4_0), else in the plain one. Activations are float32 and rounded to 8 bits within the product, as in a model. With
--serve it answers requests, a line of JSON each, so that the sides take turns; alone it measures one stage and prints a
line for each count of tokens and format. At every input a result is compared with the product of the real values.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp  # type: ignore[import-not-found]
import numpy as np

F32, CPU_DEVICE = 0, 0
FORMATS = {"Q4_0": (2, 18, 4.61), "Q8_0": (8, 34, 73.9)}
"""Name -> ggml's number, bytes of a block (a float16 scale, then codes), deviation of codes that are equally likely."""
BLOCK, GRAPH_NODES = 32, 8
STD = 0.02
PATTERN_BLOCKS = 65_537
"""Random blocks, drawn once and repeated through a matrix: a prime, so that no two rows begin alike."""
LARGE_PAGE_BYTES, MADV_HUGEPAGE = 2 << 20, 14
CHECKED_ROWS = 16
LARGEST_ERROR = 0.02
"""Of a product, root mean square, relative. Rounding errs by 0.29 steps, a step is the largest of a block over 127, and
among 32 normal values that is 2 to 3 deviations: 0.5% to 0.7%. A wrong product is off by 100% or more."""


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def load() -> Any:
    """The library, with the signatures of what is called."""
    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).with_name("lib") / "libggml.so"))
    pointer, number, i64, size, flag = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_bool
    for names, result, arguments in (
        ("init", pointer, [InitParams]),
        ("free backend_buffer_free", None, [pointer]),
        ("new_tensor_2d", pointer, [pointer, number, i64, i64]),
        ("mul_mat", pointer, [pointer, pointer, pointer]),
        ("new_graph_custom", pointer, [pointer, size, flag]),
        ("build_forward_expand", None, [pointer, pointer]),
        ("tensor_overhead", size, []),
        ("graph_overhead_custom", size, [size, flag]),
        ("backend_dev_by_type", pointer, [number]),
        ("backend_dev_init backend_reg_get_proc_address", pointer, [pointer, ctypes.c_char_p]),
        ("backend_dev_buffer_type backend_dev_backend_reg", pointer, [pointer]),
        ("backend_dev_supports_op", flag, [pointer, pointer]),
        ("backend_cpu_set_n_threads", None, [pointer, number]),
        ("backend_alloc_ctx_tensors_from_buft", pointer, [pointer, pointer]),
        ("backend_buft_name", ctypes.c_char_p, [pointer]),
        ("backend_buffer_get_base get_data", pointer, [pointer]),
        ("backend_buffer_get_size", size, [pointer]),
        ("backend_tensor_alloc", number, [pointer, pointer, pointer]),
        ("backend_tensor_set backend_tensor_get", None, [pointer, pointer, size, size]),
        ("backend_graph_compute", number, [pointer, pointer]),
    ):
        for name in names.split():
            function = getattr(lib, "ggml_" + name)
            function.restype, function.argtypes = result, arguments
    return lib


class Cpu:
    """ggml's CPU with one thread, and its kinds of buffers in the order in which llama.cpp tries them at load."""

    def __init__(self) -> None:
        self.lib = load()
        self.device = self.lib.ggml_backend_dev_by_type(CPU_DEVICE)
        self.backend = self.lib.ggml_backend_dev_init(self.device, None)
        self.lib.ggml_backend_cpu_set_n_threads(self.backend, 1)
        self.plain = self.lib.ggml_backend_dev_buffer_type(self.device)
        registry = self.lib.ggml_backend_dev_backend_reg(self.device)
        found = self.lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        self.special: list[int] = []
        if found:
            kinds = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(found)(self.device)
            while kinds and kinds[len(self.special)]:
                self.special.append(kinds[len(self.special)])

    def context(self, tensors: int, graphs: int = 0, nodes: int = 0) -> int:
        """A context for the descriptions of so many tensors, and graphs of so many nodes; data lie elsewhere."""
        room = tensors * self.lib.ggml_tensor_overhead() + graphs * self.lib.ggml_graph_overhead_custom(nodes, False)
        return int(self.lib.ggml_init(InitParams(room + 4096, None, True)))

    def kind_of_buffer(self, form: str, in_features: int, out_features: int) -> int:
        """Where llama.cpp puts a matrix: the first special buffer that supports its product, or the plain one."""
        for kind in self.special:
            context = self.context(3)
            weight = self.lib.ggml_new_tensor_2d(context, FORMATS[form][0], in_features, out_features)
            buffer = self.lib.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
            product = self.lib.ggml_mul_mat(context, weight, self.lib.ggml_new_tensor_2d(context, F32, in_features, 1))
            fits = self.lib.ggml_backend_dev_supports_op(self.device, product)
            self.lib.ggml_backend_buffer_free(buffer)
            self.lib.ggml_free(context)
            if fits:
                return kind
        return int(self.plain)

    def allow_large_pages(self, buffer: int) -> None:
        """Let a buffer that was not touched yet have pages of 2 MB, as the weights of all other sides have."""
        begin = self.lib.ggml_backend_buffer_get_base(buffer)
        end = begin + self.lib.ggml_backend_buffer_get_size(buffer)
        begin = -(-begin // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
        if end > begin and sys.platform == "linux":
            advise = ctypes.CDLL(None).madvise
            advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            advise(begin, end - begin, MADV_HUGEPAGE)


class Stage:
    """The linears of one stage in one format, in so many copies that they do not stay in the cache."""

    def __init__(self, cpu: Cpu, form: str, in_features: int, widths: list[int], cache_bytes: int) -> None:
        self.cpu, self.in_features, self.widths = cpu, in_features, widths
        kind, block_bytes, deviation = FORMATS[form]
        self.layer_bytes = in_features * sum(widths) // BLOCK * block_bytes
        copies = 2 * cache_bytes // self.layer_bytes + 1
        self.contexts = [cpu.context(copies * len(widths))]
        self.layers = [
            [cpu.lib.ggml_new_tensor_2d(self.contexts[0], kind, in_features, width) for width in widths]
            for _ in range(copies)
        ]
        # Siblings share one buffer: every width is a multiple of 64, and the choice looks at nothing finer.
        place = cpu.kind_of_buffer(form, in_features, widths[0])
        self.buffers = [cpu.lib.ggml_backend_alloc_ctx_tensors_from_buft(self.contexts[0], place)]
        cpu.allow_large_pages(self.buffers[0])
        self.blocks = np.random.default_rng(0).integers(0, 256, (PATTERN_BLOCKS, block_bytes), np.uint8)
        self.blocks[:, :2] = np.array([STD / deviation], np.float16).view(np.uint8)
        for number, width in enumerate(widths):
            content = np.resize(self.blocks, (width * in_features // BLOCK, block_bytes))
            for layer in self.layers:
                cpu.lib.ggml_backend_tensor_set(layer[number], content.ctypes.data, 0, content.nbytes)
        self.graphs: list[int] = []
        self.turn = 0

    def start(self, x: Any) -> None:
        """Make a graph of each copy for an input, [tokens, in_features] float32; results of all copies share memory."""
        lib, plain = self.cpu.lib, self.cpu.plain
        self.free(keep=1)
        data = self.cpu.context(1 + len(self.widths))
        given, *results = [lib.ggml_new_tensor_2d(data, F32, n, x.shape[0]) for n in (self.in_features, *self.widths)]
        self.buffers.append(lib.ggml_backend_alloc_ctx_tensors_from_buft(data, plain))
        self.cpu.allow_large_pages(self.buffers[1])
        lib.ggml_backend_tensor_set(given, x.ctypes.data, 0, x.nbytes)
        steps = self.cpu.context(len(self.layers) * len(self.widths), len(self.layers), GRAPH_NODES)
        self.contexts += [data, steps]
        self.graphs = [lib.ggml_new_graph_custom(steps, GRAPH_NODES, False) for _ in self.layers]
        for layer, graph in zip(self.layers, self.graphs, strict=True):
            for weight, result in zip(layer, results, strict=True):
                product = lib.ggml_mul_mat(steps, weight, given)
                lib.ggml_backend_tensor_alloc(self.buffers[1], product, lib.ggml_get_data(result))
                lib.ggml_build_forward_expand(graph, product)
        self.run(1)
        for result, width in zip(results, self.widths, strict=True):
            self._check(x, result, width)

    def run(self, calls: int) -> float:
        """Thread CPU seconds of so many calls, each of the next copy; with one thread ggml computes in this one."""
        compute, failed = self.cpu.lib.ggml_backend_graph_compute, 0
        began = time.thread_time()
        for _ in range(calls):
            self.turn += 1
            failed |= compute(self.cpu.backend, self.graphs[self.turn % len(self.graphs)])
        took = time.thread_time() - began
        if failed:
            raise RuntimeError(f"ggml_backend_graph_compute returned {failed}")
        return took

    def free(self, keep: int = 0) -> None:
        """Give the memory back; ``keep=1`` leaves the weights."""
        for buffer in self.buffers[keep:]:
            self.cpu.lib.ggml_backend_buffer_free(buffer)
        for context in self.contexts[keep:]:
            self.cpu.lib.ggml_free(context)
        del self.buffers[keep:], self.contexts[keep:]

    def _check(self, x: Any, result: int, width: int) -> None:
        """Compare a result at its first and last outputs with the product of the weights' real values."""
        found = np.empty((x.shape[0], width), np.float32)
        self.cpu.lib.ggml_backend_tensor_get(result, found.ctypes.data, 0, found.nbytes)
        rows = np.r_[:CHECKED_ROWS, width - CHECKED_ROWS : width]
        per_row = self.in_features // BLOCK
        blocks = self.blocks[(rows[:, None] * per_row + np.arange(per_row)) % PATTERN_BLOCKS]
        scales, codes = blocks[..., :2].copy().view(np.float16), blocks[..., 2:]
        if codes.shape[-1] == BLOCK:
            values = codes.view(np.int8).astype(np.float32)
        else:  # the first half of a block lies in the low halves of its bytes
            values = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.float32) - 8
        expected = x @ (values * scales).reshape(len(rows), -1).T
        error = float(np.linalg.norm(found[:, rows] - expected) / np.linalg.norm(expected))
        if not error < LARGEST_ERROR:
            raise RuntimeError(
                f"a product is off by {error:.1%}, beyond the {LARGEST_ERROR:.0%} that rounding explains"
            )


def answer(request: dict[str, Any], cpu: Cpu, stages: dict[str, Stage]) -> dict[str, Any]:
    """What one request gives; ``stages`` holds the one that was built last, in each format."""
    if request["do"] == "build":
        for stage in stages.values():
            stage.free()
        stages.clear()
        for form in FORMATS:
            stages[form] = Stage(cpu, form, *(request[key] for key in ("in_features", "widths", "cache_bytes")))
        return {"layer_bytes": {form: stage.layer_bytes for form, stage in stages.items()}}
    if request["do"] == "input":
        stage = stages[request["format"]]
        stage.start(np.random.default_rng(1).standard_normal((request["tokens"], stage.in_features), np.float32))
        return {}
    return {"cpu_s": stages[request["format"]].run(request["calls"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="answer requests on standard input")
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--widths", type=int, nargs="+", default=[12288])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--cache-bytes", type=int, default=32 << 20, help="of the last-level cache")
    args = parser.parse_args()
    # llama.cpp may print; standard output is for answers only.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    cpu = Cpu()
    places = {
        form: cpu.lib.ggml_backend_buft_name(cpu.kind_of_buffer(form, args.in_features, args.widths[0])).decode()
        for form in FORMATS
    }
    stages: dict[str, Stage] = {}
    if args.serve:
        system = llama_cpp.llama_print_system_info().decode()
        about = {"llama_cpp_python": llama_cpp.__version__, "system": system, "buffers": places}
        print(json.dumps(about), file=answers, flush=True)
        for line in sys.stdin:
            try:
                found = answer(json.loads(line), cpu, stages)
            except Exception as error:  # whatever it is, the benchmark names it
                found = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(found), file=answers, flush=True)
        return
    shape = {"in_features": args.in_features, "widths": args.widths, "cache_bytes": args.cache_bytes}
    answer({"do": "build", **shape}, cpu, stages)
    for tokens in args.tokens:
        for form, stage in stages.items():
            answer({"do": "input", "format": form, "tokens": tokens}, cpu, stages)
            best = min(stage.run(1) for _ in range(5))
            line = {"tokens": tokens, "format": form, "buffer": places[form], "ms": round(1e3 * best, 4)}
            print(json.dumps(line), file=answers, flush=True)


if __name__ == "__main__":
    main()
