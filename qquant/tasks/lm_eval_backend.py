"""A loaded model run through lm-evaluation-harness: the harness's task files and its model class, our local data.

Nothing is fetched: the data set of every task file is replaced by what files.py read. The harness asks, runs, stops and
reads the answers; only HumanEval's programs are judged by our sandbox, because the harness would fetch its judge from
the hub and run the code without limits. Wording without the harness is lm_eval_prompts.py's.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from qquant.errors import BadDataError, BadModelError, NumericError, UsageError
from qquant.task_report import TaskItem
from qquant.tasks.items import LETTERS, Item, TaskSet, Verdict, likeliest_letter
from qquant.tasks.lm_eval_prompts import FEWSHOT_SEED, GSM8K_SCORED, compared_text, judge, questions
from qquant.tasks.sandbox import require_permission
from qquant.telling import OnProgress, unheard

OLDEST = (0, 4, 13)
"""The lm-eval whose task files and samples this was written and checked against; older ones build tasks otherwise."""
INSTALL = "pip install 'qquant[eval]'"

_FILES = {
    "mmlu": ("mmlu/default", "mmlu_{}"),
    "ceval": ("ceval", "ceval-valid_{}"),
    "cmmlu": ("cmmlu", "cmmlu_{}"),
    "gsm8k": ("gsm8k", "gsm8k"),
    "humaneval": ("humaneval", "humaneval"),
}
"""Task -> folder of the harness's task files, and the name of the task in it for a subject."""

_REQUESTS_AT_ONCE = 64
"""Batches that the harness is given at a time; it sorts them by length, and progress is told in between."""


@dataclass(frozen=True)
class Sample:
    """One item as the harness ran it."""

    context: str
    """All that the model read."""
    continuations: tuple[str, ...]
    """What was scored behind it; empty where the model generated."""
    logprobs_nats: tuple[float, ...]
    """Of each continuation."""
    output: str | None
    """What was generated, cut at the stop strings; None where continuations were scored."""
    target: str
    """What the harness holds the answer against; of choices the number of the right one."""
    verdicts: Mapping[str, Verdict]
    """By the harness's name for its reading of the answer: "none" for choices, two filters for GSM8K, nothing for
    HumanEval, whose programs are not run here."""
    truncated: bool
    """The model's window was too short for the context, which lost its first tokens."""


class LmEvalRun(NamedTuple):
    """What the harness made of a task."""

    items: list[TaskItem]
    """One per item of the data, in its order."""
    truncated: int
    """Items whose context lost its first tokens."""


def run_lm_eval(
    model: Any,
    tokenizer: Any,
    data: TaskSet,
    *,
    label: str,
    shots: int,
    batch_size: int,
    allow_code_execution: bool = False,
    on_progress: OnProgress = unheard,
) -> LmEvalRun:
    """Let the harness put a task to a model that is already loaded, and return its decisions.

    The window is what the harness reads in the model's config. A longer prompt loses tokens at its beginning, heading
    first; that is the harness's rule.

    Args:
        model: a transformers causal language model on its device, ours or any other; is read, and set to ``eval()``.
        tokenizer: its tokenizer; as before afterwards.
        data: what files.py read.
        label: the model's, for the items.
        shots: worked examples per question, as ``lm_eval_prompts.questions`` takes them.
        batch_size: sequences at a time. 1 repeats exactly; larger ones move log-likelihoods in the last digits.
        allow_code_execution: HumanEval only: run what the model wrote, in our sandbox.
        on_progress: told what is being done.

    Raises:
        UsageError: lm-eval is missing or too old; HumanEval without ``allow_code_execution``; bad ``shots``.
        BadDataError: too few examples, or a subject that the harness does not have.
        BadModelError: the model's window has no room for what a task generates.
        NumericError: log-likelihoods that are not finite.
    """
    if data.task == "humaneval":
        require_permission(allow_code_execution)
    samples = run_harness(
        model,
        tokenizer,
        data,
        shots=shots,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    if data.task == "humaneval":
        verdicts = _run_programs(data, samples, on_progress)
    else:
        filter_name = GSM8K_SCORED if data.task == "gsm8k" else "none"
        verdicts = [sample.verdicts[filter_name] for sample in samples]
    items = [
        TaskItem(
            label=label,
            task=data.task,
            id=item.id,
            group=item.group,
            answer=verdict.answer,
            truth=item.truth,
            correct=verdict.correct,
            choice_logprobs_nats=sample.logprobs_nats or None,
            output=sample.output,
        )
        for item, sample, verdict in zip(data.items, samples, verdicts, strict=True)
    ]
    return LmEvalRun(items, sum(sample.truncated for sample in samples))


def run_harness(
    model: Any,
    tokenizer: Any,
    data: TaskSet,
    *,
    shots: int,
    batch_size: int,
    on_progress: OnProgress = unheard,
) -> list[Sample]:
    """The harness's samples of one task, in the order of ``data.items``; nothing is executed.

    Arguments and errors are those of ``run_lm_eval``.
    """
    require_lm_eval()
    questions(data, shots=shots)  # the same limits on shots and subjects, with messages that say what to do
    try:
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UsageError(
            f"lm-eval lacks a package that it needs for transformers models ({error}): {INSTALL}"
        ) from error
    with _quiet_harness(), _greedy(model, tokenizer):
        tasks, places = _tasks(data, shots)
        # float32 for the softmax alone: in the model's bfloat16 the four choices tie too often.
        harness_model = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype="float32",
        )
        _require_room(tasks, harness_model)
        watched = _Watched(harness_model, batch_size, f"lm-eval: {data.task}", on_progress)
        watched.begin(tasks)
        found = evaluate(lm=watched, task_dict={"tasks": tasks}, log_samples=True, bootstrap_iters=0)
        by_item: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for name, logged in found["samples"].items():
            for entry in logged:
                by_item[places[name][entry["doc_id"]]].append(entry)
        return [_sample(data.items[number], by_item[number], harness_model) for number in range(len(data.items))]


def require_lm_eval() -> str:
    """The version of lm-eval that is installed.

    Raises:
        UsageError: none is, or one that is too old.
    """
    try:
        found = version("lm_eval")
    except PackageNotFoundError:
        raise UsageError(
            f"the lm-eval backend needs lm-evaluation-harness, which is not installed: {INSTALL}"
        ) from None
    if tuple(int(part) for part in found.split(".")[:3] if part.isdecimal()) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UsageError(f"the lm-eval backend needs lm-eval {oldest} or newer, got {found}: {INSTALL}")
    return found


def _run_programs(data: TaskSet, samples: Sequence[Sample], on_progress: OnProgress) -> list[Verdict]:
    verdicts = []
    for question, sample in zip(questions(data, shots=0), samples, strict=True):
        verdicts.append(judge(question, output=sample.output))
        on_progress("running humaneval's programs", len(verdicts), len(samples))
    return verdicts


class _Watched:
    """The harness's model as ``evaluate`` calls it, which tells progress between parts of the requests.

    No subclass of the harness's, so that this file can be imported without it.
    """

    rank = 0
    world_size = 1

    def __init__(self, inner: Any, batch_size: int, what: str, on_progress: OnProgress) -> None:
        self._inner, self._what, self._on_progress = inner, what, on_progress
        self._at_once = _REQUESTS_AT_ONCE * batch_size

    def begin(self, tasks: Mapping[str, Any]) -> None:
        self._on_progress(self._what, 0, sum(len(task.eval_docs) for task in tasks.values()))

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        # Four requests are one item, and share one pass of the model as long as they stay together.
        return self._in_parts(self._inner.loglikelihood, requests, len(LETTERS))

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        return self._in_parts(self._inner.generate_until, requests, 1)

    def _in_parts(self, run: Callable[..., list[Any]], requests: Sequence[Any], per_item: int) -> list[Any]:
        answers: list[Any] = []
        step = self._at_once if per_item > 1 else max(1, self._at_once // 16)  # a generation takes many passes
        for begin in range(0, len(requests), step):
            answers += run(requests[begin : begin + step], disable_tqdm=True)
            self._on_progress(self._what, len(answers) // per_item, len(requests) // per_item)
        return answers


def _tasks(data: TaskSet, shots: int) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The harness's task objects on our data, and for each the places of its documents among ``data.items``."""
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    folder, pattern = _FILES[data.task]
    root = Path(lm_eval.__file__).parent / "tasks" / folder
    index = TaskManager(include_path=str(root), include_defaults=False).task_index

    by_subject: dict[str | None, list[int]] = defaultdict(list)
    for place, item in enumerate(data.items):
        by_subject[item.group].append(place)

    tasks, places = {}, {}
    for subject, numbers in by_subject.items():
        name = pattern.format(subject)
        if name not in index or index[name].cfg is None:
            raise BadDataError(f"lm-eval has no task {name}; its {data.task} knows the published subjects only")
        config = {key: value for key, value in index[name].cfg.items() if key not in ("tag", "group", "task_list")}
        asked = [_document(data, data.items[number]) for number in numbers]
        examples = [_document(data, item) for item in data.shots.get(subject, ())]
        splits = {config.get("fewshot_split") or "unused": datasets.Dataset.from_list(examples)}
        splits[config.get("test_split") or config["validation_split"]] = datasets.Dataset.from_list(asked)
        # The harness calls this instead of loading a data set, and hands over the metadata of the task file.
        config["custom_dataset"] = lambda splits=splits, **metadata: splits
        config["num_fewshot"] = shots
        if data.task == "humaneval":
            # Building and running programs is all that is marked unsafe in this task; neither is done here.
            config |= {"unsafe_code": False, "filter_list": None, "metric_list": [{"metric": "bypass"}]}
        task = ConfigurableTask(config=config)
        task.set_fewshot_seed(FEWSHOT_SEED)
        tasks[name], places[name] = task, numbers
    return tasks, places


def _document(data: TaskSet, item: Item) -> dict[str, Any]:
    """An item in the columns of the data set that the harness's task file was written for."""
    if data.task == "gsm8k":
        return {"question": item.question, "answer": item.extra["answer"]}
    if data.task == "humaneval":
        return {"task_id": item.id, **{key: item.extra[key] for key in ("prompt", "test", "entry_point")}}
    if data.task == "mmlu":
        return {"question": item.question, "choices": list(item.choices), "answer": LETTERS.index(item.truth)}
    letters = dict(zip(LETTERS, item.choices, strict=True))
    if data.task == "ceval":
        return {"question": item.question, **letters, "answer": item.truth}
    return {"Question": item.question, **letters, "Answer": item.truth}


def _sample(item: Item, entries: Sequence[Mapping[str, Any]], harness_model: Any) -> Sample:
    """What the harness logged of one item, once per filter."""
    first = entries[0]
    context, detail = first["arguments"][0]
    logprobs: tuple[float, ...] = ()
    if item.choices:
        logprobs = tuple(float(response[0][0]) for response in first["resps"])
        if not all(map(math.isfinite, logprobs)):
            raise NumericError("the model's logits must be finite to compare choices; try --dtype float32")
        # The first of the largest, as the harness's argmax; whether that is right is the harness's own word.
        verdicts = {first["filter"]: Verdict(answer=likeliest_letter(logprobs), correct=first["acc"] == 1.0)}
        # The last token of a continuation is scored and not read.
        tokens, room = len(harness_model.tok_encode(context + detail)) - 1, harness_model.max_length
    else:
        verdicts = {entry["filter"]: _read(entry) for entry in entries if "exact_match" in entry}
        tokens = len(harness_model.tok_encode(context))
        room = harness_model.max_length - _new_tokens(detail, harness_model)
    return Sample(
        context=context,
        continuations=tuple(arguments[1] for arguments in first["arguments"]) if item.choices else (),
        logprobs_nats=logprobs,
        output=None if item.choices else first["resps"][0][0],
        target=str(first["target"]),
        verdicts=verdicts,
        truncated=tokens > room,
    )


def _new_tokens(generation: Mapping[str, Any], harness_model: Any) -> int:
    """Tokens that a task lets the harness generate."""
    return int(generation.get("max_gen_toks", harness_model.max_gen_toks))


def _read(entry: Mapping[str, Any]) -> Verdict:
    """The verdict of one of GSM8K's filters."""
    found = entry["filtered_resps"][0]
    answer = None if found == "[invalid]" else compared_text(found)
    return Verdict(answer=answer, correct=float(entry["exact_match"]) == 1.0)


def _require_room(tasks: Mapping[str, Any], harness_model: Any) -> None:
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            continue
        wanted = _new_tokens(task.config.generation_kwargs, harness_model)
        if wanted >= harness_model.max_length:
            raise BadModelError(
                f"lm-eval's {name} generates up to {wanted} tokens, and the model's window is "
                f"{harness_model.max_length}; use --backend qquant, which lets the answer take half of it"
            )


@contextmanager
def _greedy(model: Any, tokenizer: Any) -> Iterator[None]:
    """What the harness needs to generate greedily up to its own limit; everything is as before afterwards.

    The model's generation_config.json is put aside but for its end-of-text tokens: the harness leaves it in force, and
    then ``max_new_tokens`` in it replaces the task's limit, and a repetition penalty changes the answers. A tokenizer
    that names no end of text gets the model's.
    """
    from transformers import GenerationConfig

    kept = model.generation_config
    before = {name: getattr(tokenizer, name) for name in ("eos_token", "pad_token", "padding_side")}
    try:
        model.generation_config = GenerationConfig(eos_token_id=kept.eos_token_id)
        if tokenizer.eos_token is None:
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(_end_of_text(tokenizer, kept.eos_token_id))
        yield
    finally:
        model.generation_config = kept
        for name, value in before.items():
            setattr(tokenizer, name, value)


def _end_of_text(tokenizer: Any, ids: Any) -> int:
    """The original Qwen's tokenizer names its end of text ``eod_id``; others leave it to the model."""
    if hasattr(tokenizer, "eod_id"):
        return int(tokenizer.eod_id)
    if ids is None:
        raise BadModelError(
            "lm-eval needs to know how a text ends: neither the tokenizer nor generation_config.json names an "
            "end-of-text token; add eos_token to tokenizer_config.json"
        )
    return int(ids[0] if isinstance(ids, list) else ids)


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """No log lines and no bars of the harness, which would run through our own; its errors are exceptions anyway."""
    import lm_eval.api.task as building

    log, bar = logging.getLogger("lm_eval"), building.tqdm
    level = log.level
    log.setLevel(logging.ERROR)
    building.tqdm = lambda documents, **options: documents
    try:
        yield
    finally:
        log.setLevel(level)
        building.tqdm = bar
