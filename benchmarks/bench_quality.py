"""KL, perplexity, agreement and CPU seconds of every method of ours and of peers, on one model and the same windows.

Every contestant is a process of its own that gets a model folder and calibration windows of token ids and leaves a
folder; one judge (quality_judge.py) reads it and compares it with the original in float32 on held-out windows. Rows are
kept in a JSON file: a row that is there is not made again, unless --again asks for it, and any number of models, bits
and contestants come together in the file. This file imports neither torch nor qquant (see child_process.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.child_process import ONE_THREAD, OUR_ENVIRONMENT, ROOT, check, run
from benchmarks.quality_contestants import ENVIRONMENTS, IMPORTS, PACKAGES, PEERS, SIDES, Contestant, command_of, ours
from benchmarks.quality_table import tables

HERE = Path(__file__).resolve().parent
REFERENCE = ROOT / "examples" / "reference-model"
VERSION = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"


@dataclass
class Setting:
    """What all contestants of one call share."""

    model: Path
    name: str
    bits: int
    group_size: int
    skip: str | None
    calibration: Path
    held_out: Path
    windows: str
    """Hash of both sets of windows: rows with another one are not comparable."""

    def owns(self, row: dict[str, Any]) -> bool:
        """Whether a kept row belongs to this setting."""
        mine = (self.name, self.bits, self.group_size, self.skip, self.windows)
        return (row["model"], row["bits"], row["group_size"], row["skip"], row["windows"]) == mine


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the results file; none if it is not there yet."""
    return list(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.exists() else []


def keep(path: Path, row: dict[str, Any]) -> None:
    """Put a row in the file, in the place of an older one of the same contestant and setting.

    The file is read again just before, because another call may have added to it.
    """
    keys = ("model", "contestant", "bits", "group_size", "skip")
    others = [other for other in read_rows(path) if any(other[key] != row[key] for key in keys)]
    record = {
        "schema_version": 1,
        "command": "python -m benchmarks.bench_quality",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread, Python {platform.python_version()}",
        "rows": [*others, row],
    }
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(path)


def cut_windows(args: argparse.Namespace, work: Path) -> Setting:
    """Make both sets of windows with a process of our environment."""
    paths = {}
    for kind, texts, count in (
        ("calibration", args.calibrate, args.calibration_windows),
        ("held-out", args.held_out, args.held_out_windows),
    ):
        paths[kind] = work / f"{kind}.json"
        command = [args.python, str(HERE / "quality_windows.py"), str(args.model), str(paths[kind])]
        command += ["--count", str(count), "--length", str(args.seq_len), "--texts", *map(str, texts)]
        check(run(command, env={**ONE_THREAD, **OUR_ENVIRONMENT}, cwd=str(work)))
    both = b"".join(path.read_bytes() for path in paths.values())
    return Setting(
        model=args.model,
        name=args.model.name,
        bits=args.bits,
        group_size=args.group_size,
        skip=args.skip,
        calibration=paths["calibration"],
        held_out=paths["held-out"],
        windows=hashlib.sha256(both).hexdigest()[:16],
    )


class Imports:
    """What a side's imports alone cost, and its version: measured once, and then taken from the rows that are there."""

    def __init__(self, pythons: dict[str, str], work: Path, rows: list[dict[str, Any]]) -> None:
        self._pythons, self._work = pythons, str(work)
        self._known = {row["side"]: (row["import_cpu_seconds"], row["version"]) for row in rows}

    def of(self, side: str) -> tuple[float, str]:
        """CPU seconds of the imports, and the version of the side's package."""
        if side not in self._known:
            python, env = self._pythons[side], ENVIRONMENTS[side]
            seconds = check(run([python, "-c", IMPORTS[side]], env=env, cwd=self._work)).cpu_seconds
            version = check(run([python, "-c", VERSION, PACKAGES[side]], env=env, cwd=self._work)).output.strip()
            self._known[side] = (seconds, version)
        return self._known[side]


def one_row(
    who: Contestant, setting: Setting, args: argparse.Namespace, imports: Imports, work: Path
) -> dict[str, Any]:
    """Run a contestant and judge what it left; a contestant that fails gets a row that says with what."""
    python, out, plain = args.pythons[who.side], work / "out", work / "plain"
    for folder in (out, plain):
        shutil.rmtree(folder, ignore_errors=True)
    options = {"bits": setting.bits, "group_size": setting.group_size, "skip": setting.skip}
    command = command_of(
        who,
        python,
        str(HERE),
        model=str(setting.model),
        windows=str(setting.calibration),
        out=str(out),
        options=options,
    )
    import_seconds, version = imports.of(who.side)
    row: dict[str, Any] = {
        "model": setting.name,
        "contestant": who.name,
        "side": who.side,
        "version": version,
        "bits": setting.bits,
        "group_size": setting.group_size,
        "skip": setting.skip,
        "options": who.options,
        "computed_in": who.dtype,
        "windows": setting.windows,
        "window_counts": [args.calibration_windows, args.held_out_windows, args.seq_len],
    }
    child = run(command, env=ENVIRONMENTS[who.side], cwd=str(work), timeout=args.timeout)
    row |= {
        "work_cpu_seconds": round(child.cpu_seconds - import_seconds, 2),
        "import_cpu_seconds": round(import_seconds, 2),
        "wall_seconds": round(child.wall_seconds, 1),
        "peak_mb": round(child.peak_mb),
    }
    if child.returncode:
        return {**row, "error": last_words(child.output, child.returncode, work)}
    if who.side == "llm-compressor":
        plainer = [python, command[1], "plain", str(setting.model), str(out), str(plain)]
        child = run(plainer, env=ENVIRONMENTS[who.side], cwd=str(work))
    result = plain if who.side == "llm-compressor" else out
    judge = [args.python, "-m", "benchmarks.quality_judge", str(setting.model), str(result), str(setting.held_out)]
    if not child.returncode:
        child = run(judge, env={**ONE_THREAD, **OUR_ENVIRONMENT}, cwd=str(work))
    if child.returncode:
        return {**row, "error": "judging: " + last_words(child.output, child.returncode, work)}
    return {**row, **json.loads(child.output.strip().splitlines()[-1])}


def last_words(output: str, code: int, work: Path) -> str:
    """The last line of a failed process, without the names of this machine's folders."""
    if code == -9 or code == 137:
        return "ran past the time limit or out of memory"
    line = ([line for line in output.splitlines() if line.strip()] or ["nothing"])[-1].strip()
    return line.replace(str(work), "WORK").replace(str(ROOT), ".")[:300]


def chosen_contestants(args: argparse.Namespace) -> list[Contestant]:
    """Ours, then the peers whose environment is there, cut down to what --only names."""
    everyone = [ours(spec, dtype) for dtype in args.our_dtypes for spec in args.methods] + list(PEERS)
    named = [who for who in everyone if any(who.answers_to(pattern) for pattern in args.only)]
    missing = {who.side for who in named if not Path(args.pythons[who.side]).exists()}
    for side in sorted(missing):
        print(f"{side} is left out: no interpreter at the place of --{side}-python", file=sys.stderr)
    return [who for who in named if who.side not in missing]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=REFERENCE, help="model folder")
    parser.add_argument(
        "--calibrate", type=Path, nargs="+", default=[REFERENCE / "calib.txt"], help="texts, equal shares"
    )
    parser.add_argument("--held-out", type=Path, nargs="+", default=[REFERENCE / "eval.txt"], help="texts or JSONL")
    parser.add_argument("--calibration-windows", type=int, default=120)
    parser.add_argument("--held-out-windows", type=int, default=76)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--skip", help="regex of linears that every contestant leaves alone")
    parser.add_argument("--methods", nargs="+", default=["fast", "gptq", "best"], help="ours: METHOD[,FIELD=VALUE...]")
    parser.add_argument("--our-dtypes", nargs="+", choices=("float32", "stored"), default=["float32"])
    parser.add_argument("--only", nargs="+", default=["*"], help="sides, or names with * and ?: ours 'auto-round sym*'")
    parser.add_argument("--again", action="store_true", help="make rows again that are in the file")
    parser.add_argument("--timeout", type=float, default=900, help="seconds after which a contestant is given up")
    parser.add_argument("--python", default=sys.executable, help="interpreter of our environment")
    for side in SIDES[1:]:
        parser.add_argument(f"--{side}-python", default="", help=f"{side}'s interpreter; left out without it")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "quality.json", help="the rows")
    parser.add_argument("--markdown", type=Path, help="write the tables here after each row")
    args = parser.parse_args()
    for name in ("model", "json"):
        setattr(args, name, getattr(args, name).resolve())
    args.calibrate, args.held_out = ([path.resolve() for path in paths] for paths in (args.calibrate, args.held_out))
    peers = {side: getattr(args, side.replace("-", "_") + "_python") for side in SIDES[1:]}
    args.pythons = {side: os.path.abspath(path) for side, path in {"ours": args.python, **peers}.items()}
    return args


def main() -> int:
    args = arguments()
    contestants = chosen_contestants(args)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        setting, imports = cut_windows(args, work), Imports(args.pythons, work, read_rows(args.json))
        for who in contestants:
            mine = [row for row in read_rows(args.json) if setting.owns(row) and row["contestant"] == who.name]
            if mine and not args.again:
                continue
            row = one_row(who, setting, args, imports, work)
            keep(args.json, row)
            said = row.get("error") or f"KL {row['mean_kl_nats'] * 1e3:.3f}e-3"
            print(
                f"[{setting.name}] {who.name}: {said}, {row['work_cpu_seconds']:.1f} CPU s", file=sys.stderr, flush=True
            )
            if args.markdown:
                args.markdown.write_text(tables(read_rows(args.json)), encoding="utf-8")
    print(tables(read_rows(args.json)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
