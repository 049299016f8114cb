"""One rank against several: the same bytes, the ratio of times, and bytes sent per block beside the formula.

Runs our command under torchrun, every rank on one thread, on one machine and the CPU. Imports neither torch nor qquant.
The formula is that of docs/scaling.md, written out here once more from the shapes alone. Run it as a module:
``python -m benchmarks.bench_ranks``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.child_process import ONE_THREAD, OUR_ENVIRONMENT, ROOT, Child, check, run

LANES, PIECE_ROWS, SIDE = 16, 2048, 256
SMALL = "--layers 3 --hidden 512 --intermediate 1408 --heads 8 --kv-heads 2 --vocab 4096 --text-words 30000"
METHODS = {"gptq": (False, False), "best": (True, True)}  # whether inputs' misses are summed, and outputs are weighted
GROUP_SIZE = 128
KINDS = ("moments", "solutions")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="a Qwen2 or Llama folder; default: a small synthetic one, made here")
    parser.add_argument("--data", type=Path, help="calibration text; default: the synthetic model's")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--method", choices=METHODS, default="gptq")
    parser.add_argument("--n-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        model, data = args.model, args.data
        if model is None:
            model = work / "synthetic"
            maker = [sys.executable, str(ROOT / "benchmarks" / "make_synthetic_checkpoint.py"), str(model)]
            check(run([*maker, *shlex.split(SMALL)], env={}, cwd=name))
            data = work / "synthetic-calibration.txt"
        if data is None:
            parser.error("--model needs --data")
        rows = [measured(size, model.resolve(), data.resolve(), args, work) for size in args.ranks]
    setting = {"samples": args.n_samples, "seq_len": args.seq_len, "method": args.method}
    about = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": version("torch"), **setting}
    print(json.dumps(about))
    titles = ["ranks", "seconds, whole command", "quantizing", "ratio", "rank"]
    titles += ["moments, bytes per block", "formula", "solutions", "formula", "other"]
    print("|", " | ".join(titles), "|")
    print("|" + "---|" * len(titles))
    for row in rows:
        ratio = row["quantizing_seconds"] / rows[0]["quantizing_seconds"]
        cells = [row["ranks"], f"{row['seconds']:.1f}", f"{row['quantizing_seconds']:.1f}", f"{ratio:.2f}"]
        for rank, sent in enumerate(row["sent"]):
            told = [sent[kind + made] for kind in KINDS for made in ("", "_formula")]
            print("|", *(f"{cell} |" for cell in (*cells, rank, *told, sent["other"])))
            cells = [""] * 4
    same = all(row["sha256"] == rows[0]["sha256"] for row in rows)
    right = all(sent[kind] == sent[f"{kind}_formula"] for row in rows for sent in row["sent"] for kind in KINDS)
    print(f"{len(rows[0]['sha256'])} files, the same bytes for {args.ranks} ranks: {same}; bytes as predicted: {right}")
    if args.json:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return 0 if same and right else 1


def measured(size: int, model: Path, data: Path, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Quantize with so many ranks; bytes are those of the last block."""
    out = work / f"out-{size}"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    job = ["-m", "qquant.gptq", "--model", str(model), "--out", str(out), "--data", str(data)]
    job += ["--n-samples", str(args.n_samples), "--seq-len", str(args.seq_len), "--method", args.method]
    job += ["--group-size", str(GROUP_SIZE), "--device", "cpu", "--debug"]
    child = check(run([*start, *job], env={**ONE_THREAD, **OUR_ENVIRONMENT}, cwd=str(work)))
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    sent = [
        {**last_block(child, rank), **formula(config, size, rank, args.n_samples, args.method)} for rank in range(size)
    ]
    return {
        "ranks": size,
        "seconds": child.wall_seconds,
        "quantizing_seconds": float(re.findall(r"linears in ([0-9.]+) s", child.output)[0]),  # without the imports
        "cpu_seconds": child.cpu_seconds,
        "sent": sent,
        "sha256": {
            str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*"))
            if path.is_file()
        },
    }


def last_block(child: Child, rank: int) -> dict[str, int]:
    """Bytes that a rank sent during the last block, by what it wrote with --debug."""
    told = [json.loads(text) for text in re.findall(r"sent (\{[^{}]*\})", child.output)]
    if not told:  # one rank sends nothing, and says nothing of it
        return dict.fromkeys((*KINDS, "other"), 0)
    *_, before, after = [one for one in told if one["rank"] == rank]
    return {kind: after[kind] - before[kind] for kind in (*KINDS, "other")}


def formula(config: dict[str, Any], size: int, rank: int, samples: int, method: str) -> dict[str, int]:
    """Bytes that a rank sends for one block, as docs/scaling.md has them."""
    exact, weighted = METHODS[method]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    lanes = len(range(rank, min(LANES, samples), size))
    moments = solutions = 0
    for stage, columns in (([hidden, kv, kv], hidden), ([hidden], hidden), ([inner, inner], hidden), ([hidden], inner)):
        matrices = [columns] * (1 + exact) + [hidden] * (exact and len(stage) == 1)
        for rows in matrices:
            own = rows * (rank + 1) // size - rows * rank // size
            moments += 4 * columns * ((rows - own) * lanes + own * (size - 1))
        sides = [divisor(rows) if weighted else 1 for rows in stage]
        for side in dict.fromkeys(sides):
            tall = sum(rows for rows, other in zip(stage, sides, strict=True) if other == side)
            height = PIECE_ROWS // side * side
            pieces = [min(height, tall - top) for top in range(0, tall, height)]
            mine = sum(pieces[rank::size]) * (columns + 8 * columns // GROUP_SIZE)
            solutions += (mine + (4 * columns if rank == 0 else 0)) * (size - 1)
    return {"moments_formula": moments, "solutions_formula": solutions}


def divisor(rows: int) -> int:
    """Outputs that are weighted together."""
    return next(side for side in range(min(SIDE, rows), 0, -1) if rows % side == 0)


if __name__ == "__main__":
    sys.exit(main())
