"""Recipe of an evaluation on tasks: what a model and its quantized versions get right, item by item.

Read the tasks, word their questions, put them to one model after the other in batches, judge, compare on the same
items. Every finished batch is in the journal before the next begins. Every step's own room does the work; the command
line is eval.py's.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from qquant.errors import BadDataError, UsageError
from qquant.tasks.items import PromptFormat, Style, TaskName
from qquant.telling import OnProgress, unheard
from qquant.text_sources import at_home

if TYPE_CHECKING:
    from qquant.results import Result
    from qquant.task_report import TaskItem, Tasks
    from qquant.tasks.asking import AskedTask, Decisions

Backend = Literal["qquant", "lm-eval"]

_TOO_LARGE = "a batch does not fit the device; lower --batch-size"
TASKS: tuple[TaskName, ...] = get_args(TaskName)
_FOLDERS = {"ceval": ("ceval", "c-eval"), "humaneval": ("humaneval", "human-eval")}
"""What a task's folder or file is called in a root folder, where it is not only the task's own name."""


def evaluate_tasks(
    baseline: str | Path,
    candidates: Sequence[str | Path],
    *,
    tasks: Sequence[str],
    data: Mapping[TaskName, Path | str] | Path | str,
    style: str = "auto",
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    prompt_format: str = "qwen",
    backend: str = "qquant",
    allow_code_execution: bool = False,
    bitsandbytes: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    threads: int | None = None,
    journal: Path | None = None,
    resume: bool = False,
    command: str = "evaluate_tasks() from Python",
    on_progress: OnProgress = unheard,
) -> tuple[Result, list[TaskItem]]:
    """Put tasks to a model and its candidates, and return the record and every decision.

    One model is in memory at a time, each with the tokenizer of its own folder.

    Args:
        baseline: folder or hub id of the original.
        candidates: folders or hub ids, quantized or not; there need be none.
        tasks: of mmlu, ceval, cmmlu, gsm8k and humaneval.
        data: where each task's files are, see ``tasks.files.read_task``; or a folder with one for each of them.
        style: "base", "chat", or "auto": chat if the baseline's tokenizer has a chat template, for an original Qwen if
            its generation config says so. All models are asked alike.
        shots: worked examples per question; None: the prompt format's own number for each task.
        limit: only the first so many items of each subject, of the task where it has none.
        batch_size: prompts that go through a model together.
        prompt_format: "qwen" or "lm-eval", see ``PromptFormat``; the second is of base style.
        backend: "qquant", or "lm-eval": the same models run by lm-evaluation-harness, in its own format.
        allow_code_execution: run the code that a model writes for HumanEval, confined.
        bitsandbytes: "nf4", "llm-int8": the baseline once more as bitsandbytes loads it.
        device: "auto", "cpu", "cuda", "cuda:1" ...
        dtype: compute dtype of all models; "auto": the baseline's, but float32 for float16 on a CPU.
        seed: of torch's generators. Nothing is drawn at random: decoding is greedy.
        threads: CPU threads for torch, set for the whole process; None leaves them alone.
        journal: file that keeps every finished batch, see ``journal.Journal``; the caller removes it.
        resume: go on with that file.
        command: what the report says it was made by.
        on_progress: told what is being done.

    Returns:
        The record, and the items of all models and tasks, which ``result_files.write_items`` puts beside it.

    Raises:
        QquantError: bad options, models, data or numbers, or not enough GPU memory.
    """
    import torch

    from qquant.eval_inputs import common_dtype, labelled, refuse_below_one
    from qquant.eval_models import bitsandbytes_labels, fits, identities, loaders, rows
    from qquant.eval_models import tokenizers as tokenizer_hashes
    from qquant.eval_record import finished_result
    from qquant.journal import kept
    from qquant.model_folder import load_tokenizer, resolve_folder
    from qquant.seen_text import seen_questions
    from qquant.sources import pick_device
    from qquant.tasks.asking import ask, put, put_with_lm_eval

    names, harness = _checked(tasks, style, prompt_format, backend, allow_code_execution=allow_code_execution)
    refuse_below_one(limit=limit, batch_size=batch_size, threads=threads)
    where = pick_device(device)
    sources = data if isinstance(data, Mapping) else task_sources(names, [str(data)])
    folders = labelled([resolve_folder(str(name)) for name in (baseline, *candidates)])
    first = next(iter(folders))
    compute = common_dtype(folders[first], dtype, where)
    kinds = bitsandbytes_labels(folders, bitsandbytes)
    tokenizers = {label: load_tokenizer(folder) for label, folder in folders.items()}
    tokenizers |= dict.fromkeys(kinds, tokenizers[first])
    asking: PromptFormat = "lm-eval" if "lm-eval" in (backend, prompt_format) else "qwen"
    chosen = _style(folders[first], tokenizers, "base" if asking == "lm-eval" else style)
    options: dict[str, Any] = {"style": chosen, "shots": shots, "limit": limit, "batch_size": batch_size}
    asked = []
    for number, name in enumerate(names):
        on_progress("reading tasks", number, len(names))
        if name not in sources:
            raise UsageError(f"the data of {name} must be named, got that of {', '.join(sources)}; name its folder")
        asked.append(ask(name, sources[name], prompt_format=asking, **options))
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)

    questions: dict[str, list[str]] = {one.data.task: [item.question for item in one.data.items] for one in asked}
    seen = seen_questions(folders, tokenizers, questions)
    hashes = identities(folders, on_progress)
    run: dict[str, Any] = {"measure": "tasks", "models": [*tokenizers], "sha256": hashes, "tasks": names}
    run |= {"questions": [task.sha256() for task in asked], "shots": [task.shots for task in asked], "style": chosen}
    run |= {"limit": limit, "batch_size": batch_size, "prompt_format": asking, "backend": backend}
    run |= {
        "tokenizers": tokenizer_hashes(folders),
        "lm_eval": harness,
        "dtype": str(compute),
        "device": where.type,
        "threads": threads,
    }
    execute = put_with_lm_eval if backend == "lm-eval" else put
    done: dict[str, list[Decisions]] = {}
    with kept(journal, run, resume=resume, pieces="batches of items") as finished, fits(_TOO_LARGE):
        for label, load in loaders(folders, kinds, compute, where).items():
            with _loaded(load, label, on_progress) as model:
                shared: dict[str, Any] = {"label": label, "batch_size": batch_size, "finished": finished}
                shared |= {"on_progress": on_progress}
                done[label] = [execute(task, model, tokenizers[label], **shared) for task in asked]
    found = _tasks(asked, done, "lm-eval" if backend == "lm-eval" else "qquant", asking, limit)
    facts: dict[str, Any] = {"rows": rows(folders, identities=hashes, in_memory=kinds, seen=seen), "seed": seed}
    record = finished_result(dtype=compute, device=where, tasks=found, command=command, **facts)
    return record, [item for decisions in done.values() for one in decisions for item in one.items]


def task_sources(tasks: Sequence[str], given: Sequence[str]) -> dict[TaskName, Path | str]:
    """Where each task's data is, from what a command line says.

    Args:
        tasks: names of tasks.
        given: each ``TASK=PLACE``, where the place may be a hub id too, or a folder that holds a folder or file for
            each task that has no place of its own.

    Raises:
        UsageError: an unknown task, two root folders, or none where one is needed.
        BadDataError: the root folder has nothing for a task.
    """
    names = _known(tasks)
    places: dict[TaskName, Path | str] = {}
    roots = []
    for text in given:
        task, equals, place = text.partition("=")
        if not equals or task not in TASKS:
            roots.append(Path(text))
            continue
        (name,) = _known([task])
        if not place or name in places:
            raise UsageError(f"--task-data {name}=PATH must name one place, got {text!r}; name it once")
        places[name] = place
    if len(roots) > 1:
        raise UsageError(f"the data of tasks is one folder and TASK=PATH for the rest, got {len(roots)} folders")
    for name in names:
        if name in places:
            continue
        if not roots:
            raise UsageError(f"{name} needs data: give --task-data {name}=PATH, or a folder that has a folder {name}")
        places[name] = _inside(roots[0], name)
    return {name: places[name] for name in names}


def _inside(root: Path, name: TaskName) -> Path:
    """A task's folder or file in a root folder."""
    root = at_home(root)
    if not root.is_dir():
        raise BadDataError(f"the data of tasks must be a folder, {root} is none; check the path, or write TASK=PATH")
    called = _FOLDERS.get(name, (name,))
    found = [path for path in sorted(root.iterdir()) if path.name.split(".")[0].lower() in called]
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise BadDataError(f"{root} must have one folder or file called {name}, it has {there}; write {name}=PATH")
    return found[0]


def _known(tasks: Sequence[str]) -> list[TaskName]:
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or not tasks or len(set(tasks)) < len(tasks):
        raise UsageError(f"tasks must be some of {', '.join(TASKS)}, each once, got {', '.join(tasks) or 'none'}")
    return [name for wanted in tasks for name in TASKS if name == wanted]


def _checked(
    tasks: Sequence[str], style: str, prompt_format: str, backend: str, *, allow_code_execution: bool
) -> tuple[list[TaskName], str | None]:
    """The tasks, if all options go together, and the version of lm-eval that runs them, if it does."""
    names = _known(tasks)
    for option, value, known in (
        ("style", style, ("auto", *get_args(Style))),
        ("prompt format", prompt_format, get_args(PromptFormat)),
        ("backend", backend, get_args(Backend)),
    ):
        if value not in known:
            raise UsageError(f"the {option} must be one of {', '.join(known)}, got {value!r}")
    if style == "chat" and "lm-eval" in (prompt_format, backend):
        raise UsageError(
            "lm-eval's format is for base style, got --style chat; leave that out, or use --prompt-format qwen"
        )
    if "humaneval" in names:
        from qquant.tasks.sandbox import enforced, require_permission

        require_permission(allow_code_execution)
        enforced()  # refuses a machine on which nothing can be confined now, and not after hours of generation
    if backend == "lm-eval":
        from qquant.tasks.lm_eval_backend import require_lm_eval

        return names, require_lm_eval()
    return names, None


def _style(baseline: Path, tokenizers: Mapping[str, Any], wanted: str) -> Style:
    """The style of all prompts; raises UsageError where one of the models cannot be asked so."""
    from qquant.json_files import read_json

    first = next(iter(tokenizers.values()))
    if wanted == "auto":
        chats = bool(getattr(first, "chat_template", None))
        if chats and hasattr(first, "im_start_id"):  # an original Qwen's tokenizer has the template for base models too
            settings = baseline / "generation_config.json"
            chats = settings.is_file() and read_json(settings).get("chat_format") == "chatml"
        wanted = "chat" if chats else "base"
    if wanted != "chat":
        return "base"
    for label, tokenizer in tokenizers.items():
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(f"chat style needs a chat template, the tokenizer of {label} has none; use --style base")
    return "chat"


@contextmanager
def _loaded(load: Callable[[], Any], label: str, tell: OnProgress) -> Iterator[Callable[[], Any]]:
    """A function that returns a model, loaded when it is first called and let go of at the end."""
    import torch

    held: list[Any] = []

    def model() -> Any:
        if not held:
            tell(f"loading {label}", 0, 1)
            held.append(load())
        return held[0]

    try:
        yield model
    finally:
        held.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _tasks(
    asked: Sequence[AskedTask],
    done: Mapping[str, Sequence[Decisions]],
    backend: Backend,
    prompt_format: PromptFormat,
    limit: int | None,
) -> Tasks:
    """The section of the record."""
    from qquant.task_report import TaskData, Tasks
    from qquant.tasks.scores import comparison_of, score_of

    scores, comparisons = [], []
    baseline, *others = done
    for number, task in enumerate(asked):
        for decisions in (found[number] for found in done.values()):
            scores.append(
                score_of(
                    decisions.items,
                    style=task.style,
                    shots=task.shots,
                    backend=backend,
                    prompt_format=prompt_format,
                    truncated=decisions.truncated,
                    seconds=decisions.seconds,
                )
            )
        theirs = done[baseline][number].items
        comparisons += [comparison_of(theirs, done[label][number].items) for label in others]
    data = (
        TaskData(task=task.data.task, sha256=task.data.sha256, items=len(task.data.items), limit=limit)
        for task in asked
    )
    return Tasks(
        data=tuple(data), scores=tuple(scores), comparisons=tuple(comparisons), code_confinement=_confinement(asked)
    )


def _confinement(asked: Sequence[AskedTask]) -> str | None:
    """What held back generated code, for the report."""
    if all(task.data.task != "humaneval" for task in asked):
        return None
    from qquant.tasks.sandbox import enforced

    return enforced().sentence()
