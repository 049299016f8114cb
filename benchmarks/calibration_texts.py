"""What bench_calibration.py calibrates and evaluates on: text of four domains, and questions with answers as chats.

DATA holds a folder per source, each with calib.txt, which is calibrated on, and eval.txt, which is not; gsm8k holds
questions with answers besides. Nothing is quantized here.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.calibration_report import CHATS
from qquant.calibrate import Sample, load_mixture, load_samples
from qquant.overlap import overlap_of, run_hashes, sketch_of

DOMAINS = {"English": ("books", "enwiki"), "Chinese": ("zh",), "code": ("code",), "mathematics": ("gsm8k",)}
"""Domain -> folders of its sources."""
LENGTH = 256
EVAL_WINDOWS = 16
"""Of each text."""

_HELD_OUT, _QUESTIONS = "test_first660.jsonl", "train_1000.jsonl"
"""Questions with answers: those of the first are laid out as calib.txt lays them out to be held-out mathematics."""
_MARKS = re.compile(r"<<[^>]*>>")
"""A calculator's notes in the answers, which neither calib.txt nor what the model was trained on has."""
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_PAGE = 4000
"""Characters of the page that is copied."""


class Texts:
    """All texts of a benchmark as ids of one tokenizer."""

    def __init__(self, model: Path, data: Path, scratch: Path, *, samples: int) -> None:
        """Read everything once.

        Args:
            model: folder with the tokenizer. If it brings no chat template, it gets ChatML.
            data: as this file's beginning says.
            scratch: an empty folder for files made of the data.
            samples: of a mixture, unless something else is said.
        """
        self.data, self.samples = data, samples
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.tokenizer.chat_template = self.tokenizer.chat_template or _CHATML
        self.questions = scratch / "questions.jsonl"
        """To calibrate on."""
        held_out = scratch / "held_out.jsonl"
        for path, name in ((self.questions, _QUESTIONS), (held_out, _HELD_OUT)):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in _answered(data / "gsm8k" / name))
            path.write_text("".join(lines), encoding="utf-8")
        texts = {domain: [self._held_out(name) for name in names] for domain, names in DOMAINS.items()}
        windows = {domain: torch.cat([_spread(part, len(parts)) for part in parts]) for domain, parts in texts.items()}
        chats = load_samples(
            held_out, self.tokenizer, n_samples=EVAL_WINDOWS, seq_len=LENGTH, packing="pack", chat_template=True
        )
        self.windows = windows | {CHATS: torch.stack([chat.input_ids for chat in chats])}
        """Text -> [EVAL_WINDOWS, LENGTH] ids to evaluate on."""
        self._ids = {domain: torch.cat(parts) for domain, parts in texts.items()}
        self._ids[CHATS] = self.windows[CHATS].flatten()

    def mixed(self, weights: Mapping[str, float], folder: Path | None = None, **options: Any) -> list[Sample]:
        """Samples of some domains; a domain's weight is shared by its sources."""
        sources = {
            (folder or self.data) / name / "calib.txt": weight / len(DOMAINS[domain])
            for domain, weight in weights.items()
            for name in DOMAINS[domain]
        }
        return self.drawn(sources, **options)

    def drawn(self, sources: Mapping[Path, float], **options: Any) -> list[Sample]:
        """Samples of files with weights; all are packed, so that each holds as many tokens."""
        wanted = {"n_samples": self.samples, "seq_len": LENGTH, "packing": "pack", **options}
        return load_mixture({str(name): weight for name, weight in sources.items()}, self.tokenizer, **wanted).samples

    def overlaps(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Share of each held-out text that these samples had, as an evaluation would estimate it."""
        sketch = sketch_of(sample.input_ids for sample in samples)
        found = {name: overlap_of(sketch, ids) for name, ids in self._ids.items()}
        return {name: overlap.share for name, overlap in found.items() if overlap}

    def shared_runs(self) -> dict[str, float]:
        """Source -> share of the runs of its held-out text that all of its calibration text has too, exactly."""
        found = {}
        for folder in sorted(path.parent for path in self.data.glob("*/calib.txt")):
            runs = torch.unique(run_hashes(self._held_out(folder.name)))
            seen = torch.unique(run_hashes(self._encoded((folder / "calib.txt").read_text(encoding="utf-8"))))
            found[folder.name] = float(torch.isin(runs, seen).double().mean())
        return found

    def _held_out(self, name: str) -> Tensor:
        path = self.data / name / _HELD_OUT
        if not path.is_file():
            return self._encoded((self.data / name / "eval.txt").read_text(encoding="utf-8"))
        rows = _answered(path)
        return self._encoded("\n\n".join(f"Question: {row['question']}\nAnswer: {row['answer']}" for row in rows))

    def _encoded(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _answered(path: Path) -> list[dict[str, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"question": row["question"], "answer": _MARKS.sub("", row["answer"])} for row in rows]


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
