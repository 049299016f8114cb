"""Registers, spills and shared memory of every CUDA kernel on every architecture, as ptxas reports them.

Compiles all kernels afresh in a temporary folder; needs nvcc and no GPU. Prints a table and, with --out, writes the
same as JSON.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import build_cuda  # noqa: E402 - beside setup.py, which is no package


def table(resources: list[build_cuda.Resources]) -> str:
    """Markdown: a row per kernel, a column per architecture, "registers (stack bytes)"."""
    archs = sorted({r.arch for r in resources}, key=lambda arch: int(arch.removeprefix("sm_")))
    cells = {
        (r.kernel, r.arch): f"{r.registers}" + (f" ({r.stack_bytes} B stack)" if r.stack_bytes else "")
        for r in resources
    }
    lines = ["| kernel | " + " | ".join(archs) + " |", "|---" * (len(archs) + 1) + "|"]
    for kernel in sorted({r.kernel for r in resources}):
        lines.append(f"| `{kernel}` | " + " | ".join(cells[kernel, arch] for arch in archs) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    try:
        toolkit = build_cuda.find_toolkit()
        with tempfile.TemporaryDirectory() as folder:
            objects = build_cuda.compile_kernels(toolkit, build_cuda.archs(), Path(folder))
            resources = build_cuda.read_resources(objects)
    except build_cuda.CudaUnavailable as error:
        raise SystemExit(f"compiles the CUDA kernels: {error}") from error
    print(table(resources))
    if args.out:
        record = {
            "schema_version": 1,
            "command": shlex.join(["python", "benchmarks/cuda_resources.py", *sys.argv[1:]]),
            "nvcc": toolkit.version.strip().splitlines()[-1],
            "flags": list(build_cuda.FLAGS),
            "kernels": [resource._asdict() for resource in resources],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
