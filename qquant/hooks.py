"""What enters and leaves a model's modules, as every room that runs blocks reads it; knows no model and no data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def counted_rows(values: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of a sample's [1, T, K] that count, [T', K]: those where ``mask`` [T] bool holds, all without one."""
    flat = values.reshape(-1, values.shape[-1])
    return flat if mask is None else flat[mask.to(flat.device)]


@contextmanager
def inputs_seen(layers: Sequence[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """While this lasts: place in ``layers`` -> what reached that layer last."""
    seen: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, n=n: seen.__setitem__(n, args[0]))
        for n, layer in enumerate(layers)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def first_output(output: Any) -> Tensor:
    """The hidden states of a module's output, which some models return as the first of a tuple."""
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result
