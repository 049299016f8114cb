"""What a user may choose about weight quantization, and the record of what was done to each module.

Pydantic models only: strict, frozen, JSON in and out. How a choice is carried out lives in solver.py and walk.py,
how it is written into a checkpoint in checkpoint.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qquant.errors import UsageError
from qquant.methods import ClipSearch, Order, Recipe, best_without, recipe_of

Bits = Literal[2, 3, 4, 8]


class Strict(BaseModel):
    """A frozen model in which an unknown or mistyped field is an error, not a shrug."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModuleOverride(Strict):
    """What a pattern changes for the modules it matches; None keeps the general setting."""

    bits: Bits | None = None
    group_size: int | None = None
    sym: bool | None = None
    desc_act: bool | None = None


class QuantizeConfig(Strict):
    """How the weights are quantized. Field names are the ones every GPTQ reader knows."""

    method: str = "best"
    """"best": the most accurate pipeline. "fast": plain GPTQ, as AutoGPTQ. "rtn": round to nearest, needs no data. Or
    parts joined by "+", such as "qep+pivot+refine": ``qquant.methods`` names them, docs/methods.md says what each does.
    """
    bits: Bits = 4
    """Width of one stored weight: 2, 3, 4 or 8."""
    group_size: int = 128
    """Input columns that share a scale and a zero; -1 for the whole row. Must divide the row length."""
    sym: bool = True
    """Fix the zero at mid-range. Every kernel reads symmetric files; asymmetric ones are a little more accurate."""
    desc_act: bool = False
    """Visit columns by falling Hessian diagonal and group them in that order; readers then need g_idx."""
    static_groups: bool = False
    """Fit every group's grid before the first column is rounded. With desc_act: act-order that needs no g_idx."""
    act_group_aware: bool | None = None
    """Visit whole groups by their largest Hessian diagonal, and columns by diagonal inside each; needs no g_idx.
    None: as the method says, but off where desc_act or static_groups is on."""
    true_sequential: bool = True
    """Inside a block, quantize each set of linears on inputs that already passed the quantized sets before it."""
    clip_search: ClipSearch | None = None
    """Search a smaller range per group: by plain squared error (weight), weighted by the group's block of the Hessian
    (hessian), or by running the column loop for each (loop). off: the range of the weights, as AutoGPTQ does. None: as
    the method says."""
    damp_percent: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the Hessian's mean diagonal added to it before it is inverted."""
    strict: bool = False
    """An error instead of a fallback: where a Hessian needs more damping than was asked for, or columns left out of it,
    or rounding to nearest."""
    dynamic: dict[str, ModuleOverride] = Field(default_factory=dict)
    """Per-module rules, first match wins: "-:regex" leaves a module alone, "+:regex" changes its settings. The
    regex is matched from the start of the module's full name, as GPTQModel and vLLM do."""

    @field_validator("method")
    @classmethod
    def _method_is_known(cls, value: str) -> str:
        try:
            recipe_of(value)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("group_size")
    @classmethod
    def _group_size_is_positive_or_whole_row(cls, value: int) -> int:
        if value != -1 and value < 1:
            raise ValueError(f"group_size must be -1 (the whole row) or at least 1, got {value}")
        return value

    @field_validator("dynamic")
    @classmethod
    def _patterns_compile(cls, rules: dict[str, ModuleOverride]) -> dict[str, ModuleOverride]:
        for pattern in rules:
            if pattern[:2] not in ("-:", "+:"):
                raise ValueError(f'a dynamic rule starts with "-:" (skip) or "+:" (change), got {pattern!r}')
            try:
                re.compile(pattern[2:])
            except re.error as error:
                raise ValueError(f"dynamic rule {pattern!r} is not a regular expression: {error}") from error
        return rules

    @model_validator(mode="after")
    def _orders_do_not_clash(self) -> Self:
        if self.act_group_aware and self.desc_act:
            raise ValueError("act_group_aware and desc_act are two orders of the same columns; switch one of them off")
        if self.act_group_aware and self.group_size == -1:
            raise ValueError(
                "act_group_aware orders groups, and group_size -1 has only one; use desc_act or a group size"
            )
        return self

    @model_validator(mode="after")
    def _method_can_be_carried_out(self) -> Self:
        if not self.true_sequential and self.recipe.needs_exact_stream:
            raise ValueError(
                f'method "{self.method}" compares with the original stage by stage, which needs true_sequential; leave '
                "it on (no --one-pass), or choose a method without qep, gptaq, residual and tune: the most accurate is "
                f'"{best_without("qep", "residual")}"'
            )
        if self.static_groups and self.clip == "loop":
            raise ValueError(
                "clip loop fits each group to what earlier groups left of it, and static_groups fits all beforehand; "
                "use clip hessian, or leave static_groups out"
            )
        return self

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build from a dict of options. Raises UsageError that lists every wrong field in one line."""
        try:
            return cls.model_validate(dict(data))
        except ValueError as error:
            raise UsageError(_one_line(error)) from error

    @cached_property
    def recipe(self) -> Recipe:
        """What the method consists of."""
        return recipe_of(self.method)

    @cached_property
    def needs_data(self) -> bool:
        """Whether calibration data is needed."""
        return self.recipe.needs_data

    @cached_property
    def clip(self) -> ClipSearch:
        """The search for a smaller range that is in force once None is resolved."""
        return self.clip_search or self.recipe.clip

    @cached_property
    def order(self) -> Order:
        """The order of columns that is in force where desc_act is off."""
        if self.act_group_aware is not None:
            return "group-aware" if self.act_group_aware else "left-to-right"
        if not self.needs_data or self.static_groups:
            return "left-to-right"
        return self.recipe.order

    @cached_property
    def group_aware(self) -> bool:
        """Whether whole groups are visited by their largest Hessian diagonal."""
        return self.order == "group-aware" and not self.desc_act

    @cached_property
    def needs_g_idx(self) -> bool:
        """Whether a reader must follow g_idx: only act-order without static groups scatters a group's columns."""
        return self.needs_data and self.desc_act and not self.static_groups and self.group_size != -1

    def for_module(self, name: str) -> QuantizeConfig | None:
        """The settings of one module by its full name, or None if a rule leaves it alone."""
        for pattern, override in self.dynamic.items():
            if re.match(pattern[2:], name):
                if pattern.startswith("-:"):
                    return None
                changes = override.model_dump(exclude_none=True)
                return QuantizeConfig.from_dict({**self.model_dump(exclude={"dynamic"}), **changes})
        return self


class ModuleRecord(Strict):
    """What was done to one linear layer; one line of a checkpoint's quant_log.json."""

    name: str
    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    shape: tuple[int, int]
    """[out, in]."""
    relative_error: float
    """trace(D H D^T) / trace(W H W^T), D = quantized - original: share of the output's energy that is error,
    over about 64 evenly spaced rows. Where H had to be damped more than asked, it is H with that damping; without data
    (rtn), or where H could not be used, it is the identity."""
    damp_percent: float
    """The damping that was used in the end."""
    damp_escalations: int
    """How often damping had to be raised tenfold before the Hessian could be inverted."""
    dead_columns: int
    """Input columns that calibration never excited; their weights were rounded to nearest."""
    seconds: float
    fallback: str | None = None
    """What was done instead of what was asked, and why; None: all as asked."""


class QuantizeLog(Strict):
    """The record of a whole quantization run, in the order the modules were done."""

    schema_version: int = 1
    modules: tuple[ModuleRecord, ...]
    skipped: tuple[str, ...] = ()
    """Linear layers left alone by a rule."""


def _one_line(error: ValueError) -> str:
    """Fold a pydantic error into one line: field, rule and what came, for each fault."""
    details = getattr(error, "errors", None)
    if details is None:
        return str(error)
    parts = []
    for item in details():
        field = ".".join(str(piece) for piece in item["loc"]) or "options"
        message = item["msg"].removeprefix("Value error, ")
        parts.append(
            f"{field}: {message}" if item["type"] == "value_error" else f"{field}: {message}, got {item['input']!r}"
        )
    return "; ".join(parts)
