"""Calibration samples from text, chats or a mixture of both, always the same for the same input.

The tokenizer is handed in. Reading files is text_sources.py's, ids token_coding.py's, weights source_weights.py's, the
choice among candidates sample_choice.py's; what a sample is, samples.py's. No model, no Hessian and no device here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from qquant.errors import BadDataError, UsageError
from qquant.sample_choice import Choice, Select, check_select
from qquant.samples import Sample as Sample
from qquant.samples import check_samples as check_samples
from qquant.samples import data_record as data_record
from qquant.samples import fingerprint as fingerprint
from qquant.samples import refuse_below
from qquant.samples import samples_from_ids as samples_from_ids
from qquant.source_weights import Sources, sample_counts, weighted
from qquant.text_sources import Document, Kind, read_documents
from qquant.token_coding import Coder, as_wished, has_template
from qquant.tokenizer_check import Tokenizer as Tokenizer
from qquant.tokenizer_check import check_tokenizer as check_tokenizer

Packing = Literal["auto", "pack", "truncate"]

POOL = 64
"""Candidates considered per wanted sample; what lies behind them in a very large source is not read."""

_log = logging.getLogger("qquant")


@dataclass(frozen=True)
class Given:
    """What one source gave to a mixture."""

    source: str
    """As it was named."""
    read_as: str
    """What it holds and whether that went through the chat template, in words."""
    wanted: int
    """Samples that were its share."""
    samples: int
    tokens: int
    """That count in the Hessian."""


@dataclass(frozen=True)
class Mixture:
    """Samples of one source or several, and what each of them gave."""

    samples: list[Sample]
    """Of one source in its order; of several, each spread evenly over the whole, so that any beginning is mixed too."""
    given: tuple[Given, ...]
    hint: str | None
    """One sentence on the chat template, if the model has one and nothing of the data went through it."""


def load_samples(
    source: Sources,
    tokenizer: Tokenizer,
    *,
    n_samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    packing: Packing = "auto",
    chat_template: bool | None = None,
    select: Select = "random",
) -> list[Sample]:
    """Read calibration data and cut it into samples; the same arguments give the same samples, in source order.

    Packing joins the texts and cuts windows of exactly seq_len; truncating makes one sample of each document.
    If there are more candidates than n_samples, they are drawn without replacement. At most the first
    64 * n_samples candidates are considered. Too few, or some left unread, is logged as a warning.

    Args:
        source: a text file; a JSON or JSONL file of items with `text`, `conversations` (Qwen), `messages` (OpenAI), or
            a prompt and its answer; each also as .gz; a .parquet file or a hub id `owner/name[:config]` of such items.
            A list of these gives each the same share of the samples, a mapping to weights gives shares by weight.
        tokenizer: of the model that is to be quantized.
        n_samples: how many samples are wanted of all sources together.
        seq_len: tokens of a packed sample, or the most a truncated one keeps; at least 2.
        seed: of the draw.
        packing: auto packs texts and truncates conversations.
        chat_template: True puts everything into the model's chat template, plain text as a user's message; False puts
            nothing into one and takes chats as plain text; None: prompts with answers go through it where there is
            one, messages always, Qwen's conversations become ChatML, and plain text stays as it is.
        select: "random"; "spread": one sample from each of n_samples equal stretches of the source, copies of others
            and repetitions passed over.

    Raises:
        UsageError: an option that is out of range.
        BadDataError: data that is missing, empty, too short or unreadable; the message names file and line.
    """
    return load_mixture(
        source,
        tokenizer,
        n_samples=n_samples,
        seq_len=seq_len,
        seed=seed,
        packing=packing,
        chat_template=chat_template,
        select=select,
    ).samples


def load_mixture(
    sources: Sources,
    tokenizer: Tokenizer,
    *,
    n_samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    packing: Packing = "auto",
    chat_template: bool | None = None,
    select: Select = "random",
) -> Mixture:
    """As ``load_samples``, and what each source gave.

    Each source is drawn from as if it were alone. One that has too little gives what it has; the others do not fill
    its share.
    """
    for name, value, least in (("n_samples", n_samples, 1), ("seq_len", seq_len, 2), ("seed", seed, 0)):
        refuse_below(name, value, least)
    if seed >= 2**63:
        raise UsageError(f"seed must be below 2**63, got {seed}; give a smaller one")
    if packing not in ("auto", "pack", "truncate"):
        raise UsageError(f"packing must be auto, pack or truncate, got {packing!r}; write one of these")
    check_select(select)
    if chat_template and not has_template(tokenizer):
        raise UsageError("chat_template needs a tokenizer that brings one, and this one does not; leave it out")
    weights = weighted(sources)
    samples: list[tuple[float, int, Sample]] = []
    given: list[Given] = []
    used = False
    for place, (source, wanted) in enumerate(zip(weights, sample_counts(weights, n_samples), strict=True)):
        kind, documents = _documents(source, tokenizer, chat_template)
        coder = Coder(tokenizer, kind, framed=chat_template is True)
        draw = _pack if packing == "pack" or (packing == "auto" and kind == "text") else _truncate
        choice = Choice(wanted, select, torch.Generator().manual_seed(seed))
        found = draw(documents, coder, choice, seq_len, str(source))
        if len(found) < wanted:
            _log.warning("%s: %d samples were wanted and %d found; all are used", source, wanted, len(found))
        used |= coder.templated
        words = _WORDS[kind] + (" in the chat template" if coder.templated else "")
        given.append(Given(str(source), words, wanted, len(found), sum(int(one.mask.sum()) for one in found)))
        samples += [((index + 0.5) / len(found), place, sample) for index, sample in enumerate(found)]
    samples.sort(key=lambda one: one[:2])
    unused = has_template(tokenizer) and chat_template is None and not used
    return Mixture([sample for _, _, sample in samples], tuple(given), _HINT if unused else None)


_WORDS: dict[Kind, str] = {"text": "plain text", "conversations": "conversations as ChatML", "messages": "messages"}
_HINT = (
    "the model has a chat template and none of the data went through it; --chat-template puts it in, "
    "--no-chat-template says that this is meant"
)


def _documents(source: str | Path, tokenizer: Tokenizer, chat_template: bool | None) -> tuple[Kind, Iterator[Document]]:
    """The documents of a source as they are to be coded, and their kind."""
    raw = read_documents(source)
    first = next(raw, None)
    if first is None:
        raise BadDataError(f"calibration data must hold text, and {source} holds none; give a file with text in it")
    if first.kind == "pairs" and chat_template is None and not has_template(tokenizer):
        _log.warning("%s: the model has no chat template; prompts and answers are taken as plain text", source)
    documents = as_wished(chain([first], raw), tokenizer, chat_template)
    begun = next(documents)
    return begun.kind, chain([begun], documents)


# --- drawing ---------------------------------------------------------------------------------------------------------


def _pack(documents: Iterator[Document], coder: Coder, choice: Choice, seq_len: int, source: str) -> list[Sample]:
    """Join all documents, cut windows end to end from the start, choose some of them."""
    length = _room(seq_len, coder)
    limit = POOL * choice.wanted * length
    parts: list[Tensor] = []
    count = 0
    for ids in coder.join(documents):
        if count >= limit:
            _log.warning("%s: only its first %d tokens were considered (%d per wanted sample)", source, count, POOL)
            break
        parts.append(torch.tensor(ids, dtype=torch.int64))
        count += len(ids)
    if count < length:
        raise BadDataError(
            f"packing needs at least seq_len = {seq_len} tokens for one window, but {source} has {count}; "
            "lower --seq-len or give more text"
        )
    windows = torch.cat(parts)[: count // length * length].view(-1, length)
    usable = (coder.counted(windows).sum(1) >= 2).nonzero().flatten()
    if not len(usable):
        raise BadDataError(f"a window needs 2 tokens that count, but {source} has none such; give real text")
    kept = [index for index in choice.order(len(usable)) if choice.takes(windows[usable[index]])]
    return [_sample(windows[usable[index]], coder) for index in sorted(kept)]


def _truncate(documents: Iterator[Document], coder: Coder, choice: Choice, seq_len: int, source: str) -> list[Sample]:
    """Choose documents, pass over those too short to count, cut each at seq_len; only what is tried is tokenized."""
    length = _room(seq_len, coder)
    pool = list(islice(documents, POOL * choice.wanted))
    if len(pool) == POOL * choice.wanted and next(documents, None) is not None:
        _log.warning("%s: only its first %d documents were considered (%d per wanted sample)", source, len(pool), POOL)
    found: dict[int, Sample] = {}
    for index in choice.order(len(pool)):
        ids: list[int] = []
        for part in coder.parts(pool[index]):
            ids += part
            if len(ids) >= length:
                break
        tokens = torch.tensor(ids[:length], dtype=torch.int64)
        if int(coder.counted(tokens).sum()) >= 2 and choice.takes(tokens):
            found[index] = _sample(tokens, coder)
    if not found:
        raise BadDataError(f"a sample needs 2 tokens that count, but {source} has none such; give longer documents")
    return [found[index] for index in sorted(found)]


def _room(seq_len: int, coder: Coder) -> int:
    """Tokens of a sample that are the data's."""
    if seq_len - coder.frame_tokens < 2:
        raise UsageError(
            f"seq_len must leave room for text in the chat template, which takes {coder.frame_tokens} tokens, "
            f"got {seq_len}; raise --seq-len"
        )
    return seq_len - coder.frame_tokens


def _sample(ids: Tensor, coder: Coder) -> Sample:
    tokens = coder.framed(ids).clone()
    return Sample(tokens, coder.counted(tokens))
