"""The names of quantization methods and what each stands for; a method is one name or several joined by "+".

Only names and numbers: the mathematics is in solver.py and the rooms under it, each named in docs/methods.md.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Literal

from qquant.errors import UsageError

Base = Literal["rtn", "gptq", "gptaq", "qep"]
Order = Literal["left-to-right", "group-aware", "pivot"]
ClipSearch = Literal["off", "weight", "hessian", "loop"]


@dataclass(frozen=True)
class Recipe:
    """What a method does, part by part."""

    base: Base = "gptq"
    """rtn: round to nearest. gptq: error feedback. gptaq, qep: feedback that also looks at the original's inputs."""
    strength: float = 1.0
    """Of gptaq and qep: 0 is plain GPTQ, 1 aims at the original's outputs in full."""
    residual: float = 0.0
    """Share of the residual stream's error that linears which write into it are asked to undo."""
    order: Order = "group-aware"
    """In which columns are visited, where the config asks for no act-order."""
    clip: ClipSearch = "weight"
    """How a group's range is searched."""
    signed: bool = False
    """Whether a symmetric group's scale may be negative, so that its larger side gets the extra step."""
    refine: int = 0
    """Passes of scale refit and coordinate descent over the finished codes."""
    output: bool = False
    """Whether those passes weight a linear's outputs by how much the model's predictions feel them."""
    tune: int = 0
    """Gradient steps on a block's scales against its full-precision output."""
    scaling: bool = False
    """Whether strong input channels are scaled down and the weights that read them up, folded into weights."""
    rotation: bool = False
    """Whether each head's values are turned by an orthogonal matrix, folded into weights."""

    @property
    def needs_data(self) -> bool:
        """Whether calibration data is used at all."""
        return self.base != "rtn"

    @property
    def needs_exact_stream(self) -> bool:
        """Whether the original model runs beside the quantized one."""
        return self.base in ("gptaq", "qep") or self.residual > 0 or self.tune > 0

    @property
    def folds(self) -> bool:
        """Whether a block's channels are changed before it is quantized."""
        return self.scaling or self.rotation


_PRESETS = {
    "fast": "gptq+left-to-right+clip-off",
    "best": "awq+qep+residual:0.5+gar+clip-weight+signed+output+refine:2",
}
_PARTS: dict[str, tuple[str, object]] = {
    "rtn": ("base", "rtn"),
    "gptq": ("base", "gptq"),
    "gptaq": ("base", "gptaq"),
    "qep": ("base", "qep"),
    "left-to-right": ("order", "left-to-right"),
    "gar": ("order", "group-aware"),
    "pivot": ("order", "pivot"),
    "clip-off": ("clip", "off"),
    "clip-weight": ("clip", "weight"),
    "clip-hessian": ("clip", "hessian"),
    "clip-loop": ("clip", "loop"),
    "signed": ("signed", True),
    "residual": ("residual", 1.0),
    "refine": ("refine", 2),
    "output": ("output", True),
    "tune": ("tune", 30),
    "awq": ("scaling", True),
    "rotate": ("rotation", True),
}
_SHARES = {"gptaq": "strength", "qep": "strength", "residual": "residual"}
_COUNTS = {"refine": "refine", "tune": "tune"}


def known_methods() -> list[str]:
    """Every name that a method may have or be joined of."""
    return [*_PRESETS, *_PARTS]


def best_without(*parts: str) -> str:
    """What "best" is made of, less some parts by name: the most accurate method where those cannot be carried out."""
    return "+".join(part for part in _PRESETS["best"].split("+") if part.partition(":")[0] not in parts)


@cache
def recipe_of(method: str) -> Recipe:
    """What a method's name stands for.

    Args:
        method: "fast", "best", or parts joined by "+", such as "qep+pivot+clip-loop+refine". Parts that have a
            strength or a count take it behind a colon: "qep:0.5", "refine:3". What is not named is as in "gptq", or
            as in "fast" or "best" where the name begins with that: "best+refine:4".

    Raises:
        UsageError: an unknown name, two parts for the same thing, a number that is out of range, or parts that do
            not go together.
    """
    first, _, more = method.partition("+")
    if first in _PRESETS:
        return _recipe(method, more.split("+") if more else [], recipe_of(_PRESETS[first]))
    return _recipe(method, method.split("+"), Recipe())


def _recipe(method: str, parts: list[str], begun: Recipe) -> Recipe:
    """A recipe in which some parts are replaced."""
    found: dict[str, object] = {}
    named: dict[str, str] = {}
    for part in parts:
        name, colon, number = part.partition(":")
        if name not in _PARTS:
            hint = (
                f"{name} comes first, without a number" if name in _PRESETS else f"known: {', '.join(known_methods())}"
            )
            raise UsageError(f"a method is one of these names or several joined by '+', got {part!r}; {hint}")
        slot, value = _PARTS[name]
        if slot in named:
            raise UsageError(f"method {method!r} names both {named[slot]} and {part}; keep one of them")
        named[slot], found[slot] = part, value
        if colon:
            found[(_SHARES | _COUNTS).get(name, "")] = _number(name, number)
    recipe = replace(begun, **found)  # type: ignore[arg-type]
    _check(recipe, method)
    return replace(recipe, refine=2) if recipe.output and not recipe.refine else recipe


def _number(name: str, text: str) -> float | int:
    try:
        value = float(text) if name in _SHARES else int(text)
    except ValueError:
        value = -1
    if name in _SHARES and 0 < value <= 1:
        return value
    if name in _COUNTS and 1 <= value <= 1000:
        return value
    rule = {**dict.fromkeys(_SHARES, "a share above 0 and up to 1"), **dict.fromkeys(_COUNTS, "1 to 1000 passes")}
    example = name + (":0.5" if name in _SHARES else ":3" if name in _COUNTS else "")
    raise UsageError(f"{name} takes {rule.get(name, 'no number')}, got {text!r}; write for example {example}")


def _check(recipe: Recipe, method: str) -> None:
    """Round to nearest knows only a clip search by weight."""
    if recipe.base != "rtn":
        return
    plain = Recipe(base="rtn", clip=recipe.clip, signed=recipe.signed)
    if recipe != plain or recipe.clip in ("hessian", "loop"):
        odd = [f.name for f in fields(Recipe) if getattr(recipe, f.name) != getattr(plain, f.name)] or ["clip"]
        raise UsageError(f"rtn uses no data and goes with clip-off, clip-weight and signed only; method {method!r} "
                         f"also sets {', '.join(odd)}")  # fmt: skip
