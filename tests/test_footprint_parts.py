"""Parts of a prediction on models so small that their bytes are worked out by hand, one claim each.

Whether predictions are what real models, caches and processes take is test_footprint.py's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from qquant import planning
from qquant.footprint import CPU_PRODUCT_BYTES, footprint, weights_bytes
from qquant.plan_report import Plan
from qquant.planning import Question, plan_model, what_would_fit
from qquant.shapes import model_shapes
from qquant.stored_bytes import CacheShape, LinearShape, ModelShapes, layer_bytes, packed_bytes, panel_bytes

OUT = LinearShape(name="block.wide", inputs=64, outputs=48, bias=False, tail=False)
TAIL = LinearShape(name="block.tail", inputs=48, outputs=64, bias=False, tail=True)
CACHE = CacheShape(heads=2, key_dim=32, value_dim=32, window=None)
# Two linears of 3072, embedding and output projection of 100 * 64 each, and 192 of norms.
SMALL = ModelShapes(
    model_type="small",
    parameters=2 * 3072 + 2 * 6400 + 192,
    linears=(OUT, TAIL),
    caches=(CACHE,),
    stages=((64, 48), (48, 64)),
    largest_tensor=6400,
    hidden=64,
    query_heads=8,
    query_width=64,
    query_norms=False,
    vocabulary=100,
    tied=False,
    embedding_parameters=12800,
    positions=None,
)
CELL: dict[str, Any] = {"precision": "bf16", "kv_cache": "bf16", "batch": 1, "device": "cuda"}


# ---- weights


def test_query_and_key_norms_of_a_qwen3_are_weights_that_are_never_packed() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    shapes = model_shapes(AutoConfig.for_model("qwen3", **sizes, **heads, tie_word_embeddings=False))
    # q, k, v, o, and three of 64 * 128; two norms of 64, and one of 32 for queries and one for keys.
    linears = 64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 128
    norms = 2 * 64 + 32 + 32
    assert shapes.query_norms
    assert shapes.parameters == 2 * (linears + norms) + 2 * 320 * 64 + 64 == 139_712
    assert weights_bytes(shapes, "bf16") == 279_424
    # Groups of 32 in 8 bits: codes, a zero (1 byte) and a scale (2) per group and output, an index (4) per input.
    by_outputs = 64 * 128 + 2 * 128 * 3 + 64 * 4  # q, gate, up
    by_inputs = 128 * 64 + 4 * 64 * 3 + 128 * 4  # o, down
    square = 64 * 64 + 2 * 64 * 3 + 64 * 4  # k, v
    packed = 2 * (3 * by_outputs + 2 * by_inputs + 2 * square)
    assert weights_bytes(shapes, "int8", group_size=32) == packed + 2 * (139_712 - 2 * linears) == 194_944


@pytest.mark.parametrize(
    ("bits", "group_size", "expected"),
    [
        (8, 16, 3072 + 4 * 48 * 1 + 4 * 48 * 2 + 64 * 4),
        (4, 16, 1536 + 4 * 48 // 2 + 4 * 48 * 2 + 64 * 4),
        (4, -1, 1536 + 48 // 2 + 48 * 2 + 64 * 4),
    ],
    ids=["8 bits", "4 bits", "whole rows"],
)
def test_a_packed_matrix_is_codes_zeros_scales_and_an_index(bits: int, group_size: int, expected: int) -> None:
    assert packed_bytes(OUT, bits, group_size) == expected


@pytest.mark.parametrize(
    ("linear", "bits", "group_size", "expected"),
    [
        (OUT, 8, 16, 3072 + 4 * 48 * 2),
        (OUT, 4, 16, 1536 + 4 * 48 * 2),
        (OUT, 4, -1, 1536 + 48 * 2),
        (replace(OUT, bias=True), 4, -1, 1536 + 48 * 2 + 48 * 4),
        (replace(OUT, outputs=40), 4, 16, 1536 + 4 * 48 * 2),
        (replace(OUT, inputs=60), 4, 12, (5 * 16 * 48) // 2 + 5 * 48 * 2 + 4 * 5 * 16),
    ],
    ids=["8 bits", "4 bits", "whole rows", "bias in float32", "rows fill panels", "groups fill words"],
)
def test_a_linear_in_memory_is_words_and_scales(linear: LinearShape, bits: int, group_size: int, expected: int) -> None:
    assert panel_bytes(linear, bits, group_size) == expected


# ---- caches


def test_the_int8_cache_keeps_ranges_and_the_mean_of_its_keys_in_float32() -> None:
    # 29 tokens of 3 sequences, room for 64; 32 codes, a scale and a zero of 2 bytes each for every vector.
    stored = 3 * 2 * 64 * (32 + 4)
    mean = 3 * 2 * 32 * 4
    assert layer_bytes(CACHE, "int8", 3, 10, 20) == (stored + mean, stored)
    # Values in 4 bits: half the codes, and a range for each 32 of them.
    assert layer_bytes(CACHE, "int4", 3, 10, 20) == (stored + mean, 3 * 2 * 64 * (16 + 4))
    # A plain cache holds the 29 tokens and not a byte more.
    assert layer_bytes(CACHE, "bf16", 3, 10, 20) == (3 * 2 * 29 * 32 * 2,) * 2
    assert layer_bytes(CACHE, "fp32", 3, 10, 20) == (3 * 2 * 29 * 32 * 4,) * 2


# ---- activations of a prompt


def activations(shapes: ModelShapes, **cell: Any) -> int:
    return footprint(shapes, **{**CELL, **cell}).activations_bytes


ROWS = 1000


def test_queries_that_are_normed_are_there_in_float32_and_squared() -> None:
    wide = replace(SMALL, query_width=4096)
    prompt = {"prompt_tokens": ROWS, "new_tokens": 1}
    # The queries in 2 bytes, their float32 copy and its square.
    needed = ROWS * 4096 * (2 + 4 + 4)
    assert activations(replace(wide, query_norms=True), **prompt) >= needed
    assert activations(wide, **prompt) < needed


def test_the_int8_cache_has_the_keys_in_float32_and_less_their_mean() -> None:
    many = replace(SMALL, caches=(CacheShape(heads=8, key_dim=512, value_dim=512, window=None),))
    prompt = {"prompt_tokens": ROWS, "new_tokens": 1}
    # Keys and values in 2 bytes, the keys in float32, and those less their mean.
    needed = ROWS * 4096 * (2 + 2 + 4 + 4)
    for kind in ("int8", "int4"):
        assert activations(many, kv_cache=kind, **prompt) >= needed
    assert activations(many, **prompt) < needed


def test_norms_of_a_packed_model_on_a_cpu_make_no_copies_in_float32() -> None:
    wide = replace(SMALL, query_width=4096, query_norms=True)
    cell = {"prompt_tokens": ROWS, "new_tokens": 1, "precision": "int8"}
    # The queries, and for the rotation its product, the rotated half and the product of that, all in 2 bytes; the norm
    # would need a float32 copy and its square.
    rotated, normed = ROWS * 4096 * 2 * 4, ROWS * 4096 * (2 + 4 + 4)
    assert rotated <= activations(wide, device="cpu", **cell) < normed
    assert activations(wide, device="cpu", compute_dtype="fp16", **cell) >= normed
    assert activations(wide, **cell) >= normed


def test_a_packed_linear_is_made_whole_for_many_tokens_on_a_card_and_never_on_a_cpu() -> None:
    large = replace(OUT, inputs=64, outputs=100_000)
    shapes = replace(SMALL, linears=(large, replace(TAIL, inputs=80)), stages=((64, 100_000), (80, 64)))
    weight = 2 * large.weights
    for tokens, made in ((64, False), (65, True)):
        cell = {"prompt_tokens": tokens, "new_tokens": 1, "precision": "int4"}
        results = tokens * 2 * 100_000
        assert (activations(shapes, **cell) >= results + weight) is made
        assert results <= activations(shapes, device="cpu", **cell) < results + weight
    # So many sequences are as many tokens.
    alone = {"prompt_tokens": 1, "new_tokens": 2, "precision": "int4"}
    assert activations(shapes, **alone, batch=64) < 64 * 2 * 100_000 + weight <= activations(shapes, **alone, batch=65)


def test_siblings_have_their_results_at_once_and_the_input_is_there_once_more() -> None:
    shapes = replace(SMALL, stages=((64, 5000), (48, 64)))
    # Residuals and input of the block, its normed input; the results; the input once more, in 2 bytes, of float32 in 3.
    for dtype, element, encoded in (("bf16", 2, 2), ("fp32", 4, 3)):
        cell = {"prompt_tokens": ROWS, "new_tokens": 1, "precision": "int8", "kv_cache": dtype, "compute_dtype": dtype}
        assert activations(shapes, device="cpu", **cell) == ROWS * ((4 * 64 + 5000) * element + 64 * encoded)


def test_onednn_is_needed_for_an_output_projection_of_more_tokens_than_our_kernel_takes() -> None:
    cell = {**CELL, "device": "cpu", "precision": "int8", "prompt_tokens": 1, "new_tokens": 2}
    eight, nine = (footprint(SMALL, **cell | {"batch": batch}).overhead_bytes for batch in (8, 9))
    assert nine - eight == CPU_PRODUCT_BYTES


# ---- decoding

DEEP = replace(SMALL, caches=(CacheShape(heads=8, key_dim=32, value_dim=64, window=None),) * 8)
"""Eight layers, so that the last step is the largest moment; values twice as wide as keys."""


def test_a_plain_cache_has_one_layer_s_longer_copy_beside_it() -> None:
    found = footprint(DEEP, **{**CELL, "batch": 2}, prompt_tokens=100, new_tokens=101)
    values = 2 * 8 * 200 * 64 * 2
    assert found.cache_bytes == 8 * (values + values // 2)
    assert values <= found.activations_bytes < values + values // 2  # and not the keys beside it
    assert found.peak_bytes == sum(
        (found.weights_bytes, found.cache_bytes, found.activations_bytes, found.overhead_bytes)
    )


def test_the_int8_cache_copies_nothing_while_it_has_room_and_its_codes_when_it_grows() -> None:
    cell: dict[str, Any] = {"kv_cache": "int8", "batch": 2, "prompt_tokens": 1}
    # 1 token and room for 1024 more.
    assert activations(DEEP, **cell, new_tokens=1025) < 2 * 8 * 64 * 64
    assert activations(DEEP, **cell, new_tokens=1026) >= 2 * 8 * 1025 * 64


# ---- plans


@pytest.fixture
def plan_of(monkeypatch: pytest.MonkeyPatch, tiny_qwen2: Path) -> Any:
    """``plan_of(shapes, **options)``: what is planned for a model of these shapes."""

    def get(shapes: ModelShapes, **options: Any) -> Plan:
        monkeypatch.setattr(planning, "model_shapes", lambda config: shapes)
        found = plan_model(str(tiny_qwen2), Question(**options), command="qquant plan").plan
        assert found is not None
        return found

    return get


@pytest.mark.parametrize(
    ("precision", "weights", "beside"),
    [
        ("bf16", 2 * 19_136, 2 * 6400),
        # Words and scales; beside them the larger of both matrices as a file has it.
        ("int8", 2 * 12_992 + 2 * 3072 + 4 * 48 * 2 + 3 * 64 * 2, 3072 + 4 * 48 * 3 + 64 * 4),
    ],
    ids=["bf16", "int8"],
)
def test_loading_takes_the_tensors_and_what_is_read_at_once(
    plan_of: Any, precision: str, weights: int, beside: int
) -> None:
    (cell,) = plan_of(SMALL, precisions=(precision,), kv_caches=("plain",), group_size=16).cells
    assert cell.footprint.weights_bytes == weights
    assert cell.loading_peak_bytes == weights + beside


ONE_CELL: dict[str, Any] = {"precisions": ("bf16",), "kv_caches": ("plain",), "batches": (1,)}


@pytest.mark.parametrize("largest", [6400, 10**9], ids=["generating", "loading"])
def test_the_context_of_a_card_comes_on_top_of_the_larger_of_generating_and_loading(plan_of: Any, largest: int) -> None:
    shapes = replace(SMALL, largest_tensor=largest)
    (cell,) = plan_of(shapes, **ONE_CELL).cells
    assert (cell.loading_peak_bytes > cell.footprint.peak_bytes) is (largest == 10**9)
    needed = max(cell.loading_peak_bytes, cell.footprint.peak_bytes) + 2**29
    for room, fits in ((needed, True), (needed - 1, False)):
        found = plan_of(shapes, **ONE_CELL, device_bytes=room)
        assert found.cells[0].fits is fits
        assert (what_would_fit(found) is None) is fits


def cut(plan: Plan, precision: str) -> dict[int, str | None]:
    """Why a model cannot be cut over so many cards; None where it can."""
    assert all(row.fits is (row.reason is None) for row in plan.tensor_parallel)
    return {row.ranks: row.reason for row in plan.tensor_parallel if row.precision == precision}


OUTPUTS, INPUTS = "block.wide: 48 outputs in whole words by ", "block.tail: 48 inputs in whole words by "
# 48 columns over 4 cards are 12: of 8 bits 3 words, of 4 bits one and a half; over 8 cards 6 of them fill none.
WORDS: dict[str, tuple[LinearShape, str, dict[int, str | None]]] = {
    "outputs of 4 bits": (OUT, "int4", {1: None, 2: None, 4: f"{OUTPUTS}4", 8: f"{OUTPUTS}8"}),
    "outputs of 8 bits": (OUT, "int8", {1: None, 2: None, 4: None, 8: f"{OUTPUTS}8"}),
    "inputs of 4 bits": (TAIL, "int4", {1: None, 2: None, 4: f"{INPUTS}4", 8: f"{INPUTS}8"}),
    "inputs of 8 bits": (TAIL, "int8", {1: None, 2: None, 4: None, 8: f"{INPUTS}8"}),
    "outputs that are not packed": (OUT, "bf16", dict.fromkeys((1, 2, 4, 8))),
    "inputs that are not packed": (TAIL, "bf16", dict.fromkeys((1, 2, 4, 8))),
}


@pytest.mark.parametrize(("linear", "precision", "expected"), WORDS.values(), ids=list(WORDS))
def test_a_packed_matrix_is_cut_between_words_only(
    plan_of: Any, linear: LinearShape, precision: str, expected: dict[int, str | None]
) -> None:
    found = plan_of(replace(SMALL, linears=(linear,)), precisions=(precision,), group_size=-1)
    assert cut(found, precision) == expected


def test_a_packed_tail_is_cut_between_groups_only(plan_of: Any) -> None:
    shapes = replace(SMALL, linears=(replace(TAIL, inputs=192),))
    # 3 groups of 64 cannot be dealt to 2 cards; 12 of 16 can to 2 and 4.
    by = "block.tail: 192 / 64 = 3 groups by"
    assert cut(plan_of(shapes, group_size=64), "int4") == {1: None, 2: f"{by} 2", 4: f"{by} 4", 8: f"{by} 8"}
    by = "block.tail: 192 / 16 = 12 groups by"
    assert cut(plan_of(shapes, group_size=16), "int4") == {1: None, 2: None, 4: None, 8: f"{by} 8"}


def test_a_matrix_that_is_not_packed_is_cut_between_any_columns(plan_of: Any) -> None:
    shapes = replace(SMALL, linears=(replace(TAIL, inputs=44), replace(OUT, outputs=44)))
    found = cut(plan_of(shapes, precisions=("bf16",)), "bf16")
    assert found == {1: None, 2: None, 4: None, 8: "block.tail: 44 inputs by 8"}


@pytest.mark.parametrize("linear", [replace(OUT, outputs=36), replace(TAIL, inputs=36)], ids=["outputs", "inputs"])
def test_whole_words_alone_are_not_enough(plan_of: Any, linear: LinearShape) -> None:
    # 36 over 8 cards: 4 are a word of 8 bits each, and 4 columns are left over.
    found = cut(plan_of(replace(SMALL, linears=(linear,)), precisions=("int8",), group_size=-1), "int8")
    assert [ranks for ranks, reason in found.items() if reason is None] == [1]


def test_heads_are_cut_whole_and_only_keys_and_values_may_lie_twice(plan_of: Any) -> None:
    few = cut(plan_of(replace(SMALL, query_heads=4), precisions=("bf16",)), "bf16")
    assert few == {1: None, 2: None, 4: None, 8: "4 query heads by 8"}  # its 2 key and value heads on 4 cards
    odd = replace(SMALL, caches=(replace(CACHE, heads=3),))
    by = "3 key and value heads by"
    assert cut(plan_of(odd, precisions=("bf16",)), "bf16") == {1: None, 2: f"{by} 2", 4: f"{by} 4", 8: f"{by} 8"}
