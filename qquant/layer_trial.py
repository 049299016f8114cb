"""A decoder layer beside what is to compute in its stead: both run for a few tokens, and every bit must agree.

What the layer tells its attention function is taken down on the way. Which layers are tried is decoder_step.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qquant.layer_turns import TurnForm

_SEQUENCES, _TOKENS = 2, 3
"""The first token finds an empty cache, the second one that others have made, the third one that was made here."""


class StandIn(Protocol):
    """What is to compute in a layer's stead."""

    layer: nn.Module
    attention: Any
    """The layer's attention module."""
    features: int
    """Of the residual stream."""
    turns: TurnForm
    index: int
    """Of the layer, in a cache."""

    def learn(self, options: dict[str, Any]) -> None:
        """Take over what the layer tells its attention function."""
        ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own forward."""
        ...


@contextmanager
def _taken_down(name: str) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Calls of an attention function of transformers: its module and its options."""
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    before, calls = local.get(name), []
    plain = ALL_ATTENTION_FUNCTIONS[name]

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        calls.append((module, options))
        return plain(module, query, key, value, mask, **options)

    local[name] = attend
    try:
        yield calls
    finally:
        del local[name]
        if before is not None:
            local[name] = before


def attention_of(attention: Any) -> str:
    """The name of what an attention module calls, as transformers looks it up; empty if it does not look it up."""
    name = attention.config._attn_implementation
    return name if name in ALL_ATTENTION_FUNCTIONS else ""


def same_bits(step: StandIn, config: Any) -> bool:
    """Whether layer and stand-in give the same bits, and leave the same cache behind.

    Args:
        step: for a layer whose attention has a name. It learns what the layer tells its attention function.
        config: of the model.
    """
    layer = step.layer
    generator = torch.Generator().manual_seed(0)
    caches = DynamicCache(config=config), DynamicCache(config=config)
    training = layer.training
    layer.eval()
    try:
        for position in range(_TOKENS):
            x = torch.randn(_SEQUENCES, 1, step.features, generator=generator).bfloat16()
            options = {
                "position_ids": torch.full((_SEQUENCES, 1), position),
                "use_cache": True,
                "position_embeddings": step.turns.random(_SEQUENCES, generator),
            }
            with torch.no_grad(), _taken_down(attention_of(step.attention)) as calls:
                wanted = layer(x, past_key_values=caches[0], **options)
            if len(calls) != 1 or calls[0][0] is not step.attention or not isinstance(wanted, Tensor):
                return False
            step.learn(calls[0][1])
            with torch.no_grad():
                if not torch.equal(wanted, step.forward(x, past_key_values=caches[1], **options)):
                    return False
    finally:
        layer.train(training)
    one, other = (cast(Any, cache.layers[step.index]) for cache in caches)
    return torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
