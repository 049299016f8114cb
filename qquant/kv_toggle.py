"""Switch the Int8 KV cache of a model on and off: ``enable_kv_quant`` and ``disable_kv_quant``.

The switch is one instance's: its config says so, its ``generate`` makes an ``Int8KVCache``, its keys are folded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, get_args

from torch import Tensor
from transformers import PreTrainedModel

from qquant import kv_attention
from qquant.errors import BadModelError, UsageError
from qquant.kv_cache_quant import Int8KVCache, KeyRotation
from qquant.kv_store import KVScheme
from qquant.models.key_fold import Factors, can_fold, fold_keys, unfold_keys

_log = logging.getLogger("qquant")

KeyTransform = Literal["auto", "fold", "hadamard", "none"]

_STATE = "_qquant_kv"
"""Attribute of a model whose cache is switched on."""


@dataclass
class _Switched:
    """What ``disable_kv_quant`` has to undo."""

    factors: Factors
    use_cache_quantization: Any
    use_cache_kernel: Any


def enable_kv_quant(
    model: PreTrainedModel,
    *,
    use_cache_kernel: bool = True,
    key_transform: KeyTransform = "auto",
    samples: Sequence[Tensor] | None = None,
    scheme: KVScheme = "token",
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

    Returns:
        The same model.

    Raises:
        UsageError: an option has no such value or does not fit the model.
        BadModelError: the model's layers have no keys and values to quantize.
    """
    if key_transform not in get_args(KeyTransform):
        raise UsageError(f"key_transform must be one of {', '.join(get_args(KeyTransform))}, got {key_transform!r}")
    if model.config.is_encoder_decoder:
        raise BadModelError(f"the int8 cache serves decoders, {model.config.model_type} is an encoder-decoder")
    disable_kv_quant(model)
    config = model.config.get_text_config(decoder=True)
    if key_transform == "auto":
        key_transform = "fold" if can_fold(model, config) else "hadamard"
    elif key_transform == "fold" and not can_fold(model, config):
        raise UsageError(
            f"key_transform 'fold' needs a family known to rotate channel pairs (i, i + D/2) of separate q_proj and "
            f"k_proj, {config.model_type} is not; use 'hadamard'"
        )
    options: dict[str, Any] = {
        "use_cache_kernel": use_cache_kernel,
        "key_rotation": "hadamard" if key_transform == "hadamard" else "none",
        "scheme": scheme,
        "exact_prefill": scheme == "token",
    }
    Int8KVCache(model.config, **options)  # refuses here, not in the middle of a generation, what cannot be cached
    factors = fold_keys(model, config, samples) if key_transform == "fold" else {}
    state = _Switched(factors, *(getattr(model.config, flag, None) for flag in _FLAGS))
    setattr(model, _STATE, state)
    model.config.use_cache_quantization = True
    model.config.use_cache_kernel = use_cache_kernel
    # A bound method, so that a copy of the model prepares caches for the copy.
    model._prepare_cache_for_generation = MethodType(_preparing(options), model)
    return model


def disable_kv_quant(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``enable_kv_quant`` wholly, folded weights included; a model that is not switched on stays as it is."""
    state: _Switched | None = getattr(model, _STATE, None)
    if state is None:
        return model
    config = model.config.get_text_config(decoder=True)
    unfold_keys(model, config, state.factors)
    kv_attention.release(config)
    for flag in _FLAGS:
        before = getattr(state, flag)
        if before is None:
            delattr(model.config, flag)
        else:
            setattr(model.config, flag, before)
    del model._prepare_cache_for_generation
    delattr(model, _STATE)
    return model


_FLAGS = ("use_cache_quantization", "use_cache_kernel")
"""Keys of config.json, as Qwen's users know them."""


def enable_as_configured(
    model: PreTrainedModel, use_cache_quantization: bool | None = None, use_cache_kernel: bool | None = None
) -> None:
    """Switch the cache on if the arguments, or for None the model's config.json, say so; the kernel flag alone does
    nothing, as ever."""
    wanted, kernel = (
        getattr(model.config, flag, None) if given is None else given
        for flag, given in zip(_FLAGS, (use_cache_quantization, use_cache_kernel), strict=True)
    )
    if wanted:
        enable_kv_quant(model, use_cache_kernel=True if kernel is None else bool(kernel))


def _preparing(options: dict[str, Any]) -> Callable[..., Any]:
    """A ``_prepare_cache_for_generation`` that puts an ``Int8KVCache`` where transformers would make its own."""

    def prepare(
        model: PreTrainedModel,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        ordinary = type(model)._prepare_cache_for_generation
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            kind = generation_config.cache_implementation
            if kind not in (None, "dynamic", "offloaded"):
                raise UsageError(
                    f"cache_implementation {kind!r} and the int8 cache exclude each other: leave it out, or call "
                    "qquant.disable_kv_quant(model) first"
                )
            cache = Int8KVCache(model.config, **options, reserve=max_cache_length, offloading=kind == "offloaded")
            # An assistant's drafts are rolled back.
            if generation_config.is_assistant:
                cache.activate_past_recording()
            generation_config.cache_implementation = None
            model_kwargs["past_key_values"] = cache
            result = ordinary(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            # Ours, not the user's: nobody outside will look at it after this generation.
            cache._is_user_defined = False
            return result
        return ordinary(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)

    return prepare
