"""Quantize a folder with llm-compressor on windows of token ids, or turn its result into plain weights for the judge.

Runs in llm-compressor's own environment, started by bench_quality.py; imports nothing of qquant. The model computes in
float32, so its scales are stored in float32 as well, where a GPTQ file has float16. AWQ asks for pinned memory even
where there is no accelerator, and fails; so pinning is switched off.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import CompressedTensorsConfig

BEFORE = {
    "awq": lambda: AWQModifier(duo_scaling="both"),
    "spinquant": lambda: SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard"),
}


def recipe(options: dict[str, Any]) -> list[Any]:
    """The modifiers in order: what changes the weights first, then GPTQ or round to nearest."""
    weights = QuantizationArgs(
        num_bits=options["bits"],
        type="int",
        symmetric=options["sym"],
        strategy="channel" if options["group_size"] == -1 else "group",
        group_size=None if options["group_size"] == -1 else options["group_size"],
        observer=options.get("observer", "memoryless_minmax"),
    )
    scheme = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head", *([f"re:{options['skip']}"] if options.get("skip") else [])],
    }
    before = [BEFORE[name]() for name in options.get("before", ())]
    if options.get("method", "gptq") == "rtn":
        return [*before, QuantizationModifier(**scheme)]
    damping = options.get("dampening_frac", 0.01)
    return [*before, GPTQModifier(**scheme, actorder=options.get("actorder", "static"), dampening_frac=damping)]


def quantize(args: argparse.Namespace) -> None:
    IntermediatesCache.pin_memory = lambda self, batch_index: None
    windows = json.loads(args.windows.read_text(encoding="utf-8"))
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=recipe(args.options),
        num_calibration_samples=len(windows),
        max_seq_length=len(windows[0]),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)


def make_plain(args: argparse.Namespace) -> None:
    """Write scale * (code - zero) of every stored linear, in float32."""
    config = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32, quantization_config=config)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name.endswith((".weight", ".bias"))}
    plain = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(args.original).config)
    plain.to(torch.float32).load_state_dict(tensors)
    plain.save_pretrained(args.out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("quantize")
    command.add_argument("model")
    command.add_argument("windows", type=Path, help="JSON list of lists of token ids")
    command.add_argument("out")
    command.add_argument(
        "options", type=json.loads, help="JSON: bits, group_size, sym, actorder, observer, before, ..."
    )
    command.set_defaults(run=quantize)
    command = commands.add_parser("plain")
    command.add_argument("original")
    command.add_argument("folder")
    command.add_argument("out")
    command.set_defaults(run=make_plain)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
