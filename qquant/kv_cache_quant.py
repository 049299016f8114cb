"""The Int8 KV cache: quantize and dequantize keys and values, a transformers cache of them, and its switch on a model.

The arithmetic is kv_ops.py's, the storage kv_store.py's, one layer kv_layer.py's, the attention that reads integers
kv_attention.py's, and what is done about outlier keys models/key_fold.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, DummyLayer, get_layer_types_and_kwargs

from qquant import kv_attention, kv_ops
from qquant.errors import BadModelError, UsageError
from qquant.kv_layer import Int8Layer, Int8SlidingLayer, KeyRotation
from qquant.kv_ops import KVBits
from qquant.kv_store import KVScheme, encode_as_qwen
from qquant.models.key_fold import Factors, can_fold, fold_keys, unfold_keys
from qquant.telling import say_once

KeyTransform = Literal["auto", "fold", "hadamard", "none"]

_STATE = "_qquant_kv"
"""Attribute of a model whose cache is switched on."""


@dataclass
class _Switched:
    """What ``disable_kv_quant`` has to undo."""

    options: dict[str, Any]
    factors: Factors
    attended_by_us: bool
    """Already before: model_kernels.py puts our attention into quantized models."""
    use_cache_quantization: Any
    use_cache_kernel: Any


def quantize_cache_v(states: Tensor, *, scheme: KVScheme = "token") -> tuple[Tensor, Tensor, Tensor]:
    """Store keys or values as uint8: ``states`` is about ``scale * (quantized - zero_point)``.

    ``token`` gives every token of every head its own range and rounds to nearest, so what is stored for a token never
    depends on its neighbours or on how a prompt was split into calls, and no value is off by more than half a step.

    ``qwen`` is the scheme that the first Qwen models published, kept to compare against, with the defects it has:
    it truncates, which biases every value down by half a step on average; one range serves all tokens of the call; the
    range lives in the dtype of ``states``; and a constant input divides by zero, which dequantizes to NaN.

    Args:
        states: [B, H, T, D], any float dtype, finite; beyond +-8e6 values are clamped. Read, never written.
        scheme: whose range a value is rounded in, and how.

    Returns:
        quantized: [B, H, T, D] uint8.
        scale: [B, H, T, 1] float16 (``token``, always positive) or the dtype of ``states`` (``qwen``).
        zero_point: [B, H, T, 1], dtype of ``scale``: the real, unrounded level that stands for 0.0.

    Raises:
        UsageError: ``states`` is not a float tensor of four dimensions, or the scheme is unknown.

    Source: ``qwen`` follows the formula of Qwen's own cache quantization, Qwen-7B ``modeling_qwen.py`` (2023).
    """
    if states.dim() != 4 or not states.is_floating_point():
        raise UsageError(f"states must be a float tensor [B, H, T, D], got {states.dtype} {list(states.shape)}")
    if scheme not in ("token", "qwen"):
        raise UsageError(f"scheme must be 'token' or 'qwen', got {scheme!r}")
    codes, scale, zero = kv_ops.encode(states) if scheme == "token" else encode_as_qwen(states)
    return codes, scale[..., None], zero[..., None]


def dequantize_cache_torch(quantized: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Recover the values of either scheme: ``scale * (quantized - zero_point)``.

    Args:
        quantized: [B, H, T, D] uint8. Read, never written.
        scale: [B, H, T, 1], any float dtype.
        zero_point: [B, H, T, 1], dtype of ``scale``.

    Returns:
        [B, H, T, D] float32, the precision in which the kernels compute too.
    """
    return kv_ops.decode(quantized, scale[..., 0], zero_point[..., 0], torch.float32)


class Int8KVCache(Cache):
    """A KV cache in 8 bits: 0.516 of the bytes of a bfloat16 cache at a head size of 128.

    Works wherever transformers takes a ``past_key_values``. Making one puts our attention in front of the sdpa or flash
    attention of the model that ``config`` belongs to; other caches pass through it unchanged.

    Args:
        config: the model's config.
        use_cache_kernel: False runs plain torch instead of the compiled kernels.
        key_rotation: ``hadamard`` stores keys multiplied by an orthogonal matrix that spreads outlier channels over all
            others; it needs no data and costs a small product per step. ``enable_kv_quant`` offers the better ``fold``.
        scheme: ``token``, or ``qwen`` for the published one, see ``quantize_cache_v``.
        value_bits: 4 stores values in 4 bits (0.41 of bfloat16 together with keys of 8), with ranges for every 32
            channels. It costs far more accuracy, see docs/kv-cache.md, and no fused kernel reads it.
        exact_prefill: False makes every call, prefill too, see quantized keys and values. The published
            implementation did so; it is also how a whole text can be scored as if decoded token by token.
        reserve: tokens that the cache will probably hold; room for them is taken at once, but for no more than 1024
            beyond the prompt. It grows past that in steps.
        offloading: keep layers on the CPU and bring each to its device when it is needed.

    Raises:
        BadModelError: the model has layers whose cache is not keys and values of plain or sliding attention.
        UsageError: an option has no such value.
    """

    def __init__(
        self,
        config: Any,
        *,
        use_cache_kernel: bool = True,
        key_rotation: KeyRotation = "none",
        scheme: KVScheme = "token",
        value_bits: KVBits = 8,
        exact_prefill: bool = True,
        reserve: int = 0,
        offloading: bool = False,
    ) -> None:
        if key_rotation not in ("none", "hadamard"):
            raise UsageError(f"key_rotation must be 'none' or 'hadamard', got {key_rotation!r}")
        if scheme not in ("token", "qwen"):
            raise UsageError(f"scheme must be 'token' or 'qwen', got {scheme!r}")
        if value_bits not in (8, 4) or (value_bits == 4 and scheme == "qwen"):
            raise UsageError(f"value_bits must be 8, or 4 with scheme 'token', got {value_bits!r} with {scheme!r}")
        if getattr(config, "is_encoder_decoder", False):
            raise BadModelError(f"the int8 cache serves decoders, {config.model_type} is an encoder-decoder")
        text_config = config.get_text_config(decoder=True)
        if value_bits == 4 and (head := _head_size(text_config)) % kv_ops.INT4_GROUP:
            raise UsageError(
                f"value_bits 4 needs a head size that is a multiple of {kv_ops.INT4_GROUP}, got {head}; use 8"
            )
        options = {
            "use_cache_kernel": use_cache_kernel,
            "key_rotation": key_rotation,
            "scheme": scheme,
            "value_bits": value_bits,
            "exact_prefill": exact_prefill,
            "reserve": reserve,
        }
        super().__init__(
            layers=[
                _make_layer(text_config, layer_type, kwargs, options)
                for layer_type, kwargs in zip(*get_layer_types_and_kwargs(text_config), strict=True)
            ],
            offloading=offloading,
        )
        if not kv_attention.adopt(text_config):
            say_once(
                f"attn_implementation {text_config._attn_implementation!r} takes no integers: keys and values are "
                "dequantized at every step; sdpa or flash_attention_2 would let the int8 kernel run"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all layers hold, room not yet used included; exact."""
        return sum(getattr(layer, "nbytes", 0) for layer in self.layers)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held, without the room ahead; exact."""
        return sum(getattr(layer, "nbytes_used", 0) for layer in self.layers)


def _head_size(config: Any) -> int:
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def _make_layer(config: Any, layer_type: str, kwargs: dict[str, Any], options: dict[str, Any]) -> Any:
    """The layer for one of transformers' layer types, or BadModelError that names it."""
    if layer_type == "full_attention":
        return Int8Layer(config, **options)
    if layer_type in ("sliding_attention", "chunked_attention"):
        return Int8SlidingLayer(config, **kwargs, **options)
    if layer_type == "dummy":
        return DummyLayer()
    if layer_type in ("linear_attention", "conv"):
        # These hold a state of fixed size and no keys; nothing in them grows with the text.
        return DYNAMIC_LAYER_TYPE_MAPPING[layer_type](**kwargs)
    raise BadModelError(
        f"the int8 cache holds plain and sliding attention, {config.model_type} has layers of type {layer_type!r}; "
        "use transformers' own cache for this model"
    )


def enable_kv_quant(
    model: PreTrainedModel,
    *,
    use_cache_kernel: bool = True,
    key_transform: KeyTransform = "auto",
    samples: Sequence[Tensor] | None = None,
    scheme: KVScheme = "token",
    value_bits: KVBits = 8,
) -> PreTrainedModel:
    """Let ``model.generate`` keep its keys and values in 8 bits. Calling it again changes the options.

    Args:
        model: a causal language model. Modified in place: its config's flags and attention implementation, its
            ``generate``, and with ``fold`` its q_proj and k_proj (its logits stay bit for bit the same).
        use_cache_kernel: False runs plain torch instead of the compiled kernels.
        key_transform: what is done about outlier channels of the keys. ``fold`` moves them into the queries once,
            exactly and at no cost per step, for families that are known to allow it. ``hadamard`` rotates keys and
            queries at each step, for any model. ``auto`` is ``fold`` where it can be done, else ``hadamard``.
        samples: token ids to measure key channels on for ``fold``; without them it judges by the weights.
        scheme: ``token``, or ``qwen`` for the published one (which quantizes the prompt before it is used, too).
        value_bits: 8, or 4 for fewer bytes at a much larger error, see ``Int8KVCache``.

    Returns:
        The same model.

    Raises:
        UsageError: an option has no such value or does not fit the model.
        BadModelError: the model's layers have no keys and values to quantize.
    """
    if key_transform not in get_args(KeyTransform):
        raise UsageError(f"key_transform must be one of {', '.join(get_args(KeyTransform))}, got {key_transform!r}")
    config = model.config.get_text_config(decoder=True)
    if key_transform == "auto":
        key_transform = "fold" if can_fold(model, config) else "hadamard"
    elif key_transform == "fold" and not can_fold(model, config):
        raise UsageError(
            "key_transform 'fold' needs plain or GPTQ-packed q_proj and k_proj (or c_attn) in memory and a family "
            f"known to rotate channel pairs (i, i + D/2), this {config.model_type} model does not offer that; use "
            "'hadamard'"
        )
    options: dict[str, Any] = {
        "use_cache_kernel": use_cache_kernel,
        "key_rotation": "hadamard" if key_transform == "hadamard" else "none",
        "scheme": scheme,
        "value_bits": value_bits,
        "exact_prefill": scheme == "token",
    }
    earlier: _Switched | None = getattr(model, _STATE, None)
    attended_by_us = kv_attention.takes_integers(config) if earlier is None else earlier.attended_by_us
    # Refuses here, not in the middle of a generation, what cannot be cached, and before anything is changed.
    Int8KVCache(model.config, **options)
    disable_kv_quant(model)
    kv_attention.adopt(config)
    factors = fold_keys(model, config, samples) if key_transform == "fold" else {}
    state = _Switched(options, factors, attended_by_us, *(getattr(model.config, flag, None) for flag in _FLAGS))
    setattr(model, _STATE, state)
    model.config.use_cache_quantization = True
    model.config.use_cache_kernel = use_cache_kernel
    # A partial of the model, so that a copy of it, unpickled or deep, prepares caches for the copy.
    vars(model)["_prepare_cache_for_generation"] = partial(_prepare_cache, model)
    return model


def disable_kv_quant(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``enable_kv_quant`` wholly, folded weights included; a model that is not switched on stays as it is."""
    state: _Switched | None = getattr(model, _STATE, None)
    if state is None:
        return model
    config = model.config.get_text_config(decoder=True)
    unfold_keys(model, config, state.factors)
    if not state.attended_by_us:
        kv_attention.release(config)
    for flag in _FLAGS:
        before = getattr(state, flag)
        if before is None:
            delattr(model.config, flag)
        else:
            setattr(model.config, flag, before)
    del vars(model)["_prepare_cache_for_generation"]
    delattr(model, _STATE)
    return model


_FLAGS = ("use_cache_quantization", "use_cache_kernel")
"""Keys of config.json, as Qwen's users know them."""


def enable_as_configured(model: PreTrainedModel) -> None:
    """Switch the cache on if the model's config.json says so and nobody has yet.

    The kernel flag alone does nothing, as ever.
    """
    wanted, kernel = (getattr(model.config, flag, None) for flag in _FLAGS)
    if wanted and not hasattr(model, _STATE):
        enable_kv_quant(model, use_cache_kernel=kernel is None or bool(kernel))


def _prepare_cache(
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """What stands in for a switched model's ``_prepare_cache_for_generation``: makes an ``Int8KVCache``."""
    ordinary = type(model)._prepare_cache_for_generation
    if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
        return ordinary(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    kind = generation_config.cache_implementation
    if kind not in (None, "dynamic", "offloaded"):
        raise UsageError(
            f"cache_implementation {kind!r} and the int8 cache exclude each other: leave it out, or call "
            "qquant.disable_kv_quant(model) first"
        )
    options = getattr(model, _STATE).options
    cache: Any = Int8KVCache(model.config, **options, reserve=max_cache_length, offloading=kind == "offloaded")
    # An assistant's drafts are rolled back.
    if generation_config.is_assistant:
        cache.activate_past_recording()
    generation_config.cache_implementation = None
    model_kwargs["past_key_values"] = cache
    result = ordinary(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    # Ours, not the user's: nobody outside will look at it after this generation.
    cache._is_user_defined = False
    return result
