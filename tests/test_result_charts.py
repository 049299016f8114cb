"""The charts of a report: drawn for every kind of result, complete, told apart without colour, safe in a page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from qquant.charts.accuracy import front, pareto_charts, task_charts
from qquant.charts.contexts import context_charts
from qquant.charts.grid_cells import families, profile_cells, slice_of
from qquant.charts.label_places import Box
from qquant.charts.layers import layer_charts
from qquant.charts.memory import memory_charts, parts_charts
from qquant.charts.of_results import charts
from qquant.charts.predictions import difference, prediction_charts
from qquant.charts.speed import speed_charts
from qquant.charts.svg import Chart, text_width
from qquant.layer_names import in_order, layer_of
from tests.chart_results import ROWS, every_result, kept, model_row, plan, profile, result, tasks


@pytest.fixture(scope="module")
def all_charts() -> list[Chart]:
    return charts(every_result())


def tree(chart: Chart) -> ET.Element:
    return ET.fromstring(chart.svg)


def tips(chart: Chart) -> list[str]:
    return [node.text or "" for node in tree(chart).iter("title")][1:]


def texts(chart: Chart) -> list[str]:
    return [node.text or "" for node in tree(chart).iter("text")]


def written(root: ET.Element) -> list[tuple[str, Box]]:
    """Every text with a box a little smaller than its letters, because widths are estimated."""
    found = []
    for node in root.iter("text"):
        size = float(node.get("font-size", "12"))
        wide = 0.85 * text_width(node.text or "", size)
        shift = {"middle": wide / 2, "end": wide}.get(node.get("text-anchor", ""), 0)
        box = Box(float(node.get("x", "0")) - shift, float(node.get("y", "0")) - 0.6 * size, wide, 0.5 * size)
        found.append((node.text or "", box))
    return found


def test_every_question_has_its_chart(all_charts: list[Chart]) -> None:
    kinds = list(dict.fromkeys(chart.anchor.rpartition("-")[0] for chart in all_charts))
    assert kinds == [
        "pareto-kl", "pareto-score", "tasks", "layers", "memory-batch-profile", "memory-length-profile",
        "memory-batch-plan", "memory-length-plan", "memory-parts", "prediction", "speed", "speed-decode",
        "speed-prefill", "kv-cache", "long-context",
    ]  # fmt: skip


def test_ids_of_a_page_differ_and_begin_with_the_anchor(all_charts: list[Chart]) -> None:
    assert len({chart.anchor for chart in all_charts}) == len(all_charts)
    ids = [(chart.anchor, node.get("id", "")) for chart in all_charts for node in tree(chart).iter() if node.get("id")]
    assert len({own for _, own in ids}) == len(ids)
    assert all(own.startswith(f"{anchor}-") for anchor, own in ids)


def test_a_chart_names_itself_and_scales_with_the_page(all_charts: list[Chart]) -> None:
    for chart in all_charts:
        root = tree(chart)
        assert (root.get("role"), root.get("width")) == ("img", "100%")
        assert root.get("viewBox", "").startswith("0 0 ")
        assert [child.tag for child in root][:2] == ["title", "desc"]
        assert all(child.text for child in root[:2])
        assert root.get("aria-labelledby") == f"{root[0].get('id')} {root[1].get('id')}"
        assert chart.caption


def test_colours_are_the_pages_and_nothing_outside_is_referred_to(all_charts: list[Chart]) -> None:
    known = re.compile(r"var\(--(ink|muted|line|paper|panel|good|bad|c[1-8]|s[0-8])\)")
    for chart in all_charts:
        paints = {node.get(name, "none") for node in tree(chart).iter() for name in ("fill", "stroke")} - {"none"}
        assert all(known.fullmatch(paint) for paint in paints)
        assert not re.search(r"<script|<style|<image|href|url\(|style=|http|\son\w+=", chart.svg)


def test_no_two_texts_lie_on_each_other(all_charts: list[Chart]) -> None:
    for chart in all_charts:
        for (one, box), (other, there) in combinations(written(tree(chart)), 2):
            assert not box.overlap(there), f"{chart.anchor}: {one!r} lies on {other!r}"


def test_no_text_leaves_its_drawing(all_charts: list[Chart]) -> None:
    for chart in all_charts:
        root = tree(chart)
        width, height = (float(end) for end in root.get("viewBox", "").split()[2:])
        for text, box in written(root):
            assert box.left >= -1, f"{chart.anchor}: {text!r} begins at {box.left:.0f}"
            assert box.right <= width + 1, f"{chart.anchor}: {text!r} ends at {box.right:.0f} of {width:.0f}"
            assert box.top >= 0, f"{chart.anchor}: {text!r} is cut at the top"
            assert box.bottom <= height, f"{chart.anchor}: {text!r} is cut at the bottom"


def test_all_pictures_of_a_large_report_stay_small(all_charts: list[Chart]) -> None:
    assert sum(len(chart.svg) for chart in all_charts) < 500_000


def test_results_without_numbers_make_no_chart() -> None:
    empty = model_row("bare").model_copy(update={"accuracy": None, "speed": None})
    assert charts([]) == []
    assert charts([result((empty,)), result(())]) == []


def test_names_of_models_cannot_break_out() -> None:
    evil = '</text></svg><script>alert("1")</script>&\x00\u202e' + "é" * 200
    rows = [ROWS[0].model_copy(update={"label": evil}), ROWS[2].model_copy(update={"label": evil + "2"})]
    for chart in charts([result(rows)]):
        tags = {node.tag for node in tree(chart).iter()}
        assert tags <= {"svg", "title", "desc", "text", "rect", "path", "circle", "polygon"}
        assert "\u202e" not in chart.svg


def test_the_front_keeps_what_no_other_beats_in_both() -> None:
    assert front([(5, 0.03), (5, 0.01), (8, 0.001), (9, 0.002), (14, 0.0)]) == [(5, 0.01), (8, 0.001), (14, 0.0)]


def test_a_model_is_marked_at_its_size_and_divergence_with_its_speed() -> None:
    (chart,) = pareto_charts([result()])
    assert "qwen-7b-int4: 5.91 GB, 40 tokens/s, 0.009" in tips(chart)
    assert texts(chart).count("40 tokens/s") == 4


def test_the_unquantized_reference_stands_on_zero() -> None:
    chart = pareto_charts([result()])[0]
    assert "0" in texts(chart)
    assert "qwen-7b: 15.5 GB, 40 tokens/s, 0" in tips(chart)


def test_scores_are_averaged_only_over_models_with_all_tasks() -> None:
    found = tasks()
    partly = found.model_copy(update={"scores": found.scores[:-1]})
    score = pareto_charts([result(tasks=partly)])[1]
    assert score.anchor == "pareto-score-1"
    assert "int4" in texts(score)
    assert "int4-rtn" not in texts(score)


def test_a_difference_that_chance_explains_is_hollow() -> None:
    (chart,) = task_charts([result(tasks=tasks())])
    marks = [node for node in tree(chart).iter("polygon") if len(node) and "of MMLU" in (node[0].text or "")]
    # int8 and int4 lose less than half an interval, int4-rtn more
    assert [node.get("fill") == "var(--panel)" for node in marks] == [True, True, False]
    assert {"−3.1", "[−4.3, −1.9]"} <= set(texts(chart))


def test_every_layer_of_every_candidate_has_a_cell() -> None:
    (chart,) = layer_charts([result()])
    assert len(tips(chart)) == 3 * 32 * 5
    assert "layer 3, o: 0.144" in tips(chart)  # 0.009 * (1 + 3) * (1 + 3)


def test_a_darker_cell_is_a_larger_error() -> None:
    (chart,) = layer_charts([result()])
    cells = [node for node in tree(chart).iter("rect") if len(node)]
    by_error = sorted((float((node[0].text or "").rpartition(": ")[2]), (node.get("fill") or "")[-2]) for node in cells)
    assert [step for _, step in by_error] == sorted(step for _, step in by_error)
    assert {step for _, step in by_error} == set("012345678")


NAMES = {
    "llama": ("model.layers.3.self_attn.q_proj", ("q", 3)),
    "qwen_attention": ("transformer.h.7.attn.c_proj", ("o", 7)),
    "qwen_mlp": ("transformer.h.7.mlp.c_proj", ("down", 7)),
    "qwen_gate": ("transformer.h.0.mlp.w2", ("gate", 0)),
    "other": ("model.layers.1.mixer.in_proj", ("in_proj", 1)),
    "no_layer": ("lm_head", None),
}


@pytest.mark.parametrize(("name", "place"), list(NAMES.values()), ids=list(NAMES))
def test_names_of_linears_are_understood(name: str, place: tuple[str, int] | None) -> None:
    assert layer_of(name) == place


def test_kinds_follow_a_block_from_first_to_last() -> None:
    assert in_order({"down", "in_proj", "qkv", "o"}) == ["qkv", "o", "down", "in_proj"]


def test_a_prediction_far_above_the_measurement_stays_in_the_plot() -> None:
    for chart in memory_charts([result((), profile=profile(device_gib=1000, off=0.25))]):
        dashed = [node.get("d", "") for node in tree(chart).iter("path") if node.get("stroke-dasharray") == "5 3"]
        heights = [float(place.split()[1]) for path in dashed for place in path.strip("M").split("L")]
        assert min(heights) >= 28  # where the frame begins


def test_no_name_lies_on_the_front_of_the_kept_report() -> None:
    (chart,) = pareto_charts([kept("reference-model")])
    (front_line,) = [node for node in tree(chart).iter("path") if node.get("stroke-dasharray") == "2 4"]
    corners = [tuple(map(float, part.split())) for part in front_line.get("d", "").strip("M").split("L")]
    names = [box for text, box in written(tree(chart)) if "model" in text or "int" in text]
    for (x, y), (right, down) in pairwise(corners):
        for step in range(101):
            place = x + (right - x) * step / 100, y + (down - y) * step / 100
            assert all(box.gap(place) > 0 for box in names)


def test_in_a_crowd_only_the_best_are_named_and_all_are_marked() -> None:
    crowd = [
        ROWS[0],
        *[ROWS[2].model_copy(update={"label": f"m{n}", "weights_bytes": 4 * 10**9 + n}) for n in range(30)],
    ]
    (chart,) = pareto_charts([result(crowd)])
    assert {"m0", "qwen-7b"} <= set(texts(chart))
    assert not {f"m{number}" for number in range(1, 30)} & set(texts(chart))
    assert len(tips(chart)) == 31
    assert "Only the models on that line are named" in chart.caption


def test_measured_is_solid_predicted_dashed_and_out_of_memory_crossed() -> None:
    batch, length = memory_charts([result((), profile=profile())])
    lines = [node for node in tree(batch).iter("path") if node.get("stroke-width") in ("2", "1.4")]
    dashes = [node.get("stroke-dasharray") for node in lines]
    assert (dashes.count("5 3"), dashes.count(None)) == (6, 6)
    stopped = [tip for tip in tips(batch) if tip.endswith("out of memory")]
    assert stopped == ["bf16, KV bf16, batch 16, 1,024+128 tokens: out of memory"]
    assert "beyond the device's 24 GiB" in texts(batch)
    assert not [tip for tip in tips(length) if "out of memory" in tip]


def test_a_grid_of_one_batch_and_one_length_has_no_curve() -> None:
    whole = profile()
    single = whole.model_copy(update={"cells": whole.cells[:1]})
    assert memory_charts([result((), profile=single)]) == []
    drawn = speed_charts([result((), profile=single)])
    assert [chart.anchor for chart in drawn] == ["speed-decode-1", "speed-prefill-1"]


def test_a_grid_without_a_finished_cell_draws_nothing() -> None:
    whole = profile(device_gib=1)
    assert {cell.status for cell in whole.cells} == {"out-of-memory"}
    bare = [cell.model_copy(update={"predicted": None}) for cell in whole.cells]
    assert charts([result((), profile=whole.model_copy(update={"cells": tuple(bare)}))]) == []


def test_many_runs_that_ended_at_one_batch_are_counted() -> None:
    batch = memory_charts([result((), profile=profile(device_gib=8))])[0]
    # int4 with the cache of int8 still fits: 5.5 + 3/4 + 16 * 9/16 * 0.516 GiB do not, those of batch 1 do
    assert "4" in texts(batch)
    assert any(tip.startswith("out of memory: bf16, KV bf16, batch 1,") for tip in tips(batch))


def test_models_of_several_sizes_get_charts_of_their_own() -> None:
    small = profile()
    renamed = [c.model_copy(update={"key": c.key.model_copy(update={"label": "qwen-14b"})}) for c in small.cells]
    both = small.model_copy(update={"cells": (*small.cells, *renamed)})
    drawn = memory_charts([result((), profile=both)])
    assert [chart.title.rpartition(": ")[2] for chart in drawn] == ["qwen-7b", "qwen-7b", "qwen-14b", "qwen-14b"]
    assert [chart.anchor for chart in drawn][1:3] == ["memory-length-profile-1", "memory-batch-profile2-1"]


def test_an_anchor_ends_with_the_place_of_its_result() -> None:
    unlike = [kept("reference-model"), result(()), result((), profile=profile())]
    assert {chart.anchor.rpartition("-")[2] for chart in charts(unlike)} == {"1", "3"}


def test_a_model_and_what_was_made_of_it_share_a_chart() -> None:
    names = {"bf16": "base", "int8": "base-int8", "int4": "base-int4"}
    cells = [replace(cell, model=names[cell.precision]) for cell in profile_cells(profile())]
    assert len(families(cells)) == 1
    again = [replace(cell, model="base-int4-rtn") for cell in cells if cell.precision == "int4"]
    assert [{cell.model for cell in group} for group in families([*cells, *again]).values()] == [
        set(names.values()),
        {"base-int4-rtn"},
    ]


def test_along_the_batch_one_length_is_drawn() -> None:
    cells = slice_of(profile_cells(profile()), "batch")
    assert {cell.text for cell in cells} == {"1,024+128 tokens"}
    assert {cell.batch for cell in cells} == {1, 2, 4, 8, 16}


def test_a_plan_shows_what_its_longest_text_needs() -> None:
    (chart,) = parts_charts([result((), plan=plan())])
    assert "int4, KV int8" in texts(chart)
    assert "int4, KV int8: weights 5.5 GiB" in tips(chart)
    assert "int4, KV bf16: KV cache 4 GiB" in tips(chart)  # half a GiB per 1024 tokens


def test_cells_outside_the_band_are_counted() -> None:
    measured = profile(off=0.02)
    (chart,) = prediction_charts([result((), profile=measured)])
    cells = [cell for cell in profile_cells(measured) if cell.measured_bytes]
    inside = sum(abs(difference(cell)) <= 0.05 for cell in cells)
    assert 0 < inside < len(cells)
    assert chart.caption.startswith(f"{inside} of {len(cells)} cells within ±5 %; the farthest is +6.4 %")


def test_speed_shows_the_median_and_the_whole_range() -> None:
    (chart,) = speed_charts([result(ROWS[:1])])
    # 8 tokens in 0.19 to 0.22 s
    assert "qwen-7b: 40 tokens/s, 36.4 to 42.1" in tips(chart)


def test_decoding_tells_how_long_single_tokens_took() -> None:
    decode = speed_charts([result((), profile=profile())])[0]
    # 40 tokens/s for one sequence: 25 ms a token, the slowest repetition 5 % more
    assert any(tip.endswith("a token took 25 ms (p95 26.2 ms)") for tip in tips(decode))


def test_all_schemes_of_the_cache_are_shown_and_the_chosen_is_bold() -> None:
    (chart,) = context_charts([kept("reference-model-kv-cache")])
    bold = [node.text for node in tree(chart).iter("text") if node.get("font-weight")]
    assert bold == ["hadamard"]
    assert {"published", "none", "hadamard", "fold"} <= set(texts(chart))


def test_every_setting_has_a_curve_in_both_plots_of_length() -> None:
    (chart,) = context_charts([kept("reference-model-long-context")])
    assert texts(chart).count("+ ntk + logn") == 2
    assert texts(chart).count("int4: + ntk + logn") == 2
    assert texts(chart).count("made for") == 2
