"""Packed linears on a CPU against torch, oneDNN, gptqmodel and llama.cpp at the shapes of known models, one thread.

A row is a stage of a block (q/k/v, o, gate/up, down) at one count of tokens, Int4 and Int8 with groups of 128, bfloat16
activations. Every contestant goes through so many copies of its weights that they come from memory; all weights may use
pages of 2 MB (torch's switch THP_MEM_ALLOC_ENABLE, set here for all sides). Where tokens are few, plain reading of such
memory takes turns with the products. Shares of its speed, and how many times as fast one contestant is as another, are
the middle of what the rounds say: other work on the machine slows a round for all. How fast one thread multiplies is
probed once. A run that was cut off goes on where it ended (--out).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

from benchmarks.linear_contestants import READING, Side, Stage, sides_of, stages_of
from benchmarks.turns import Contestant, Peer, PeerError, Record, median_ms, setting_of, take_turns, times_as_fast
from qquant import _native
from qquant.models.sizes import size_config

MODELS = ("qwen-1.8b", "qwen-7b", "qwen-14b", "qwen-72b", "qwen2.5-0.5b", "qwen2.5-7b")
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024)
QUICK = {"qwen-7b": ("o",), "qwen2.5-0.5b": ("gate/up",)}
QUICK_TOKENS = (1, 4, 16, 256)

MOST_PRODUCTS = 1 << 34
"""Multiply-adds of one call; a stage with more is cut to its first features, and lies in memory once."""
LEAST_CUT = 2048
"""Features that are left at least; with fewer, preparing the activations weighs more than in the whole stage."""
FEW_TOKENS = 8
"""Up to so many a product is bound by the reading of weights, and from 16 on by multiplying."""

FASTEST_TORCH = ("torch bf16", "torch int4pack", "torch int8pack")
SHOWN = ("torch bf16", "torch int4pack", "torch int8pack", "oneDNN int8")
LLAMACPP = {4: "llama.cpp Q4_0", 8: "llama.cpp Q8_0"}
"""Beside the bits of ours that each is compared with."""


def cut(stage: Stage, tokens: int) -> Stage:
    """The stage with as many output features as MOST_PRODUCTS allow, the same share of each linear."""
    share = max(MOST_PRODUCTS / (tokens * stage.weights), LEAST_CUT / sum(stage.widths))
    if share >= 1:
        return stage
    return replace(stage, widths=tuple(-(-int(width * share) // 64) * 64 for width in stage.widths))


def takes_part(name: str, tokens: int) -> bool:
    """Whether a contestant is measured: a tile unpacks for nothing where there is little to multiply."""
    if name == READING:
        return tokens <= FEW_TOKENS
    return tokens >= 4 or "tile" not in name


def measure(stage: Stage, sides: list[Side], tokens: int, args: argparse.Namespace) -> Any:
    """One row as it goes into the record."""
    x = torch.randn(tokens, stage.in_features).bfloat16()
    taking_part = [side for side in sides if takes_part(side.name, tokens)]
    contestants: list[Contestant] = [side.start(x) for side in taking_part]
    with torch.inference_mode():
        times = take_turns(contestants, args.seconds)
    read_bytes = next((side.layer_bytes for side in taking_part if side.name == READING), 0)
    cells: dict[str, dict[str, Any]] = {}
    for side in taking_part:
        took = median_ms(times[side.name])
        gmac_per_s = 1e-6 * tokens * stage.weights / took
        if read_bytes:
            share: float | None = times_as_fast(times[side.name], times[READING]) * side.layer_bytes / read_bytes
        else:
            share = gmac_per_s / args.rates[side.limit] if side.limit in args.rates else None
        cells[side.name] = {
            "ms": took,
            "fastest_ms": 1e3 * min(times[side.name]),
            "turns": len(times[side.name]),
            "gb_per_s": 1e-6 * side.layer_bytes / took,
            "gmac_per_s": gmac_per_s,
            "share_of_limit": share,
        }
        if side.name.startswith("int"):  # ours
            cells[side.name]["times_as_fast_as"] = {
                name: times_as_fast(times[side.name], times[name])
                for name in (*SHOWN, *LLAMACPP.values())
                if name in times
            }
    reading = cells.pop(READING, None)
    return {
        "model": stage.model,
        "stage": stage.name,
        "in_features": stage.in_features,
        "widths": stage.widths,
        "tokens": tokens,
        "limit": "read bandwidth" if reading else "rate of products",
        "read_bandwidth_gb_per_s": reading and reading["gb_per_s"],
        "product_rates_gmac_per_s": args.rates,
        "contestants": cells,
    }


def line_of(row: dict[str, Any]) -> str:
    """A row of the printed table: milliseconds of ours and of the others, and what they say of each other."""
    cells = row["contestants"]

    def ms(name: str) -> str:
        return f"{cells[name]['ms']:.3g}" if name in cells else "-"

    def share(name: str) -> str:
        found = cells[name]["share_of_limit"] if name in cells else None
        return "-" if found is None else f"{found:.0%}"

    peers = {name: cell["ms"] for name, cell in cells.items() if name.startswith("gptqmodel")}
    shown = [row["model"], row["stage"], f"{row['in_features']} x {'+'.join(map(str, row['widths']))}"]
    shown += [str(row["tokens"]), *map(ms, SHOWN), f"{min(peers.values()):.3g}" if peers else "not measured"]
    shown += [ms(name) if name in cells else "not measured" for name in LLAMACPP.values()]
    for bits in (4, 8):
        chosen = f"int{bits} auto"
        shown += [ms(f"int{bits} exact"), ms(f"int{bits} tile"), ms(f"int{bits} int8 activations")]
        shown += [ms(chosen), share(chosen), f"{cells[chosen]['times_as_fast_as']['torch bf16']:.2f}"]
    return f"| {' | '.join(shown)} |"


HEADER = (
    ["model", "stage", "shape", "tokens", *SHOWN, "gptqmodel's fastest", *LLAMACPP.values()]
    + [f"Int{bits} {what}" for bits in (4, 8) for what in ("exact", "tile", "int8 act.", "auto", "share", "x bf16")]
)  # fmt: skip


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """What was to be shown, each with the median and the worst of its rows."""

    def ratios(tokens: range, ours: str, others: tuple[str, ...], models: tuple[str, ...] = MODELS) -> list[float]:
        return [
            min(row["contestants"][ours]["times_as_fast_as"][other] for other in others)
            for row in rows
            if row["tokens"] in tokens and row["model"] in models and row["contestants"].keys() >= {*others}
        ]

    def shares(ours: str, models: tuple[str, ...]) -> list[float]:
        chosen = [row for row in rows if row["tokens"] == 1 and row["model"] in models]
        return [row["contestants"][ours]["share_of_limit"] for row in chosen]

    sevens, few, many = ("qwen-7b",), range(1, FEW_TOKENS + 1), range(16, 1025)
    asked = [
        ("1 token, Qwen-7B: Int4's share of read bandwidth, 0.75 asked", shares("int4 auto", sevens)),
        ("or Int4 over torch's int4pack, 1.5 asked", ratios(range(1, 2), "int4 auto", ("torch int4pack",), sevens)),
        ("1 token, Qwen-7B: Int8's share of read bandwidth, 0.85 asked", shares("int8 auto", sevens)),
    ]
    for bits in (4, 8):
        asked += [
            (
                f"4 tokens: Int{bits} over torch's fastest, 1 asked",
                ratios(range(4, 5), f"int{bits} auto", FASTEST_TORCH),
            ),
            (f"16 to 1024: Int{bits} over torch bf16, 1 asked", ratios(many, f"int{bits} auto", ("torch bf16",))),
            (
                f"16 to 1024: Int{bits} with int8 activations over oneDNN int8, 0.85 asked",
                ratios(many, f"int{bits} int8 activations", ("oneDNN int8",)),
            ),
            (f"1 to 8: Int{bits} over {LLAMACPP[bits]}", ratios(few, f"int{bits} auto", (LLAMACPP[bits],))),
            (
                f"16 to 1024: Int{bits} with int8 activations over {LLAMACPP[bits]}",
                ratios(many, f"int{bits} int8 activations", (LLAMACPP[bits],)),
            ),
        ]
    return [
        f"{text}: median {statistics.median(found):.2f}, least {min(found):.2f} of {len(found)}" if found
        else f"{text}: not measured"
        for text, found in asked
    ]  # fmt: skip


def start_peer(name: str, option: str, python: Path | None, script: str) -> Peer | None:
    """The process of another tool, or None with a line that says why."""
    if python is None:
        print(f"{name}: not measured ({option} names the Python of an environment that has it)")
        return None
    try:
        return Peer(python, script, environment={"OMP_NUM_THREADS": "1"})
    except PeerError as error:
        print(f"{name}: not measured, {error}")
        return None


def wanted_stages(args: argparse.Namespace) -> list[Stage]:
    """The stages of a run, each once: models share shapes."""
    models = args.model or (list(QUICK) if args.quick else MODELS)
    stages = [stage for model in models for stage in stages_of(model, size_config(model))]
    return [stage for stage in stages if not args.quick or stage.name in QUICK.get(stage.model, (stage.name,))]


def run_stage(stage: Stage, counts: list[int], peers: Sequence[Peer | None], record: Record, args: Any) -> None:
    """Measure one stage at all counts of tokens; weights are made anew only where the stage is cut."""
    made: tuple[Stage, list[Side]] | None = None
    # Many first: memory that was just filled is slow for some seconds, which short products notice most.
    for tokens in sorted(counts, reverse=True):
        part = cut(stage, tokens)
        if made is None or made[0] != part:
            made = None  # the last ones are freed before the next are made
            made = (part, sides_of(part, args.cache_bytes if part == stage else 0, *peers))
            # The first row on fresh weights was seen to be slow for some contestants.
            if tokens <= FEW_TOKENS:
                measure(part, made[1], tokens, args)
        row = measure(part, made[1], tokens, args)
        record.add(f"{stage.model} {stage.name} {tokens}", row)
        print(line_of(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two stages and four counts of tokens, under a minute")
    parser.add_argument("--model", nargs="+", choices=MODELS, help="only these models")
    parser.add_argument("--tokens", type=int, nargs="+", help="only these counts of tokens")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each contestant of a row (default 0.1)")
    parser.add_argument("--gptqmodel-python", type=Path, help="Python of an environment that has gptqmodel")
    parser.add_argument("--llamacpp-python", type=Path, help="Python of an environment with llama-cpp-python")
    parser.add_argument("--out", type=Path, help="JSON file, written row by row; rows that it has are not repeated")
    args = parser.parse_args()
    host = _native.host()
    if host is None or not torch._C._dispatch_has_kernel_for_dispatch_key("qquant::panel_linear", "CPU"):
        sys.exit("the compiled modules _host and _C are needed; build them with: " + _native.REBUILD)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    args.cache_bytes = max(host.last_level_cache_bytes(), 32 << 20)
    args.rates = host.product_rates()
    peers = [
        start_peer("gptqmodel", "--gptqmodel-python", args.gptqmodel_python, "peer_gptqmodel_linear.py"),
        start_peer("llama.cpp", "--llamacpp-python", args.llamacpp_python, "peer_llamacpp_linear.py"),
    ]
    about = [peer.about for peer in peers if peer is not None]
    record = Record(args.out, setting_of("bench_linear.py", host, peers=about))

    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in args.rates.items())
    print(f"Milliseconds. Share: of read bandwidth up to {FEW_TOKENS} tokens, above of the rate of bfloat16 products;")
    print(f"multiply-adds of one thread, 1e9 per second: {rates}.")
    print(f"Peers: {json.dumps(about) if about else 'none'}.\n")
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    began = time.perf_counter()
    for stage in wanted_stages(args):
        counts = args.tokens or (QUICK_TOKENS if args.quick else TOKENS)
        left = [tokens for tokens in counts if f"{stage.model} {stage.name} {tokens}" not in record.rows]
        run_stage(stage, left, peers, record, args)
    for peer in peers:
        if peer is not None:
            peer.close()
    print("\n" + "\n".join(verdicts(list(record.rows.values()))))
    print(f"\nMade in {time.perf_counter() - began:.0f} s by: `{record.setting['commands'][-1]}`")


if __name__ == "__main__":
    main()
