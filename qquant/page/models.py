"""Tables of what an evaluation says about models: divergence, size, speed, memory, KV cache, length, layers.

Task scores are scores.py's, grids of memory and speed grids.py's; nothing here measures or knows HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from qquant.charts.scales import disk_unit, memory_unit
from qquant.long_report import SHOWN, LongPoint, LongScore
from qquant.page.joined import Condition, grouped, identity, stored_as
from qquant.page.tables import DASH, NOT_KNOWN, Table, make_table, number, percent
from qquant.records import field
from qquant.results import ModelRow, Result, overlap_warnings

_MEGA = 1e6
_WORST_LAYERS = 3


def tables(results: Sequence[Result]) -> list[Table]:
    """Every table that the results have data for; results are numbered from 1 in their order."""
    return [
        *_divergence(results),
        *_sizes(results),
        *_speeds(results),
        *_memories(results),
        *_caches(results),
        *_lengths(results),
        *_layers(results),
    ]


def _rows(members: Sequence[tuple[int, Result]], cells: Callable[[ModelRow], list[str] | None]) -> list[list[str]]:
    """A line per model; lines that say the same are one, with the numbers of all results that say it."""
    compared = {identity(result.rows[0]) for _, result in members if len(result.rows) > 1}
    lines: list[_Line] = []
    for place, result in members:
        for row in result.rows:
            found = cells(row)
            if found is None:
                continue
            base = row.role == "baseline" and identity(row) in compared
            name = row.label + (" (baseline)" if base else "")
            name += ", random weights" if row.random_weights else ""
            own = _Line(name, stored_as(row), identity(row), [place], found)
            if not any(line.take(own) for line in lines):
                lines.append(own)
    return [[line.name, line.stored, ", ".join(map(str, line.places)), *line.cells] for line in lines]


@dataclass
class _Line:
    """A model with its numbers and the results that they are from."""

    name: str
    stored: str
    identity: str
    places: list[int]
    cells: list[str]

    def take(self, other: _Line) -> bool:
        """Take up a line that says the same, or of the same model what is not known here; False: it is another."""
        pairs = list(zip(self.cells, other.cells, strict=True))
        same = all(one == two for one, two in pairs)
        whole = self.identity == other.identity and all(one == two or NOT_KNOWN in (one, two) for one, two in pairs)
        if (self.name, self.stored) != (other.name, other.stored) or not (same or whole):
            return False
        self.places += [place for place in other.places if place not in self.places]
        self.cells = [two if one == NOT_KNOWN else one for one, two in pairs]
        return True


def _divergence(results: Sequence[Result]) -> Iterator[Table]:
    def condition(result: Result) -> Condition | None:
        data = result.data
        alone = result.kv_cache is not None and len(result.rows) == 1  # its table has the same perplexity
        if data is None or alone or not any(row.accuracy for row in result.rows):
            return None
        return (
            ("text", f"{data.name}, {data.tokens:,} tokens, sha256 {data.sha256[:12]}"),
            ("window", f"{data.window_tokens} tokens, stride {data.stride_tokens}"),
            ("dtype", result.compute_dtype),
            ("device", result.environment.device),
            ("baseline", identity(result.rows[0])),
        )

    def cells(row: ModelRow) -> list[str] | None:
        found = row.accuracy
        if found is None:
            return None
        compared = [
            number(field(row, "ratios.perplexity"), ".4f"),
            number(found.nll_difference_nats, "+.5f"),
            number(found.nll_difference_stderr_nats, ".5f"),
            number(found.kl_mean_nats, ".3g"),
            number(found.kl_p99_nats, ".3g"),
            number(found.kl_max_nats, ".3g"),
            percent(found.top1_agreement, ".2f"),
        ]
        return [f"{found.perplexity:.4f}", *([DASH] * len(compared) if row.role == "baseline" else compared)]

    head = (
        "model", "stored as", "result", "perplexity", "ratio", "NLL difference (nats)", "its standard error",
        "mean KL (nats)", "p99 KL (nats)", "max KL (nats)", "same top-1 (%)",
    )  # fmt: skip
    for own, members, notes in grouped(results, condition):
        value = dict(own)
        intro = f"Text {value['text']}; windows of {value['window']}; {value['dtype']} on {value['device']}."
        title = f"Perplexity and divergence of {members[0][1].rows[0].label} on {value['text'].split(',')[0]}"
        seen = overlap_warnings([row for _, result in members for row in result.rows])
        yield make_table("accuracy", title, head, _rows(members, cells), labels=3, intro=intro, notes=[*seen, *notes])


def _sizes(results: Sequence[Result]) -> Iterator[Table]:
    # The smallest decides, so that no model is shown as 0.00.
    unit = disk_unit([min((r.weights_bytes for one in results for r in one.rows if r.weights_bytes), default=0)])

    def cells(row: ModelRow) -> list[str] | None:
        if row.weights_bytes is None:
            return None
        parameters = None if row.parameters is None else row.parameters / _MEGA
        folder = None if row.folder_bytes is None else row.folder_bytes / unit.size
        return [
            number(parameters, ",.2f"),
            f"{row.weights_bytes / unit.size:,.2f}",
            DASH if row.role == "baseline" else number(field(row, "ratios.weights_bytes"), ".3f"),
            number(row.bits_per_weight, ".2f"),
            number(folder, ",.2f"),
        ]

    head = (
        "model", "stored as", "result", "parameters (million)", f"weights ({unit.name})", "ratio",
        "bits per weight", f"folder ({unit.name})",
    )  # fmt: skip
    # One table for all: sizes do not depend on machine or text. Rows of one baseline stay together.
    known = [one for one in enumerate(results, 1) if one[1].rows]
    order = list(dict.fromkeys(identity(result.rows[0]) for _, result in known))
    body = _rows(sorted(known, key=lambda one: order.index(identity(one[1].rows[0]))), cells)
    if body:
        intro = (
            f"1 {unit.name} is {unit.size:,} bytes; a ratio is to the model's own baseline; bits per weight "
            "count everything that is stored, embeddings and scales too."
        )
        yield make_table("speed", "Size of the weights", head, body, labels=3, intro=intro)


def _speeds(results: Sequence[Result]) -> Iterator[Table]:
    def condition(result: Result) -> Condition | None:
        env, prompts = result.environment, {row.speed.prompt_tokens for row in result.rows if row.speed}
        return (
            ("device", env.device),
            ("number of threads", str(env.threads)),
            ("dtype", result.compute_dtype),
            ("torch", env.torch),
            ("prompt", f"{', '.join(map(str, sorted(prompts)))} tokens"),
            ("baseline", identity(result.rows[0])),
        ) if prompts else None  # fmt: skip

    def cells(row: ModelRow) -> list[str] | None:
        if row.speed is None:
            return None
        prefill, decode = (
            DASH if row.role == "baseline" else number(field(row, f"ratios.{part}_tokens_per_second"), ".3f")
            for part in ("prefill", "decode")
        )
        speed = row.speed
        return [f"{speed.prefill_tokens_per_second:,.1f}", prefill, f"{speed.decode_tokens_per_second:,.1f}", decode]

    head = ("model", "stored as", "result", "prefill (tokens/s)", "ratio", "decode (tokens/s)", "ratio")
    for own, members, notes in grouped(results, condition):
        value = dict(own)
        intro = (
            f"A prompt of {value['prompt']}, {value['dtype']} on {value['device']}, threads: "
            f"{value['number of threads']}, torch {value['torch']}. Ratios are to the baseline in the same run."
        )
        title = f"Speed of {members[0][1].rows[0].label}, one sequence at a time"
        yield make_table("speed", title, head, _rows(members, cells), labels=3, intro=intro, notes=notes)


def _memories(results: Sequence[Result]) -> Iterator[Table]:
    taken = (row.memory.tensor_bytes for result in results for row in result.rows if row.memory)
    unit = memory_unit([min((size for size in taken if size), default=0)])

    def condition(result: Result) -> Condition | None:
        if not any(row.memory for row in result.rows):
            return None
        env = result.environment
        return ("device", env.device), ("dtype", result.compute_dtype), ("torch", env.torch)

    def cells(row: ModelRow) -> list[str] | None:
        memory = row.memory
        if memory is None:
            return None
        sizes = (
            memory.tensor_bytes, memory.rss_before_bytes, memory.peak_rss_bytes, memory.cuda_before_bytes,
            memory.cuda_peak_bytes,
        )  # fmt: skip
        tensors, *rest = [number(None if size is None else size / unit.size, ",.2f") for size in sizes]
        ratio = DASH if row.role == "baseline" else number(field(row, "ratios.tensor_bytes"), ".3f")
        return [tensors, ratio, *rest]

    head = (
        "model", "stored as", "result", f"tensors ({unit.name})", "ratio", f"RSS before ({unit.name})",
        f"peak RSS ({unit.name})", f"CUDA before ({unit.name})", f"peak CUDA ({unit.name})",
    )  # fmt: skip
    for own, members, notes in grouped(results, condition):
        value = dict(own)
        intro = (
            f"Around loading and one run of a model, {value['dtype']} on {value['device']}, torch {value['torch']}. "
            "RSS is of the whole process, with what it held before."
        )
        yield make_table(
            "memory", "Memory of an evaluation", head, _rows(members, cells), labels=3, intro=intro, notes=notes
        )


def _caches(results: Sequence[Result]) -> Iterator[Table]:
    head = (
        "model", "cache", "bytes per token", "of BF16", "perplexity", "mean KL (nats)", "p99 KL (nats)",
        "same top-1 (%)",
    )  # fmt: skip
    for place, result in enumerate(results, 1):
        cost = result.kv_cache
        if cost is None:
            continue
        body = []
        for model in cost.models:
            body.append([model.label, "exact", DASH, DASH, f"{model.exact.perplexity:.4f}", DASH, DASH, DASH])
            for scheme in model.schemes:
                found = scheme.accuracy
                chosen = " (chosen)" if scheme.name == model.chosen else ""
                body.append([
                    model.label, f"int8 {scheme.name}{chosen}", f"{scheme.bytes_per_token:,.0f}",
                    f"{scheme.share_of_bfloat16:.3f}", number(field(found, "perplexity"), ".4f"),
                    number(field(found, "kl_mean_nats"), ".3g"), number(field(found, "kl_p99_nats"), ".3g"),
                    percent(field(found, "top1_agreement"), ".2f"),
                ])  # fmt: skip
        intro = (
            f"Result {place}: {cost.windows} windows of {cost.window_tokens} tokens, {result.compute_dtype} on "
            f"{result.environment.device}. KL is to the same model with an exact cache."
        )
        title = f"What keys and values in 8 bits cost {cost.models[0].label}"
        seen = overlap_warnings(result.rows)
        yield make_table("kv-cache", title, head, body, labels=2, intro=intro, notes=seen)


def _lengths(results: Sequence[Result]) -> Iterator[Table]:
    def whole(point: LongPoint) -> LongScore:
        return point.whole

    def tail(point: LongPoint) -> LongScore:
        return point.tail

    for place, result in enumerate(results, 1):
        found = result.long_context
        if found is None:
            continue
        made = ", ".join(
            f"{model.label} for {model.made_for_tokens:,}"
            for model in found.models
            if model.made_for_tokens is not None
        )
        intro = f"Result {place}: {result.compute_dtype} on {result.environment.device}; tokens per window across."
        intro += f" Made for this many tokens: {made}." if made else ""
        seen = overlap_warnings(result.rows)
        for name, part in (("all predictions", whole), (f"last {found.tail_tokens} tokens", tail)):
            body = [
                [model.label, SHOWN[row.setting], *[f"{part(point).perplexity:.4f}" for point in row.points]]
                for model in found.models
                for row in model.rows
            ]
            head = ("model", "setting", *[f"{length:,}" for length in found.lengths_tokens])
            title = f"Perplexity of {found.models[0].label} by length, {name}"
            yield make_table("long-context", title, head, body, labels=2, intro=intro, notes=seen)


def _layers(results: Sequence[Result]) -> Iterator[Table]:
    lines: dict[tuple[str, ...], None] = {}
    for result in results:
        for row in result.rows:
            worst = sorted(row.layer_errors, key=lambda layer: -layer.relative_error)[:_WORST_LAYERS]
            kind = "of the weights" if row.method == "rtn" else "of the output"
            for layer in worst:
                lines[row.label, stored_as(row), layer.name, kind, f"{100 * layer.relative_error:.3g}"] = None
    if lines:
        head = ("model", "stored as", "layer", "error", "share of energy (%)")
        intro = (
            f"The {_WORST_LAYERS} largest of each model: the error's share of a layer's output energy on the "
            "calibration data. Rounding to nearest (rtn) uses no data; its error is of the weights."
        )
        body = [list(line) for line in lines]
        yield make_table("layers", "Layers with the largest error", head, body, labels=4, intro=intro)
