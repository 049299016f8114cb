"""One attention layer of the Int8 KV cache, plain or sliding, as transformers' cache calls it.

It decides what a call of attention gets: exact states in prefill, integers in decoding, tensors where nobody takes
integers. Storage is kv_store.py's; the cache of all layers is kv_cache_quant.py's.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from qquant import kv_attention
from qquant.errors import UsageError
from qquant.kv_attention import MAX_QUERIES, QuantizedStates
from qquant.kv_ops import KVBits
from qquant.kv_store import KVScheme, TokenStore, hadamard
from qquant.telling import say_once

KeyRotation = Literal["none", "hadamard"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels take."""

SLIDING_SLACK = 64
"""Tokens that a sliding layer may hold beyond its window before it moves the window to the front."""


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
        value_bits: KVBits,
        exact_prefill: bool,
        reserve: int,
    ) -> None:
        # Not the parent's: it would set ``keys`` and ``values``, which are properties here.
        self.config = config
        self.use_cache_kernel = use_cache_kernel
        self.key_rotation: KeyRotation = key_rotation
        self.scheme: KVScheme = scheme
        self.value_bits: KVBits = value_bits
        self.exact_prefill = exact_prefill
        self.reserve = reserve
        self.is_initialized = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Layer:
        """A copy of all that is stored, for the same model: the config stays the model's own."""
        memo[id(self.config)] = self.config
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the storage for tensors like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rotation = hadamard(key_states.shape[-1], self.device) if self.key_rotation == "hadamard" else None
        self.key_offset: Tensor | None = None
        self.key_store = TokenStore(key_states, scheme=self.scheme, reserve=self.reserve)
        self.value_store = TokenStore(value_states, scheme=self.scheme, bits=self.value_bits, reserve=self.reserve)
        self.is_initialized = True

    @torch.compiler.disable
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add keys and values [B, H, L, D]; returns what attention over all tokens needs, see the class."""
        if self.use_cache_kernel and key_states.dtype not in DTYPES:
            raise UsageError(
                f"the int8 kernels take float32, float16 and bfloat16, got {key_states.dtype}; "
                "use_cache_kernel=False takes any float dtype"
            )
        if torch.is_grad_enabled() and key_states.requires_grad:
            say_once("no gradient flows through what an int8 cache has stored; train without a cache")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.dtype = key_states.dtype
        length, held = key_states.shape[2], self._visible()
        past = None
        if self.exact_prefill and held and length > MAX_QUERIES:
            past = [states.dequantize() for states in self._states(held)]
        # Detached, because what is kept would keep the graph of every prompt alive.
        self.key_store.append(self._easy_to_quantize(key_states.detach()), kernel=self.use_cache_kernel)
        self.value_store.append(value_states.detach(), kernel=self.use_cache_kernel)
        if past is not None:
            return torch.cat([past[0], key_states], 2), torch.cat([past[1], value_states], 2)
        if self.exact_prefill and not held:
            return key_states, value_states
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
        keys = QuantizedStates(
            *self.key_store.last(count),
            dtype=self.dtype,
            offset=self.key_offset,
            rotation=self.rotation,
            kernel=kernel,
        )
        values = self.value_store.last(count)
        return keys, QuantizedStates(*values, dtype=self.dtype, bits=self.value_bits, kernel=kernel)

    def _easy_to_quantize(self, key_states: Tensor) -> Tensor:
        """Keys less the mean of the first call's, and rotated.

        Channels that sit far from zero, as biased keys do, thus cost no range. In float32: a rounding to bfloat16
        before the one to 8 bits would cost as much as the latter.
        """
        if self.scheme == "qwen" or not key_states.shape[2]:
            return key_states
        keys = key_states.float()
        if self.key_offset is None:
            self.key_offset = keys.mean(2, keepdim=True)
        keys = keys - self.key_offset
        return keys if self.rotation is None else keys @ self.rotation

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """[B, H, T, D] dequantized keys, a fresh tensor; None before the first update."""
        return self._states(self._visible())[0].dequantize() if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """[B, H, T, D] dequantized values, a fresh tensor; None before the first update."""
        return self._states(self._visible())[1].dequantize() if self.is_initialized else None

    @property
    def layer_past(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
        """((q_key, key_scale, key_zero_point), (q_value, value_scale, value_zero_point)), as Qwen documented them.

        Views [B, H, T, D] uint8 and [B, H, T, 1]. Keys are stored less ``key_offset`` [B, H, 1, D], which no score
        depends on but for a constant per query, and rotated where ``key_rotation`` says so.
        """
        if not self.is_initialized:
            raise UsageError("layer_past exists after the first update; this layer holds nothing yet")
        pair = [store.last(self._visible()) for store in (self.key_store, self.value_store)]
        keys, values = [(codes, scale[..., None], zero[..., None]) for codes, scale, zero in pair]
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of memory held, room not yet used and the offset of the keys included."""
        return self.key_store.nbytes + self.value_store.nbytes + self._fixed_bytes if self.is_initialized else 0

    @property
    def nbytes_used(self) -> int:
        """Bytes of the tokens held, without the room ahead."""
        if not self.is_initialized:
            return 0
        return self.key_store.nbytes_used + self.value_store.nbytes_used + self._fixed_bytes

    @property
    def _fixed_bytes(self) -> int:
        return 0 if self.key_offset is None else self.key_offset.untyped_storage().nbytes()

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
            if self.key_offset is not None:
                self.key_offset = self.key_offset.index_select(0, rows.to(self.key_offset.device))

    def offload(self) -> None:
        """Move the storage to the CPU; what does not grow stays."""
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
        found: tuple[Any, Any] = super().update(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        if not self.record_past and self.key_store.tokens > self.sliding_window + SLIDING_SLACK:
            self._trim()
        return found

    def _visible(self) -> int:
        return min(self.key_store.tokens, self.sliding_window - 1)

    def _trim(self) -> None:
        for store in (self.key_store, self.value_store):
            store.keep_newest(self.sliding_window - 1, room=self.sliding_window + 2 * SLIDING_SLACK)

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
        left = max(0, self.cumulative_length + tokens_to_remove)
        if self.is_initialized and self.key_store.tokens + tokens_to_remove < min(left, self.sliding_window - 1):
            raise UsageError(
                f"a sliding layer can give back the tokens since its last crop, {-tokens_to_remove} is more than it has"
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = left
        if self.is_initialized and self.cumulative_length >= self.sliding_window:
            self._trim()

    def reset(self) -> None:
        """Forget everything and free the storage."""
        super().reset()
        self.cumulative_length = 0
