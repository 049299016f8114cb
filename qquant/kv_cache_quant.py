"""The Int8 KV cache: quantize and dequantize keys and values, and a transformers cache that stores them so.

The arithmetic is kv_ops.py's, the storage kv_store.py's, the attention that reads it kv_attention.py's. How a model
comes to use this cache by itself is kv_toggle.py's.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DummyLayer,
    get_layer_types_and_kwargs,
)

from qquant import kv_attention, kv_ops
from qquant.errors import BadModelError, UsageError
from qquant.kv_attention import MAX_QUERIES, QuantizedStates
from qquant.kv_store import KVScheme, TokenStore, encode_as_qwen

_log = logging.getLogger("qquant")

KeyRotation = Literal["none", "hadamard"]

SLIDING_SLACK = 64
"""Tokens that a sliding layer may hold beyond its window before it moves the window to the front."""


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
        [B, H, T, D] float32, the precision in which the kernels compute too; of the ``qwen`` scheme in the dtype of
        ``scale``, in which it was published.
    """
    if scale.dtype == torch.float16:
        return kv_ops.decode(quantized, scale[..., 0], zero_point[..., 0], torch.float32)
    return scale * (quantized.to(scale.dtype) - zero_point)


class Int8Layer(CacheLayerMixin):
    """Keys and values of one attention layer as uint8.

    The first call (prefill) and every later one of more than 16 tokens get back the exact keys and values of their own
    tokens; shorter calls get ``QuantizedStates`` where the model runs our attention, and tensors where it does not.
    """

    is_croppable = True
    is_sliding = False

    def __init__(
        self,
        config: Any,
        *,
        use_cache_kernel: bool,
        key_rotation: KeyRotation,
        scheme: KVScheme,
        exact_prefill: bool,
        reserve: int,
    ) -> None:
        # Not the parent's: it would set ``keys`` and ``values``, which are properties here.
        self.config = config
        self.use_cache_kernel = use_cache_kernel
        self.key_rotation: KeyRotation = key_rotation
        self.scheme: KVScheme = scheme
        self.exact_prefill = exact_prefill
        self.reserve = reserve
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the storage for tensors like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rotation = hadamard(key_states.shape[-1], self.device) if self.key_rotation == "hadamard" else None
        self.key_store = TokenStore(key_states, scheme=self.scheme, reserve=self.reserve)
        self.value_store = TokenStore(value_states, scheme=self.scheme, reserve=self.reserve)
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add keys and values [B, H, L, D]; returns what attention over all tokens needs, see the class."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, held = key_states.shape[2], self._visible()
        self.key_store.append(self._rotate(key_states), kernel=self.use_cache_kernel)
        self.value_store.append(value_states, kernel=self.use_cache_kernel)
        if self.exact_prefill and (not held or length > MAX_QUERIES):
            if not held:
                return key_states, value_states
            past = [states.dequantize()[:, :, :held] for states in self._states(held + length)]
            return torch.cat([past[0], key_states], 2), torch.cat([past[1], value_states], 2)
        keys, values = self._states(held + length)
        if length <= MAX_QUERIES and held and kv_attention.takes_integers(self.config):
            return keys, values
        return keys.dequantize(), values.dequantize()

    def _visible(self) -> int:
        """Tokens held that the next call attends to."""
        return self.key_store.tokens

    def _states(self, count: int) -> tuple[QuantizedStates, QuantizedStates]:
        """The newest ``count`` keys and values."""
        kernel = self.use_cache_kernel and self.scheme == "token"
        keys = QuantizedStates(*self.key_store.last(count), dtype=self.dtype, rotation=self.rotation, kernel=kernel)
        return keys, QuantizedStates(*self.value_store.last(count), dtype=self.dtype, kernel=kernel)

    def _rotate(self, key_states: Tensor) -> Tensor:
        # In float32: a rounding to bfloat16 before the one to 8 bits would cost as much as the latter.
        return key_states if self.rotation is None else key_states.float() @ self.rotation

    @property
    def keys(self) -> Tensor | None:
        """[B, H, T, D] dequantized keys, a fresh tensor; None before the first update."""
        return self._states(self._visible())[0].dequantize() if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """[B, H, T, D] dequantized values, a fresh tensor; None before the first update."""
        return self._states(self._visible())[1].dequantize() if self.is_initialized else None

    @property
    def layer_past(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """((q_key, key_scale, key_zero_point), (q_value, value_scale, value_zero_point)) as Qwen documented them:
        views [B, H, T, D] uint8 and [B, H, T, 1]. Keys are rotated where ``key_rotation`` says so."""
        pair = [store.last(self._visible()) for store in (self.key_store, self.value_store)]
        keys, values = [(codes, scale[..., None], zero[..., None]) for codes, scale, zero in pair]
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, room not yet used included."""
        return self.key_store.nbytes + self.value_store.nbytes if self.is_initialized else 0

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held, without the room ahead."""
        return self.key_store.nbytes_used + self.value_store.nbytes_used if self.is_initialized else 0

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.key_store.tokens if self.is_initialized else 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that a call of ``query_length`` tokens attends to, position of the first of them)."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; ``tokens_to_remove`` is negative or 0, as transformers passes it."""
        if tokens_to_remove > 0:
            raise UsageError(
                f"crop takes a negative number of tokens to remove, got {tokens_to_remove}; "
                "for a final length n pass n - cache.get_seq_length()"
            )
        if self.is_initialized:
            self.key_store.drop_newest(-tokens_to_remove)
            self.value_store.drop_newest(-tokens_to_remove)

    def reset(self) -> None:
        """Forget everything and free the storage."""
        if self.is_initialized:
            del self.key_store, self.value_store
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i of the batch becomes row ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch ``repeats`` times in a row."""
        if self.is_initialized:
            rows = torch.arange(self.key_store.codes.shape[0], device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows of the batch: int64 indices or a bool mask."""
        if self.is_initialized:
            rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
            self.key_store.select(rows)
            self.value_store.select(rows)

    def offload(self) -> None:
        """Move the storage to the CPU."""
        if self.is_initialized:
            self.key_store.to("cpu")
            self.value_store.to("cpu")

    def prefetch(self) -> None:
        """Bring offloaded storage back."""
        if self.is_initialized:
            self.key_store.to(self.device)
            self.value_store.to(self.device)


class Int8SlidingLayer(Int8Layer):
    """An ``Int8Layer`` that holds no more than the window and a little slack.

    Args:
        sliding_window: tokens that a query sees, itself included.
        **options: as ``Int8Layer``.
    """

    is_sliding = True

    def __init__(self, config: Any, *, sliding_window: int, **options: Any) -> None:
        super().__init__(config, **options)
        self.sliding_window = sliding_window
        self.reserve = min(self.reserve, sliding_window + SLIDING_SLACK)
        self.cumulative_length = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Drop nothing until ``crop``, so that it can restore what the window has left behind."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """As ``Int8Layer.update``; attention gets the window before the call and the call's own tokens."""
        found = super().update(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        if not self.record_past and self.key_store.tokens > self.sliding_window + SLIDING_SLACK:
            self._trim()
        return found

    def _visible(self) -> int:
        return min(self.key_store.tokens, self.sliding_window - 1)

    def _trim(self) -> None:
        self.key_store.keep_newest(self.sliding_window - 1)
        self.value_store.keep_newest(self.sliding_window - 1)

    def get_seq_length(self) -> int:
        """Tokens seen so far, those that left the window included."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that a call of ``query_length`` tokens attends to, position of the first of them)."""
        held = min(self.cumulative_length, self.sliding_window - 1)
        return held + query_length, self.cumulative_length - held

    def crop(self, tokens_to_remove: int) -> None:
        """As ``Int8Layer.crop``; past the window only after ``activate_past_recording``."""
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise UsageError(
                "a sliding layer that has passed its window can be cropped only if it recorded the past: "
                "call cache.activate_past_recording() before the tokens that may be taken back"
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = max(0, self.cumulative_length + tokens_to_remove)
        if self.is_initialized and self.cumulative_length >= self.sliding_window:
            self._trim()

    def reset(self) -> None:
        """Forget everything and free the storage."""
        super().reset()
        self.cumulative_length = 0


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
        exact_prefill: bool = True,
        reserve: int = 0,
        offloading: bool = False,
    ) -> None:
        if key_rotation not in ("none", "hadamard"):
            raise UsageError(f"key_rotation must be 'none' or 'hadamard', got {key_rotation!r}")
        if scheme not in ("token", "qwen"):
            raise UsageError(f"scheme must be 'token' or 'qwen', got {scheme!r}")
        text_config = config.get_text_config(decoder=True)
        options = {
            "use_cache_kernel": use_cache_kernel,
            "key_rotation": key_rotation,
            "scheme": scheme,
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
            _log.warning(
                "attn_implementation %r takes no integers: keys and values are dequantized at every step; "
                "sdpa or flash_attention_2 would let the int8 kernel run",
                text_config._attn_implementation,
            )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all layers hold, room not yet used included; exact."""
        return sum(getattr(layer, "nbytes", 0) for layer in self.layers)

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held, without the room ahead; exact."""
        return sum(getattr(layer, "nbytes_used", 0) for layer in self.layers)


def hadamard(dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Orthogonal matrix [dim, dim] float32 of Hadamard blocks, as large as the powers of two in ``dim`` allow.

    Source: Sylvester's construction; its use on q and k after RoPE: QuaRot, arXiv:2404.00456, section 4.
    """
    block = dim & -dim
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / math.sqrt(block)] * (dim // block)).to(device)


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
