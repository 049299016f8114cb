"""Do our tasks in lm-eval's format read and decide every item as lm-evaluation-harness itself does?

Both sides get the same model object, in float32, and the same items. Ours puts lm_eval_prompts.py's questions to
runner.py; the other is the harness with its own task files. Started by run.sh; prints one table and exits with 1 if
anything differs: a context, a continuation, a decision, a generated text, a program.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from qquant.checkpoint import load_model
from qquant.model_folder import load_tokenizer
from qquant.tasks.files import read_task
from qquant.tasks.items import Question, TaskName, TaskSet
from qquant.tasks.lm_eval_backend import Sample, run_harness
from qquant.tasks.lm_eval_prompts import Gsm8kFilter, humaneval_program, judge, judge_gsm8k, questions
from qquant.tasks.runner import Reply, answer, batches
from tests.lm_eval.models import make_sharp_qwen_v1

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
OWN_MODEL = ROOT / "examples" / "reference-model"

SHOTS: dict[TaskName, int] = {"mmlu": 5, "ceval": 5, "cmmlu": 5, "gsm8k": 5, "humaneval": 0}
GENERATING = ("gsm8k", "humaneval")
RANDOM = "random-qwen-v1"
"""Stands for a model that models.py makes."""
RANDOM_GENERATIONS = 4
"""Items that it generates for: its text is noise, and only whether both sides stop, cut and decode alike is of use."""

WINDOW_TOKENS = 16384
"""The small models were made for 512 tokens or so, five examples are more. Both sides get a window that nothing fills:
they shorten prompts by different rules, ours by whole examples, and that is not what is compared here. The models
compute positions and have none stored, so they run; what they answer that far out is as good as any answer here."""


@dataclass
class Agreement:
    """One model on one task."""

    model: str
    task: TaskName
    shots: int
    items: int
    equal_contexts: int
    """Of the items: the text that the model reads is the same, and so are the continuations that are scored."""
    equal_decisions: int
    """Same answer and same word on whether it is right; for GSM8K by both of the harness's filters."""
    correct: int
    distinct_answers: int
    """How many answers there are: a model that always says A would agree with anyone who reads it so."""
    max_difference_nats: float | None
    """Largest difference of a choice's log-likelihood between the sides; None where text is generated."""
    min_margin_nats: float | None
    """Smallest lead of a best choice over the second: far above the difference, equal decisions are no luck."""
    equal_outputs: int | None
    """Generated texts that are the same, character by character; None where choices are scored."""
    equal_programs: int | None
    """HumanEval: programs that are the harness's prompt, answer and test; None elsewhere."""
    our_batch: int
    their_batch: int
    our_seconds: float
    their_seconds: float
    data_sha256: str

    @property
    def holds(self) -> bool:
        """Nothing differs."""
        counts = (self.equal_contexts, self.equal_decisions, self.equal_outputs, self.equal_programs)
        return all(count in (None, self.items) for count in counts)


def main() -> int:
    """Compare, print and write what was found."""
    options = arguments()
    found: list[Agreement] = []
    for name in options.model:
        with model_folder(name) as folder:
            model = load_model(folder, dtype=torch.float32, device=torch.device(options.device)).eval()
            tokenizer = load_tokenizer(folder)
        for field in ("max_position_embeddings", "seq_length"):
            if hasattr(model.config, field):
                setattr(model.config, field, WINDOW_TOKENS)
        for task in options.tasks:
            with data_folder(task, options.data) as source:
                if source is None:
                    print(f"{name}, {task}: skipped, {options.data / task} is not there", file=sys.stderr)
                    continue
                few = name == RANDOM and task in GENERATING
                data = first_items(task, source, min(options.items, RANDOM_GENERATIONS) if few else options.items)
            both = (options.batch_size, options.their_batch_size)
            found.append(compare(model, tokenizer, data, Path(name).name, *both))
            print(line(found[-1]), file=sys.stderr, flush=True)
            if options.out:  # after every task, because all of them take a quarter of an hour
                write_figures(options.out, found, options.device)
    print("\n".join([HEAD, *map(line, found)]))
    return 0 if found and all(agreement.holds for agreement in found) else 1


def arguments() -> argparse.Namespace:
    """The command line."""
    trained = SHARED / "models" / "qwen-tiny-lm"
    models = [str(trained if trained.exists() else OWN_MODEL), RANDOM]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=models, help=f"folders, or {RANDOM}")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="folder of task folders")
    parser.add_argument("--tasks", nargs="+", choices=get_args(TaskName), default=list(get_args(TaskName)))
    parser.add_argument("--items", type=int, default=50, help="of each task, over as many subjects as there are")
    parser.add_argument("--batch-size", type=int, default=10, help="on our side")
    parser.add_argument("--their-batch-size", type=int, default=1, help="on the harness's side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    return parser.parse_args()


def compare(model: Any, tokenizer: Any, data: TaskSet, name: str, our_batch: int, their_batch: int) -> Agreement:
    """Run both sides on the same items."""
    shots = SHOTS[data.task]
    start = time.perf_counter()
    asked = questions(data, shots=shots)
    replies = run_ours(model, tokenizer, asked, our_batch)
    ours = time.perf_counter()
    before = settings(model, tokenizer)
    samples = run_harness(model, tokenizer, data, shots=shots, batch_size=their_batch, on_progress=told)
    theirs = time.perf_counter()
    if settings(model, tokenizer) != before:
        raise SystemExit("the harness's run left the model or its tokenizer changed")
    if any(one.truncated for both in zip(replies, samples, strict=True) for one in both):
        raise SystemExit(f"a prompt of {data.task} is longer than {WINDOW_TOKENS} tokens; only whole ones are compared")

    triples = list(zip(asked, replies, samples, strict=True))
    verdicts = [judge(question, logprobs=reply.logprobs_nats, output=reply.output) for question, reply, _ in triples]
    generates = data.task in GENERATING
    return Agreement(
        model=name,
        task=data.task,
        shots=shots,
        items=len(asked),
        equal_contexts=sum(
            (text_of(question), question.choices) == (sample.context, sample.continuations)
            for question, _, sample in triples
        ),
        equal_decisions=sum(decides_alike(*triple) for triple in triples),
        correct=sum(verdict.correct for verdict in verdicts),
        distinct_answers=len({verdict.answer for verdict in verdicts}),
        max_difference_nats=None if generates else max(difference(reply, sample) for _, reply, sample in triples),
        min_margin_nats=None if generates else min(margin(sample.logprobs_nats) for sample in samples),
        equal_outputs=sum(reply.output == sample.output for _, reply, sample in triples) if generates else None,
        equal_programs=sum(same_program(q, s) for q, _, s in triples) if data.task == "humaneval" else None,
        our_batch=our_batch,
        their_batch=their_batch,
        our_seconds=round(ours - start, 1),
        their_seconds=round(theirs - ours, 1),
        data_sha256=data.sha256,
    )


def settings(model: Any, tokenizer: Any) -> tuple[object, ...]:
    """What a run of the harness changes for its own time."""
    return model.generation_config, tokenizer.eos_token, tokenizer.pad_token, tokenizer.padding_side


def run_ours(model: Any, tokenizer: Any, asked: Sequence[Question], batch_size: int) -> list[Reply]:
    """Our runner's replies, in the order of the questions."""
    by_id: dict[str, Reply] = {}
    for batch in batches(asked, batch_size):
        replies = answer(model, tokenizer, batch, batch_size=batch_size)
        by_id.update(zip((question.id for question in batch), replies, strict=True))
        told("ours", len(by_id), len(asked))
    return [by_id[question.id] for question in asked]


def decides_alike(question: Question, reply: Reply, sample: Sample) -> bool:
    """Whether both sides say the same of an item, by every reading that the harness has of it."""
    if question.choices:
        return judge(question, logprobs=reply.logprobs_nats) == sample.verdicts["none"]
    output = reply.output or ""
    if "entry_point" in question.item.extra:
        # Its own judge would be fetched from the hub: both texts go to our sandbox, as the same program.
        return judge(question, output=output) == judge(question, output=sample.output)
    return all(judge_gsm8k(question, output, rule=rule) == sample.verdicts[rule] for rule in get_args(Gsm8kFilter))


def text_of(question: Question) -> str:
    """All that the model reads on our side, nothing dropped."""
    return question.heading + "".join(question.shots) + question.body


def same_program(question: Question, sample: Sample) -> bool:
    """The harness runs prompt and answer, a line break, and what it holds the answer against."""
    return humaneval_program(question, sample.output or "") == f"{sample.context}{sample.output}\n{sample.target}"


def difference(reply: Reply, sample: Sample) -> float:
    """Largest of an item's choices."""
    assert reply.logprobs_nats is not None
    return max(abs(one - other) for one, other in zip(reply.logprobs_nats, sample.logprobs_nats, strict=True))


def margin(logprobs: Sequence[float]) -> float:
    """Lead of the best choice."""
    best, second, *_ = sorted(logprobs, reverse=True)
    return best - second


def first_items(task: TaskName, source: Path, count: int) -> TaskSet:
    """The first items of a task; of a task with subjects as few of each as give ``count``."""
    groups = len({item.group for item in read_task(task, source, limit=1).items})
    data = read_task(task, source, limit=-(-count // groups))
    return replace(data, items=data.items[:count])


@contextmanager
def model_folder(name: str) -> Iterator[Path]:
    """Where a model's files are, as long as they are read."""
    if name != RANDOM:
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as made:
        yield make_sharp_qwen_v1(Path(made) / RANDOM, window_tokens=WINDOW_TOKENS)


@contextmanager
def data_folder(task: TaskName, folder: Path) -> Iterator[Path | None]:
    """Where a task's files are; C-Eval's may not be passed on, so ours are made up, in its layout."""
    if (folder / task).is_dir():
        yield folder / task
    elif task == "ceval":
        with tempfile.TemporaryDirectory() as made:
            write_ceval(Path(made))
            yield Path(made)
    else:
        yield None


SUBJECTS = ("accountant", "civil_servant", "computer_network", "high_school_physics", "logic")


def write_ceval(folder: Path) -> None:
    """Sums as multiple choice in C-Eval's layout: ten questions and five examples for each of five subjects."""
    parts: dict[Literal["dev", "val"], range] = {"dev": range(5), "val": range(5, 15)}
    for part, numbers in parts.items():
        (folder / part).mkdir()
        for place, subject in enumerate(SUBJECTS):
            lines = ["id,question,A,B,C,D,answer" + ",explanation" * (part == "dev")]
            for row, number in enumerate(numbers):
                left, right = 10 * place + number, 3 + 7 * number % 11
                right_at = (number + place) % 4
                choices = [str(left + right + step - right_at) for step in range(4)]
                cells = [str(row), f"{left} 加 {right} 等于____。", *choices, "ABCD"[right_at]]
                lines.append(",".join(cells) + ",相加" * (part == "dev"))
            text = "\n".join(lines) + "\n"
            (folder / part / f"{subject}_{part}.csv").write_text(text, encoding="utf-8")


HEAD = (
    "| model | task | items | same context | same decision | correct | answers | largest difference, nats "
    "| smallest lead, nats | same output |\n|---|---|---|---|---|---|---|---|---|---|"
)


def line(one: Agreement) -> str:
    """A row of the table."""
    cells: list[object] = [one.model, one.task, one.items, one.equal_contexts, one.equal_decisions, one.correct]
    cells.append(one.distinct_answers)
    for value in (one.max_difference_nats, one.min_margin_nats):
        cells.append("" if value is None else f"{value:.2g}")
    cells.append("" if one.equal_outputs is None else one.equal_outputs)
    return "| " + " | ".join(map(str, cells)) + " |"


def write_figures(path: Path, found: Sequence[Agreement], device: str) -> None:
    """The figures with what they were made by; what the file holds of other models and tasks stays."""
    packages = ("lm_eval", "torch", "transformers", "datasets")
    made_by = {
        "command": " ".join(["bash tests/lm_eval/run.sh", *sys.argv[1:]]),
        "versions": {name: version(name) for name in packages},
        "device": device,
        "dtype": "float32",
    }
    new = [vars(one) | {"holds": one.holds} | made_by for one in found]
    taken = {(row["model"], row["task"]) for row in new}
    old = json.loads(path.read_text(encoding="utf-8"))["agreement"] if path.exists() else []
    rows = [row for row in old if (row["model"], row["task"]) not in taken] + new
    text = json.dumps({"schema_version": 1, "agreement": rows}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def told(what: str, done: int, total: int) -> None:
    """Progress, on one line of stderr."""
    print(f"\r  {what}: {done} of {total}  ", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
