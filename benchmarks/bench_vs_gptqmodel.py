"""CPU seconds and peak memory of a whole Int4 run, ours against gptqmodel's, one thread each.

Every run is a process of its own, measured from outside (child_process.py). A second, small process that only imports
the same libraries gives the price of the imports. This file imports neither torch nor qquant: a big parent would show
up in the peak memory of its children.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.child_process import ONE_THREAD, OUR_ENVIRONMENT, PEER_ENVIRONMENT, ROOT, check, run

HERE = Path(__file__).resolve().parent
IMPORTS = {"ours": "import torch, transformers, safetensors", "gptqmodel": "import torch, transformers, gptqmodel"}
WINDOWS = """
import json, sys
from tokenizers import Tokenizer
ids = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json").encode(open(sys.argv[2], encoding="utf-8").read()).ids
count, length = int(sys.argv[3]), int(sys.argv[4])
assert len(ids) >= count * length, f"the text has {len(ids)} tokens, {count} x {length} are needed"
json.dump([ids[i * length : (i + 1) * length] for i in range(count)], open(sys.argv[5], "w"))
"""


@dataclass
class Job:
    """One model and its calibration."""

    name: str
    model: str
    text: str
    samples: int
    length: int = 256


@dataclass
class Result:
    """The cheapest of the repeats of one side of one job."""

    job: str
    side: str
    whole_cpu_seconds: float
    import_cpu_seconds: float
    work_cpu_seconds: float
    wall_seconds: float
    peak_mb: float
    import_peak_mb: float
    output_mb: float
    stages: dict[str, float] = field(default_factory=dict)
    command: str = ""


def command_of(job: Job, side: str, args: argparse.Namespace, work: Path) -> list[str]:
    """The command that quantizes the job on one side, into WORK/out."""
    if side == "ours":
        command = [args.python, "-m", "qquant.gptq", "--method", "gptq", "--model", job.model, "--data", job.text]
        command += ["--out", str(work / "out"), "--bits", "4", "--group-size", "128", "--seq-len", str(job.length)]
        return [*command, "--n-samples", str(job.samples), *shlex.split(args.our_options)]
    windows = work / f"{job.name}-windows.json"
    cut = [args.python, "-c", WINDOWS, job.model, job.text, str(job.samples), str(job.length), str(windows)]
    check(run(cut, env=ONE_THREAD, cwd=str(work)))
    script = str(HERE / "peer_gptqmodel.py")
    return [args.peer_python, script, job.model, str(windows), str(work / "out"), str(work / "stages.json")]


def measure(job: Job, args: argparse.Namespace, work: Path) -> list[Result]:
    """Run the sides of a job in turn, ``--repeats`` times, and keep of each the run with the fewest CPU seconds.

    In turn, because the machine's other work changes with time and should not favour a side.
    """
    results: dict[str, Result] = {}
    commands = {side: command_of(job, side, args, work) for side in args.sides}
    for _ in range(args.repeats):
        for side, command in commands.items():
            python, out, stages = command[0], work / "out", work / "stages.json"
            env = {**ONE_THREAD, **(PEER_ENVIRONMENT if side == "gptqmodel" else OUR_ENVIRONMENT)}
            imports = check(run([python, "-c", IMPORTS[side]], env=env, cwd=str(work)))
            shutil.rmtree(out, ignore_errors=True)
            stages.unlink(missing_ok=True)
            child = check(run(command, env=env, cwd=str(work)))
            print(f"[{job.name} {side}] {child.cpu_seconds:.1f} CPU s, {child.peak_mb:.0f} MB", file=sys.stderr)
            if side in results and results[side].whole_cpu_seconds <= child.cpu_seconds:
                continue
            found = json.loads(stages.read_text(encoding="utf-8")) if stages.exists() else {}
            if call := re.search(r"([\d.]+) CPU s ", child.output):  # our command's own summary
                found["quantize_checkpoint"] = float(call[1])
            results[side] = Result(
                job=job.name,
                side=side,
                whole_cpu_seconds=round(child.cpu_seconds, 2),
                import_cpu_seconds=round(imports.cpu_seconds, 2),
                work_cpu_seconds=round(child.cpu_seconds - imports.cpu_seconds, 2),
                wall_seconds=round(child.wall_seconds, 2),
                peak_mb=round(child.peak_mb, 1),
                import_peak_mb=round(imports.peak_mb, 1),
                output_mb=round(sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6, 3),
                stages={name: round(value, 2) for name, value in found.items()},
                command=child.command.replace(str(work), "WORK").replace(str(ROOT), "."),
            )
    return list(results.values())


def table(results: list[Result]) -> str:
    """One Markdown row per side of a job; "work" is the whole process less its imports."""
    lines = [
        "| job | side | CPU s, whole | of it imports | work | wall s | peak MB | of it imports | weights out MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.job} | {r.side} | {r.whole_cpu_seconds:.1f} | {r.import_cpu_seconds:.1f} | {r.work_cpu_seconds:.1f} "
        f"| {r.wall_seconds:.1f} | {r.peak_mb:.0f} | {r.import_peak_mb:.0f} | {r.output_mb:.3f} |"
        for r in results
    ]
    return "\n".join(lines)


def jobs(args: argparse.Namespace, work: Path) -> list[Job]:
    """The jobs that were asked for; the Llama layer is made on the spot."""
    found = []
    if "model" in args.jobs:
        if not (args.model and args.text):
            raise SystemExit("the job `model` needs --model DIR and --text FILE")
        found.append(Job(Path(args.model).name, str(Path(args.model).resolve()), str(Path(args.text).resolve()), 128))
    if "layer" in args.jobs:
        folder = work / "llama-layer"
        maker = [args.python, str(HERE / "make_synthetic_checkpoint.py"), str(folder), "--family", "llama"]
        check(run([*maker, "--layers", "1", "--vocab", "2048", "--untied"], env=ONE_THREAD, cwd=str(work)))
        found.append(Job("llama-layer", str(folder), str(work / "llama-layer-calibration.txt"), 64))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", nargs="+", choices=("model", "layer"), default=["layer"])
    parser.add_argument("--sides", nargs="+", choices=("gptqmodel", "ours"), default=["gptqmodel", "ours"])
    parser.add_argument("--model", help="model folder of the job `model`")
    parser.add_argument("--text", help="calibration text of the job `model`")
    parser.add_argument("--python", default=sys.executable, help="interpreter of our environment")
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-interop/bin/python"), help="gptqmodel's interpreter")
    parser.add_argument("--our-options", default="", help="more options for our side, in one string")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side; the cheapest counts")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    args.peer_python, args.python = (os.path.abspath(path) for path in (args.peer_python, args.python))
    if args.json:
        args.json = args.json.resolve()

    if "gptqmodel" in args.sides and not Path(args.peer_python).exists():
        print("gptqmodel's side is left out: its environment is missing; make interop makes it", file=sys.stderr)
        args.sides.remove("gptqmodel")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        results = [result for job in jobs(args, work) for result in measure(job, args, work)]
    command = "python benchmarks/bench_vs_gptqmodel.py " + shlex.join(sys.argv[1:])
    print(f"{table(results)}\n\nMade by: `{command}`")
    for result in results:
        if result.stages:
            print(f"\n{result.job}, stages of {result.side}: {result.stages}")
    if args.json:
        record = {
            "schema_version": 1,
            "command": command,
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
            "results": [asdict(result) for result in results],
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
