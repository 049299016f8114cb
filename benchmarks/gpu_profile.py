"""Memory and speed on a GPU at the shapes of Qwen 1.8B, 7B, 14B and 72B with random weights, by ``qquant.profile``.

The cells of the tables in Qwen's README, those of the README beside them: every size and precision at 2048 tokens in
all, and the 7B model with the full and the Int8 cache at growing batches and lengths. Grids run in that order; once the
budget is spent no further one is begun, and what was left out is said. Each cell is a process of its own, so out of
memory, as for 72B in BF16 on one GPU, is a label and not the end. By default a prompt fills most of the 2048 tokens,
which gives the README's memory; ``--whole`` generates all of them, which gives its speed as well and takes minutes for
each cell. Records of several calls are joined by ``qquant report``.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from qquant.page.grids import tables
from qquant.profile_grid import Grid, profile_models
from qquant.profile_report import profile_sections
from qquant.progress import step_progress
from qquant.result_files import write_result
from qquant.results import Result, shown_command

NEW_TOKENS = 32
"""Enough steps for a median; the prompt fills the cache, because 2048 single steps would take the whole budget."""
BASE = Grid(new_tokens=(NEW_TOKENS,), prompt_tokens=(2048 - NEW_TOKENS,), warmups=0, repeats=2)
SIZES = ("qwen-1.8b", "qwen-7b", "qwen-14b", "qwen-72b")
GRIDS: dict[str, tuple[list[str], Grid]] = {
    **{size: ([size], replace(BASE, precisions=("bf16", "int8", "int4"))) for size in SIZES},
    "batches of 7B": (
        ["qwen-7b"],
        replace(
            BASE, precisions=("bf16",), kv_caches=("bf16", "int8"), batches=(4, 16, 32, 64),
            prompt_tokens=(1024 - NEW_TOKENS,),
        ),
    ),
    "lengths of 7B": (
        ["qwen-7b"],
        replace(BASE, precisions=("bf16",), kv_caches=("int8",), prompt_tokens=(4096 - NEW_TOKENS, 8192 - NEW_TOKENS)),
    ),
}  # fmt: skip
TINY = {"tiny": (["qwen2.5-0.5b"], replace(BASE, prompt_tokens=(16,), new_tokens=(4,), repeats=1))}


def chosen_grids(names: list[str] | None, *, whole: bool) -> dict[str, tuple[list[str], Grid]]:
    """The grids to run; with ``whole`` only those of the sizes, and every token is generated, from a prompt of one."""
    wanted = [name for name in GRIDS if name in (names or (SIZES if whole else GRIDS))]
    if whole and (others := [name for name in wanted if name not in SIZES]):
        sys.exit(f"--whole is for the grids {', '.join(SIZES)}, got {', '.join(others)}; leave one of the two out")
    found = {name: GRIDS[name] for name in wanted}
    if not whole:
        return found
    return {
        name: (sizes, replace(grid, prompt_tokens=(1,), new_tokens=(2048,), repeats=1))
        for name, (sizes, grid) in found.items()
    }


def joined(results: list[Result]) -> Result:
    """One record of all grids; they ran on one machine, minutes apart."""
    first = results[0]
    profiles = [result.profile for result in results if result.profile is not None]
    cells = tuple(cell for profile in profiles for cell in profile.cells)
    rows = {row.label: row for result in results[::-1] for row in result.rows}
    ordered = tuple(
        row.model_copy(update={"role": "candidate" if number else "baseline"})
        for number, row in enumerate(sorted(rows.values(), key=lambda row: row.parameters or 0))
    )
    labels = tuple(row.label for row in ordered)
    profile = profiles[0].model_copy(update={"cells": cells, "random_weights": labels})
    return first.model_copy(update={"rows": ordered, "profile": profile})


def main() -> None:
    """Run the grids that fit the budget, print Markdown, write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the report folder is called so, less the suffix")
    parser.add_argument("--budget-seconds", type=float, default=420)
    parser.add_argument("--grid", nargs="+", choices=list(GRIDS), help="only these")
    parser.add_argument("--whole", action="store_true", help="generate all 2048 tokens, as the README did")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one small cell, to try the script on a CPU")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("these tables need a CUDA device, and this torch sees none; --tiny --device cpu tries the script")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    command = shown_command(["python", "benchmarks/gpu_profile.py", *sys.argv[1:]])
    began = time.monotonic()
    results: list[Result] = []
    grids = TINY if args.tiny else chosen_grids(args.grid, whole=args.whole)
    for name, (sizes, grid) in grids.items():
        if results and time.monotonic() - began > args.budget_seconds:
            print(f"left out for time: {name}", flush=True)
            continue
        with tempfile.TemporaryDirectory() as folder, step_progress() as on_progress:
            options = {"journal": Path(folder) / "journal", "device": args.device, "on_progress": on_progress}
            results.append(profile_models([], sizes, grid, command=command, **options))
        if args.out:  # after every grid: a machine that is taken away leaves what was done
            report = args.out.with_suffix("")  # a folder, as qquant.report joins them
            report.mkdir(parents=True, exist_ok=True)
            write_result(joined(results), report)
    whole = joined(results)
    assert whole.profile is not None
    print("\n\n".join([*profile_sections(whole.profile), *(table.to_markdown() for table in tables([whole]))]))


if __name__ == "__main__":
    main()
