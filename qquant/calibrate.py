"""Calibration samples: token ids and masks from text, chats or a user's own ids, always the same for the same input.

The tokenizer is handed in. Reading files is text_sources.py; no model, no Hessian and no device here.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from qquant.errors import BadDataError, BadModelError, UsageError
from qquant.models.qwen.vocabulary import DEFAULT_SYSTEM
from qquant.text_sources import Document, Kind, blocks, one_line, read_documents

Packing = Literal["auto", "pack", "truncate"]

POOL = 64
"""Candidates considered per wanted sample; what lies behind them in a very large source is not read."""
PROBE = (
    "The quick brown fox's 2 jumps: 1234567890, 3.14 and 0x1F.\n\n"
    "def f(x):\n    return  x*2\t# tab\r\n\n\n   trailing   spaces   \n"
    "Ünïcode, naïve café, ½, Straße — “quotes”…\n量化模型需要校准数据。日本語のテキスト、한국어 문장.\n"
    "Съешь ещё этих мягких булок; שלום עולם; नमस्ते दुनिया; مرحبا 🙂👍🏽 don't WE'LL <tag/> __init__ a1b2C3"
)

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_log = logging.getLogger("qquant")


class Tokenizer(Protocol):
    """What is asked of a tokenizer; every transformers tokenizer is one."""

    def encode(self, text: Any, *, add_special_tokens: bool, **kwargs: Any) -> Any:
        """Turn text into a list of ids."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Turn a list of messages into a list of ids."""


@dataclass(frozen=True)
class Sample:
    """One sequence that is run through the model."""

    input_ids: Tensor
    """[T] int64."""
    mask: Tensor
    """[T] bool; False: the token is masked for the model's attention and not counted in the Hessian."""


def load_samples(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    n_samples: int = 128,
    seq_len: int = 2048,
    seed: int = 0,
    packing: Packing = "auto",
) -> list[Sample]:
    """Read calibration data and cut it into samples; the same arguments give the same samples, in source order.

    Packing joins the texts and cuts windows of exactly seq_len; truncating makes one sample of each document.
    If there are more candidates than n_samples, they are drawn without replacement. At most the first
    64 * n_samples candidates are considered. Too few, or some left unread, is logged as a warning.

    Args:
        source: a text file; a JSON or JSONL file of items with `text`, `conversations` (Qwen) or `messages`
            (OpenAI); each also as .gz; a .parquet file or a hub id `owner/name[:config]` of such items.
        tokenizer: of the model that is to be quantized.
        n_samples: how many samples are wanted.
        seq_len: tokens of a packed sample, or the most a truncated one keeps; at least 2.
        seed: of the draw.
        packing: auto packs texts and truncates conversations.

    Raises:
        UsageError: an option that is out of range.
        BadDataError: data that is missing, empty, too short or unreadable; the message names file and line.
    """
    _check_options(n_samples=n_samples, seq_len=seq_len, seed=seed, packing=packing)
    documents = read_documents(source)
    first = next(documents, None)
    if first is None:
        raise BadDataError(f"calibration data must hold text, and {source} holds none; give a file with text in it")
    if packing == "auto":
        packing = "pack" if first.kind == "text" else "truncate"
    draw = _pack if packing == "pack" else _truncate
    generator = torch.Generator().manual_seed(seed)
    samples = draw(chain([first], documents), _Coder(tokenizer, first.kind), n_samples, seq_len, generator, str(source))
    if len(samples) < n_samples:
        _log.warning("%s: %d samples were wanted and %d found; all are used", source, n_samples, len(samples))
    return samples


def samples_from_ids(
    ids: Tensor | Sequence[Sequence[int] | Tensor],
    masks: Tensor | Sequence[Sequence[int] | Tensor] | None = None,
    *,
    seq_len: int | None = None,
) -> list[Sample]:
    """Make samples of token ids that the caller already has; rows may differ in length.

    Args:
        ids: [N, T] integers, or N rows of integers. Read, never written.
        masks: the same shape, True or 1 where a token counts (an attention mask will do); None: all count.
        seq_len: cut every row to this length; None: keep it whole.

    Raises:
        BadDataError: something other than rows of integers, or masks that do not fit them.
        UsageError: seq_len below 2.
    """
    _check_options(seq_len=2 if seq_len is None else seq_len)
    if any(isinstance(rows, Tensor) and _tensor(rows, "rows").dim() == 0 for rows in (ids, masks)):
        raise BadDataError("ids and masks must be rows of integers, got a single number; give [N, T] token ids")
    if masks is not None and len(masks) != len(ids):
        raise BadDataError(f"masks must have one row per row of ids: got {len(masks)} for {len(ids)}; give both alike")
    samples = []
    for index, row in enumerate(ids):
        tokens = _tensor(row, f"row {index} of ids")
        tokens = tokens if tokens.numel() else tokens.long()  # torch makes an empty list float
        if tokens.dim() != 1 or tokens.dtype not in _INTEGERS:
            got = f"{list(tokens.shape)} {tokens.dtype}"
            raise BadDataError(f"row {index} of ids must be a flat row of integers, got {got}; give [N, T] token ids")
        mask = torch.ones_like(tokens) if masks is None else _tensor(masks[index], f"row {index} of masks")
        if mask.shape != tokens.shape:
            got = f"{list(mask.shape)} for {list(tokens.shape)}"
            raise BadDataError(f"the mask of row {index} must have its row's shape, got {got}; give one flag per id")
        if len(odd := mask[(mask != 0) & (mask != 1)]):
            raise BadDataError(f"the mask of row {index} must hold 0 and 1, got {odd[0].item()}; give one flag per id")
        tokens, mask = tokens[:seq_len].cpu(), mask[:seq_len].cpu()
        samples.append(Sample(tokens.to(torch.int64, copy=True), mask.to(torch.bool, copy=True)))
    return samples


def check_samples(samples: Sequence[Sample], vocab_size: int) -> None:
    """Refuse samples that would calibrate nothing or that the model cannot look up.

    Args:
        samples: what load_samples or samples_from_ids returned. Read, never written.
        vocab_size: rows of the model's input embedding.

    Raises:
        BadDataError: no samples, a sample with fewer than 2 counted tokens, or an id outside the vocabulary.
    """
    if not samples:
        raise BadDataError(
            "calibration needs at least one sample, got none; give data, or method rtn, which needs none"
        )
    for index, sample in enumerate(samples):
        ids, mask = sample.input_ids, sample.mask
        if ids.dim() != 1 or ids.shape != mask.shape or ids.dtype != torch.int64 or mask.dtype != torch.bool:
            got = f"{list(ids.shape)} {ids.dtype} and {list(mask.shape)} {mask.dtype}"
            raise BadDataError(
                f"sample {index} must be [T] int64 ids and a [T] bool mask, got {got}; see samples_from_ids"
            )
        counted, length = int(mask.sum()), ids.numel()
        if counted < 2:
            got = f"all of its {length} are masked" if length > 1 and not counted else f"it has {counted} of {length}"
            raise BadDataError(
                f"sample {index} needs at least 2 counted tokens, but {got}; drop it or give a longer one"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise BadDataError(
                f"token ids must be in 0..{vocab_size - 1}, the model's vocabulary, but sample {index} has "
                f"{low if low < 0 else high}; tokenize with the tokenizer of this model"
            )


def fingerprint(samples: Sequence[Sample]) -> str:
    """Name the samples by the SHA-256 of their ids and masks, in order; it holds no text and depends on no machine."""
    digest = hashlib.sha256()
    for sample in samples:
        length = sample.input_ids.numel()
        digest.update(struct.pack(f"<{length + 1}q", length, *sample.input_ids.tolist()))
        digest.update(bytes(sample.mask.tolist()))
    return digest.hexdigest()


def check_tokenizer(tokenizer: Tokenizer, folder: str | Path, probe: str | None = None) -> str | None:
    """Compare a loaded tokenizer with the tokenizer.json it should follow.

    transformers picks the pre-tokenizer by model type. For a model trained with another one the ids then come out
    differently, without a word and at a high price in accuracy.

    Args:
        tokenizer: as AutoTokenizer gave it.
        folder: the model's folder.
        probe: text to compare on, such as the head of the user's data; None: a built-in one of many scripts.

    Returns:
        One sentence for the user where the two differ; None if they agree or there is no tokenizer.json.

    Raises:
        BadModelError: tokenizer.json cannot be read.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer as FileTokenizer

    try:
        written = FileTokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise BadModelError(f"tokenizer.json must be readable, got: {one_line(error)}; fetch it again") from error
    written.no_truncation()
    written.no_padding()
    text = PROBE if probe is None else probe
    encoding = written.encode(text, add_special_tokens=False)
    theirs = encoding.ids
    ours = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    if ours == theirs:
        return None
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    char = encoding.offsets[same][0] if same < len(theirs) else len(text)
    # A user's own text stays out of the sentence, which may end up in a published log.
    place = f"character {char}" + (f" ({text[char : char + 12]!r})" if probe is None else "")
    return (
        f"the loaded {type(tokenizer).__name__} does not give the ids of tokenizer.json: {len(ours)} against "
        f"{len(theirs)} tokens on a probe text, first different at token {same}, {place}; if the model was trained "
        "with tokenizer.json, load that file by PreTrainedTokenizerFast(tokenizer_file=...) and use it throughout"
    )


def _check_options(*, n_samples: int = 1, seq_len: int = 2, seed: int = 0, packing: str = "auto") -> None:
    for name, value, least in (("n_samples", n_samples, 1), ("seq_len", seq_len, 2), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}; give a larger one")
    if seed >= 2**63:
        raise UsageError(f"seed must be below 2**63, got {seed}; give a smaller one")
    if packing not in ("auto", "pack", "truncate"):
        raise UsageError(f"packing must be auto, pack or truncate, got {packing!r}; write one of these")


def _tensor(row: Any, where: str) -> Tensor:
    if isinstance(row, Tensor) and (row.is_meta or row.layout != torch.strided):
        raise BadDataError(f"{where} must be a dense tensor with values, got {row.layout} on {row.device}; give such")
    try:
        return torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise BadDataError(f"{where} must be integers, got: {one_line(error)}; give rows of token ids") from error


# --- drawing ---------------------------------------------------------------------------------------------------------


def _pack(
    documents: Iterator[Document], coder: _Coder, wanted: int, seq_len: int, generator: torch.Generator, source: str
) -> list[Sample]:
    """Join all documents, cut windows end to end from the start, draw some of them."""
    limit = POOL * wanted * seq_len
    parts: list[Tensor] = []
    count = 0
    for ids in coder.join(documents):
        if count >= limit:
            _log.warning("%s: only its first %d tokens were considered (%d per wanted sample)", source, count, POOL)
            break
        parts.append(torch.tensor(ids, dtype=torch.int64))
        count += len(ids)
    if count < seq_len:
        raise BadDataError(
            f"packing needs at least seq_len = {seq_len} tokens for one window, but {source} has {count}; "
            "lower --seq-len or give more text"
        )
    windows = torch.cat(parts)[: count // seq_len * seq_len].view(-1, seq_len)
    masks = coder.counted(windows)
    usable = (masks.sum(1) >= 2).nonzero().flatten()
    if not len(usable):
        raise BadDataError(f"a window needs 2 tokens that count, but {source} has none such; give real text")
    chosen = usable[torch.randperm(len(usable), generator=generator)[:wanted].sort().values]
    return [Sample(windows[i].clone(), masks[i].clone()) for i in chosen]


def _truncate(
    documents: Iterator[Document], coder: _Coder, wanted: int, seq_len: int, generator: torch.Generator, source: str
) -> list[Sample]:
    """Draw documents, pass over those too short to count, cut each at seq_len; only what is drawn is tokenized."""
    pool = list(islice(documents, POOL * wanted))
    if len(pool) == POOL * wanted and next(documents, None) is not None:
        _log.warning("%s: only its first %d documents were considered (%d per wanted sample)", source, len(pool), POOL)
    found: dict[int, Sample] = {}
    for index in torch.randperm(len(pool), generator=generator).tolist():
        ids: list[int] = []
        for part in coder.parts(pool[index]):
            ids += part
            if len(ids) >= seq_len:
                break
        tokens = torch.tensor(ids[:seq_len], dtype=torch.int64)
        mask = coder.counted(tokens)
        if int(mask.sum()) >= 2:
            found[index] = Sample(tokens, mask)
        if len(found) == wanted:
            break
    if not found:
        raise BadDataError(f"a sample needs 2 tokens that count, but {source} has none such; give longer documents")
    return [found[index] for index in sorted(found)]


# --- tokenizing ------------------------------------------------------------------------------------------------------


class _Coder:
    """Turns documents of one kind into ids with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, kind: Kind) -> None:
        self._tokenizer = tokenizer
        self._ignored = self._mark("<|endoftext|>") if kind == "conversations" else None

    def counted(self, ids: Tensor) -> Tensor:
        """Tell which ids count in the Hessian: all but the end-of-text id of Qwen conversations."""
        return torch.ones_like(ids, dtype=torch.bool) if self._ignored is None else ids != self._ignored

    def join(self, documents: Iterable[Document]) -> Iterator[list[int]]:
        """Yield the ids of all documents; texts are parted by the end-of-text id, chats end with their own marks."""
        eos = getattr(self._tokenizer, "eos_token_id", None)
        for index, document in enumerate(documents):
            if index and document.kind == "text" and eos is not None:
                yield [eos]
            yield from self.parts(document)

    def parts(self, document: Document) -> Iterator[list[int]]:
        """Yield the ids of one document, a text block by block."""
        if document.kind == "conversations":
            yield self._chatml(document)
        elif document.kind == "messages":
            yield self._templated(document)
        else:
            yield self._bos
            for block in blocks(document.value):
                yield self._encode(block)

    @cached_property
    def _bos(self) -> list[int]:
        """The begin-of-text id, if this tokenizer starts a text with it."""
        bos = getattr(self._tokenizer, "bos_token_id", None)
        empty = list(self._tokenizer.encode("", add_special_tokens=True, verbose=False))
        return [bos] if bos is not None and empty[:1] == [bos] else []

    def _encode(self, text: str) -> list[int]:
        # verbose: no "longer than the model's maximum"; the ids are cut to size afterwards.
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _mark(self, token: str) -> int | None:
        """The id of a special token, or None if the tokenizer knows it only as ordinary text."""
        ids = self._encode(token)
        unknown = ids[:1] == [getattr(self._tokenizer, "unk_token_id", None)]
        if len(ids) != 1 or (unknown and str(getattr(self._tokenizer, "unk_token", "")) != token):
            return None
        return ids[0]

    @cached_property
    def _frame(self) -> tuple[int, int, list[int]] | None:
        """The ids of turn start, turn end and line break."""
        start, end = self._mark("<|im_start|>"), self._mark("<|im_end|>")
        return None if start is None or end is None else (start, end, self._encode("\n"))

    def _chatml(self, document: Document) -> list[int]:
        """Lay out a conversation as Qwen does for its own calibration: every turn ends with a line break.

        Not ``Vocabulary.encode_chat``: this serves any tokenizer that has the two marks, Qwen2's among them.

        Source: QwenLM/Qwen, run_gptq.py.
        """
        if self._frame is None:
            raise BadDataError(
                f"{document.where}: Qwen conversations need a tokenizer with <|im_start|> and <|im_end|>, and this one "
                "lacks them; give plain text, or 'messages' if the tokenizer has a chat template"
            )
        start, end, newline = self._frame
        turns = [("system", DEFAULT_SYSTEM), *((turn["from"], turn["value"]) for turn in document.value)]
        if turns[1][0] != "user":
            del turns[1]
        ids: list[int] = []
        for role, value in turns:
            ids += [start, *self._encode(role), *newline, *self._encode(value), end, *newline]
        return ids

    def _templated(self, document: Document) -> list[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            raise BadDataError(
                f"{document.where}: 'messages' need a tokenizer with a chat template, and this one has none; give "
                "plain text, or Qwen's 'conversations' if the tokenizer has <|im_start|>"
            )
        try:
            ids = self._tokenizer.apply_chat_template(
                document.value, tokenize=True, return_dict=False, tokenizer_kwargs={"verbose": False}
            )
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise BadDataError(
                f"{document.where}: the chat template refuses the messages: {one_line(error)}; change or drop them"
            ) from error
        return list(ids)
