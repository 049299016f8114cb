"""How exactly each layer's keys and values survive 8 bits, and which of their channels are outliers.

Runs a loaded model over windows of ids and looks at what it hands to its cache. What the errors do to predictions is
kv_accuracy.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from qquant.kv_cache_quant import dequantize_cache_torch
from qquant.kv_layer import Int8Layer
from qquant.kv_report import KVPeaks, KVStates

MAX_PEAKS = 512
"""Most columns that a layer's picture gets; wider layers keep the largest of neighbouring channels."""

_TINY = torch.finfo(torch.float32).tiny
"""Keeps what is zero throughout, and so are its errors, from dividing by zero."""


@dataclass
class _Tally:
    """Sums over tokens of one layer's keys or values, each [H, D] float64."""

    energy: Tensor
    peak: Tensor
    stored_energy: Tensor
    stored_peak: Tensor
    error: Tensor


def layer_states(
    model: PreTrainedModel, samples: Sequence[Tensor], device: torch.device, make_cache: Callable[[], Cache]
) -> dict[int, tuple[KVPeaks, KVStates, KVStates]]:
    """Errors and peaks of the keys and the values of every layer that the cache keeps in 8 bits.

    Args:
        model: a causal language model. Run, not modified.
        samples: [tokens] int64 windows; each is one call of the model.
        device: of the model.
        make_cache: gives an empty int8 cache with exact prefill and without rotation, so that the model itself computes
            with exact keys and values throughout, and a layer's error is its own.

    Returns:
        Place in the cache -> (keys as the model computes them, keys as stored, values).
    """
    tallies: dict[int, tuple[_Tally, _Tally]] = {}
    with torch.inference_mode():
        for sample in samples:
            cache = make_cache()
            for place, layer in enumerate(cache.layers):
                if isinstance(layer, Int8Layer):
                    setattr(layer, "update", _watching(layer, tallies, place))  # noqa: B010
            model(input_ids=sample[None].to(device), past_key_values=cache, use_cache=True)
    return {place: (_peaks(keys.peak), _summary(keys), _summary(values)) for place, (keys, values) in tallies.items()}


def _watching(
    layer: Int8Layer, tallies: dict[int, tuple[_Tally, _Tally]], place: int
) -> Callable[..., tuple[Any, Any]]:
    """The layer's ``update``, after which what it was given is held against what it stores."""
    update = layer.update

    def watched(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        result: tuple[Any, Any] = update(keys, values, *args, **kwargs)
        if place not in tallies:
            tallies[place] = (_new_tally(keys), _new_tally(values))
        offsets = (layer.key_offset, None)
        for tally, states, stored, offset in zip(
            tallies[place], (keys, values), layer.layer_past, offsets, strict=True
        ):
            _add(tally, states, dequantize_cache_torch(*stored), offset)
        return result

    return watched


def _new_tally(states: Tensor) -> _Tally:
    _, heads, _, dim = states.shape
    return _Tally(*(torch.zeros(heads, dim, dtype=torch.float64) for _ in range(5)))


def _add(tally: _Tally, states: Tensor, stored: Tensor, offset: Tensor | None) -> None:
    """Add [1, H, T, D] keys or values, and what was stored of the newest of them (a sliding layer forgets the rest)."""
    exact = states[:, :, -stored.shape[2] :].double()
    wanted = exact if offset is None else exact - offset.double()
    tally.energy += _sum_of_squares(exact)
    tally.stored_energy += _sum_of_squares(wanted)
    tally.error += _sum_of_squares(stored.double() - wanted)
    tally.peak = torch.maximum(tally.peak, exact.abs().amax(dim=(0, 2)).cpu())
    tally.stored_peak = torch.maximum(tally.stored_peak, wanted.abs().amax(dim=(0, 2)).cpu())


def _sum_of_squares(states: Tensor) -> Tensor:
    return states.square().sum(dim=(0, 2)).cpu()


def _summary(tally: _Tally) -> KVStates:
    per_channel = tally.error / tally.stored_energy.clamp(min=_TINY)
    return KVStates(
        relative_error=(tally.error.sum() / tally.energy.sum().clamp(min=_TINY)).sqrt().item(),
        channel_error=per_channel.mean().sqrt().item(),
        peaks=_peaks(tally.stored_peak),
    )


def _peaks(peak: Tensor) -> KVPeaks:
    pooled = -(-peak.numel() // MAX_PEAKS)
    return KVPeaks(
        outlier_ratio=(peak.amax(-1) / peak.median(-1).values.clamp(min=_TINY)).max().item(),
        heads=len(peak),
        # Four digits are more than a colour shows.
        largest=tuple(float(f"{part.max().item():.4g}") for part in peak.flatten().split(pooled)),
        channels_per_peak=pooled,
    )
