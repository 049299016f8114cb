"""Quantize a folder with auto-round on windows of token ids, exported as auto_gptq; runs in auto-round's environment.

Started by bench_quality.py; imports nothing of qquant. The model computes in float32 (amp off).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("windows", type=Path, help="JSON list of lists of token ids")
    parser.add_argument("out", type=Path)
    parser.add_argument("options", type=json.loads, help="JSON: bits, group_size, sym, iters and others of AutoRound")
    args = parser.parse_args()
    torch.set_num_threads(1)
    windows = torch.tensor(json.loads(args.windows.read_text(encoding="utf-8")))
    options = dict(args.options)
    if skip := options.pop("skip", None):
        options["layer_config"] = {skip: {"bits": 16}}
    tuning = AutoRound(
        args.model,
        dataset=list(windows.split(1)),
        nsamples=len(windows),
        seqlen=windows.shape[1],
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
        **options,
    )
    tuning.quantize_and_save(str(args.out), format="auto_gptq")
    if not (args.out / "config.json").exists():  # it makes a folder named after the model and the scheme
        (inner,) = args.out.iterdir()
        for file in inner.iterdir():
            file.rename(args.out / file.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
