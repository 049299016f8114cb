"""Peak memory and seconds per block of quantizing a checkpoint that is larger than the memory it may use.

Runs our command line as a process of its own and reads its ru_maxrss with wait4; imports neither torch nor qquant,
because a big parent would show up in that figure. With --kill-after it is killed by SIGKILL, with --stop-after asked to
stop by SIGTERM, and started again, which goes on where it was; with --end-after it is stopped for good, and the time of
the whole run is extrapolated.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STOPPED = 75
"""The exit code of a run that was asked to stop, and goes on when it is started again."""

LOADS = """
import sys, torch, qquant
model = qquant.load_quantized(sys.argv[1])
with torch.inference_mode():
    logits = model(input_ids=torch.arange(1, 9)[None]).logits
assert bool(torch.isfinite(logits).all()), "logits must be finite"
"""


@dataclass
class Part:
    """One process of a run."""

    code: int
    wall: float
    cpu: float
    peak: int
    """Bytes."""
    linears: int
    """Finished by it."""
    walking: float
    """Seconds from its first finished linear to its last."""
    walked: int
    """Linears finished in that time."""


def make(folder: Path, python: str) -> None:
    """Make the synthetic model unless a model is there."""
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, str(HERE / "make_synthetic_checkpoint.py"), str(folder)], check=True)


def finished_linears(out: Path) -> int:
    """How many linears the journal of an unfinished run names."""
    count = 0
    try:
        text = (out.with_name(f"{out.name}.unfinished") / "journal.jsonl").read_text(encoding="utf-8")
    except OSError:
        return 0
    for line in text.splitlines():
        try:
            piece = json.loads(line)
        except ValueError:
            continue  # the line that is being written
        for value in piece.values() if isinstance(piece, dict) else ():
            count += len(value["modules"]) if isinstance(value, dict) and "modules" in value else 0
    return count


def run(command: list[str], log: Path, out: Path, end: tuple[float, signal.Signals] | None) -> Part:
    """Run to the end, or until a signal after some seconds ended it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = newest = finished_linears(out)
    begun, first, last = newest, 0.0, 0.0
    with log.open("ab") as stream:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        asked = False
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            now = time.perf_counter()
            if pid:
                break
            if (count := finished_linears(out)) > newest:
                newest, last = count, now
                if not first:
                    begun, first = count, now
            if end is not None and not asked and now - start > end[0]:
                process.send_signal(end[1])
                asked = True
            time.sleep(1)
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    return Part(process.returncode, now - start, cpu, peak, newest - before, last - first, newest - begun)


def shown(part: Part, per_block: int, name: str) -> str:
    """A row of the table."""
    each = f"{part.walking / part.walked * per_block:.1f}" if part.walking and part.walked else "not measured"
    cells = (name, part.code, f"{part.wall:.0f}", f"{part.cpu:.0f}", f"{part.peak / 1e6:.1f}")
    return "| " + " | ".join(map(str, (*cells, f"{part.linears / per_block:.1f}", each))) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="the synthetic model's folder; made if it is missing, and kept")
    parser.add_argument("--out", type=Path, help="keep the quantized model here")
    parser.add_argument("--python", default=sys.executable, help="interpreter of our environment")
    parser.add_argument("--n-samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--method", default="gptq", help="as qquant quantize takes it")
    parser.add_argument("--max-memory", help="as qquant quantize takes it")
    parser.add_argument("--options", default="", help="more options for qquant, in one string")
    parser.add_argument("--kill-after", type=float, action="append", default=[], metavar="MINUTES",
                        help="kill the run and start it again; repeatable")  # fmt: skip
    parser.add_argument("--stop-after", type=float, action="append", default=[], metavar="MINUTES",
                        help="then ask the run to stop, and start it again; repeatable")  # fmt: skip
    parser.add_argument("--end-after", type=float, metavar="MINUTES", help="stop the last part for good")
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
        command += ["--n-samples", str(args.n_samples), "--seq-len", str(args.seq_len)]
        command += ["--max-memory", args.max_memory] if args.max_memory else []
        command += shlex.split(args.options)
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        blocks, per_block = config["num_hidden_layers"], 7
        parts: list[Part] = []
        print("| part | exit code | wall s | CPU s | peak MB | blocks | s per block |\n|---|---|---|---|---|---|---|")
        ends: list[tuple[float, signal.Signals] | None] = [(60 * each, signal.SIGKILL) for each in args.kill_after]
        ends += [(60 * each, signal.SIGTERM) for each in args.stop_after]
        ends.append(None if args.end_after is None else (60 * args.end_after, signal.SIGTERM))
        for end in ends:
            parts.append(run(command, log, out, end))
            print(shown(parts[-1], per_block, f"{len(parts)}"), flush=True)
            if parts[-1].code not in (0, -signal.SIGKILL if end and end[1] == signal.SIGKILL else STOPPED):
                print(log.read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
                raise SystemExit(f"{shlex.join(command)}\nfailed with {parts[-1].code}")
            if parts[-1].code == 0:
                break
        complete = parts[-1].code == 0
        if complete:
            loaded = run([args.python, "-c", LOADS, str(out)], log, out, None)
            print(f"| loaded, 8 tokens | {loaded.code} | {loaded.wall:.0f} | {loaded.cpu:.0f} "
                  f"| {loaded.peak / 1e6:.1f} | | |")  # fmt: skip
            if loaded.code:
                print(log.read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
        size_in = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        size_out = sum(file.stat().st_size for file in out.glob("*.safetensors"))

    done, wall = sum(part.linears for part in parts) / per_block, sum(part.wall for part in parts)
    walked, steps = sum(part.walking for part in parts), sum(part.walked for part in parts) / per_block
    result = {
        "command": "python benchmarks/bench_large.py " + shlex.join(sys.argv[1:]),
        "blocks": blocks,
        "blocks_done": round(done, 2),
        "complete": complete,
        "input_gb": round(size_in / 1e9, 3),
        "output_gb": round(size_out / 1e9, 3),
        "samples": args.n_samples,
        "tokens_per_sample": args.seq_len,
        "method": args.method,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "peak_mb": round(max(part.peak for part in parts) / 1e6, 1),
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(sum(part.cpu for part in parts), 1),
        "seconds_per_block": round(walked / steps, 1) if steps else None,
        "parts": [asdict(part) for part in parts],
        "this_process_peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
    }
    print(
        f"\n{blocks} blocks, {result['input_gb']} GB in, {result['output_gb']} GB out, {args.n_samples} samples of "
        f"{args.seq_len} tokens, method {args.method}, {result['threads']} threads; peak {result['peak_mb']} MB."
    )
    if not complete and steps:
        whole = wall + (blocks - done) * walked / steps
        print(f"Ended after {done:.1f} blocks; the whole run is EXTRAPOLATED to {whole / 3600:.1f} hours.")
    print(f"Peak and totals are of whole commands, seconds per block of the walk alone. Made by: `{result['command']}`")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 1 if result["peak_mb"] > args.limit_mb else 0


if __name__ == "__main__":
    sys.exit(main())
