"""Quantize a folder with gptqmodel on windows of token ids; runs in gptqmodel's own environment.

Started by bench_quality.py; imports nothing of qquant. The model computes in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("windows", type=Path, help="JSON list of lists of token ids")
    parser.add_argument("out")
    parser.add_argument(
        "options", type=json.loads, help="JSON: of QuantizeConfig; gptaq and foem as dicts; skip: regex"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    options = dict(args.options)
    if gptaq := options.pop("gptaq", None):
        options["gptaq"] = GPTAQConfig(**gptaq)
    if foem := options.pop("foem", None):
        options["foem"] = FOEMConfig(**foem)
    if skip := options.pop("skip", None):
        options["dynamic"] = {f"-:{skip}": {}}
    windows = json.loads(args.windows.read_text(encoding="utf-8"))
    model = GPTQModel.load(args.model, QuantizeConfig(**options), device="cpu", dtype=torch.float32)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows], batch_size=1)
    model.save(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
