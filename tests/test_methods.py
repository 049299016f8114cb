"""Names of methods and what they stand for; every method must choose what its slow reference chooses, code by code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qquant import refinement
from qquant.affine import choose_qparams, dequantize, quantize, search_qparams
from qquant.config import QuantizeConfig
from qquant.errors import UsageError
from qquant.factor import inverse_factor
from qquant.methods import Recipe, best_without, known_methods, recipe_of
from qquant.moments import Moments
from qquant.solver import corrected_target, solve
from tests.method_reference import make_layer, solve_slowly, target_by_least_squares

CASES: dict[str, dict[str, Any]] = {
    "fast": {"method": "fast"},
    "signed": {"method": "gptq+signed+clip-off"},
    "signed int8 row": {"method": "gptq+signed+clip-weight", "bits": 8, "group_size": -1},
    "signed changes nothing asymmetric": {"method": "gptq+signed+clip-hessian", "sym": False},
    "clip loop": {"method": "gptq+clip-loop"},
    "clip loop asym int3": {"method": "gptq+clip-loop+left-to-right", "bits": 3, "sym": False},
    "clip loop desc_act": {"method": "gptq+clip-loop", "desc_act": True, "group_size": 24},
    "clip loop signed int2": {"method": "gptq+clip-loop+signed", "bits": 2},
    "pivot": {"method": "gptq+pivot+clip-off"},
    "pivot row": {"method": "gptq+pivot+clip-off", "group_size": -1, "bits": 8},
    "pivot clip loop": {"method": "gptq+pivot+clip-loop+signed", "group_size": 12},
    "qep": {"method": "qep+clip-off"},
    "qep half": {"method": "qep:0.5+clip-hessian", "sym": False},
    "residual": {"method": "residual+clip-off"},
    "qep residual pivot": {"method": "qep:0.9+residual:0.7+pivot+clip-off", "bits": 3},
    "gptaq": {"method": "gptaq+clip-off+left-to-right"},
    "gptaq group-aware": {"method": "gptaq:0.3+clip-weight", "bits": 2, "sym": False},
    "gptaq pivot clip loop": {"method": "gptaq+pivot+clip-loop", "group_size": 24},
    "gptaq desc_act": {"method": "gptaq+clip-off", "desc_act": True},
    "gptaq row": {"method": "gptaq+clip-off", "group_size": -1},
    "gptaq static act-order": {"method": "gptaq+clip-off", "desc_act": True, "static_groups": True},
    "refine": {"method": "gptq+refine:2+clip-off"},
    "refine asym int3": {"method": "gptq+refine:1+clip-weight", "bits": 3, "sym": False},
    "refine int2 signed": {"method": "gptq+signed+refine:3+clip-off", "bits": 2},
    "refine row": {"method": "gptq+refine:1+clip-off", "bits": 3, "group_size": -1},
    "refine desc_act": {"method": "gptq+refine:2+clip-off", "desc_act": True},
    "refine static act-order": {"method": "refine:2+clip-off", "desc_act": True, "static_groups": True},
    "gptaq refine": {"method": "gptaq+refine:1+clip-off"},
}  # fmt: skip
OUTPUT_CASES: dict[str, dict[str, Any]] = {
    "output": {"method": "gptq+output+refine:2+clip-off"},
    "best": {"method": "best"},
    "best asym int3": {"method": "best", "sym": False, "bits": 3},
    "best desc_act": {"method": "best", "desc_act": True},
    "best int3 row": {"method": "best", "bits": 3, "group_size": -1},
}


@pytest.fixture(autouse=True)
def exact_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many steps of conjugate gradients as rows that see one another have scales: then they are exact."""
    monkeypatch.setattr(refinement, "_CONJUGATE_STEPS", 8)


def assert_same(layer: Any, options: dict[str, Any], side: int | None = None) -> None:
    config = QuantizeConfig(**{"group_size": 16, **options})
    expected = solve_slowly(layer, config, side)
    got = solve(layer.weight, layer.moments(side), config)
    assert torch.equal(got.g_idx.long(), expected.g_idx)
    assert torch.equal(got.codes.long(), expected.codes)
    assert torch.equal(got.scales.double(), expected.scales)
    assert torch.equal(got.zeros.double(), expected.zeros)


@pytest.mark.parametrize("options", list(CASES.values()), ids=list(CASES))
def test_every_method_chooses_what_its_slow_reference_chooses(options: dict[str, Any]) -> None:
    assert_same(make_layer(rows=4), options)


@pytest.mark.parametrize("options", list(OUTPUT_CASES.values()), ids=list(OUTPUT_CASES))
def test_methods_that_weigh_outputs_choose_what_their_slow_reference_chooses(options: dict[str, Any]) -> None:
    """Four rows of two groups: eight scales, which eight steps of conjugate gradients find exactly."""
    assert_same(make_layer(rows=4, columns=32), options)


def test_output_moments_may_come_in_blocks() -> None:
    assert_same(make_layer(rows=4, columns=32, seed=2), {"method": "qep+output+refine:2+signed"}, side=2)


@pytest.mark.parametrize("method", ["qep+residual+refine:1", "gptaq+refine:1", "gptq+pivot+clip-loop+refine:1"])
def test_dead_columns_meet_the_slow_reference_too(method: str) -> None:
    layer = make_layer(rows=4, dead=(3, 20))
    assert_same(layer, {"method": method})
    assert solve(layer.weight, layer.moments(), QuantizeConfig(method=method, group_size=16)).dead_columns == 2


@pytest.mark.parametrize(("strength", "residual"), [(1.0, 0.0), (0.4, 0.0), (0.0, 1.0), (0.9, 0.6)])
@pytest.mark.parametrize("dead", [(), (5, 30)], ids=["", "dead"])
def test_the_corrected_target_is_the_least_squares_answer(
    strength: float, residual: float, dead: tuple[int, ...]
) -> None:
    layer = make_layer(dead=dead)
    parts = [f"qep:{strength}"] * (strength > 0) + [f"residual:{residual}"] * (residual > 0)
    config = QuantizeConfig(method="+".join(parts), group_size=16)
    moments = layer.moments()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    inverse, _, _ = inverse_factor(moments.inputs, order, moments.inputs.diagonal() == 0, config.damp_percent)
    got = corrected_target(layer.weight, moments, config, inverse, order)
    expected = target_by_least_squares(layer, strength=strength, residual=residual, damp_percent=config.damp_percent)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["qep", "gptaq"])
def test_without_mismatch_a_method_is_plain_gptq(method: str) -> None:
    layer = make_layer()
    moments = layer.moments()
    still = replace(moments, mismatch=torch.zeros_like(moments.inputs))
    plain = solve(layer.weight, moments, QuantizeConfig(method="gptq", group_size=16))
    assert torch.equal(solve(layer.weight, still, QuantizeConfig(method=method, group_size=16)).codes, plain.codes)


@pytest.mark.parametrize("method", ["qep", "gptaq"])
def test_error_propagation_brings_outputs_nearer_to_the_originals(method: str) -> None:
    layer = make_layer(rows=32)
    wanted = layer.original @ layer.weight.T

    def miss(name: str) -> float:
        got = solve(layer.weight, layer.moments(), QuantizeConfig(method=name, group_size=16)).weight().double()
        return float((layer.inputs @ got.T - wanted).square().mean())

    assert miss(method) < miss("gptq")


@pytest.mark.parametrize("method", ["qep", "gptaq"])
def test_a_method_that_needs_the_originals_inputs_says_so(method: str) -> None:
    layer = make_layer()
    with pytest.raises(UsageError, match=f"{method} needs the mismatch"):
        solve(layer.weight, layer.moments().inputs, QuantizeConfig(method=method, group_size=16))


@pytest.mark.parametrize("method", ["gptaq+pivot+clip-loop", "qep+residual+clip-off+refine:1", "best"])
def test_no_method_depends_on_threads_or_on_given_moments(method: str) -> None:
    """In float32, as models are quantized; 160 columns are more than LAPACK factorizes alike with any threads.

    The moments are read only, so that the second of two equal calls finds what the first found.
    """
    layer = make_layer(rows=8, columns=160)
    moments = to_dtype(layer.moments(side=4), torch.float32)
    config = QuantizeConfig(method=method, group_size=80)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            found.append(solve(layer.weight.float(), moments, config))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.codes, found[0].codes)
        assert torch.equal(other.scales, found[0].scales)


@pytest.mark.parametrize("method", ["gptaq+pivot+clip-loop", "gptaq+signed+left-to-right", "best"])
def test_no_method_depends_on_the_block_size(method: str) -> None:
    layer = make_layer(rows=16, columns=192, seed=1)
    config = QuantizeConfig(method=method, group_size=32)
    expected = solve(layer.weight, layer.moments(), config)
    for block_size in (8, 100, 512):
        got = solve(layer.weight, layer.moments(), config, block_size=block_size)
        assert torch.equal(got.codes, expected.codes)
        assert torch.equal(got.scales, expected.scales)


def test_float32_finds_solutions_as_good_as_float64() -> None:
    layer = make_layer(rows=16, columns=96, seed=4)
    config = QuantizeConfig(method="best", group_size=32)
    exact = solve(layer.weight, layer.moments(), config)
    fast = solve(layer.weight.float(), to_dtype(layer.moments(), torch.float32), config)
    goal, outputs = exact.target, layer.slopes.T @ layer.slopes / len(layer.slopes)
    assert goal is not None

    def loss(weight: Tensor) -> float:
        error = weight.double() - goal
        return float(((outputs @ error @ layer.moments().inputs) * error).sum())

    assert loss(fast.weight()) <= loss(exact.weight()) * 1.01


def to_dtype(moments: Moments, dtype: torch.dtype) -> Moments:
    parts = {name: None if part is None else part.to(dtype) for name, part in vars(moments).items()}
    return Moments(**parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_signed_grid_holds_the_largest_value_and_clips_the_other_side_by_a_step_at_most(bits: int) -> None:
    weight = torch.randn(200, 16, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    scale, zero = choose_qparams(weight, bits=bits, sym=True, signed=True)
    found = dequantize(quantize(weight, scale[:, None], zero[:, None], bits), scale[:, None], zero[:, None])
    error = (found - weight).abs()
    farthest = weight.abs().argmax(1, keepdim=True)
    # The extreme value is 2^(bits - 1) steps exactly; only the scale's rounding to float16 (half of 2^-10) is left.
    assert (error.gather(1, farthest) <= weight.abs().amax(1, keepdim=True) * 2.0**-11).all()
    assert torch.equal(scale < 0, weight.gather(1, farthest)[:, 0] > 0)
    levels = 2 ** (bits - 1)
    # By brute force over all codes; a value beyond the last code of the other side is off by up to one step.
    codes = torch.arange(2**bits).double()
    nearest = (scale[:, None, None] * (codes - levels) - weight[:, :, None]).abs().amin(-1)
    torch.testing.assert_close(error, nearest, rtol=0, atol=1e-12)
    assert (error <= scale.abs()[:, None] * (1 + levels * 2.0**-11)).all()
    plain, _ = choose_qparams(weight, bits=bits, sym=True)
    # 2^(bits - 1) steps where the plain grid has half a step less for the same reach.
    torch.testing.assert_close(scale.abs() / plain, torch.full_like(plain, 1 - 2.0**-bits), rtol=2.0**-10, atol=0)


def test_signed_asymmetric_grids_are_the_plain_ones() -> None:
    weight = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    plain = choose_qparams(weight, bits=4, sym=False)
    signed = choose_qparams(weight, bits=4, sym=False, signed=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, signed, strict=True))


def test_the_looped_clip_is_the_best_of_all_factors() -> None:
    """No factor's own grid leaves less in the loop than the one that was found."""
    layer = make_layer(rows=8, columns=16)
    factor = torch.linalg.cholesky(torch.linalg.inv(layer.moments().inputs), upper=True)
    arguments: dict[str, Any] = {"bits": 3, "sym": True, "hessian": None, "factor": factor}

    def left(scale: Tensor, zero: Tensor) -> Tensor:
        work, total = layer.weight.clone(), torch.zeros(8, dtype=torch.float64)
        for j in range(16):
            value = dequantize(quantize(work[:, j], scale, zero, 3), scale, zero)
            error = (work[:, j] - value) / factor[j, j]
            total += error**2
            work[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
        return total

    least = left(*search_qparams(layer.weight, clip_search="loop", **arguments))
    every = [left(*choose_qparams(layer.weight, bits=3, sym=True, shrink=1 - 0.05 * n)) for n in range(7)]
    torch.testing.assert_close(least, torch.stack(every).amin(0), rtol=1e-12, atol=0)
    assert (least < every[0]).any()


@pytest.mark.parametrize(("name", "expected"), [
    ("gptq", Recipe()),
    ("fast", Recipe(order="left-to-right", clip="off")),
    ("rtn", Recipe(base="rtn")),
    ("rtn+signed+clip-off", Recipe(base="rtn", signed=True, clip="off")),
    ("gptaq", Recipe(base="gptaq")),
    ("gptaq:0.25", Recipe(base="gptaq", strength=0.25)),
    ("qep+pivot+clip-loop+refine", Recipe(base="qep", order="pivot", clip="loop", refine=2)),
    ("refine:5", Recipe(refine=5)),
    ("output", Recipe(refine=2, output=True)),
    ("output+refine:1", Recipe(refine=1, output=True)),
    ("residual:0.5+gar", Recipe(residual=0.5)),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_name_stands_for_its_parts(name: str, expected: Recipe) -> None:
    assert recipe_of(name) == expected


def test_parts_behind_a_preset_replace_its_own() -> None:
    assert recipe_of("best+refine:4+clip-loop") == replace(recipe_of("best"), refine=4, clip="loop")
    assert recipe_of("best+gptq") == replace(recipe_of("best"), base="gptq")
    assert recipe_of("fast+signed") == replace(recipe_of("fast"), signed=True)


@pytest.mark.parametrize("name", known_methods())
def test_every_known_name_is_a_method_or_a_part_of_one(name: str) -> None:
    recipe = recipe_of("gptq+" + name if name.startswith("clip") else name)
    assert recipe.needs_data == (name != "rtn")
    exact = recipe.base in ("qep", "gptaq") or recipe.residual > 0 or recipe.tune > 0
    assert recipe.needs_exact_stream == exact


@pytest.mark.parametrize(("name", "message"), [
    ("nonsense", "got 'nonsense'; known: fast, best, rtn"),
    ("", "got ''"),
    ("gptq+", "got ''"),
    ("GPTQ", "got 'GPTQ'"),
    ("gptq + refine", "got 'gptq '"),
    ("refine+best", "best comes first, without a number"),
    ("fast+best", "best comes first"),
    ("best:2", "best comes first, without a number"),
    ("best+refine+refine:3", "names both refine and refine:3"),
    ("gptq+qep", "names both gptq and qep; keep one"),
    ("qep+gptaq", "names both qep and gptaq"),
    ("pivot+gar", "names both pivot and gar"),
    ("clip-off+clip-loop", "names both clip-off and clip-loop"),
    ("refine+refine:3", "names both refine and refine:3"),
    ("qep:0", "a share above 0 and up to 1, got '0'"),
    ("qep:1.5", "a share above 0 and up to 1, got '1.5'"),
    ("qep:nan", "a share above 0 and up to 1, got 'nan'"),
    ("qep:", "a share above 0 and up to 1, got ''"),
    ("residual:much", "a share above 0 and up to 1, got 'much'"),
    ("refine:0", "1 to 1000 passes, got '0'"),
    ("refine:2.5", "1 to 1000 passes, got '2.5'"),
    ("refine:-1", "1 to 1000 passes, got '-1'"),
    ("signed:1", "signed takes no number, got '1'"),
    ("pivot:2", "pivot takes no number"),
    ("rtn+pivot", "also sets order"),
    ("rtn+refine", "also sets refine"),
    ("rtn+output", "also sets output"),
    ("rtn+residual", "also sets residual"),
    ("rtn+clip-loop", "also sets clip"),
    ("rtn+clip-hessian", "also sets clip"),
])  # fmt: skip
def test_a_name_that_stands_for_nothing_is_one_clear_error(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        recipe_of(name)
    assert message in str(caught.value)
    with pytest.raises(UsageError, match=r"^method: "):
        QuantizeConfig.from_dict({"method": name})


def test_an_explicit_option_wins_over_the_method() -> None:
    assert QuantizeConfig(method="fast").clip == "off"
    assert QuantizeConfig(method="fast", clip_search="hessian").clip == "hessian"
    assert QuantizeConfig(method="fast", act_group_aware=True).order == "group-aware"
    assert QuantizeConfig(method="qep+pivot").order == "pivot"
    assert QuantizeConfig(method="qep+pivot", act_group_aware=True).order == "group-aware"
    assert QuantizeConfig(method="qep+pivot", act_group_aware=False).order == "left-to-right"
    assert QuantizeConfig(method="qep+pivot", static_groups=True).order == "left-to-right"
    assert not QuantizeConfig(method="best", desc_act=True).group_aware
    assert QuantizeConfig(method="best", desc_act=True).needs_g_idx
    assert not QuantizeConfig(method="rtn", desc_act=True).needs_g_idx


def test_act_order_takes_the_place_of_a_methods_order() -> None:
    layer = make_layer()
    found = [
        solve(layer.weight, layer.moments().inputs, QuantizeConfig(method=method, group_size=16, desc_act=True))
        for method in ("gptq", "gptq+pivot", "gptq+left-to-right")
    ]
    assert all(torch.equal(other.codes, found[0].codes) for other in found[1:])


@pytest.mark.parametrize("method", ["qep", "gptaq", "gptq+residual", "best", "tune"])
def test_one_pass_does_not_go_with_a_method_that_compares_with_the_original(method: str) -> None:
    with pytest.raises(UsageError, match=r"true_sequential.*leave it on"):
        QuantizeConfig.from_dict({"method": method, "true_sequential": False})
    QuantizeConfig(method="gptq+refine+output", true_sequential=False)


def test_the_most_accurate_is_the_default_and_one_pass_is_told_what_is_left_of_it() -> None:
    assert QuantizeConfig().method == "best"
    with pytest.raises(UsageError, match=r"the most accurate is \"awq\+gar.*\"") as caught:
        QuantizeConfig.from_dict({"true_sequential": False})
    left = str(caught.value).split('"')[-2]
    assert left == best_without("qep", "residual")
    assert not QuantizeConfig(method=left, true_sequential=False).recipe.needs_exact_stream
    assert recipe_of(best_without()) == recipe_of("best")
    assert recipe_of(left) == replace(recipe_of("best"), base="gptq", residual=0.0)


@pytest.mark.parametrize("options", [{"method": "gptq+clip-loop"}, {"clip_search": "loop"}], ids=["part", "option"])
def test_the_looped_clip_does_not_go_with_static_groups(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"clip loop .* static_groups"):
        QuantizeConfig.from_dict({"static_groups": True, **options})


@pytest.mark.parametrize("clip", ["hessian", "loop"])
def test_round_to_nearest_refuses_a_clip_search_that_needs_data(clip: str) -> None:
    with pytest.raises(UsageError, match="needs calibration data"):
        solve(torch.ones(8, 32), None, QuantizeConfig(method="rtn", clip_search=clip, group_size=32))  # type: ignore[arg-type]
