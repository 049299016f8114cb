"""The whole job on one small model: plan it, quantize it to Int8 and Int4, evaluate, profile, and make one page of all.

Every step is a command that you could type yourself; this script only types them, one after the other, and prints
each before it runs. The default is the model that ships beside it; any other folder does as well:

    python examples/quickstart.py --model DIR --data CALIBRATION.txt --eval HELD-OUT.txt
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "examples" / "reference-model"

# Row of the report -> options of the quantizer. Plain GPTQ shows what the default method is worth, and round to
# nearest, which uses no data, what GPTQ is.
VARIANTS = {
    "int8": ["--bits", "8"],
    "int4": ["--bits", "4"],
    "int4-fast": ["--bits", "4", "--method", "fast"],
    "int4-rtn": ["--bits", "4", "--method", "rtn"],
}

GRID = ["--kv", "bf16,int8", "--batch", "1,8", "--prompt-tokens", "128", "--new-tokens", "64", "--repeats", "3"]
"""What is profiled: both caches, alone and in a batch. Every cell runs in a process of its own."""
LENGTHS = [*GRID[:-4], "--new-tokens", "64,256,1024"]
"""What is planned: the same, and longer answers."""


def main() -> None:
    """Quantize each variant, evaluate all of them in one report, print it."""
    parser = argparse.ArgumentParser(description="quantize, evaluate and report one small model")
    parser.add_argument("--model", type=Path, default=REFERENCE, help="folder of the original model")
    parser.add_argument("--data", type=Path, help="calibration text (default: calib.txt of the reference model)")
    parser.add_argument("--eval", type=Path, dest="held_out", help="evaluation text (default: its eval.txt)")
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"), help="where everything is written")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per calibration sample")
    args = parser.parse_args()
    data = args.data or REFERENCE / "calib.txt"
    held_out = args.held_out or REFERENCE / "eval.txt"
    for path, option in ((args.model / "config.json", "--model"), (data, "--data"), (held_out, "--eval")):
        if not path.is_file():
            parser.error(f"{shown(path)} does not exist; name another with {option}")

    started = time.monotonic()
    device = "cuda" if shutil.which("nvidia-smi") else "cpu"
    run("qquant.plan", args.model, *LENGTHS, "--device", device, "--out", args.out / "plan", "--overwrite")
    for name, options in VARIANTS.items():
        source = ["--model", args.model, "--data", data, "--seq-len", args.seq_len]
        run("qquant.gptq", *source, *options, "--out", args.out / name, "--overwrite")
    candidates = [part for name in VARIANTS for part in ("--candidate", args.out / name)]
    report, profile, plan, page = (args.out / name for name in ("report", "profile", "plan", "page"))
    texts = ["--data", held_out, "--answers", 3]
    run("qquant.eval", "--baseline", args.model, *candidates, *texts, "--out", report, "--overwrite")
    run("qquant.profile", args.model, args.out / "int8", args.out / "int4", *GRID, "--out", profile, "--overwrite")
    run("qquant.report", report, profile, plan, "--out", page, "--overwrite")

    text = (report / "report.md").read_text(encoding="utf-8")
    print("\n" + first_table(text) + "\n")
    print(f"Done in {time.monotonic() - started:.0f} s. The numbers: {report / 'report.md'}")
    print(f"Everything on one page, for a browser: {page / 'report.html'}")


def run(module: str, *options: object) -> None:
    """Print one command, run it in this interpreter's environment, and stop with its exit code if it fails."""
    line = ["python", "-m", module, *(shown(option) for option in options)]
    print(f"\n$ {shlex.join(line)}", flush=True)
    result = subprocess.run([sys.executable, *line[1:]], check=False)
    if result.returncode:
        sys.exit(result.returncode)


def shown(option: object) -> str:
    """An option as a user would write it: paths below the current folder relative to it."""
    if isinstance(option, Path) and option.is_absolute() and option.is_relative_to(Path.cwd()):
        return str(option.relative_to(Path.cwd()))
    return str(option)


def first_table(markdown: str) -> str:
    """The first table of a Markdown text; the whole text if it has none."""
    lines = markdown.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("|")), None)
    if start is None:
        return markdown
    stop = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return "\n".join(lines[start:stop])


if __name__ == "__main__":
    main()
