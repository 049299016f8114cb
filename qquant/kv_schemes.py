"""The ways to keep keys and values in 8 bits that an evaluation compares, each put on and taken off a loaded model.

Which is best is measured in kv_accuracy.py; what a user switches on for good is kv_cache_quant.py's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from qquant import kv_attention
from qquant.accuracy import LogitsFn
from qquant.kv_cache_quant import Int8KVCache
from qquant.kv_report import SchemeName
from qquant.models.key_fold import can_fold, fold_keys, unfold_keys

CacheMaker = Callable[..., Int8KVCache]
"""Makes an empty cache of one scheme; takes ``Int8KVCache``'s options to change."""

PROMPT = 64
"""Tokens of a sequence that a cache gets in a first call, as a prompt, unless that is more than half of it. The mean of
their keys is what the cache takes away from all later ones."""

_OPTIONS: dict[SchemeName, dict[str, Any]] = {
    "published": {"scheme": "qwen"},
    "none": {},
    "hadamard": {"key_rotation": "hadamard"},
    "fold": {},
}


def check_cacheable(config: PretrainedConfig) -> None:
    """Raise BadModelError, in the cache's own words, if the layers of such a model cannot be cached in 8 bits."""
    Int8KVCache(config)
    kv_attention.release(config.get_text_config(decoder=True))


def schemes_for(model: PreTrainedModel) -> tuple[SchemeName, ...]:
    """The schemes that a model can have: folding is for families that are known to allow it."""
    folds = can_fold(model, model.config.get_text_config(decoder=True))
    return ("published", "none", "hadamard", "fold") if folds else ("published", "none", "hadamard")


def automatic_scheme(model: PreTrainedModel) -> SchemeName:
    """What ``enable_kv_quant(key_transform="auto")`` takes."""
    return "fold" if "fold" in schemes_for(model) else "hadamard"


@contextmanager
def scheme_on(model: PreTrainedModel, name: SchemeName) -> Iterator[CacheMaker]:
    """Prepare a model for a scheme as long as the block lasts; yields what makes its empty caches.

    Without ``exact_prefill`` every query sees quantized keys and values, those of its own call too.

    Args:
        model: a causal language model whose int8 cache is not switched on. With ``fold`` its q_proj and k_proj are
            modified in place inside the block, which leaves its logits bit for bit as they were.
        name: one of ``schemes_for(model)``.
    """
    config = model.config.get_text_config(decoder=True)
    adopted = kv_attention.takes_integers(config)
    factors = fold_keys(model, config) if name == "fold" else {}
    try:
        yield partial(Int8KVCache, model.config, exact_prefill=False, **_OPTIONS[name])
    finally:
        unfold_keys(model, config, factors)
        if not adopted:
            kv_attention.release(config)


def last_logits(
    model: PreTrainedModel,
    device: torch.device,
    ids: Tensor,
    keep: int,
    cache: Int8KVCache | None,
    *,
    prompt: int = PROMPT,
) -> Tensor:
    """Run a model on fresh sequences.

    With a cache of a per-token scheme that is not exact in prefill, this gives what decoding the tokens after the
    prompt one by one gives.

    Args:
        model: a causal language model.
        device: of the model.
        ids: [B, T] int64.
        keep: how many logits are wanted per sequence.
        cache: what keys and values pass through; None: they stay exact.
        prompt: tokens that pass through the cache before the rest, at most half of them; 0: all in one call, for the
            published scheme, whose one range per call serves prompts.

    Returns:
        [B, keep, vocab] logits that follow the last ``keep`` tokens.
    """
    # With it the output projection skips the rest; not every model knows the option.
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    first = 0 if cache is None else min(prompt, ids.shape[1] // 2)
    found: list[Tensor] = []
    if cache is not None and cache.get_seq_length() == 0:
        plan_positions(model, cache, ids.shape[1])
    for begin, end in ((0, first), (first, ids.shape[1])):
        wanted = min(end - begin, keep - (ids.shape[1] - end))
        if begin == end:
            continue
        # Logits that nobody wants are still computed once: models take 0 for all of them.
        options: dict[str, Any] = {"logits_to_keep": max(1, wanted)} if known else {}
        fed = ids[:, begin:end].to(device)
        logits: Tensor = model(input_ids=fed, past_key_values=cache, use_cache=cache is not None, **options).logits
        if wanted > 0:
            found.append(logits[:, -wanted:])
    return torch.cat(found, 1)


def plan_positions(model: PreTrainedModel, cache: Int8KVCache, total: int) -> None:
    """Tell an empty cache how many tokens it will hold, if the positions of the model's tokens depend on it."""
    plan_prompt: Any = getattr(model, "plan_prompt", None)
    if plan_prompt is not None:
        plan_prompt(cache, total)


def cached_logits_fn(
    model: PreTrainedModel, device: torch.device, make_cache: CacheMaker, *, prompt: int = PROMPT
) -> LogitsFn:
    """A model with a fresh 8-bit cache for every window as a ``LogitsFn``; see ``last_logits``."""
    return lambda window, keep: last_logits(model, device, window[None], keep, make_cache(), prompt=prompt)[0]
