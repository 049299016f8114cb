"""Attention over a quantized cache, as an attention implementation of transformers with the mask that belongs to it.

An implementation is named ``qquant_<base>``. It takes keys and values that are still integers itself, and one token
over bfloat16 ones on a CPU by plain_attention.py; everything else - prefill, other caches - it hands to the base
(``sdpa``, ``flash_attention_2``, ...), exact and unchanged.
"""

from __future__ import annotations

import inspect
import re
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qquant import kv_ops, plain_attention
from qquant.kv_ops import KVBits
from qquant.telling import say_once

PREFIX = "qquant_"
"""What the names of our attention implementations begin with."""

BASES = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
"""Implementations that ours may stand in front of. Eager attention returns its weights, which a fused kernel never has,
and is a function of each model's own file, so nothing can stand in front of it."""

MAX_QUERIES = 16
"""Most tokens of one call that are attended in integers: a decoding step or the check of an assistant's draft. Longer
calls are prefill, where arithmetic and not memory is the limit, and keep exact keys and values."""

# Arguments of transformers' attention functions that change the result and that the kernel does not know.
_FOREIGN = ("softcap", "s_aux", "position_bias", "cache")


class QuantizedStates:
    """Keys or values of one layer, still integers; to whoever is not our attention an ordinary tensor [B, H, T, D].

    Any torch function, method or index sees the dequantized values, so a model that does more with its keys than to
    hand them to attention stays right, at the cost of a copy.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor,
        *,
        dtype: torch.dtype,
        bits: KVBits = 8,
        offset: Tensor | None = None,
        rotation: Tensor | None = None,
        kernel: bool = True,
    ) -> None:
        self.codes, self.scale, self.zero = codes, scale, zero
        self.dtype = dtype
        self.bits: KVBits = bits
        self.offset = offset
        """[B, H, 1, D] float32 that was taken from every vector before it was stored, or None. Attention may ignore it
        in keys: it adds the same to all scores of a query, and softmax does not see that."""
        self.rotation = rotation
        """[D, D] float32 orthogonal matrix that the vectors were multiplied by after that, or None."""
        self.kernel = kernel
        """False: plain torch instead of the compiled operators."""

    def _as_tensor(self) -> Tensor:
        say_once(
            "keys and values of an int8 cache were dequantized for code that is not our attention; make the cache "
            "from the very config object of the model (model.config), and nothing between cache and attention may "
            "touch them"
        )
        return self.dequantize()

    @property
    def shape(self) -> torch.Size:
        """[B, H, T, D]."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits))

    @property
    def device(self) -> torch.device:
        """Where the integers are."""
        return self.codes.device

    def dequantize(self) -> Tensor:
        """[B, H, T, D] in ``dtype``: a fresh tensor."""
        if self.bits == 4:
            return kv_ops.decode_int4(self.codes, self.scale, self.zero, self.dtype)
        recover = kv_ops.dequantize if self.kernel and self.scale.dtype == torch.float16 else kv_ops.decode
        if self.rotation is None and self.offset is None:
            plain: Tensor = recover(self.codes, self.scale, self.zero, self.dtype)
            return plain
        found: Tensor = recover(self.codes, self.scale, self.zero, torch.float32)
        if self.rotation is not None:
            found = found @ self.rotation.T
        return (found if self.offset is None else found + self.offset).to(self.dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._as_tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self._as_tensor()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every torch function gets tensors."""
        args, kwargs = tree_map(lambda x: x._as_tensor() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*args, **kwargs)


def adopt(config: Any) -> bool:
    """Put our attention in front of the one that a text model's config names; returns whether that could be done.

    Args:
        config: transformers text config; its ``_attn_implementation`` is changed. Saving a model does not store it.
    """
    if takes_integers(config):
        return True
    base = config._attn_implementation or "sdpa"
    if base not in BASES or not _looks_implementations_up(type(config).__module__):
        return False
    _register(base)
    config._attn_implementation = PREFIX + base
    return True


@cache
def _looks_implementations_up(config_module: str) -> bool:
    """Whether a family's model takes any registered implementation.

    Some choose their attention by comparing its name with ``"sdpa"`` and would go astray under another one. No flag of
    transformers tells, so the source of the model's file does.
    """
    name = config_module.replace("configuration", "modeling")
    try:
        source = inspect.getsource(import_module(name))
    except (ImportError, OSError, TypeError):
        return False
    compares = re.search(r"_attn_implementation\s*(==|!=|in\b|not in\b)", source)
    return "ALL_ATTENTION_FUNCTIONS" in source and not compares


def release(config: Any) -> None:
    """Undo ``adopt``."""
    if takes_integers(config):
        config._attn_implementation = config._attn_implementation.removeprefix(PREFIX)


def use_decode_kernel(model: torch.nn.Module) -> list[str]:
    """Let a bfloat16 model on a CPU attend by ``plain_attention`` when it takes one token per sequence, in place.

    Args:
        model: any; what has no config of transformers is left alone.

    Returns:
        Lines to print: what attends, or why that stays torch; none where the kernel could not serve the model.
    """
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cpu" or first.dtype != torch.bfloat16:
        return []
    text_config = getattr(getattr(model, "config", None), "get_text_config", None)  # not every module is transformers'
    if text_config is None or not plain_attention.kernel_is_live() or not adopt(text_config(decoder=True)):
        return []
    return ["attention (bfloat16): decode_attention for 1 token, torch for more"]


def takes_integers(config: Any) -> bool:
    """Whether the model of this config runs our attention now."""
    return (config._attn_implementation or "").startswith(PREFIX)


def _register(base: str) -> None:
    """Teach transformers ``qquant_<base>``: attention and mask together.

    Without a mask of the same name a left-padded batch would silently attend to its padding.
    """

    def attention(
        module: torch.nn.Module, query: Tensor, key: Any, value: Any, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(key, QuantizedStates) and isinstance(value, QuantizedStates):
            fused: tuple[Tensor, None] = _attend(module, query, key, value, attention_mask, base, options)
            return fused
        # A model that rebuilt one of the two from pieces gets plain tensors for both.
        keys, values = (
            states._as_tensor() if isinstance(states, QuantizedStates) else states for states in (key, value)
        )
        if plain_attention.serves(query, keys, values, attention_mask, options):
            return plain_attention.attend(query, keys, values, attention_mask, options)
        result: tuple[Tensor, Tensor | None] = ALL_ATTENTION_FUNCTIONS[base](
            module, query, keys, values, attention_mask, **options
        )
        return result

    attention.attends_plain = True  # type: ignore[attr-defined]
    AttentionInterface.register(PREFIX + base, attention)
    AttentionMaskInterface.register(PREFIX + base, ALL_MASK_ATTENTION_FUNCTIONS[base])


@torch.compiler.disable
def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: QuantizedStates,
    value: QuantizedStates,
    mask: Tensor | None,
    base: str,
    options: dict[str, Any],
) -> tuple[Tensor, None]:
    """Fused attention over integers; [B, L, Hq, Dv] and no weights, as transformers wants them."""
    length, tokens = query.shape[2], key.shape[2]
    unknown = [name for name in _FOREIGN if options.get(name) is not None]
    if value.bits == 4:
        unknown.append("values of 4 bits")
    if mask is not None and mask.dtype not in (torch.bool, torch.int64):
        unknown.append(f"a mask of {mask.dtype}")
    if options.get("dropout") or options.get("is_causal") is False:
        unknown.append("dropout or no causality")
    if unknown:
        say_once(f"the int8 attention kernel does not know {', '.join(unknown)}: keys and values were dequantized")
        result: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS[base](
            module, query, key.dequantize(), value.dequantize(), mask, **options
        )
        return result
    if mask is None or mask.dim() == 2:
        mask = _full_mask(mask, length, tokens, options.get("sliding_window"), query.device)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    rows = query if key.rotation is None else query.float() @ key.rotation
    attend = kv_ops.decode_attention if key.kernel else kv_ops.attention_reference
    found = attend(
        rows, key.codes, key.scale, key.zero, value.codes, value.scale, value.zero, mask, scaling
    )  # [B, Hq, L, Dv]
    return found.to(query.dtype).transpose(1, 2).contiguous(), None


def _full_mask(
    padding: Tensor | None, length: int, tokens: int, window: int | None, device: torch.device
) -> Tensor | None:
    """The mask of flash attention, [B, T] or None, as [B or 1, 1, L, T]; None where plain causality says it all."""
    trimmed = window is not None and tokens >= window and length > 1
    if padding is None and not trimmed:
        return None
    seen = kv_ops.visible(length, tokens, device)
    if trimmed and window is not None:
        # A query sees itself and the window - 1 tokens before it.
        seen = seen.triu(tokens - length - window + 1)
    seen = seen[None, None]
    return seen if padding is None else seen & padding.bool()[:, None, None, -tokens:]
