"""What keeping keys and values in 8 bits costs a model: the schemes side by side, by context length, and all the rest.

The whole measurement behind ``--kv-cache`` is put together here; the layers and the needles have rooms of their own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qquant.accuracy import LogitsFn, evaluate, kl_divergence, log_probs, logits_fn, token_nll
from qquant.errors import NumericError
from qquant.kv_errors import layer_states
from qquant.kv_layer import Int8Layer
from qquant.kv_needle import ANSWER, CUE, measure_needles
from qquant.kv_report import KVCacheCost, KVDecoded, KVLayer, KVModel, KVPoint, KVRange, KVScheme, SchemeName
from qquant.kv_schemes import (
    PROMPT,
    CacheMaker,
    automatic_scheme,
    cached_logits_fn,
    last_logits,
    plan_positions,
    scheme_on,
    schemes_for,
)
from qquant.records import Accuracy
from qquant.telling import OnProgress, unheard

LAYER_WINDOWS = 4
"""Windows that the errors of the layers are measured on; they are sums over all tokens and settle soon."""
DECODED_TOKENS = 256
"""Tokens whose part after the prompt is also decoded one by one, as a generation does, to hold the rest against."""
FIRST_RANGE = 64
"""Tokens of context in the first range; each later one doubles what came before."""

_log = logging.getLogger("qquant")


@dataclass
class _PerToken:
    """One cache's results on every token of the windows, in their order; an entry per window."""

    nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)


@dataclass
class _Watch:
    """Stands between a model and ``evaluate``, which keeps no per-token results, and notes them.

    It leans on ``evaluate`` running the baseline first in every window, and windows in order.
    """

    ids: Tensor
    window: int
    per_token: dict[str, _PerToken] = field(default_factory=dict)
    theirs: Tensor | None = None

    def watch(self, label: str, model: LogitsFn, *, baseline: bool = False) -> LogitsFn:
        """The same model; every call is noted under ``label``."""
        notes = self.per_token[label] = _PerToken()

        def logits(fed: Tensor, keep: int) -> Tensor:
            ours = model(fed, keep)
            if baseline:
                self.theirs = ours
            begin = len(notes.nll) * self.window + 1
            nll, kl = _compare(self.theirs, ours, self.ids[begin : begin + keep])
            notes.nll.append(nll)
            notes.kl.append(kl)
            return ours

        return logits


def measure_kv_cache(
    models: Mapping[str, PreTrainedModel],
    ids: Tensor,
    device: torch.device,
    *,
    window: int,
    max_tokens: int,
    seed: int,
    tell: OnProgress = unheard,
) -> KVCacheCost:
    """Measure the Int8 cache of every model, and in depth that of the first.

    Args:
        models: label -> causal language model on ``device`` whose int8 cache is not switched on. Weights and config
            are changed while this runs and are bit for bit the same afterwards, also after an error.
        ids: [tokens] int64, more than ``window``. Read, never written.
        device: of the models.
        window: tokens of context per window.
        max_tokens: as many whole windows as fit into this many scored tokens, at least one.
        seed: of the needles.
        tell: told what is being done.

    Raises:
        BadModelError: a model has layers that cannot be cached in 8 bits.
        NumericError: a logit is not finite, but for the published scheme's, whose accuracy is then None.
    """
    count = max(1, min(max_tokens, ids.numel() - 1) // window)
    text = ids[: count * window + 1]
    found: dict[str, tuple[KVModel, dict[str, _PerToken]]] = {}
    for label, model in models.items():
        found[label] = _measure_schemes(label, model, text, device, window, tell)
    label, model = next(iter(models.items()))
    summary, per_token = found[label]
    tell(f"keys and values of {label}", 0, 1)
    samples = text[:-1].split(window)[:LAYER_WINDOWS]
    layers = list(_layers(model, samples, device))
    with scheme_on(model, summary.chosen) as make_cache:
        decoded = _decode(model, text[: min(window, DECODED_TOKENS)], device, make_cache)
        needles = measure_needles(
            lambda contexts, keep: last_logits(model, device, contexts, keep, None),
            lambda contexts, keep: last_logits(model, device, contexts, keep, make_cache()),
            ids,
            longest=window,
            seed=seed,
            progress=lambda done, total: tell(f"needles in {label}", done, total),
        )
    return KVCacheCost(
        kind="int8",
        seed=seed,
        window_tokens=window,
        windows=count,
        prompt_tokens=min(PROMPT, window // 2),
        models=tuple(one for one, _ in found.values()),
        decoded=decoded,
        ranges=tuple(_ranges(per_token, summary.chosen, window)),
        layer_tokens=len(samples) * window,
        layers=tuple(layers),
        cue_tokens=CUE,
        answer_tokens=ANSWER,
        needles=needles,
    )


def _measure_schemes(
    label: str, model: PreTrainedModel, ids: Tensor, device: torch.device, window: int, tell: OnProgress
) -> tuple[KVModel, dict[str, _PerToken]]:
    """One model with every scheme; the per-token results of "exact" and of each scheme besides."""
    names = schemes_for(model)
    schemes: list[KVScheme] = []
    watch = _Watch(ids, window)
    exact: Accuracy | None = None
    # One scheme at a time, because folding changes the weights for everyone; the exact cache runs beside each.
    for number, name in enumerate(names):
        prompt = 0 if name == "published" else PROMPT
        with scheme_on(model, name) as make_cache:
            held, plain = _sizes(model, ids[:window], device, make_cache)
            try:
                base, rest = evaluate(
                    watch.watch("exact", logits_fn(model, device), baseline=True),
                    {name: watch.watch(name, cached_logits_fn(model, device, make_cache, prompt=prompt))},
                    ids,
                    seq_len=window,
                    stride=window,
                    progress=lambda done, total, number=number: tell(  # type: ignore[misc]
                        f"KV cache of {label}", number * total + done, len(names) * total
                    ),
                )
                assert base is not None
                exact, accuracy = Accuracy(**asdict(base)), Accuracy(**asdict(rest[name]))
            except NumericError:
                if name != "published" or not _finite(watch.per_token["exact"]):
                    raise
                _log.warning("the published cache scheme gave %s numbers that are not finite; it is left out", label)
                accuracy = None
                del watch.per_token[name]
        schemes.append(KVScheme(name=name, bytes_per_token=held, share_of_bfloat16=held / plain, accuracy=accuracy))
    assert exact is not None
    return _choose(label, exact, schemes, watch.per_token, automatic_scheme(model)), watch.per_token


def _layers(model: PreTrainedModel, samples: Sequence[Tensor], device: torch.device) -> Iterator[KVLayer]:
    """Every attention layer, with keys as the model computes them and, where its family allows it, folded."""
    found = {}
    names: tuple[SchemeName, ...] = ("none", "fold") if "fold" in schemes_for(model) else ("none",)
    for name in names:
        with scheme_on(model, name) as make_cache:
            found[name] = layer_states(model, samples, device, partial(make_cache, exact_prefill=True))
    for layer, (computed, keys, values) in sorted(found["none"].items()):
        folded = found["fold"][layer][1] if "fold" in found else None
        yield KVLayer(layer=layer, computed_keys=computed, keys=keys, folded_keys=folded, values=values)


def _choose(
    label: str, exact: Accuracy, schemes: list[KVScheme], per_token: dict[str, _PerToken], automatic: SchemeName
) -> KVModel:
    """The record of one model, with the choice among the schemes of the same size."""
    kl: dict[SchemeName, Tensor] = {}
    for scheme in schemes:
        if scheme.name != "published":
            kl[scheme.name] = torch.cat(per_token[scheme.name].kl)
    chosen, second = sorted(kl, key=lambda name: kl[name].mean().item())[:2]
    rival = second if chosen == automatic else automatic
    lead = kl[rival] - kl[chosen]
    return KVModel(
        label=label,
        exact=exact,
        schemes=tuple(schemes),
        chosen=chosen,
        automatic=automatic,
        rival=rival,
        lead_nats=lead.mean().item(),
        lead_stderr_nats=lead.std().item() / math.sqrt(lead.numel()),
    )


def _decode(model: PreTrainedModel, ids: Tensor, device: torch.device, make_cache: CacheMaker) -> KVDecoded:
    """Whether decoding token by token, integer attention and all, is where one call over all of them says it is."""
    prompt = min(PROMPT, len(ids) // 2)
    tokens, cache = len(ids) - prompt, make_cache()
    with torch.inference_mode():
        exact, at_once = (last_logits(model, device, ids[None], tokens, one)[0] for one in (None, make_cache()))
        plan_positions(model, cache, len(ids))  # as at_once has them, and not as the prompt alone would
        model(input_ids=ids[None, :prompt].to(device), past_key_values=cache, use_cache=True)
        steps = torch.cat([last_logits(model, device, token.view(1, 1), 1, cache)[0] for token in ids[prompt:]])
    following = ids[prompt:].roll(-1)  # only the KL is used
    kl = [_compare(exact, logits, following)[1].mean().item() for logits in (steps, at_once)]
    return KVDecoded(tokens=tokens, kl_mean_nats=kl[0], at_once_kl_mean_nats=kl[1])


def _sizes(model: PreTrainedModel, window: Tensor, device: torch.device, make_cache: CacheMaker) -> tuple[float, float]:
    """Bytes per token of the cache after one window, and of as many keys and values in bfloat16."""
    cache = make_cache()
    with torch.inference_mode():
        last_logits(model, device, window[None], 1, cache)
    parts = [part for layer in cache.layers if isinstance(layer, Int8Layer) for part in layer.layer_past]
    held = sum(layer.nbytes_used for layer in cache.layers if isinstance(layer, Int8Layer))
    return held / len(window), 2 * sum(codes.numel() for codes, _, _ in parts) / len(window)


def _compare(theirs: Tensor | None, ours: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Per token of one window: [tokens] float64 negative log-likelihood and KL(theirs || ours), in nats."""
    assert theirs is not None
    nll, kl = [], []
    for rows, log_q, log_p in log_probs(ours, theirs):
        assert log_p is not None
        nll.append(token_nll(log_q, targets[rows]))
        kl.append(kl_divergence(log_p, log_q).cpu())
    return torch.cat(nll), torch.cat(kl)


def _finite(notes: _PerToken) -> bool:
    return all(bool(torch.isfinite(nll).all()) for nll in notes.nll)


def _ranges(per_token: dict[str, _PerToken], chosen: SchemeName, window: int) -> Iterator[KVRange]:
    """Ranges of context length that double; a prediction's place in its window is the length of its context."""
    first, last = 1, min(FIRST_RANGE, window)
    while first <= window:
        place = slice(first - 1, last)
        yield KVRange(
            first_tokens=first,
            last_tokens=last,
            tokens=len(per_token["exact"].nll) * (last - first + 1),
            exact=_point(per_token["exact"], place, exact=True),
            chosen=_point(per_token[chosen], place),
            published=_point(per_token["published"], place) if "published" in per_token else None,
        )
        first, last = last + 1, min(2 * last, window)


def _point(notes: _PerToken, place: slice, *, exact: bool = False) -> KVPoint:
    nll, kl = (torch.stack(found)[:, place].mean().item() for found in (notes.nll, notes.kl))
    return KVPoint(perplexity=math.exp(nll), kl_mean_nats=None if exact else kl)
