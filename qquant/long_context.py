"""Perplexity by sequence length: the same tokens from windows of many lengths, with and without NTK and LogN.

A model comes in loaded, a text as ids, and a record goes out. Windows of 32k tokens and vocabularies of 152k are meant
to work: logits exist only a few tokens at a time. Loading is the door's; the record and its tables are long_report's.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qquant.errors import BadDataError, BadModelError, NumericError, UsageError
from qquant.journal import Journal
from qquant.long_report import (
    SHOWN,
    LongContext,
    LongDifference,
    LongModel,
    LongPoint,
    LongRow,
    LongScore,
    SettingName,
)
from qquant.telling import OnProgress, unheard

_CHUNK_ELEMENTS = 2**24
"""Logits held at a time: 64 MiB in float32, 110 tokens of a 152k vocabulary. Fewer would read the head more often."""

_SWITCHES = ("use_dynamic_ntk", "use_logn_attn")
_SETTINGS: dict[SettingName, tuple[bool, bool]] = {
    "plain": (False, False),
    "ntk": (True, False),
    "ntk_logn": (True, True),
    "logn": (False, True),
}

_Losses = dict[tuple[SettingName, int], Tensor]
"""(setting, length) -> [tokens] float64 negative log-likelihoods of one model."""


def parse_lengths(text: str) -> tuple[int, ...]:
    """Lengths as a user writes them, "1024,2048,4096"; raises UsageError as ``check_lengths`` does."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise UsageError(f"lengths must be whole numbers with commas between them, like 1024,2048,4096, got {text!r}")
    return check_lengths([int(word) for word in words])


def check_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Lengths in ascending order, each once.

    Raises:
        UsageError: there is none, one is below 2, or one does not divide the longest, so that its windows would not
            end where the longest ones do and the tokens scored would not be the same.
    """
    ordered = tuple(sorted(set(lengths)))
    if not ordered or ordered[0] < 2:
        raise UsageError(f"lengths must be at least one number, each 2 or more, got {list(lengths)}")
    if odd := [length for length in ordered if ordered[-1] % length]:
        raise UsageError(
            f"each length must divide the longest ({ordered[-1]}), so that all are scored on the same tokens, and "
            f"{odd[0]} does not; give powers of two"
        )
    return ordered


def settings_of(model: Any) -> tuple[SettingName, ...]:
    """The rows a model gives: all four of a Qwen v1 model, whose config switches them, one of any other."""
    return tuple(_SETTINGS) if model.config.model_type == "qwen" else ("as_configured",)


@contextmanager
def setting_on(model: Any, name: SettingName) -> Iterator[None]:
    """Put a setting on a model's config, which the model reads at every call, and take it off again."""
    if name == "as_configured":
        yield
        return
    config = model.config
    before = [getattr(config, switch) for switch in _SWITCHES]
    try:
        for switch, value in zip(_SWITCHES, _SETTINGS[name], strict=True):
            setattr(config, switch, value)
        yield
    finally:
        for switch, value in zip(_SWITCHES, before, strict=True):
            setattr(config, switch, value)


def measure_long_context(
    loaders: Mapping[str, Callable[[], Any]],
    ids: Tensor,
    device: torch.device,
    *,
    lengths: Sequence[int],
    tell: OnProgress = unheard,
    finished: Journal | None = None,
) -> LongContext:
    """Score one text at every length with every model in all its settings; one model is in memory at a time.

    The text is cut to whole windows of the longest length. Windows of a length do not overlap and start afresh, and
    each feeds its tokens and scores the prediction after every one; so the tokens scored are the same at every length.

    Args:
        loaders: label -> a function that gives the causal language model in eval mode on ``device``, called once. The
            first is the baseline. A model's config is the same afterwards, also after an error.
        ids: [tokens] int64, more than the longest length. Read, never written.
        device: of the models.
        lengths: tokens per window, see ``check_lengths``; a model may have been made for fewer.
        tell: told what is being done.
        finished: settings and lengths of an earlier run, which are not run again; those that are run are added.

    Raises:
        UsageError: lengths that do not go together.
        BadDataError: the text is too short for the longest length.
        BadModelError: a candidate has another vocabulary than the baseline, or a model has no such positions.
        NumericError: a model's negative log-likelihoods are not finite, or too large for a perplexity.
    """
    ordered = check_lengths(lengths)
    longest, shortest = ordered[-1], ordered[0]
    count = (ids.numel() - 1) // longest
    if ids.ndim != 1 or count < 1:
        raise BadDataError(f"a text to evaluate is one row of more than {longest} tokens, got shape {list(ids.shape)}")
    text, tail = ids[: count * longest + 1], shortest // 2
    # Ascending: rotary embeddings that grow with the longest input they met have met no longer one yet.
    models: list[LongModel] = []
    baseline: _Losses = {}
    vocabulary: int | None = None
    for label, load in loaders.items():
        tell(f"loading {label}", len(models), len(loaders))
        model = load()
        own = model.config.get_text_config().vocab_size
        if vocabulary not in (None, own):
            raise BadModelError(
                f"{label} predicts {own} tokens and the baseline {vocabulary}: a candidate must have its baseline's "
                "vocabulary"
            )
        vocabulary = own
        losses = _losses(model, label, text, device, ordered, tell, finished)
        models.append(_record(label, _made_for(model), losses, baseline, ordered, tail))
        baseline = baseline or losses
        del model
    return LongContext(lengths_tokens=ordered, windows=count, tail_tokens=tail, models=tuple(models))


def token_losses(
    model: Any, ids: Tensor, device: torch.device, *, length: int, on_window: Callable[[], None] = lambda: None
) -> Tensor:
    """Negative log-likelihoods of every token but the first, predicted from windows of ``length`` that do not overlap.

    Args:
        model: a transformers causal language model on ``device``; no KV cache is used.
        ids: [n * length + 1] int64. Read, never written.
        device: of the model.
        length: tokens fed per window.
        on_window: called after every window.

    Returns:
        [n * length] float64, nats; not necessarily finite.
    """
    # Some models must give all logits at once; and a model that is its own backbone has no head to call alone.
    partial = "logits_to_keep" in inspect.signature(model.forward).parameters and model.base_model is not model
    size = max(1, _CHUNK_ELEMENTS // model.config.get_text_config().vocab_size) if partial else length
    losses = []
    with torch.inference_mode():
        for begin in range(0, ids.numel() - 1, length):
            fed = ids[None, begin : begin + length].to(device)
            targets = ids[begin + 1 : begin + length + 1].to(device)
            with _computed_once(model.base_model if partial else None):
                for rows in torch.arange(length, device=device).split(size):
                    options = {"logits_to_keep": rows} if partial else {}
                    logits = model(input_ids=fed, use_cache=False, **options).logits[0]
                    if logits.shape[0] != rows.numel():
                        raise BadModelError(f"a model must return {rows.numel()} rows of logits, got {logits.shape[0]}")
                    losses.append(nn.functional.cross_entropy(logits.float(), targets[rows], reduction="none").cpu())
            on_window()
    return torch.cat(losses).double()


@contextmanager
def _computed_once(module: nn.Module | None) -> Iterator[None]:
    """Let a module compute at its first call, and give that same output to every later one.

    So the model around it, called for one chunk of the logits after another, runs its backbone once, and whatever it
    does to logits besides the projection (caps, scales) stays its own business.
    """
    if module is None:
        yield
        return
    replaced, compute = vars(module).get("forward"), module.forward
    found: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not found:
            found.append(compute(*args, **kwargs))
        return found[0]

    module.forward = forward
    try:
        yield
    finally:
        if replaced is None:
            del vars(module)["forward"]
        else:
            module.forward = replaced


def _losses(
    model: Any,
    label: str,
    ids: Tensor,
    device: torch.device,
    lengths: Sequence[int],
    tell: OnProgress,
    finished: Journal | None,
) -> _Losses:
    """Every setting at every length; raises for numbers that no perplexity can be made of."""
    settings, made_for = settings_of(model), _made_for(model) or 0
    # Up to this length the switches do nothing: alpha is 1, and LogN asks for more keys. The numbers are bit for bit
    # those of the first setting, at no cost.
    runs = {setting: [n for n in lengths if setting == settings[0] or n > made_for] for setting in settings}
    total = sum((ids.numel() - 1) // length for chosen in runs.values() for length in chosen)
    losses: _Losses = {}
    done = 0
    for setting in settings:
        losses |= {(setting, length): losses[settings[0], length] for length in set(lengths) - set(runs[setting])}
        for length in runs[setting]:
            where = f"{label}, {SHOWN[setting]}, {length} tokens"
            tell(where, done, total)
            if finished is not None and where in finished:
                losses[setting, length] = torch.tensor(finished[where], dtype=torch.float64)
                done += (ids.numel() - 1) // length
                continue

            def on_window(where: str = where) -> None:
                nonlocal done
                done += 1
                tell(where, done, total)

            try:
                with setting_on(model, setting):
                    found = token_losses(model, ids, device, length=length, on_window=on_window)
            except IndexError as error:  # a table of positions that ends
                raise BadModelError(
                    f"{label} has no positions for {length} tokens, give shorter lengths: {error}"
                ) from error
            if not found.mean().item() < 700:  # exp overflows float64 soon after, and NaN is not below anything
                raise NumericError(
                    f"the mean negative log-likelihood must be a number below 700 nats, got {found.mean().item():.6g} "
                    f"({where}); the model is damaged, or its dtype overflows: try bfloat16 or float32"
                )
            losses[setting, length] = found
            if finished is not None:
                finished.add(where, found.tolist())
    return losses


def _record(
    label: str, made_for: int | None, losses: _Losses, baseline: _Losses, lengths: Sequence[int], tail: int
) -> LongModel:
    """Fold one model's losses into its rows."""
    longest = lengths[-1]
    settings = list(dict.fromkeys(setting for setting, _ in losses))

    def last(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.view(-1, longest)[:, -tail:].reshape(-1)

    rows = []
    for setting in settings:
        points = []
        for length in lengths:
            ours, theirs = losses[setting, length], baseline.get((setting, length))
            plain = None if setting == settings[0] else losses[settings[0], length]
            whole, end = _score(ours, plain, theirs), _score(last(ours), last(plain), last(theirs))
            points.append(LongPoint(length_tokens=length, whole=whole, tail=end))
        rows.append(LongRow(setting=setting, points=tuple(points)))
    return LongModel(label=label, made_for_tokens=made_for, rows=tuple(rows))


def _score(ours: Tensor | None, plain: Tensor | None, baseline: Tensor | None) -> LongScore:
    assert ours is not None
    mean = ours.mean().item()
    return LongScore(
        tokens=ours.numel(),
        nll_mean_nats=mean,
        perplexity=math.exp(mean),
        to_plain=_difference(ours, plain),
        to_baseline=_difference(ours, baseline),
    )


def _difference(ours: Tensor, theirs: Tensor | None) -> LongDifference | None:
    """Per-token differences as a mean and its standard error; tokens are taken as independent."""
    if theirs is None:
        return None
    difference = ours - theirs
    count = difference.numel()
    error = difference.std().item() / math.sqrt(count) if count > 1 else None
    return LongDifference(mean_nats=difference.mean().item(), stderr_nats=error)


def _made_for(model: Any) -> int | None:
    config = model.config.get_text_config()
    name = "seq_length" if config.model_type == "qwen" else "max_position_embeddings"
    limit = getattr(config, name, None)
    return int(limit) if limit else None
