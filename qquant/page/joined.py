"""Results joined: every report.json below some folders, which of them may be compared, and the Markdown of the whole.

Rows stand in one table only if text, dtype, device and baseline are alike; otherwise a note says what differs. Which
tables there are is for models.py, scores.py and grids.py; the page is html.py's.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qquant.errors import BadDataError, UsageError
from qquant.page.tables import SECTIONS, Table, markdown_text
from qquant.plan_report import PlanCell
from qquant.profile_report import CellKey
from qquant.results import ModelRow, Result, result_from_json

FILE_NAME = "report.json"
_GIANT = 2**63
"""Whole numbers from here on are refused."""
DTYPES = {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32"}
"""As Qwen's README names them."""

_PUBLISHED_SIZES = {
    1_836_828_672: "qwen-1.8b",
    7_721_324_544: "qwen-7b",
    14_167_290_880: "qwen-14b",
    72_287_920_128: "qwen-72b",
}
"""Parameters of the original Qwen models -> their name in ``qquant.published``."""

Condition = tuple[tuple[str, str], ...]
"""(what, value) of everything that must be alike for two rows to stand in one table."""


@dataclass(frozen=True)
class Source:
    """One result and where it came from."""

    name: str
    """Its folder below the one that was named, the named one's last component in front; never an absolute path."""
    result: Result


@dataclass(frozen=True)
class Fact:
    """One number of a verdict."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Verdict:
    """What is known about one candidate."""

    label: str
    stored: str
    baseline: str
    facts: tuple[Fact, ...]

    def sentence(self) -> str:
        """All facts on one line."""
        return ", ".join(
            f"{fact.name} {fact.value}" + (f" ({fact.detail})" if fact.detail else "") for fact in self.facts
        )


@dataclass(frozen=True)
class Missing:
    """Something that no result holds."""

    what: str
    command: str
    """What to run for it; capitals stand for the reader's own folders."""


@dataclass(frozen=True)
class Joined:
    """All that a joined report shows beside its charts."""

    sources: tuple[Source, ...]
    """Results are numbered from 1 in this order."""
    verdicts: tuple[Verdict, ...]
    tables: tuple[Table, ...]

    @property
    def title(self) -> str:
        """The baselines, those that something is compared with first."""
        results = sorted((source.result for source in self.sources if source.result.rows), key=_has_no_candidate)
        names = dict.fromkeys(result.rows[0].label for result in results)
        shown = [*names][:3] + (["others"] if len(names) > 3 else [])
        return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown) or "Results"

    @property
    def missing(self) -> tuple[Missing, ...]:
        """What a whole report has and these results have not, with the command that measures it."""
        results = [source.result for source in self.sources]
        return tuple(one for one, held in _QUESTIONS.items() if not any(map(held, results)))

    def to_markdown(self) -> str:
        """Verdicts, all tables by section, what is missing, and where they come from."""
        lines = [
            f"- **{markdown_text(found.label)}** ({markdown_text(f'{found.stored}, against {found.baseline}')}): "
            + markdown_text(found.sentence())
            for found in self.verdicts
        ]
        parts = [f"# {markdown_text(self.title)}: joined report", "\n".join(lines)]
        for section, title in SECTIONS.items():
            own = [table.to_markdown() for table in self.tables if table.section == section]
            parts += [f"## {title}", *own] if own else []
        absent = [f"- {one.what}, not measured: `{one.command}`" for one in self.missing]
        parts += ["## What was not measured", "\n".join(absent)] if absent else []
        origin = []
        for place, source in enumerate(self.sources, 1):
            result, env = source.result, source.result.environment
            where = f"{env.device}, {result.compute_dtype}, torch {env.torch}, {result.created}"
            origin.append(f"{place}. {markdown_text(f'{source.name}: {result.command} ({where})')}")
        return "\n\n".join(part for part in [*parts, "## Where it comes from", "\n".join(origin)] if part) + "\n"

    def to_json(self) -> str:
        """All results on one line, each with its number and name; ``Result`` says what the fields are."""
        content = [
            {"number": place, "name": source.name, "result": source.result.model_dump(mode="json")}
            for place, source in enumerate(self.sources, 1)
        ]
        return json.dumps({"results": content}, ensure_ascii=False, separators=(",", ":")) + "\n"


def _lengths(result: Result) -> int:
    """How many lengths of text the largest series of a grid has."""
    runs: list[CellKey | PlanCell] = [cell.key for cell in result.profile.cells] if result.profile else []
    runs += result.plan.cells if result.plan else ()
    series: dict[tuple[object, ...], set[int]] = {}
    for run in runs:
        where = (type(run), getattr(run, "label", ""), run.precision, run.kv_cache, run.batch)
        series.setdefault(where, set()).add(run.prompt_tokens + run.new_tokens)
    return max(map(len, series.values()), default=0)


_EVAL = "python -m qquant.eval --baseline MODEL --candidate QUANTIZED"
_QUESTIONS: dict[Missing, Callable[[Result], bool]] = {
    Missing("Divergence from a baseline, error by layer", f"{_EVAL} --out DIR"): lambda result: any(
        row.accuracy and row.role == "candidate" for row in result.rows
    ),
    Missing("Accuracy by task", f"{_EVAL} --tasks mmlu,gsm8k --task-data DATA --out DIR"): lambda result: bool(
        result.tasks and result.tasks.scores
    ),
    Missing("Sample answers", f"{_EVAL} --answers 3 --out DIR"): lambda result: bool(
        result.answers and result.answers.samples
    ),
    Missing(
        "Speed and memory by precision and KV cache, predicted against measured",
        "python -m qquant.profile MODEL QUANTIZED --kv bf16,int8 --batch 1,8 --out DIR",
    ): lambda result: bool(result.profile and result.profile.cells),
    Missing(
        "Memory by length", "python -m qquant.plan MODEL --kv bf16,int8 --new-tokens 512,2048,8192 --out DIR"
    ): lambda result: _lengths(result) > 1,
    Missing("What fits a card", "python -m qquant.plan MODEL --gpu 24GiB --out DIR"): lambda result: bool(
        result.plan and result.plan.limits
    ),
    Missing(
        "What a KV cache of 8 bits costs", "python -m qquant.eval --baseline MODEL --kv-cache int8 --out DIR"
    ): lambda result: result.kv_cache is not None,
    Missing(
        "Perplexity by length",
        "python -m qquant.eval --baseline MODEL --measure long-context --lengths 1024,2048,4096 --out DIR",
    ): lambda result: result.long_context is not None,
}
"""What a whole report answers, and which results have it."""


def _has_no_candidate(result: Result) -> bool:
    return len(result.rows) < 2


def find_results(folders: Sequence[Path]) -> tuple[Source, ...]:
    """Read every report.json below the folders, copies of one as one; hidden folders are unfinished and left out.

    Raises:
        UsageError: a folder does not exist.
        BadDataError: no report.json there, or one that is not ours.
    """
    found: dict[bytes, Source] = {}
    copies: dict[bytes, list[str]] = {}
    read: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(
                f"results are read from folders with {FILE_NAME} in or below them, {folder} is not a folder"
            )
        below = {path: path.relative_to(folder) for path in sorted(folder.rglob(FILE_NAME)) if path.is_file()}
        below = {path: name for path, name in below.items() if not any(part.startswith(".") for part in name.parts)}
        if not below:
            raise BadDataError(f"there must be a {FILE_NAME} in or below {folder}, there is none; name another folder")
        for path, name in below.items():
            if path.resolve() in read:
                continue
            read.add(path.resolve())
            content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
            digest = hashlib.sha256(content).digest()
            # A name that is no UTF-8 could not be written into the page.
            shown = os.fsencode(Path(folder.resolve().name, name.parent).as_posix()).decode(errors="backslashreplace")
            if digest in found:
                copies.setdefault(digest, []).append(shown)
                continue
            try:
                result = result_from_json(content)
                _refuse_giants(result.model_dump())
            except BadDataError as error:
                raise BadDataError(f"{path} is {error}; remove it or name other folders") from error
            found[digest] = Source(shown, result)
    return tuple(
        replace(source, name=f"{source.name} (the same: {', '.join(copies[digest])})") if digest in copies else source
        for digest, source in found.items()
    )


def _refuse_giants(value: object, name: str = "") -> None:
    """Whole numbers that no float can hold are no count of anything."""
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_giants(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            _refuse_giants(item, f"{name}.{place}")
    elif isinstance(value, int) and abs(value) >= _GIANT:
        raise BadDataError(f"not a report that can be shown: {name} has {len(str(value))} digits")


def stored_as(row: ModelRow) -> str:
    """What the weights of a row are stored in, in a few words."""
    if row.bits is None:
        return DTYPES.get(row.checkpoint_dtype, row.checkpoint_dtype)
    group = "" if row.group_size is None else ", whole row" if row.group_size == -1 else f", group {row.group_size}"
    return f"Int{row.bits} {row.method or ''}".rstrip() + group


def identity(row: ModelRow) -> str:
    """What tells one model from another, to be shown: its name and hash; of a result without hashes, name and size."""
    if row.sha256:
        return f"{row.label} (sha256 {row.sha256[:12]})"
    return f"{row.label} ({'an unknown number of' if row.weights_bytes is None else f'{row.weights_bytes:,}'} bytes)"


def published_size(row: ModelRow) -> str | None:
    """Which model of Qwen's README has this row's shapes; None for any other.

    The parameters tell, not the label: anyone may call a folder qwen-7b. Other families share a size by chance, and
    their tables are other people's.
    """
    return _PUBLISHED_SIZES.get(row.parameters or 0) if row.model_type == "qwen" else None


def grouped(
    results: Sequence[Result], condition: Callable[[Result], Condition | None]
) -> Iterator[tuple[Condition, list[tuple[int, Result]], tuple[str, ...]]]:
    """Results of equal conditions with their numbers, and notes on what keeps them from those of earlier groups.

    Args:
        results: in the order of their numbers.
        condition: what must be alike; None leaves a result out. Every result names the same things in one order.
    """
    groups: dict[Condition, list[tuple[int, Result]]] = {}
    for place, result in enumerate(results, 1):
        found = condition(result)
        if found is not None:
            groups.setdefault(found, []).append((place, result))
    earlier: list[Condition] = []
    for own, members in groups.items():
        differing = [
            {what: theirs for (what, ours), (_, theirs) in zip(own, other, strict=True) if ours != theirs}
            for other in earlier
        ]
        earlier.append(own)
        # The nearest of the earlier groups says best what would have to be alike.
        nearest = min(differing, key=len, default={})
        shown = "; ".join(
            f"another {what} ({theirs} there, {dict(own)[what]} here)" for what, theirs in nearest.items()
        )
        yield own, members, (f"Not to be compared with the tables of its kind above: {shown}.",) if nearest else ()
