"""Move outlier channels of the keys into the queries, so that keys become easy to quantize at no cost at run time.

Rotary embedding turns channels i and i + D/2 of a head by one angle. Dividing such a pair of output rows that make
keys by a factor and multiplying the same rows that make queries leaves every score as it was, whatever the angle is
(NTK) and by whatever factor a whole query is multiplied (LogN). Factors are powers of two, so not even the rounding of
a product changes: in bfloat16 and float32 the logits of the folded model are bit for bit those of the original, and
undoing it restores every weight. In float16, weights under 6e-5 have fewer bits and may move by 2**-25.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from qquant.dense_linear import DenseLinear
from qquant.models.layouts import find_attentions
from qquant.packed_weight import PackedWeight

_log = logging.getLogger("qquant")

SPREAD = 3.0
"""Standard deviations above its mean at which a channel's largest value is guessed without data."""

CONTEXT = 1024
"""Tokens of a typical prompt. The cache stores keys less their mean over it, which takes away what rotates slowly."""

Factors = dict[str, Tensor]
"""Attention module by name -> [H, D / 2] float32 powers of two that its keys were divided by."""


class _Pairs(NamedTuple):
    """The key and query channels of one attention module, seen as rotary pairs."""

    attention: Any
    norm: nn.Module
    """Its output is what the attention module reads."""

    @property
    def normed(self) -> bool:
        """Whether keys pass a norm with a weight per channel (Qwen3), which is then what is folded."""
        return hasattr(self.attention, "k_norm")

    @property
    def fused(self) -> bool:
        """Whether one projection makes queries, keys and values, in this order (Qwen v1)."""
        return hasattr(self.attention, "c_attn")

    @property
    def linears(self) -> tuple[Any, ...]:
        """The projections that make keys and queries; that of the keys comes first."""
        attention = self.attention
        return (attention.c_attn,) if self.fused else (attention.k_proj, attention.q_proj)

    @property
    def parts(self) -> int:
        """How many of queries, keys and values, each as wide as the others, come out of one projection."""
        return 3 if self.fused else 1

    @property
    def rows(self) -> slice:
        """Of the first projection's output, the channels that are keys."""
        size = self.linears[0].out_features // self.parts
        return slice(size, 2 * size) if self.fused else slice(0, size)

    @property
    def kv_heads(self) -> int:
        """Heads of the keys."""
        heads: int = self.linears[0].out_features // self.parts // self.dim
        return heads

    @property
    def dim(self) -> int:
        """Channels of a head."""
        size: int = self.attention.head_dim
        return size


def _pairs(model: nn.Module, config: Any) -> dict[str, _Pairs]:
    """Every attention module by name; none for a family that is not known."""
    found = find_attentions(model, config.model_type)
    return {name: _Pairs(model.get_submodule(name), model.get_submodule(norm)) for name, norm in found.items()}


def can_fold(model: nn.Module, config: Any) -> bool:
    """Whether folding is known to be exact for this model.

    The family turns channels i and i + D/2 of whole heads by one angle, and queries and keys come from plain or
    GPTQ-packed linears whose weights are in memory.
    """
    found = _pairs(model, config)
    return bool(found) and _turns_whole_heads(config) and all(_rows_can_be_scaled(pairs) for pairs in found.values())


def _turns_whole_heads(config: Any) -> bool:
    """Whether every channel of a head has a partner half a head away; a part of a head pairs up otherwise."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("partial_rotary_factor", 1.0) == 1.0 and getattr(config, "rotary_pct", 1.0) == 1.0


def _rows_can_be_scaled(pairs: _Pairs) -> bool:
    """Whether scaling the weights in memory scales what the projections put out.

    Not so for subclasses that add to it (adapters), for weights packed by others, and for weights that are elsewhere.
    """
    if pairs.normed:
        return not pairs.attention.k_norm.weight.is_meta
    return all(
        (type(linear) in (nn.Linear, DenseLinear) or isinstance(linear, PackedWeight))
        and not is_parametrized(linear)
        and not any(tensor.is_meta for tensor in (*linear.parameters(), *linear.buffers()))
        and all(parameter.is_floating_point() for parameter in linear.parameters())
        for linear in pairs.linears
    )


def fold_keys(model: nn.Module, config: Any, samples: Sequence[Tensor] | None = None) -> Factors:
    """Divide the key channels that are larger than their head's median pair, and multiply the queries'.

    Args:
        model: a causal language model for which ``can_fold`` holds. Weights are modified in place.
        config: its text config.
        samples: token ids [tokens] or [B, tokens] int64 to measure keys on; None guesses them from the weights, which
            is as good: a channel's bias, its row of k_proj, and the weight of the norm before it.

    Returns:
        What was divided, for ``unfold_keys``; modules without outliers are left out and untouched.
    """
    found = _pairs(model, config)
    left = _left_by_centring(model)
    sizes = _measure(model, found, left, samples) if samples is not None else _guess(found, left)
    factors: Factors = {}
    for name, size in sizes.items():
        # Relative to the median pair, which stays; rounding leaves everything below 1.4 times of it alone.
        wanted = (size / size.median(-1, keepdim=True).values.clamp(min=1e-30)).clamp(min=1)
        powers = wanted.log2().round().exp2()
        if (powers > 1).any() and _apply(found[name], powers):
            factors[name] = powers
    if factors:
        _log.info("folded outlier key channels of %d attention modules into their queries", len(factors))
    return factors


def unfold_keys(model: nn.Module, config: Any, factors: Factors) -> None:
    """Undo ``fold_keys`` exactly. Weights are modified in place."""
    found = _pairs(model, config)
    for name, powers in factors.items():
        _apply(found[name], 1 / powers)


def _left_by_centring(model: nn.Module) -> Tensor:
    """Share [D / 2] of a constant key channel's size that remains when the mean over the context is taken away.

    Rotated by an angle t per token, n constant unit vectors have a mean of length r = sin(nt/2) / (n sin(t/2)), and
    their differences from it a root mean square of sqrt(1 - r^2).
    """
    angle = next(tensor for name, tensor in model.named_buffers() if name.endswith("rotary_emb.inv_freq")).double() / 2
    mean = (CONTEXT * angle).sin() / (CONTEXT * angle.sin())
    return (1 - mean**2).clamp(min=0).sqrt().float()


def _guess(found: dict[str, _Pairs], left: Tensor) -> dict[str, Tensor]:
    """Size of every rotary pair [H, D / 2] from the weights alone."""
    sizes = {}
    for name, pairs in found.items():
        half = (pairs.kv_heads, 2, pairs.dim // 2)
        if pairs.normed:
            # A normed head has unit mean square before the norm's weight.
            channel = pairs.attention.k_norm.weight.detach().float().abs().expand(pairs.kv_heads, -1).reshape(half)
        else:
            linear = pairs.linears[0]
            weight = linear.dequantized() if isinstance(linear, PackedWeight) else linear.weight.detach()
            # Its input, a normed vector, has unit mean square before the norm's weight.
            scaled = weight[pairs.rows].float() * pairs.norm.get_parameter("weight").detach().float().to(weight.device)
            channel = SPREAD * scaled.norm(dim=1).reshape(half)
            bias = linear.real_bias() if isinstance(linear, PackedWeight) else linear.bias
            if bias is not None:
                channel = channel + bias.detach()[pairs.rows].float().abs().reshape(half) * left.to(weight.device)
        sizes[name] = channel.norm(dim=1)
    return sizes


def _measure(model: nn.Module, found: dict[str, _Pairs], left: Tensor, samples: Sequence[Tensor]) -> dict[str, Tensor]:
    """Size of every rotary pair [H, D / 2]: the largest over all tokens of the samples, each less its own mean."""
    sizes = {name: torch.zeros(pairs.kv_heads, pairs.dim // 2) for name, pairs in found.items()}

    def watch(name: str, pairs: _Pairs) -> Any:
        def hook(_module: nn.Module, _inputs: Any, keys: Tensor) -> None:
            # Keys before rotation, [B, tokens, H, 2, D / 2]: what is left of their mean is what rotates away from it.
            halves = keys.detach()[..., pairs.rows].float().reshape(*keys.shape[:2], pairs.kv_heads, 2, pairs.dim // 2)
            mean = halves.mean(1, keepdim=True)
            halves = halves - mean * (1 - left.to(halves.device))
            sizes[name] = torch.maximum(sizes[name], halves.norm(dim=3).amax((0, 1)).cpu())

        source = pairs.attention.k_norm if pairs.normed else pairs.linears[0]
        return source.register_forward_hook(hook)

    hooks = [watch(name, pairs) for name, pairs in found.items()]
    try:
        with torch.inference_mode():
            for sample in samples:
                device = next(model.parameters()).device
                model(input_ids=sample.reshape(-1, sample.shape[-1]).to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sizes


def _apply(pairs: _Pairs, factors: Tensor) -> bool:
    """Divide keys and multiply queries by ``factors`` [H, D / 2]; False, and nothing changed, if that loses a bit."""
    attention = pairs.attention
    if pairs.normed:
        # One weight serves all heads: what the worst of them asks for.
        channel = factors.amax(0) if (factors >= 1).all() else factors.amin(0)
        channel = channel.repeat(2)
        weights = (attention.k_norm.weight, 1 / channel), (attention.q_norm.weight, channel)
        jobs = [_Job(weight, share, weight.dtype, exact=False) for weight, share in weights]
    else:
        per_key = factors.repeat(1, 2)  # [H, D]
        queries = pairs.linears[-1].out_features // pairs.parts
        per_query = per_key.repeat_interleave(queries // per_key.numel(), 0).flatten()
        per_key = 1 / per_key.flatten()
        shares = [torch.cat((per_query, per_key, torch.ones_like(per_key)))] if pairs.fused else [per_key, per_query]
        jobs = [job for linear, share in zip(pairs.linears, shares, strict=True) for job in _scaled_rows(linear, share)]
    jobs = [job._replace(factor=job.factor.to(job.tensor.device)) for job in jobs]
    # Not only without gradients: weights that were made in inference mode may only be changed in it.
    with torch.inference_mode():
        if not all(_restorable(job) for job in jobs):
            _log.warning("a key fold was left out: its factors leave the range of the stored dtype")
            return False
        for job in jobs:
            job.tensor.mul_(job.factor.to(job.tensor.dtype))
    for linear in pairs.linears:
        if isinstance(linear, PackedWeight):
            linear.forget()
    return True


class _Job(NamedTuple):
    """A tensor to multiply in place."""

    tensor: Tensor
    factor: Tensor
    """Broadcasts."""
    dtype: torch.dtype
    """That the tensor is stored in, if it is held in another."""
    exact: bool
    """Whether undoing must restore every bit, as for scales of packed weights, each of which stands for a group."""


def _restorable(job: _Job) -> bool:
    """Whether a product can be undone: exactly, or but for the last bit of the smallest float16 numbers."""
    tensor, factor = job.tensor.to(job.dtype), job.factor.to(job.dtype)
    return torch.allclose(tensor * factor / factor, tensor, rtol=0, atol=0 if job.exact else 2.0**-24)


def _scaled_rows(linear: Any, factor: Tensor) -> list[_Job]:
    """What to multiply so that output rows are scaled by ``factor`` [out]."""
    if isinstance(linear, PackedWeight):
        scales, *others = linear.row_factors(factor)
        return [_Job(*scales, exact=True), *(_Job(*other, exact=False) for other in others)]
    jobs = [_Job(linear.weight, factor[:, None], linear.weight.dtype, exact=False)]
    return jobs if linear.bias is None else [*jobs, _Job(linear.bias, factor, linear.bias.dtype, exact=False)]
