"""A stage's linears are solved in pieces that are the same for any number of ranks, and come out as if whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qquant import stage_solver
from qquant.columns import prepare
from qquant.config import QuantizeConfig
from qquant.errors import NumericError
from qquant.moments import Moments
from qquant.ranks import ALONE
from qquant.solver import relative_error, solve
from qquant.stage_solver import pieces_of, solve_stage
from tests.method_reference import make_layer
from tests.rank_programs import (
    COLUMNS,
    HEIGHTS,
    PIECE_ROWS,
    ROWS,
    SAMPLES,
    SIDE,
    SIZES,
    STAGES,
    alone,
    float_moments,
    linear_of,
    reports,
    same_bits,
    stage,
)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_solver, "PIECE_ROWS", PIECE_ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", STAGES)
def test_solutions_are_those_of_one_process_bit_for_bit(size: int, method: str) -> None:
    expected = {key: value for key, value in alone()[0].items() if key.startswith(f"{method} ")}
    assert expected
    for tensors, _, _ in reports(size):
        assert {key for key in tensors if key.startswith(f"{method} ")} == expected.keys()
        assert all(same_bits(tensors[key], value) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_damaged_weight_is_the_same_error_on_every_rank(size: int) -> None:
    expected = alone()[1]["damaged weight"]
    assert expected[0] == "NumericError"
    assert all(values["damaged weight"] == expected for _, values, _ in reports(size))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_bytes_that_ranks_send_are_those_of_the_formula(size: int) -> None:
    """As docs/scaling.md has it; what is said in other ways is small."""
    for rank, (_, _, sent) in enumerate(reports(size)):
        shapes = {"hessian": (COLUMNS, COLUMNS), "blocks": (COLUMNS, SIDE), "cross": (ROWS, COLUMNS)}
        moments = 0
        for samples in SAMPLES.values():
            lanes = {i % 16 for i in samples if i != 19}  # of sample 19 no token counts
            summed = sum(1 for lane in lanes if lane % size == rank)
            for rows, columns in shapes.values():
                own = rows * (rank + 1) // size - rows * rank // size
                moments += 2 * 4 * columns * ((rows - own) * summed + own * (size - 1))  # 2: both dtypes
        assert sent["moments"] == moments
        solutions = 0
        for method in STAGES:
            layers, _, settings, _ = stage(method)
            heights: dict[str, int] = {}
            for name, chosen in settings.items():
                if chosen is not None:
                    heights[repr(chosen)] = heights.get(repr(chosen), 0) + layers[name].out_features
            for height in heights.values():
                pieces = [min(PIECE_ROWS, height - top) for top in range(0, height, PIECE_ROWS)]
                solutions += sum(rows * (48 + 8 * 3) for rows in pieces[rank::size]) * (size - 1)
                solutions += 4 * 48 * (size - 1) if rank == 0 else 0  # g_idx
        assert sent["solutions"] == solutions


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("method", ["gptq", "best", "gptaq act-order", "rtn"])
def test_pieces_get_the_codes_of_the_tall_matrix(method: str) -> None:
    layers, moments, settings, outputs = stage(method)
    found = solve_stage(layers, moments, settings, outputs, ALONE)
    config = settings["q"]
    assert config is not None
    if outputs and moments is not None:
        moments = replace(moments, outputs=torch.cat([outputs[name] for name in HEIGHTS]))
    tall = solve(torch.cat([layer.weight for layer in layers.values()]), moments, config)
    for part, one in zip(tall.split([*HEIGHTS.values()]), found.values(), strict=True):
        for field in ("codes", "scales", "zeros", "g_idx"):
            assert torch.equal(getattr(part, field), getattr(one.solution, field)), field
        assert (part.damp_percent, part.dead_columns) == (one.solution.damp_percent, one.solution.dead_columns)


def tall_layer(rows: int, columns: int = 16) -> tuple[Tensor, Moments]:
    layer = make_layer(rows=8, columns=columns, seed=2)
    draw = torch.Generator().manual_seed(3)
    return torch.randn(rows, columns, generator=draw) * 0.1, float_moments(Moments(layer.moments().inputs))


def test_a_piece_has_2048_rows_and_the_relative_error_is_the_whole_linears() -> None:
    weight, moments = tall_layer(4500)
    config = QuantizeConfig(method="gptq", group_size=16)
    found = solve_stage({"up": linear_of(weight)}, moments, {"up": config}, {}, ALONE)["up"]
    tall = solve(weight, moments, config)
    assert torch.equal(found.solution.codes, tall.codes)
    assert found.relative_error == pytest.approx(relative_error(weight, tall, moments.inputs), rel=1e-5)
    assert stage_solver.PIECE_ROWS == 2048


@pytest.mark.parametrize(
    ("side", "heights", "expected"),
    [
        (0, [40, 56], [{"a": (0, 32)}, {"a": (32, 40), "b": (0, 24)}, {"b": (24, 56)}]),
        (12, [36, 24], [{"a": (0, 24)}, {"a": (24, 36), "b": (0, 12)}, {"b": (12, 24)}]),
        (50, [100], [{"a": (0, 50)}, {"a": (50, 100)}]),
    ],
    ids=["rows", "blocks of outputs", "blocks above the limit"],
)
@pytest.mark.usefixtures("short_pieces")
def test_pieces_never_cut_a_block_of_outputs(
    side: int, heights: list[int], expected: list[dict[str, tuple[int, int]]]
) -> None:
    pieces = pieces_of(dict(zip("ab", heights, strict=False)), side)
    assert [{name: (rows.start, rows.stop) for name, rows in piece.items()} for piece in pieces] == expected


@pytest.mark.usefixtures("short_pieces")
def test_an_error_names_the_linear_at_fault_of_those_solved_together() -> None:
    with pytest.raises(NumericError, match=r"^v: weights must be finite"):
        solve_stage(*stage("damaged"), ALONE)


def test_linears_without_settings_are_left_alone() -> None:
    assert list(solve_stage(*stage("left alone"), ALONE)) == ["q"]


def test_linears_of_the_same_settings_stand_behind_one_another() -> None:
    found = solve_stage(*stage("mixed"), ALONE)
    assert [(name, one.settings.bits) for name, one in found.items()] == [("q", 4), ("v", 4), ("k", 8)]


def test_what_was_prepared_for_all_pieces_gives_the_bits_of_one_made_anew() -> None:
    layers, moments, settings, _ = stage("gptaq act-order")
    config = settings["q"]
    assert config is not None
    assert moments is not None
    anew = solve(layers["q"].weight, moments, config)
    given = solve(layers["q"].weight, moments, config, prepared=prepare(moments, config))
    assert all(torch.equal(a, b) for a, b in zip(anew.packable(), given.packable(), strict=True))
