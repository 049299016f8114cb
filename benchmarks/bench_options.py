"""KL to the original for the options of plain GPTQ, side by side on one model: the table of docs/gptq.md.

Calibration and evaluation text are cut into windows of the same length; the model computes in float32, so that only
quantization shows. Prints one Markdown row per set of options.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import qquant
from qquant.linear import QuantLinear

PLAIN: dict[str, Any] = {"act_group_aware": False, "clip_search": "off"}
OPTIONS: dict[str, dict[str, Any]] = {
    "round to nearest": {"method": "rtn", "clip_search": "off"},
    "round to nearest, asymmetric, clip search": {"method": "rtn", "sym": False},
    "left to right, no clip search (AutoGPTQ)": PLAIN,
    "group-aware, no clip search": {"clip_search": "off"},
    "group-aware, clip search by weight": {},
    "clip search by Hessian": {"clip_search": "hessian"},
    "desc_act": {"desc_act": True},
    "desc_act and static groups": {"desc_act": True, "static_groups": True},
    "asymmetric": {"sym": False},
    "8 bits, round to nearest": {"bits": 8, "method": "rtn"},
    "8 bits": {"bits": 8},
}


def unpacked(model: Any) -> Any:
    """The same model with plain linears of the quantized values, which a CPU runs faster than packed ones."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.data = layer.dequantized().contiguous()
            if layer.bias is not None:
                plain.bias.data = layer.bias.float()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
    return model


def main() -> None:
    """Quantize with every set of options and print its KL, agreement and CPU seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="calibration text")
    parser.add_argument("--eval", type=Path, required=True, dest="held_out", help="evaluation text")
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows")
    parser.add_argument("--seq-len", type=int, default=256)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    samples = qquant.load_samples(args.data, tokenizer, n_samples=128, seq_len=args.seq_len)
    text = args.held_out.read_text(encoding="utf-8")[: args.windows * args.seq_len * 12]
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    windows = ids[: args.windows * args.seq_len].reshape(args.windows, 1, args.seq_len)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)

    with torch.inference_mode():
        original = load()
        exact = [original(window).logits.log_softmax(-1) for window in windows]
        print("| options | KL x 1e-3 | top-1 agreement | CPU s |\n|---|---|---|---|")
        for name, options in OPTIONS.items():
            model, began = load(), time.process_time()
            qquant.quantize_model(model, samples, qquant.QuantizeConfig(**{"method": "gptq", **options}))
            seconds, model = time.process_time() - began, unpacked(model)
            kl = agreement = 0.0
            for window, reference in zip(windows, exact, strict=True):
                got = model(window).logits.log_softmax(-1)
                kl += float((reference.exp() * (reference - got)).sum(-1).mean()) / args.windows
                agreement += float((reference.argmax(-1) == got.argmax(-1)).float().mean()) / args.windows
            print(f"| {name} | {kl * 1e3:.3f} | {agreement:.4f} | {seconds:.1f} |", flush=True)
    print(f"\nMade by: `python benchmarks/bench_options.py {shlex.join(sys.argv[1:])}`")


if __name__ == "__main__":
    main()
