"""How the KL of an Int4 model on held-out English, Chinese, code and mathematics depends on what it is calibrated on.

What is varied: the mixture (each domain alone, all of them, all but one), whether data goes through a chat template,
how many samples, how long they are at the same number of tokens, how they are chosen, and sources full of copies. The
model computes in float32, so that only quantization shows. Writes a record per method, METHOD.json, and
calibration.md and pictures of all records that lie there; ``--redraw`` makes these only. Texts are
calibration_texts.py's, pictures and tables calibration_report.py's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import qquant
from benchmarks.bench_options import unpacked
from benchmarks.calibration_report import Run, write_report
from benchmarks.calibration_texts import DOMAINS, EVAL_WINDOWS, LENGTH, Texts, covering, with_copies
from qquant.calibrate import Sample
from qquant.measure import environment, git_commit
from qquant.results import shown_command

EQUAL = dict.fromkeys(DOMAINS, 1.0)
SEEDS = (0, 1, 2)


class Bench:
    """The model, what it says about the held-out texts, and one method to quantize it with."""

    def __init__(self, model: Path, texts: Texts, method: str, draws: int) -> None:
        """Run the original model over the texts; ``draws`` of each way to use a chat template are made."""
        self.model, self.texts, self.method, self.draws = model, texts, method, draws
        original = self._load()
        with torch.inference_mode():
            self._exact = {name: original(rows).logits.log_softmax(-1) for name, rows in texts.windows.items()}

    def run(self, group: str, name: str, samples: Sequence[Sample], *, seed: int = 0) -> Run:
        """Quantize with these samples and measure."""
        model, began = self._load(), time.process_time()
        qquant.quantize_model(model, samples, qquant.QuantizeConfig(method=self.method))
        seconds, model = time.process_time() - began, unpacked(model)
        found: dict[str, float] = {}
        with torch.inference_mode():
            for text, rows in self.texts.windows.items():
                got, exact = model(rows).logits.log_softmax(-1), self._exact[text]
                found[text] = float((exact.exp() * (exact - got)).sum(-1).mean())
        tokens = sum(int(sample.mask.sum()) for sample in samples)
        figures = ", ".join(f"{text} {1e3 * kl:.2f}" for text, kl in found.items())
        print(f"{group}: {name}, seed {seed}: {figures}; {seconds:.0f} s", flush=True)
        return Run(group, name, len(samples), tokens, seed, found, round(seconds, 1))

    def _load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()


def mixtures(bench: Bench) -> Iterator[Run]:
    """All four domains, each alone, all but each."""
    first, *others = SEEDS
    yield bench.run("mixture", "all four", bench.texts.mixed(EQUAL, seed=first), seed=first)
    for domain in DOMAINS:
        yield bench.run("mixture", f"only {domain}", bench.texts.mixed({domain: 1.0}))
    for domain in DOMAINS:
        rest = {name: 1.0 for name in DOMAINS if name != domain}
        yield bench.run("mixture", f"without {domain}", bench.texts.mixed(rest))
    for seed in others:
        yield bench.run("mixture", "all four", bench.texts.mixed(EQUAL, seed=seed), seed=seed)


def templates(bench: Bench) -> Iterator[Run]:
    """The same questions and answers as plain text and through the template, alone and as a fourth of all."""
    texts = bench.texts
    plain = {texts.data / name / "calib.txt": 1 / len(names) for names in DOMAINS.values() for name in names}
    del plain[texts.data / DOMAINS["mathematics"][0] / "calib.txt"]
    alone, mixed = {texts.questions: 1.0}, {**plain, texts.questions: 1.0}
    for seed in range(bench.draws):
        for name, sources, through in (
            ("only questions, as text", alone, False),
            ("only questions, as chats", alone, True),
            ("all four, questions as text", mixed, False),
            ("all four, questions as chats", mixed, None),  # prompts with answers alone go through it
        ):
            yield bench.run("template", name, texts.drawn(sources, chat_template=through, seed=seed), seed=seed)
        samples = texts.mixed(EQUAL, chat_template=True, seed=seed)
        yield bench.run("template", "all four, each sample as a message", samples, seed=seed)


def numbers(bench: Bench) -> Iterator[Run]:
    """More samples and fewer."""
    for count in (8, 32, 512):
        yield bench.run("samples", f"{count} x {LENGTH}", bench.texts.mixed(EQUAL, n_samples=count))


def lengths(bench: Bench) -> Iterator[Run]:
    """Longer and shorter samples, as many tokens."""
    for length in (64, 512):
        count = bench.texts.samples * LENGTH // length
        samples = bench.texts.mixed(EQUAL, n_samples=count, seq_len=length)
        yield bench.run("length", f"{count} x {length}", samples)


def selections(bench: Bench) -> Iterator[Run]:
    """Other ways to choose among the candidates."""
    texts = bench.texts
    for seed in SEEDS:
        yield bench.run("selection", "spread", texts.mixed(EQUAL, seed=seed, select="spread"), seed=seed)
    wanted = texts.samples // len(DOMAINS)
    for seed in SEEDS:
        candidates = [texts.mixed({name: 1.0}, n_samples=2 * texts.samples, seed=seed) for name in DOMAINS]
        chosen = [sample for own in candidates for sample in covering(own, wanted)]
        yield bench.run("selection", "most different tokens", chosen, seed=seed)


def copies(bench: Bench) -> Iterator[Run]:
    """Sources that are three quarters copies."""
    with tempfile.TemporaryDirectory() as folder:
        with_copies(bench.texts.data, Path(folder))
        for select in ("random", "spread"):
            samples = bench.texts.mixed(EQUAL, Path(folder), n_samples=32, select=select)
            yield bench.run("copies", f"{select}, three quarters copies", samples)
    yield bench.run("copies", "random, no copies", bench.texts.mixed(EQUAL, n_samples=32))


SETS: dict[str, Callable[[Bench], Iterator[Run]]] = {
    "mixture": mixtures,
    "template": templates,
    "samples": numbers,
    "length": lengths,
    "selection": selections,
    "copies": copies,
}


def measure(args: argparse.Namespace, scratch: Path) -> None:
    """Make all runs that were asked for; the record is whole after each of them."""
    began = time.process_time()
    texts = Texts(args.model, args.data, scratch, samples=args.n_samples)
    bench = Bench(args.model, texts, args.method, args.draws)
    content: dict[str, Any] = {
        "schema_version": 2,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shown_command(["python", "-m", "benchmarks.bench_calibration", *sys.argv[1:]]),
        "git_commit": git_commit(),
        "environment": asdict(environment(torch.device("cpu"), qquant_version=qquant.__version__)),
        "model": args.model.name,
        "method": args.method,
        "evaluated_tokens_per_text": EVAL_WINDOWS * LENGTH,
        "overlap_share": texts.overlaps(texts.mixed(EQUAL, n_samples=4 * texts.samples)),
        "shared_runs_share": texts.shared_runs(),
        "runs": [],
    }
    for name in args.sets.split(","):
        for run in SETS[name](bench):
            content["runs"].append(asdict(run))
            content["cpu_seconds"] = round(time.process_time() - began, 1)
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (args.out / f"{args.method}.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Make the runs of one method, or redraw what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path, help="folder with books, enwiki, zh, code and gsm8k")
    parser.add_argument("--method", default="best", help="a method's name")
    parser.add_argument("--sets", default=",".join(SETS), help="of %(default)s, in the order in which they are to run")
    parser.add_argument("--draws", type=int, default=1, help="of each way to use a chat template")
    parser.add_argument("--n-samples", type=int, default=128, help="samples of a mixture")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--redraw", action="store_true", help="only make Markdown and pictures of the records")
    args = parser.parse_args()
    if not {"mixture"} <= set(args.sets.split(",")) <= set(SETS):
        parser.error(f"--sets takes mixture, which all are compared with, and others of {', '.join(SETS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.redraw:
        with tempfile.TemporaryDirectory() as scratch:
            measure(args, Path(scratch))
    write_report([json.loads(path.read_text(encoding="utf-8")) for path in sorted(args.out.glob("*.json"))], args.out)


if __name__ == "__main__":
    main()
