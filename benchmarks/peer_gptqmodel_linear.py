"""gptqmodel's side of bench_linear.py: its CPU kernels on random weights, one thread.

Runs in gptqmodel's own environment and imports nothing of qquant. With --serve it answers requests, a line of JSON
each, so that the sides take turns; alone it measures one stage and prints a line for each count of tokens and kernel.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer it does not import
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for torch's tensors, as on the other side

KERNELS = {
    "TorchAtenLinear int4": ("torch_aten_kernel", "TorchAtenLinear", 4),
    "TorchFusedLinear int4": ("torch_fused", "TorchFusedLinear", 4),
    "TorchInt8Linear int4": ("torch_int8", "TorchInt8Linear", 4),
    "TorchInt8Linear int8": ("torch_int8", "TorchInt8Linear", 8),
}
"""Name -> module, class, bits. TorchInt8Linear turns either width into eight bits with one scale per output feature."""
LARGEST_LINEAR = 100_000_000
"""Weights of a linear beyond which its modules would take many times its bytes, and minutes, to set themselves up."""


class Stage:
    """The linears of one stage under every kernel, in so many copies that they do not stay in the cache."""

    def __init__(self, in_features: int, widths: list[int], group_size: int, cache_bytes: int) -> None:
        self.in_features = in_features
        self.layers: dict[str, list[list[Any]]] = {}
        self.layer_bytes: dict[str, int] = {}
        if in_features * max(widths) > LARGEST_LINEAR or in_features % group_size:
            return
        for name in KERNELS:
            layer = [linear(name, in_features, width, group_size) for width in widths]
            held = sum(tensor.nbytes for module in layer for tensor in read_by(module))
            copies = 2 * cache_bytes // held
            self.layers[name] = [layer, *(copy.deepcopy(layer) for _ in range(copies))]
            self.layer_bytes[name] = held
        self.turn = 0
        self.x: Any = None

    def run(self, kernel: str, calls: int) -> float:
        """Thread CPU seconds of so many calls, each of the next copy."""
        import torch

        layers = self.layers[kernel]
        with torch.inference_mode():
            began = time.thread_time()
            for _ in range(calls):
                self.turn += 1
                for module in layers[self.turn % len(layers)]:
                    module(self.x)
            return time.thread_time() - began


def linear(name: str, in_features: int, out_features: int, group_size: int) -> Any:
    """A module with random codes, set up and in the form that its first call gives it."""
    import importlib

    import torch

    file, kind, bits = KERNELS[name]
    module: Any = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{file}"), kind)(
        bits=bits,
        group_size=group_size,
        sym=True,
        desc_act=False,
        in_features=in_features,
        out_features=out_features,
        bias=False,
    )
    middle = sum((1 << (bits - 1)) << shift for shift in range(0, 32, bits))
    with torch.inference_mode():
        module.qweight.copy_(torch.randint(-(2**31), 2**31, module.qweight.shape, dtype=torch.int64).to(torch.int32))
        module.qzeros.fill_(middle - (1 << 32) if middle >= 1 << 31 else middle)
        module.scales.fill_(0.02 / 2**bits)
        module.g_idx.copy_(torch.arange(in_features) // group_size)
        module.qzero_format(format=2)
        module.eval()
        module.post_init()
        module(torch.randn(1, in_features, dtype=torch.bfloat16))
    return module


def read_by(module: Any) -> list[Any]:
    """The tensors that a call reads: packed weights and what scales them, without what is left of the checkpoint."""
    if hasattr(module, "int8_weight_nk"):
        return [module.int8_weight_nk, module.int8_module.int8_channel_scale]
    fused = getattr(module, "torch_fused_op", module)
    return [module.qweight, fused.scales_and_zeros]


def answer(request: dict[str, Any], stages: list[Stage]) -> dict[str, Any]:
    """What one request gives; ``stages`` holds the one that was built last."""
    import torch

    if request["do"] == "build":
        stages.clear()
        stages.append(Stage(*(request[key] for key in ("in_features", "widths", "group_size", "cache_bytes"))))
        return {"layer_bytes": stages[0].layer_bytes}
    if request["do"] == "input":
        stages[0].x = torch.randn(request["tokens"], stages[0].in_features).bfloat16()
        return {}
    return {"cpu_s": stages[0].run(request["kernel"], request["calls"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="answer requests on standard input")
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--widths", type=int, nargs="+", default=[12288])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--cache-bytes", type=int, default=32 << 20, help="of the last-level cache")
    args = parser.parse_args()
    # gptqmodel prints on standard output, which is for answers only.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import gptqmodel
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    stages: list[Stage] = []
    if args.serve:
        print(json.dumps({"gptqmodel": gptqmodel.__version__, "torch": torch.__version__}), file=answers, flush=True)
        for line in sys.stdin:
            try:
                found = answer(json.loads(line), stages)
            except Exception as error:  # whatever it is, the benchmark names it and goes on without this peer
                found = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(found), file=answers, flush=True)
        return
    stage = Stage(args.in_features, args.widths, 128, args.cache_bytes)
    for tokens in args.tokens:
        stage.x = torch.randn(tokens, args.in_features).bfloat16()
        for name in stage.layers:
            stage.run(name, 1)
            best = min(stage.run(name, 1) for _ in range(5))
            print(json.dumps({"tokens": tokens, "kernel": name, "ms": round(1e3 * best, 4)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
