"""The joined report as one HTML page that works offline: no script, no request, every text of a result escaped.

The page's looks are in report_page.html, its tables come from Joined, its charts as finished SVG. Nothing here reads
or writes a file but that template.
"""

from __future__ import annotations

import base64
import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qquant.answer_report import Answer, AnswerToken, ModelAnswer
from qquant.charts.svg import Chart
from qquant.console import printable
from qquant.page.joined import Joined, Source, Verdict, stored_as
from qquant.page.tables import DASH, NOT_KNOWN, SECTIONS, Cell, Section, Table

DATA_NAME = "results.json"
"""The file beside the page that holds all results."""

_TEMPLATE = Path(__file__).with_name("report_page.html")
_PAGE_BYTES = 1_500_000
"""Data that would make the page larger stays in the file beside it: pages are to be under 2 MB."""
_SAMPLES = 12
"""Answers that are shown, those with the most differences."""
_TOKENS = 400
"""Tokens of an answer that are shown, and aligned."""
_PROMPT = 4000
"""Characters of a prompt that are shown."""
_NAME = 160
"""Characters of a name that are shown."""
_DOUBTS = (0.2, 0.4, 0.6, 0.8)
"""Upper edges of the probabilities whose tokens are underlined, the strongest first."""
_CHART_SECTIONS: dict[str, Section] = {
    "pareto": "accuracy", "tasks": "accuracy", "speed": "speed", "memory": "memory", "prediction": "memory",
    "kv": "kv-cache", "long": "long-context", "layers": "layers",
}  # fmt: skip
"""First word of a chart's anchor -> where it stands; others stand in the first section."""


@dataclass(frozen=True)
class _Section:
    anchor: str
    title: str
    charts: tuple[dict[str, Any], ...]
    tables: tuple[Table, ...]
    published: bool


def page(joined: Joined, charts: Sequence[Chart], data: str) -> str:
    """The whole page.

    Args:
        joined: what it says.
        charts: in their order; ``svg`` is trusted and put in as it is, the other texts are escaped.
        data: all results as JSON, which a reader can save; in the page if it is small enough, else named as the file
            ``DATA_NAME`` beside it.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, finalize=_harmless, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["kind"] = _classes
    environment.filters["short"] = _short
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    results = [source.result for source in joined.sources]
    samples = sorted(_samples(joined.sources), key=lambda sample: -sample["differing"])
    content: dict[str, Any] = {
        "title": joined.title,
        "verdicts": _by_baseline(joined.verdicts),
        "words": _words(joined.verdicts),
        "missing": joined.missing,
        "sections": _sections(joined.tables, charts, len(results)),
        "devices": list(dict.fromkeys(result.environment.device for result in results)),
        "period": " to ".join(sorted({min(r.created for r in results)[:10], max(r.created for r in results)[:10]})),
        "samples": samples[:_SAMPLES],
        "left_out": len(samples[_SAMPLES:]),
        "results": [_origin(source) for source in joined.sources],
    }
    link = "data:application/json;base64," + base64.b64encode(data.encode()).decode()
    bare = template.render(**content, data_link=DATA_NAME, data_inside=False)
    if len(bare.encode()) + len(link) > _PAGE_BYTES:
        return bare
    return template.render(**content, data_link=link, data_inside=True)


def _by_baseline(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """Verdicts under the name of what they are compared with, both in their order."""
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        found.setdefault(verdict.baseline, []).append(verdict)
    return found


_WORDS = {
    "size": "of all weights as stored on disk.",
    "perplexity": "how surprised a model is by the text; the change from the baseline, less is better.",
    "same next token": "how often both models think the same token the likeliest to come next.",
    "fits": "with so many sequences of the longest planned text at once, or one sequence of so many tokens.",
    "points": "difference in per cent of tasks solved, and the range that holds the true one 95 times in 100.",
}
"""What the facts of a verdict mean, for those who read such a page for the first time."""


def _words(verdicts: Sequence[Verdict]) -> list[tuple[str, str]]:
    """Those of the words that stand on the cards."""
    said = " ".join(f"{fact.name} {fact.value}" for verdict in verdicts for fact in verdict.facts)
    return [(word.capitalize(), meaning) for word, meaning in _WORDS.items() if word in said]


def _harmless(value: Any) -> Any:
    """Every text that goes into the page, before it is escaped; markup of ours passes."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _short(name: str) -> str:
    """A name or title, the middle of an endless one left out."""
    half = _NAME // 2
    return name if len(name) <= _NAME else f"{name[:half]} … {name[-half:]}"


def _classes(cell: Cell, name: bool) -> str:
    """CSS classes of a cell."""
    found = [
        ("name", name),
        (cell.origin, cell.origin != "measured"),
        ("unlike", cell.unlike),
        ("na", cell.text in (NOT_KNOWN, DASH)),
        ("text", len(cell.text) > _LONG),
    ]
    return " ".join(word for word, holds in found if holds)


_LONG = 28
"""Characters from which a cell is a sentence that may be broken, not a number that may not."""


def _sections(tables: Sequence[Table], charts: Sequence[Chart], results: int) -> list[_Section]:
    """Sections that have something in them, in the order of ``SECTIONS``."""
    placed: dict[Section, list[Chart]] = {}
    first = next(iter(SECTIONS))
    for chart in charts:
        placed.setdefault(_CHART_SECTIONS.get(chart.anchor.partition("-")[0], first), []).append(chart)
    found = []
    for section, title in SECTIONS.items():
        own = tuple(table for table in tables if table.section == section)
        drawn = tuple(
            {**vars(chart), "svg": Markup(chart.svg), "place": _place(chart.anchor, results)}
            for chart in placed.get(section, ())
        )
        published = any(cell.origin == "published" for table in own for row in table.body for cell in row)
        if own or drawn:
            found.append(_Section(section, title, drawn, own, published))
    return found


def _place(anchor: str, results: int) -> int:
    """The result that a chart is of, the last number between the hyphens of its anchor; 0 if there is none."""
    numbers = [int(part) for part in anchor.split("-") if part.isdecimal()]
    return numbers[-1] if numbers and numbers[-1] <= results else 0


def _samples(sources: Sequence[Source]) -> Iterator[dict[str, Any]]:
    for place, source in enumerate(sources, 1):
        for sample in source.result.answers.samples if source.result.answers else ():
            texts = [_text(sample, answer) for answer in sample.models]
            differing = sum(len(run["tokens"]) for text in texts for run in text["runs"] if run["differs"])
            yield {
                "place": place,
                "prompt": sample.prompt if len(sample.prompt) <= _PROMPT else sample.prompt[:_PROMPT] + " …",
                "prompt_tokens": sample.prompt_tokens,
                "texts": texts,
                "differing": differing,
            }


def _text(sample: Answer, answer: ModelAnswer) -> dict[str, Any]:
    """One model's answer as runs of tokens that are, or are not, as the baseline has them."""
    baseline = sample.models[0]
    against = sample.models[1] if len(sample.models) == 2 else baseline
    other = against if answer is baseline else baseline
    tokens = answer.tokens[:_TOKENS]
    differs = _differing(other.tokens[:_TOKENS], tokens)
    if answer.same_tokens is None:
        said = f"baseline, {len(answer.tokens)} tokens"
    elif answer.same_tokens >= max(len(answer.tokens), len(baseline.tokens)):
        said = f"the same {len(answer.tokens)} tokens"
    else:
        said = f"the same for {answer.same_tokens} of {len(answer.tokens)} tokens"
    if len(tokens) < len(answer.tokens):
        said += f"; the first {len(tokens)} are shown"
    return {
        "label": answer.label,
        "said": said,
        "runs": [
            {"differs": mark, "tokens": [_token(token, mark) for token, _ in run]}
            for mark, run in groupby(zip(tokens, differs, strict=True), key=lambda pair: pair[1])
        ],
    }


def _differing(baseline: Sequence[AnswerToken], tokens: Sequence[AnswerToken]) -> list[bool]:
    """For each token, whether an alignment with the baseline's answer has no partner for it."""
    differs = [True] * len(tokens)
    ours, theirs = [token.text for token in tokens], [token.text for token in baseline]
    for block in difflib.SequenceMatcher(None, theirs, ours, autojunk=False).get_matching_blocks():
        differs[block.b : block.b + block.size] = [False] * block.size
    return differs


def _token(token: AnswerToken, differs: bool) -> dict[str, str]:
    probability = math.exp(token.logprob_nats)
    doubt = next((f"p{step}" for step, edge in enumerate(_DOUBTS) if probability < edge), "")
    text = token.text
    if differs and not text.strip():
        # A mark on white space alone would not be seen.
        text = text.replace(" ", "·").replace("\n", "↵\n").replace("\t", "→")
    return {"text": text, "doubt": doubt, "tip": f"p = {probability:.2g}"}


def _origin(source: Source) -> dict[str, Any]:
    """Who ran what where, without what is empty."""
    result, env = source.result, source.result.environment
    data = result.data
    memory = None if env.device_memory_bytes is None else f"{env.device_memory_bytes / 2**30:,.1f} GiB"
    facts = {
        "created": result.created[:19].replace("T", " ") + result.created[19:].replace("+00:00", " UTC"),
        "git commit": result.git_commit,
        "device": env.device,
        "device memory": memory,
        "CPU": None if env.cpu == env.device else env.cpu,
        "threads": str(env.threads),
        "platform": env.platform,
        "driver": env.driver,
        "CUDA": env.cuda,
        "computed in": result.compute_dtype,
        "seed": str(result.seed),
        "qquant": env.qquant,
        "Python": env.python,
        "torch": env.torch,
        "transformers": env.transformers,
        **env.libraries,
        "text": data and f"{data.name}, sha256 {data.sha256[:16]}",
        "schema": str(result.schema_version),
    }
    models = []
    for row in result.rows:
        weights = "random weights" if row.random_weights else f"sha256 {row.sha256}" if row.sha256 else None
        settings = ", ".join(f"{key}={value}" for key, value in (row.quantization or {}).items())
        known = "; ".join(part for part in (weights, settings) if part)
        if known:
            models.append((f"{row.label}, {stored_as(row)}", known))
    for task in result.tasks.data if result.tasks else ():
        models.append((f"data of {task.task}, {task.items} items", f"sha256 {task.sha256}"))
    return {
        "name": source.name,
        "command": result.command,
        "facts": [(name, value) for name, value in facts.items() if value],
        "models": models,
    }
