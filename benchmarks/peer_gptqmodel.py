"""Quantize a folder with gptqmodel and write down the CPU seconds and memory of each stage.

Runs in gptqmodel's own environment, started by bench_vs_gptqmodel.py; imports nothing of qquant.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

start = time.process_time()
start_wall = time.perf_counter()


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB of 10**6 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("windows", type=Path, help="JSON list of lists of token ids")
    parser.add_argument("out")
    parser.add_argument("stages", type=Path, help="where the figures go")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--desc-act", action="store_true")
    parser.add_argument("--damp", type=float)
    args = parser.parse_args()

    figures: dict[str, float] = {"peak_mb_before_imports": peak_mb()}
    last = [start, start_wall]

    def stage(name: str) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        figures[f"{name}_cpu_s"], figures[f"{name}_wall_s"] = cpu - last[0], wall - last[1]
        figures[f"peak_mb_after_{name}"] = peak_mb()
        last[:] = [cpu, wall]

    import torch
    import transformers  # noqa: F401

    stage("import_torch")
    from gptqmodel import GPTQModel, QuantizeConfig

    stage("import_gptqmodel")
    torch.set_num_threads(1)
    windows = json.loads(args.windows.read_text(encoding="utf-8"))
    options = {"damp_percent": args.damp} if args.damp else {}
    config = QuantizeConfig(
        bits=args.bits,
        group_size=128,
        sym=not args.asym,
        desc_act=args.desc_act,
        act_group_aware=not args.desc_act,
        **options,
    )
    model = GPTQModel.load(args.model, config, device="cpu")
    stage("load")
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows], batch_size=1)
    stage("quantize")
    model.save(args.out)
    stage("save")
    args.stages.write_text(json.dumps(figures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
