"""A decoder layer's step for one new token per sequence in one operator, or two around another cache or attention.

Which layers may be computed so is found by their structure and by trying: the step must give the very bits of the layer
it stands in front of. The operators are layer_ops.py's, the trial is layer_trial.py's; a model's layers are found by
models/layouts.py. The layer itself stays what and where it is: only its ``forward`` is set on the instance, as
accelerate does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from qquant import plain_attention
from qquant.cache_room import take_place, with_place
from qquant.layer_ops import attention_inputs, kernels_are_live, layer_output, layer_step
from qquant.layer_trial import attention_of, same_bits
from qquant.layer_turns import TurnForm
from qquant.linear import QuantLinear
from qquant.linear_kernels import ACTIVATION_BITS, Implementation
from qquant.linear_ops import PANEL_ROWS
from qquant.models.layouts import Layout, known_layout
from qquant.rms_norm import KernelRMSNorm

MOST_ROWS = 8
"""Sequences of one call; more are left to the layer's own way, which is no slower by then."""

_SERVED = (Implementation.PANELS, Implementation.INT8)
"""What may serve a layer's linears; the operators call these kernels themselves."""
_PASSED_ON = ("position_ids", "use_cache")
"""Arguments of a layer that it may hand on to its attention function."""

Stage = tuple[Any, ...]
"""Nine arguments of the operators: the panels of a stage, bits, group size, zero, activation bits."""


class _Prepared(NamedTuple):
    """Arguments of the operators, and what must still be so for them to be right."""

    before: tuple[Any, ...]
    """Of attention_inputs, but x, cos and sin: weight and eps of the norm, all that follows sin. Empty: as things are,
    the operators cannot compute the layer."""
    after: tuple[Any, ...]
    """Of layer_output, after the stream."""
    linears: list[tuple[QuantLinear, Any, Any]]
    """Each with what it calls and its words: replaced when it is changed."""
    norms: list[tuple[KernelRMSNorm, Tensor, float]]
    """Each with its weight and eps."""
    wholes: list[Any]
    """What computes siblings together, while it does."""

    def holds(self) -> bool:
        """Whether no linear and no norm was changed."""
        for linear, products, words in self.linears:
            if linear._products is not products or linear._buffers.get("words") is not words:
                return False
        for norm, weight, eps in self.norms:
            if norm._parameters.get("weight") is not weight or weight.dtype != torch.bfloat16 or norm.eps != eps:
                return False
        return all(joint.whole for joint in self.wholes)


class DecoderStep:
    """Computes a layer of the pre-norm kind; its ``forward`` is set as the layer's own, on the instance."""

    def __init__(self, layer: nn.Module, layout: Layout, gate_first: bool) -> None:
        """Take a layer apart; raises ``_Unfit`` where its parts are not those that the operators know."""
        units = layout.units
        assert units is not None
        attention, _ = units
        self.layer = layer
        self.attention: Any = _part(layer, attention.module)
        self._units, self._gate_first = units, gate_first
        self._norms = [_norm(layer, unit.norm) for unit in units]
        self._stages = [[_linear(layer, name) for name in stage] for unit in units for stage in unit.stages]
        self._linears = [linear for stage in self._stages for linear in stage]
        self.features = self._norms[0].weight.shape[0]
        self.size = _whole(getattr(self.attention, "head_dim", None), "head_dim")
        self.turns = TurnForm(self.size, layout.turns_in_float32)
        self.index = _whole(getattr(self.attention, "layer_idx", None), "layer_idx")
        self._head_norms: list[Any] = [self.attention._modules.get(name) for name in ("q_norm", "k_norm")]
        self._check_parts()
        self._children = [
            (parent, name, child)
            for parent in layer.modules()
            for name, child in parent._modules.items()
            if child is not None
        ]
        self._watched: list[tuple[Any, ...]] | None = None
        self._prepared: _Prepared | None = None
        self.learn({})

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle looks at its own layer's parts, and puts its arguments together from them."""
        return {**self.__dict__, "_watched": None, "_prepared": None}

    def learn(self, options: dict[str, Any]) -> None:
        """Take over what the layer tells its attention function."""
        self._handed_on = tuple(name for name in _PASSED_ON if name in options)
        self._options = {name: value for name, value in options.items() if name not in _PASSED_ON}
        self._scaling = options.get("scaling") or self.size**-0.5
        self._told_scaling = getattr(self.attention, "scaling", None)
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
        """Put the operators' arguments together; raises ``_Unfit`` where a linear is not served by panels.

        It is asked again when something has changed, and not before, whatever the answer.
        """
        first, second = self._norms
        head_norms = [norm for norm in self._head_norms if norm is not None]
        norms = [(norm, norm.weight, norm.eps) for norm in (first, second, *head_norms)]
        found = self._prepared = _Prepared((), (), [], norms, [])
        inputs, project, raised, lower = (self._arguments(stage, found) for stage in self._stages)
        query, key = self._heads()
        query_norm, key_norm = (None if norm is None else norm.weight for norm in self._head_norms)
        head_eps = next((norm.eps for norm in head_norms), 0.0)
        before = (first.weight, first.eps, query_norm, key_norm, head_eps, *inputs, query, key, self.size)
        width = self._stages[2][0].out_features
        after = (*project, second.weight, second.eps, *raised, *lower, width, self._gate_first)
        self._prepared = found._replace(before=before, after=after)
        return self._prepared

    def _heads(self) -> tuple[int, int]:
        """Heads of queries and of keys, by the rows of q, k and v, which may be one linear."""
        rows = [linear.out_features for linear in self._stages[0]]
        if len(rows) == 1:
            groups = _whole(getattr(self.attention, "num_key_value_groups", None), "num_key_value_groups")
            key = rows[0] // (groups + 2)
            rows = [groups * key, key, key]
            if any(count % PANEL_ROWS for count in rows):
                raise _Unfit("q, k and v in one linear whose parts begin inside of a panel")
        return rows[0] // self.size, rows[1] // self.size

    def _arguments(self, stage: list[QuantLinear], found: _Prepared) -> Stage:
        """Of one stage; what they are made of is added to what was found."""
        first = stage[0]
        for linear in stage:
            step = linear.prepare(torch.bfloat16)[0]
            found.linears.append((linear, linear._products, linear._buffers.get("words")))
            if step.implementation not in _SERVED or step.tokens < MOST_ROWS or not linear.packed:
                raise _Elsewhere(f"linears served by {step.implementation}")
        panels, form = first.panels, first._form
        assert form is not None
        if len(stage) > 1:
            joint = first.siblings
            if joint is None or any(one.siblings is not joint for one in stage):
                raise _Unfit("linears that share an input but lie apart")
            panels = joint.panels
            found.wholes.append(joint)
        bits = ACTIVATION_BITS[first.steps(torch.bfloat16)[0].implementation]
        return (*panels, first.bits, form.group_size, form.zero or 0, bits)

    def forward(
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
        weight, eps, *rest = prepared.before
        inputs = (hidden_states, weight, eps, *position_embeddings[:2], *rest)
        held = self._plain_cache(attend, hidden_states.shape[0], past_key_values, attention_mask, kwargs)
        if held is not None:
            keys, values = with_place(held)
            found = layer_step(*inputs, keys, values, attention_mask, self._scaling, *prepared.after)
            take_place(held, keys, values)
            return found
        query, key, value = attention_inputs(*inputs)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.index)
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
        held = cache.layers[self.index] if self.index < len(cache.layers) else None
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
        if keys.dtype != torch.bfloat16 or values.dtype != torch.bfloat16:
            return None
        if keys.device.type != "cpu" or values.device.type != "cpu":
            return None
        if mask is not None:
            seen = (1, keys.shape[2] + 1)
            if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[2:] != seen or mask.shape[0] not in (1, batch):
                return None
        return held if self._plain and (not kwargs or plain_attention.takes(kwargs)) else None

    def _ready(self, x: Tensor, positions: Any) -> _Prepared | None:
        """Arguments if the operators may compute this call."""
        if (
            torch.compiler.is_compiling()
            or type(x) is not Tensor
            or x.dtype != torch.bfloat16
            or x.dim() != 3
            or x.shape[1] != 1
            or not 0 < x.shape[0] <= MOST_ROWS
            or x.device.type != "cpu"
            or torch.is_grad_enabled()
            or self.layer.training
            or torch.is_autocast_enabled("cpu")
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or not self.turns.fits(positions, x.shape[0])
            or getattr(self.attention, "scaling", None) != self._told_scaling
        ):
            return None
        for siblings, name, child, own, after, before in self._watched or self._watch():
            if siblings.get(name) is not child or before or "forward" in own or (after and not _idle(after)):
                return None
        prepared = self._prepared
        if prepared is None or not prepared.holds():
            try:
                prepared = self.prepare()
            except _Unfit:
                return None
        return prepared if prepared.before else None

    def _watch(self) -> list[tuple[Any, ...]]:
        """What must still be so at each call: who is whose child, and that none has hooks or a forward of its own."""
        self._watched = [
            (parent._modules, name, child, child.__dict__, child._forward_hooks, child._forward_pre_hooks)
            for parent, name, child in self._children
        ]
        return self._watched


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


def _part(layer: nn.Module, name: str) -> nn.Module:
    try:
        return layer.get_submodule(name)
    except AttributeError as error:
        raise _Unfit(f"no {name}") from error


def _norm(layer: nn.Module, name: str) -> KernelRMSNorm:
    norm = _part(layer, name)
    if not isinstance(norm, KernelRMSNorm):
        raise _Elsewhere(f"{name} does not run on rms_norm")
    return norm


def _linear(layer: nn.Module, name: str) -> QuantLinear:
    linear = _part(layer, name)
    if type(linear) is not QuantLinear:
        raise _Elsewhere(f"{name} is not quantized")
    return linear


def _whole(number: Any, name: str) -> int:
    if not isinstance(number, int):
        raise _Unfit(f"no {name}")
    return number


def step_of(layer: nn.Module) -> DecoderStep | None:
    """The step that was set as a layer's forward, or None."""
    step = getattr(vars(layer).get("forward"), "__self__", None)
    return step if isinstance(step, DecoderStep) else None


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
    done: Counter[str] = Counter()
    for layer in layers.children():
        if step_of(layer) is not None:
            del layer.forward  # of an earlier call: its parts may be others now
        if "forward" in vars(layer):
            continue
        try:
            done[_tried(layer, layout, config)] += 1
        except _Elsewhere:
            continue
    one = "layer_step" if plain_attention.kernel_is_live() else "attention_inputs and layer_output"
    return [
        f"{count} decoder layers (bfloat16): "
        + (f"as they are, {why}" if why else f"{one} for 1 token in up to {MOST_ROWS} sequences, the same bits")
        for why, count in done.items()
    ]


def _tried(layer: nn.Module, layout: Layout, config: Any) -> str:
    """Set a layer's forward; returns why not, or an empty text. Raises ``_Elsewhere``."""
    try:
        steps = [DecoderStep(layer, layout, gate_first) for gate_first in (True, False)]
        for step in steps:
            step.prepare()
    except _Elsewhere:
        raise
    except _Unfit as error:
        return str(error)
    if not attention_of(steps[0].attention):
        return "attention is not looked up by its name"
    fitting = next((step for step in steps if same_bits(step, config)), None)
    if fitting is None:
        return "they compute otherwise"
    layer.forward = fitting.forward
    return ""
