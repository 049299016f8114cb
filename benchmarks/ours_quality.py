"""Quantize a folder with qquant on windows of token ids; started by bench_quality.py as its peers are."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import qquant
from qquant.calibrate import samples_from_ids


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("windows", type=Path, help="JSON list of lists of token ids")
    parser.add_argument("out", type=Path)
    parser.add_argument("options", type=json.loads, help="JSON: fields of QuantizeConfig, and skip: a regex or null")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype; default: qquant's choice")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if skip := args.options.pop("skip", None):
        args.options["dynamic"] = {f"-:{skip}": {}}
    config = qquant.QuantizeConfig.from_dict(args.options)
    windows = json.loads(args.windows.read_text(encoding="utf-8"))
    samples = samples_from_ids(windows) if config.needs_data else None
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    qquant.quantize_checkpoint(args.model, samples, config, args.out, dtype=dtype)
    return 0


if __name__ == "__main__":
    sys.exit(main())
