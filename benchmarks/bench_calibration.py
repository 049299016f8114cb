"""How the KL of an Int4 model on held-out English, Chinese, code and mathematics depends on what it is calibrated on.

What is varied: the mixture (each domain alone, all of them, all but one), how many samples, how long they are at the
same number of tokens, how they are chosen, and sources that are full of copies. The model computes in float32, so that
only quantization shows. Writes calibration.json, calibration.md and pictures into a folder; ``--redraw`` makes the last
two from the first. Pictures and tables are calibration_report.py's.

DATA holds a folder per source, each with calib.txt, which is calibrated on, and eval.txt, which is not.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qquant
from benchmarks.bench_options import unpacked
from benchmarks.calibration_report import Run, write_report
from qquant.calibrate import Sample, load_mixture
from qquant.measure import environment, git_commit
from qquant.overlap import overlap_of, run_hashes, sketch_of
from qquant.results import shown_command

DOMAINS = {"English": ("books", "enwiki"), "Chinese": ("zh",), "code": ("code",), "mathematics": ("gsm8k",)}
"""Domain -> folders of its sources."""
_QUESTIONS = "test_first660.jsonl"
"""Held-out mathematics: questions with answers, which are laid out as calib.txt lays them out."""
SAMPLES, LENGTH = 128, 256
SEEDS = (0, 1, 2)
EVAL_WINDOWS = 16
"""Of each domain."""
_PAGE = 4000
"""Characters of the page that is copied."""


class Bench:
    """The model, its texts, and what the original says about the held-out ones."""

    def __init__(self, model: Path, data: Path) -> None:
        """Read everything once; ``data`` as this file's beginning says."""
        self.model, self.data = model, data
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        texts = {domain: [self._held_out(name) for name in names] for domain, names in DOMAINS.items()}
        self.ids = {domain: torch.cat(parts) for domain, parts in texts.items()}
        self.windows = {
            domain: torch.cat([_spread(part, len(parts)) for part in parts]) for domain, parts in texts.items()
        }
        original = self._load()
        with torch.inference_mode():
            self.exact = {name: original(rows).logits.log_softmax(-1) for name, rows in self.windows.items()}

    def mixed(self, weights: dict[str, float], folder: Path | None = None, **options: Any) -> list[Sample]:
        """Samples of some domains; a domain's weight is shared by its sources."""
        sources = {
            str((folder or self.data) / name / "calib.txt"): weight / len(DOMAINS[domain])
            for domain, weight in weights.items()
            for name in DOMAINS[domain]
        }
        return load_mixture(sources, self.tokenizer, **{"n_samples": SAMPLES, "seq_len": LENGTH, **options}).samples

    def run(self, group: str, name: str, samples: Sequence[Sample], *, seed: int = 0) -> Run:
        """Quantize with these samples and measure."""
        model, began = self._load(), time.process_time()
        qquant.quantize_model(model, samples, qquant.QuantizeConfig(method="gptq"))
        seconds, model = time.process_time() - began, unpacked(model)
        found: dict[str, float] = {}
        with torch.inference_mode():
            for domain, rows in self.windows.items():
                got, exact = model(rows).logits.log_softmax(-1), self.exact[domain]
                found[domain] = float((exact.exp() * (exact - got)).sum(-1).mean())
        tokens = sum(int(sample.mask.sum()) for sample in samples)
        print(
            f"{group}: {name}, seed {seed}: " + ", ".join(f"{d} {1e3 * kl:.2f}" for d, kl in found.items()), flush=True
        )
        return Run(group, name, len(samples), tokens, seed, found, round(seconds, 1))

    def overlaps(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Share of each held-out text that these samples had, as an evaluation would estimate it."""
        sketch = sketch_of(sample.input_ids for sample in samples)
        found = {domain: overlap_of(sketch, ids) for domain, ids in self.ids.items()}
        return {domain: overlap.share for domain, overlap in found.items() if overlap}

    def shared_runs(self) -> dict[str, float]:
        """Source -> share of the runs of its held-out text that all of its calibration text has too, exactly."""
        found = {}
        for folder in sorted(path.parent for path in self.data.glob("*/calib.txt")):
            text = (folder / "calib.txt").read_text(encoding="utf-8")
            ids = torch.tensor(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))
            runs = torch.unique(run_hashes(self._held_out(folder.name)))
            found[folder.name] = float(torch.isin(runs, torch.unique(run_hashes(ids))).double().mean())
        return found

    def _held_out(self, name: str) -> Tensor:
        path = self.data / name / _QUESTIONS
        if path.is_file():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            text = "\n\n".join(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows)
        else:
            text = (self.data / name / "eval.txt").read_text(encoding="utf-8")
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()


def _spread(ids: Tensor, parts: int) -> Tensor:
    """Windows at even distances over a text, so many that all ``parts`` of a domain give ``EVAL_WINDOWS``."""
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[torch.linspace(0, len(rows) - 1, EVAL_WINDOWS // parts).long()]


def covering(samples: Sequence[Sample], wanted: int) -> list[Sample]:
    """A choice that qquant does not offer, because it does not help: as many different tokens as possible.

    Greedily the sample whose tokens add the most, where the n-th sample with a token adds 1 / n for it.
    """
    distinct = [torch.unique(sample.input_ids) for sample in samples]
    seen = torch.zeros(1 + max(int(ids[-1]) for ids in distinct))
    heap = [(-float(len(ids)), index) for index, ids in enumerate(distinct)]
    heapq.heapify(heap)
    chosen: list[Sample] = []
    while len(chosen) < wanted:
        index = heapq.heappop(heap)[1]
        now = (-float((1 / (1 + seen[distinct[index]])).sum()), index)
        if heap and now > heap[0]:  # what a sample adds only falls, so an old figure is a bound
            heapq.heappush(heap, now)
            continue
        chosen.append(samples[index])
        seen[distinct[index]] += 1
    return chosen


def with_copies(data: Path, folder: Path) -> None:
    """Calibration texts, a little of the originals and between any two pages three copies of one and the same page."""
    for name in (name for names in DOMAINS.values() for name in names):
        text = (data / name / "calib.txt").read_text(encoding="utf-8")
        pages = [text[at : at + _PAGE] for at in range(0, min(len(text), 100 * _PAGE), _PAGE)]
        (folder / name).mkdir()
        (folder / name / "calib.txt").write_text("".join(page + 3 * pages[0] for page in pages), encoding="utf-8")


def all_runs(bench: Bench) -> Iterator[Run]:
    """Every run of the report, in its order."""
    equal = dict.fromkeys(DOMAINS, 1.0)
    for seed in SEEDS:
        yield bench.run("mixture", "all four", bench.mixed(equal, seed=seed), seed=seed)
    for domain in DOMAINS:
        yield bench.run("mixture", f"only {domain}", bench.mixed({domain: 1.0}))
    for domain in DOMAINS:
        yield bench.run("mixture", f"without {domain}", bench.mixed({name: 1.0 for name in DOMAINS if name != domain}))
    for count in (8, 32, 512):
        yield bench.run("samples", f"{count} x {LENGTH}", bench.mixed(equal, n_samples=count))
    for length in (64, 512):
        count = SAMPLES * LENGTH // length
        yield bench.run("length", f"{count} x {length}", bench.mixed(equal, n_samples=count, seq_len=length))
    for seed in SEEDS:
        yield bench.run("selection", "spread", bench.mixed(equal, seed=seed, select="spread"), seed=seed)
    for seed in SEEDS:
        parts = [covering(bench.mixed({d: 1.0}, n_samples=2 * SAMPLES, seed=seed), SAMPLES // 4) for d in DOMAINS]
        yield bench.run("selection", "most different tokens", [one for part in parts for one in part], seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        with_copies(bench.data, Path(folder))
        for select in ("random", "spread"):
            samples = bench.mixed(equal, Path(folder), n_samples=32, select=select)
            yield bench.run("copies", f"{select}, three quarters copies", samples)
    yield bench.run("copies", "random, no copies", bench.mixed(equal, n_samples=32))


def main() -> None:
    """Make all runs, or redraw what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, help="folder with books, enwiki, zh, code and gsm8k")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--redraw", action="store_true", help="only make Markdown and pictures of calibration.json")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / "calibration.json"
    if not args.redraw:
        began, bench = time.process_time(), Bench(args.model, args.data)
        runs = list(all_runs(bench))
        where = environment(torch.device("cpu"), qquant_version=qquant.__version__)
        content: dict[str, Any] = {
            "schema_version": 1,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shown_command(["python", "-m", "benchmarks.bench_calibration", *sys.argv[1:]]),
            "git_commit": git_commit(),
            "environment": asdict(where),
            "model": args.model.name,
            "evaluated_tokens_per_domain": EVAL_WINDOWS * LENGTH,
            "overlap_share": bench.overlaps(bench.mixed(dict.fromkeys(DOMAINS, 1.0), n_samples=512)),
            "shared_runs_share": bench.shared_runs(),
            "runs": [asdict(run) for run in runs],
            "cpu_seconds": round(time.process_time() - began, 1),
        }
        record.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_report(json.loads(record.read_text(encoding="utf-8")), args.out)


if __name__ == "__main__":
    main()
