"""Results joined: every report.json below some folders, which of them may be compared, and the Markdown of the whole.

Rows stand in one table only if text, dtype, device and baseline are alike; otherwise a note says what differs. Which
tables there are is for models.py, scores.py and grids.py; the page is html.py's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qquant.errors import BadDataError, UsageError
from qquant.page.tables import SECTIONS, Table, markdown_text
from qquant.results import ModelRow, Result, result_from_json

FILE_NAME = "report.json"
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

    def to_markdown(self) -> str:
        """Verdicts, all tables by section, and where they come from."""
        lines = [
            f"- **{markdown_text(found.label)}** ({markdown_text(f'{found.stored}, against {found.baseline}')}): "
            + markdown_text(found.sentence())
            for found in self.verdicts
        ]
        parts = [f"# {markdown_text(self.title)}: joined report", "\n".join(lines)]
        for section, title in SECTIONS.items():
            own = [table.to_markdown() for table in self.tables if table.section == section]
            parts += [f"## {title}", *own] if own else []
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


def _has_no_candidate(result: Result) -> bool:
    return len(result.rows) < 2


def find_results(folders: Sequence[Path]) -> tuple[Source, ...]:
    """Read every report.json below the folders, each once; hidden folders are unfinished ones and are left out.

    Raises:
        UsageError: a folder does not exist.
        BadDataError: no report.json there, or one that is not ours.
    """
    found: dict[Path, Source] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(
                f"results are read from folders with {FILE_NAME} in or below them, {folder} is not a folder"
            )
        below = {path: path.relative_to(folder) for path in sorted(folder.rglob(FILE_NAME))}
        below = {path: name for path, name in below.items() if not any(part.startswith(".") for part in name.parts)}
        if not below:
            raise BadDataError(f"there must be a {FILE_NAME} in or below {folder}, there is none; name another folder")
        for path, name in below.items():
            try:
                result = result_from_json(path.read_bytes())
            except BadDataError as error:
                raise BadDataError(f"{path} is {error}; remove it or name other folders") from error
            found.setdefault(path.resolve(), Source(Path(folder.resolve().name, name.parent).as_posix(), result))
    return tuple(found.values())


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
    return f"{row.label} ({row.weights_bytes if row.weights_bytes is not None else 'an unknown number of'} bytes)"


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
