"""What reports are made of: the strict record, the measurements that it stores, and Markdown tables of its fields.

Nothing here measures, and nothing knows what a whole report looks like: that is results.py's, and a section's is in
its *_report.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

NOT_MEASURED = "not measured"
MB, PERCENT = "MB", "%"
"""Formats beside Python's own: millions with two decimals, and a share as a percentage."""

Precision = Literal["fp32", "bf16", "fp16", "int8", "int4", "nf4", "llm-int8"]
"""What the weights of the decoder's linears are stored in; nf4 and llm-int8 are bitsandbytes' two."""
KVKind = Literal["fp32", "bf16", "fp16", "int8", "int4"]
"""What keys and values are stored in."""

TaskName = Literal["mmlu", "ceval", "cmmlu", "gsm8k", "humaneval"]
Style = Literal["base", "chat"]
"""Whether a model is given text to go on with, or a message to answer."""

NGRAM_TOKENS = 16
"""Length of the runs by which two texts are compared. Texts of one kind by different authors share few this long."""
COMMON_SHARE = 0.02
"""Share of runs that separate texts of one kind have in common, at most. Measured with a vocabulary of 6144 on seven
pairs of calibration and evaluation texts: 0 to 0.06 % of prose, 0.33 % of an encyclopedia, 0.95 % of source code. Twice
the worst; larger vocabularies make longer tokens and so rarer runs."""

_MEGA = 1e6


class Strict(BaseModel):
    """A frozen record in which an unknown, mistyped or non-finite field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Accuracy(Strict):
    """See ``qquant.accuracy.Accuracy``, which this stores field by field."""

    tokens: int
    nll_mean_nats: float
    perplexity: float
    nll_difference_nats: float | None
    nll_difference_stderr_nats: float | None
    kl_mean_nats: float | None
    kl_p99_nats: float | None
    kl_max_nats: float | None
    top1_agreement: float | None


class Speed(Strict):
    """See ``qquant.measure.Speed``, which this stores field by field."""

    prompt_tokens: int
    decode_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]


class Memory(Strict):
    """See ``qquant.measure.Memory``, which this stores field by field."""

    tensor_bytes: int | None
    rss_before_bytes: int | None
    peak_rss_bytes: int | None
    peak_rss_source: str
    cuda_before_bytes: int | None
    cuda_peak_bytes: int | None


class Environment(Strict):
    """See ``qquant.measure.Environment``, which this stores field by field."""

    python: str
    torch: str
    transformers: str
    qquant: str
    platform: str
    cpu: str
    threads: int
    device: str
    device_memory_bytes: int | None = None
    driver: str | None = None
    cuda: str | None = None
    libraries: dict[str, str] = Field(default_factory=dict)


class Footprint(Strict):
    """Bytes of one run, by what they are for."""

    weights_bytes: int
    cache_bytes: int
    """Keys and values at the last token, all copies that are alive at the peak."""
    activations_bytes: int
    """Logits and the largest intermediate tensors."""
    overhead_bytes: int
    """What a device or a process takes beside tensors and is known beforehand."""
    peak_bytes: int
    """The most at one moment; not always the sum, because loading has a peak of its own."""


def renamed(now: str, before: str) -> Any:
    """What ``Annotated`` says of a field that schema 1 had under another name: read by either, written by its own.

    Args:
        now: the field's name, which an error names, too.
        before: its name in reports of schema 1. Giving a field by both is an error.
    """
    return Field(validation_alias=AliasChoices(now, before))


def field(record: object, path: str) -> Any:
    """A field by its dotted path; None as soon as something on the way is None."""
    value: Any = record
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value


def shown(value: float | None, spec: str) -> str:
    """A number as a table shows it: by a format of Python's, ``MB`` or ``PERCENT``; None is "not measured"."""
    if value is None:
        return NOT_MEASURED
    if spec == MB:
        return f"{value / _MEGA:.2f}"
    return f"{100 * value:.2f} %" if spec == PERCENT else format(value, spec)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a cell cannot break it."""
    rows = [head, ["---"] * len(head), *body]
    lines = [[cell.replace("\n", " ").replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
