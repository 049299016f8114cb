"""Peak memory and seconds per block of quantizing a checkpoint that is larger than the memory it may use.

Runs our command line as a process of its own and reads its ru_maxrss with wait4; imports neither torch nor qquant,
because a big parent would show up in that figure.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def make(folder: Path, python: str) -> None:
    """Make the synthetic model unless a model is there."""
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, str(HERE / "make_synthetic_checkpoint.py"), str(folder)], check=True)


def quantize(command: list[str], log: Path) -> tuple[float, float, float, int]:
    """Run to the end; return wall seconds, CPU seconds, peak bytes and the exit code."""
    with log.open("wb") as out:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=out, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, process.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="the synthetic model's folder; made if it is missing, and kept")
    parser.add_argument("--out", type=Path, help="keep the quantized model here")
    parser.add_argument("--python", default=sys.executable, help="interpreter of our environment")
    parser.add_argument("--n-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--options", default="", help="more options for qquant, in one string")
    parser.add_argument("--limit-mb", type=float, default=1600, help="exit with 1 above this peak; MB are 10**6 bytes")
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        model = args.model or Path(name) / "synthetic"
        make(model, args.python)
        out, log = args.out or Path(name) / "out", Path(name) / "log.txt"
        text = model.with_name(f"{model.name}-calibration.txt")
        command = [args.python, "-m", "qquant.gptq", "--model", str(model), "--data", str(text), "--out", str(out)]
        command += ["--method", args.method, "--bits", str(args.bits), "--group-size", "128"]
        command += ["--n-samples", str(args.n_samples)]
        command += ["--seq-len", str(args.seq_len), *shlex.split(args.options)]
        wall, cpu, peak, code = quantize(command, log)
        if code:
            print(log.read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
            raise SystemExit(f"{shlex.join(command)}\nfailed with {code}")
        size_in = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        size_out = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    blocks = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]

    threads = os.environ.get("OMP_NUM_THREADS", "default")
    result = {
        "command": "python benchmarks/bench_large.py " + shlex.join(sys.argv[1:]),
        "blocks": blocks,
        "input_gb": round(size_in / 1e9, 3),
        "output_gb": round(size_out / 1e9, 3),
        "samples": args.n_samples,
        "tokens_per_sample": args.seq_len,
        "threads": threads,
        "peak_mb": round(peak / 1e6, 1),
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "wall_seconds_per_block": round(wall / blocks, 2),
        "cpu_seconds_per_block": round(cpu / blocks, 2),
        "this_process_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
    }
    print("| blocks | in GB | out GB | samples | threads | peak MB | s per block, wall | CPU |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {blocks} | {result['input_gb']} | {result['output_gb']} | {args.n_samples} x {args.seq_len} | {threads} "
        f"| {result['peak_mb']} | {result['wall_seconds_per_block']} | {result['cpu_seconds_per_block']} |"
    )
    print(f"\nWhole command, verification included. Made by: `{result['command']}`")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if peak / 1e6 > args.limit_mb else 0


if __name__ == "__main__":
    sys.exit(main())
