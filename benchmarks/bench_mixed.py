"""Mixed precision against pure Int4 and pure Int8: bytes of the files, predicted and measured KL, for several sizes.

A model's stages are measured once; then each target is quantized and published as the command does it, and its KL to
the original, both in float32, is taken on held-out text. Prints Markdown rows; ``--out`` collects all in a JSON file,
one entry per model, replacing an older entry of the same name.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qquant import QuantizeConfig, load_samples, quantize_checkpoint
from qquant.checkpoint import reopen
from qquant.divergence import divergence
from qquant.mixed_precision import RECORD_NAME, MixedPrecision, measure
from qquant.quantizing import quantize_mixed
from qquant.samples import Sample, samples_from_ids
from qquant.sources import StreamedModel


def held_out_windows(folder: Path, file: Path, *, length: int, count: int) -> list[Sample]:
    """Windows spread over a text."""
    ids = AutoTokenizer.from_pretrained(folder).encode(file.read_text(encoding="utf-8"), add_special_tokens=False)
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return samples_from_ids([ids[start : start + length] for start in starts])


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


class Bench:
    """One model with its samples."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.samples = load_samples(args.data, tokenizer, n_samples=args.n_samples, seq_len=args.seq_len)
        self.held_out = held_out_windows(args.model, args.held_out, length=args.seq_len, count=args.windows)
        self.original = StreamedModel(args.model, dtype=torch.float32)

    def kl(self, folder: Path) -> float:
        """On the held-out text."""
        return divergence(self.original, reopen(folder, dtype=torch.float32, device="cpu"), self.held_out).kl

    def pure(self, mixed: MixedPrecision, config: QuantizeConfig, out: Path) -> dict[str, Any]:
        """All linears alike."""
        began = time.process_time()
        quantize_checkpoint(self.args.model, mixed.calibration, config, out)
        seconds = time.process_time() - began
        point = mixed.pure(config.bits)
        predicted = None if point is None else point.predicted_kl
        row: dict[str, Any] = {
            "size_bytes": weight_bytes(out),
            "predicted_kl": predicted,
            "kl": self.kl(out),
            "cpu_seconds": seconds,
        }
        print(
            f"| Int{config.bits} | {row['size_bytes'] / 1e6:.3f} | {said(predicted)} | {said(row['kl'])} | | |",
            flush=True,
        )
        return row

    def mixed(self, mixed: MixedPrecision, share: float, ends: list[dict[str, Any]], out: Path) -> dict[str, Any]:
        """A size between the two."""
        low, high = (end["size_bytes"] for end in ends)
        target = int(low + share * (high - low))
        began = time.process_time()
        quantize_mixed(mixed, out, target_bytes=target)
        seconds = time.process_time() - began
        record = json.loads((out / RECORD_NAME).read_text(encoding="utf-8"))
        size, kl = weight_bytes(out), self.kl(out)
        line = ends[0]["kl"] + (size - low) / (high - low) * (ends[1]["kl"] - ends[0]["kl"])
        predicted = record["chosen"]["predicted_kl"]
        print(
            f"| {target / 1e6:.3f} | {size / 1e6:.3f} ({size / target:.4f}) | {said(predicted)} | {said(kl)} "
            f"| {said(line)} | {kl / line:.2f} |",
            flush=True,
        )
        return {
            "target_bytes": target, "size_bytes": size, "predicted_kl": predicted, "kl": kl, "line_kl": line,
            "held_out_samples_kl": record["measured_kl"], "held_out_samples_stderr": record["measured_kl_stderr"],
            "stages": record["chosen"]["stages"], "cpu_seconds": seconds,
        }  # fmt: skip


def said(kl: float | None) -> str:
    """KL in thousandths of a nat."""
    return "-" if kl is None else f"{1e3 * kl:.4g}"


def main() -> None:
    """Measure one model and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--name", help="in the JSON file; default: the folder's")
    parser.add_argument("--data", type=Path, required=True, help="calibration text")
    parser.add_argument("--eval", type=Path, required=True, dest="held_out", help="text to report on")
    parser.add_argument("--method", default="best")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--n-samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--sensitivity-tokens", type=int, default=2048)
    parser.add_argument("--shares", default="0.1,0.25,0.5,0.75,0.9", help="of the way from pure Int4 to pure Int8")
    parser.add_argument("--skip", action="append", default=[], help="regex of modules to leave alone")
    parser.add_argument("--out", type=Path, help="JSON file to put the figures into")
    args = parser.parse_args()
    torch.set_num_threads(1)

    bench = Bench(args)
    config = QuantizeConfig.from_dict(
        {"method": args.method, "group_size": args.group_size, "dynamic": {f"-:{rule}": {} for rule in args.skip}}
    )
    began = time.process_time()
    mixed = measure(args.model, bench.samples, config, sensitivity_tokens=args.sensitivity_tokens)
    seconds = time.process_time() - began
    print("| target MB | files MB (share) | predicted KL x 1e-3 | KL x 1e-3 | line | KL / line |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        pure = [
            bench.pure(mixed, config.model_copy(update={"bits": bits}), Path(work, f"int{bits}")) for bits in (4, 8)
        ]
        rows = [bench.mixed(mixed, float(share), pure, Path(work, share)) for share in args.shares.split(",")]
    name = args.name or args.model.resolve().name
    settings = {key: getattr(args, key) for key in ("method", "group_size", "seq_len", "n_samples", "windows")}
    entry = {
        **settings, "sensitivity_tokens": args.sensitivity_tokens, "skip": args.skip, "data": args.data.name,
        "eval": args.held_out.name, "measuring_cpu_seconds": seconds, "torch": torch.__version__,
        "int4": pure[0], "int8": pure[1], "mixed": rows,
    }  # fmt: skip
    print(f"measuring took {seconds:.1f} CPU s, quantizing to 4 bits {pure[0]['cpu_seconds']:.1f}", file=sys.stderr)
    if args.out:
        known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"models": {}}
        known["models"][name] = entry
        args.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
