"""A decoder layer's step for one new token per sequence in one operator, or two around another cache or attention.

Which layers may be computed so is found by their structure and by trying: the step must give the very bits of the layer
it stands in front of. The operators are layer_ops.py's; a model's layers are found by models/layouts.py. The layer
itself stays what and where it is: only its ``forward`` is set on the instance, as accelerate does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from qquant import plain_attention
from qquant.cache_room import with_place
from qquant.layer_ops import attention_inputs, kernels_are_live, layer_output, layer_step
from qquant.linear import QuantLinear
from qquant.linear_kernels import Implementation
from qquant.models.layouts import Layout, Unit, known_layout
from qquant.rms_norm import KernelRMSNorm

MOST_ROWS = 8
"""Sequences of one call; more are left to the layer's own way, which is no slower by then."""

_ACTIVATION_BITS = {Implementation.PANELS: 0, Implementation.INT8: 8}
_PASSED_ON = ("position_ids", "use_cache")
"""Arguments of a layer that it may hand on to its attention function."""

Stage = tuple[Any, ...]
"""Nine arguments of the operators: the panels of a stage, bits, group size, zero, activation bits."""


class _Prepared(NamedTuple):
    """Arguments of the operators, for as long as no linear was changed."""

    before: tuple[Any, ...]
    """Of attention_inputs, after cos and sin."""
    after: tuple[Any, ...]
    """Of layer_output, after the stream."""


class DecoderStep:
    """The ``forward`` of a layer of the pre-norm kind, set on the instance."""

    def __init__(self, layer: nn.Module, units: tuple[Unit, Unit], gate_first: bool) -> None:
        """Take a layer apart; raises ``_Unfit`` where its parts are not those that the operators know."""
        attention, _ = units
        self.layer = layer
        self.attention: Any = layer.get_submodule(attention.module)
        self._units, self._gate_first = units, gate_first
        self._norms = [_norm(layer, unit.norm) for unit in units]
        self._stages = [[_linear(layer, name) for name in stage] for unit in units for stage in unit.stages]
        self._linears = [linear for stage in self._stages for linear in stage]
        self._size = _whole(getattr(self.attention, "head_dim", None), "head_dim")
        self._index = _whole(getattr(self.attention, "layer_idx", None), "layer_idx")
        self._head_norms = [self.attention._modules.get(name) for name in ("q_norm", "k_norm")]
        self._check_parts()
        # What must still be so at each call: who is whose child, and that none has hooks or a forward of its own.
        self._children = [
            (parent._modules, name, child, child.__dict__, child._forward_hooks, child._forward_pre_hooks)
            for parent in layer.modules()
            for name, child in parent._modules.items()
            if child is not None
        ]
        self.learn({})
        self._prepared: _Prepared | None = None
        self._stamps: list[tuple[QuantLinear, Any, Any]] = []
        self._wholes: list[Any] = []

    def learn(self, options: dict[str, Any]) -> None:
        """Take over what the layer tells its attention function."""
        self._handed_on = tuple(name for name in _PASSED_ON if name in options)
        self._options = {name: value for name, value in options.items() if name not in _PASSED_ON}
        self._scaling = options.get("scaling") or self._size**-0.5
        self._plain = plain_attention.takes(self._options)

    def _check_parts(self) -> None:
        known = {self.attention, self.layer.get_submodule(self._units[1].module), *self._norms, *self._linears}
        known |= {norm for norm in self._head_norms if norm is not None}
        extra = [
            name for name, module in self.layer.named_modules() if module not in known and module is not self.layer
        ]
        activation = f"{self._units[1].module}.act_fn"
        if set(extra) - {activation}:
            raise _Unfit(f"parts that the operators do not know: {', '.join(sorted(extra))}")
        if any(norm is not None and not isinstance(norm, KernelRMSNorm) for norm in self._head_norms):
            raise _Unfit("norms of heads that do not run on rms_norm")
        if len({norm.eps for norm in self._head_norms if norm is not None}) > 1:
            raise _Unfit("norms of heads with two eps")

    def prepare(self) -> _Prepared:
        """Put the operators' arguments together; raises ``_Unfit`` where a linear is not served by panels."""
        self._stamps, self._wholes = [], []
        inputs, project, raised, lower = (self._arguments(stage) for stage in self._stages)
        query, key = (stage.out_features // self._size for stage in self._stages[0][:2])
        first, second = self._norms
        query_norm, key_norm = (None if norm is None else norm.weight for norm in self._head_norms)
        head_eps = next((norm.eps for norm in self._head_norms if norm is not None), 0.0)
        self._first = first.weight, first.eps
        before = (query_norm, key_norm, head_eps, *inputs, query, key, self._size)
        width = self._stages[2][0].out_features
        after = (*project, second.weight, second.eps, *raised, *lower, width, self._gate_first)
        self._prepared = _Prepared(before, after)
        return self._prepared

    def _arguments(self, stage: list[QuantLinear]) -> Stage:
        first = stage[0]
        for linear in stage:
            step = linear.prepare(torch.bfloat16)[0]
            if step.implementation not in _ACTIVATION_BITS or step.tokens < MOST_ROWS or not linear.packed:
                raise _Elsewhere(f"linears served by {step.implementation}")
            self._stamps.append((linear, linear._products, linear._buffers.get("words")))
        panels, form = first.panels, first._form
        assert form is not None
        if len(stage) > 1:
            joint = first.joint
            if joint is None or any(one.joint is not joint for one in stage):
                raise _Unfit("linears that share an input but lie apart")
            panels = joint.panels
            self._wholes.append(joint)
        bits = _ACTIVATION_BITS[first.steps(torch.bfloat16)[0].implementation]
        return (*panels, first.bits, form.group_size, form.zero or 0, bits)

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: Any = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As the layer's own forward."""
        prepared = self._ready(hidden_states, position_embeddings)
        attend = None if prepared is None else self._attend()
        if prepared is None or attend is None:
            return type(self.layer).forward(
                self.layer,
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        cos, sin = position_embeddings
        weight, eps = self._first
        held = self._plain_cache(attend, hidden_states.shape[0], past_key_values, attention_mask, kwargs)
        if held is not None:
            keys, values = with_place(held)
            after = prepared.after
            return layer_step(
                hidden_states,
                weight,
                eps,
                cos,
                sin,
                *prepared.before,
                keys,
                values,
                attention_mask,
                self._scaling,
                *after,
            )
        query, key, value = attention_inputs(hidden_states, weight, eps, cos, sin, *prepared.before)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self._index)
        if self._handed_on:
            given = {"position_ids": position_ids, "use_cache": use_cache}
            kwargs.update((name, given[name]) for name in self._handed_on)
        attended, _ = attend(self.attention, query, key, value, attention_mask, **self._options, **kwargs)
        return layer_output(attended, hidden_states, *prepared.after)

    def _attend(self) -> Any:
        # As transformers' attention modules look it up; "eager" is a function of each model's own file.
        return ALL_ATTENTION_FUNCTIONS.get(self.attention.config._attn_implementation)

    def _plain_cache(self, attend: Any, batch: int, cache: Any, mask: Any, kwargs: dict[str, Any]) -> Any:
        """The cache's layer if it only ever appends and our attention would read it as it is; else None."""
        if type(cache) is not DynamicCache or cache.offloading or not getattr(attend, "attends_plain", False):
            return None
        held = cache.layers[self._index] if self._index < len(cache.layers) else None
        if type(held) is not DynamicLayer or not held.is_initialized:
            return None
        keys, values = held.keys, held.values
        if (
            type(keys) is not Tensor
            or type(values) is not Tensor
            or keys.dim() != 4
            or not keys.shape[2]
            or keys.shape[0] != batch
        ):
            return None
        if keys.dtype != torch.bfloat16 or values.dtype != torch.bfloat16 or keys.device.type != "cpu":
            return None
        seen = (1, keys.shape[2] + 1)
        if mask is not None and (mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2:] != seen):
            return None
        return held if self._plain and (not kwargs or plain_attention.takes(kwargs)) else None

    def _ready(self, x: Tensor, positions: Any) -> _Prepared | None:
        """Arguments if the operators may compute this call."""
        if (
            type(x) is not Tensor
            or x.dtype != torch.bfloat16
            or x.dim() != 3
            or x.shape[1] != 1
            or not 0 < x.shape[0] <= MOST_ROWS
            or x.device.type != "cpu"
            or torch.is_grad_enabled()
            or self.layer.training
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or not isinstance(positions, tuple)
            or len(positions) != 2
        ):
            return None
        for turns in positions:
            if turns.dtype != torch.bfloat16 or turns.dim() != 3 or turns.shape[1:] != (1, self._size):
                return None
        for siblings, name, child, own, after, before in self._children:
            if siblings.get(name) is not child or before or "forward" in own or (after and not _idle(after)):
                return None
        for linear, products, words in self._stamps:
            if linear._products is not products or linear._buffers.get("words") is not words:
                return self._renewed()
        for joint in self._wholes:
            if not joint.whole:
                return self._renewed()
        return self._prepared or self._renewed()

    def _renewed(self) -> _Prepared | None:
        try:
            return self.prepare()
        except _Unfit:
            self._stamps, self._wholes, self._prepared = [], [], None
            return None


def _idle(hooks: Mapping[int, Any]) -> bool:
    """Whether hooks are those that transformers leaves behind once outputs were captured, and none is captured now."""
    if any(getattr(hook, "__module__", None) != output_capturing.__name__ for hook in hooks.values()):
        return False
    collector = getattr(output_capturing, "_active_collector", None)
    # What the layer itself gives out, its hidden states, is seen by a hook of its own.
    return collector is not None and set(collector.get() or ()) <= {"hidden_states", "_hidden_states_layers"}


class _Unfit(Exception):
    """A layer that the operators cannot compute; the text says why."""


class _Elsewhere(_Unfit):
    """As ``_Unfit``, for a reason that the lines of norms and linears give already."""


def _norm(layer: nn.Module, name: str) -> KernelRMSNorm:
    norm = layer.get_submodule(name)
    if not isinstance(norm, KernelRMSNorm):
        raise _Elsewhere(f"{name} does not run on rms_norm")
    return norm


def _linear(layer: nn.Module, name: str) -> QuantLinear:
    linear = layer.get_submodule(name)
    if type(linear) is not QuantLinear:
        raise _Elsewhere(f"{name} is not quantized")
    return linear


def _whole(number: Any, name: str) -> int:
    if not isinstance(number, int):
        raise _Unfit(f"no {name}")
    return number


def use_decoder_step(model: nn.Module) -> list[str]:
    """Let a model's layers compute single tokens by ``DecoderStep``, in place, where that gives the same bits.

    Args:
        model: of transformers, its linears packed, its norms on rms_norm.

    Returns:
        Lines to print: how many layers do, how many do not and why; none where the operators are not there.
    """
    config: Any = getattr(model, "config", None)
    layout: Layout | None = known_layout(str(getattr(config, "model_type", "")))
    if layout is None or layout.units is None or not kernels_are_live():
        return []
    try:
        layers = model.get_submodule(layout.blocks)
    except AttributeError:
        return []
    attention, mlp = layout.units
    done: Counter[str] = Counter()
    for layer in layers.children():
        present = vars(layer).get("forward")
        if isinstance(present, DecoderStep):
            done[""] += 1
        if present is not None:
            continue
        try:
            done[_tried(layer, (attention, mlp), config)] += 1
        except _Elsewhere:
            continue
    return [
        f"{count} decoder layers (bfloat16): "
        + (f"as they are, {why}" if why else "layer_step for 1 token in up to 8 sequences, the same bits")
        for why, count in done.items()
    ]


def _tried(layer: nn.Module, units: tuple[Unit, Unit], config: Any) -> str:
    """Set a layer's forward; returns why not, or an empty text. Raises ``_Elsewhere``."""
    try:
        steps = [DecoderStep(layer, units, gate_first) for gate_first in (True, False)]
        for step in steps:
            step.prepare()
        with torch.no_grad():
            fitting = next((step for step in steps if _agrees(step, config)), None)
    except _Elsewhere:
        raise
    except _Unfit as error:
        return str(error)
    if fitting is None:
        return "they compute otherwise"
    layer.forward = fitting
    return ""


@contextmanager
def _recorded(name: str) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
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


def _agrees(step: DecoderStep, config: Any) -> bool:
    """Whether layer and step give the same bits for tokens of two sequences, and leave the same cache behind."""
    layer, name = step.layer, step.attention.config._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise _Unfit(f"attention is {name}")
    features = step._norms[0].weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    caches = DynamicCache(config=config), DynamicCache(config=config)
    training = layer.training
    layer.eval()
    try:
        for position in range(3):
            x = torch.randn(2, 1, features, generator=generator).bfloat16()
            angles = torch.randn(2, 1, step._size, generator=generator)
            options = {
                "position_ids": torch.full((2, 1), position),
                "use_cache": True,
                "position_embeddings": (angles.cos().bfloat16(), angles.sin().bfloat16()),
            }
            with _recorded(name) as calls:
                wanted = layer(x, past_key_values=caches[0], **options)
            if len(calls) != 1 or calls[0][0] is not step.attention or not isinstance(wanted, Tensor):
                return False
            step.learn(calls[0][1])
            if not torch.equal(wanted, step(x, past_key_values=caches[1], **options)):
                return False
    finally:
        layer.train(training)
    one, other = (cast(Any, cache.layers[step._index]) for cache in caches)
    return torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
