"""The KV section of a report: it survives JSON, says only what the record holds, and is drawn where it can be."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qquant import kv_report
from qquant.kv_report import (
    KVCacheCost,
    KVDecoded,
    KVLayer,
    KVModel,
    KVNeedle,
    KVPeaks,
    KVPoint,
    KVRange,
    KVRecall,
    KVScheme,
    KVStates,
    SchemeName,
    kv_sections,
)
from qquant.result_files import to_markdown, write_result
from qquant.results import Result, result_from_json
from tests.test_result_files import leaves, make_accuracy, make_report

PNG = b"\x89PNG\r\n\x1a\n"


PEAKS = (1.0, 9.5, 1.5, 2.0)


def make_peaks(largest: tuple[float, ...] = PEAKS) -> KVPeaks:
    return KVPeaks(outlier_ratio=6.25, heads=2, largest=largest, channels_per_peak=1)


def make_states(error: float, largest: tuple[float, ...] = PEAKS) -> KVStates:
    return KVStates(relative_error=error, channel_error=2 * error, peaks=make_peaks(largest))


def make_layer(largest: tuple[float, ...] = PEAKS) -> KVLayer:
    """A layer that cannot be folded."""
    return KVLayer(
        layer=0,
        computed_keys=make_peaks(largest),
        keys=make_states(0.006, largest),
        folded_keys=None,
        values=make_states(0.0055),
    )


def make_scheme(name: SchemeName, kl: float | None) -> KVScheme:
    accuracy = None if kl is None else make_accuracy(12.25, kl)
    return KVScheme(name=name, bytes_per_token=1632.0, share_of_bfloat16=0.53125, accuracy=accuracy)


def make_model(label: str, **changes: Any) -> KVModel:
    fields: dict[str, Any] = {
        "label": label,
        "exact": make_accuracy(12.5, None),
        "schemes": (
            make_scheme("published", 0.007),
            make_scheme("none", 0.004),
            make_scheme("hadamard", 0.003),
            make_scheme("fold", 0.002),
        ),
        "chosen": "fold",
        "automatic": "fold",
        "rival": "hadamard",
        "lead_nats": 0.001,
        "lead_stderr_nats": 0.0001,
    }
    return KVModel(**{**fields, **changes})


def make_needle(length: int, depth: int) -> KVNeedle:
    recalls = [KVRecall(logprob_mean_nats=-value, hit_rate=1 / value) for value in (8.125, 1.5, 1.75)]
    return KVNeedle(
        length_tokens=length,
        depth_percent=depth,
        trials=16,
        absent=recalls[0],
        exact=recalls[1],
        int8=recalls[2],
        agreement=0.96875,
    )


def make_cost(**changes: Any) -> KVCacheCost:
    point = KVPoint(perplexity=12.75, kl_mean_nats=0.0025)
    fields: dict[str, Any] = {
        "kind": "int8",
        "seed": 7,
        "window_tokens": 512,
        "windows": 32,
        "prompt_tokens": 64,
        "models": (make_model("big"), make_model("int4")),
        "decoded": KVDecoded(tokens=256, kl_mean_nats=0.0021, at_once_kl_mean_nats=0.0022),
        "ranges": (
            KVRange(
                first_tokens=1,
                last_tokens=64,
                tokens=2048,
                exact=KVPoint(perplexity=13.5, kl_mean_nats=None),
                chosen=point,
                published=point,
            ),
        ),
        "layer_tokens": 2048,
        "layers": tuple(
            KVLayer(
                layer=layer,
                computed_keys=make_peaks(),
                keys=make_states(0.006),
                folded_keys=make_states(0.005, (1.0, 1.5, 1.5, 2.0)),
                values=make_states(0.0055),
            )
            for layer in range(3)
        ),
        "cue_tokens": 8,
        "answer_tokens": 8,
        "needles": (make_needle(64, 0), make_needle(64, 100)),
    }
    return KVCacheCost(**{**fields, **changes})


def with_cost(cost: KVCacheCost, report: Result | None = None) -> Result:
    return (report or make_report()).model_copy(update={"kv_cache": cost})


def section(cost: KVCacheCost, compute_dtype: str = "float32") -> str:
    return "\n\n".join(kv_sections(cost, compute_dtype=compute_dtype, picture=False))


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text))


def test_the_record_survives_json() -> None:
    report = with_cost(make_cost())
    assert result_from_json(report.model_dump_json()) == report


def test_a_report_without_the_measurement_does_not_mention_it() -> None:
    assert "kv_cache" not in make_report().model_dump_json()
    assert "KV cache" not in to_markdown(make_report())


def test_markdown_is_a_function_of_the_json_alone(tmp_path: Path) -> None:
    write_result(with_cost(make_cost()), tmp_path)
    again = to_markdown(result_from_json((tmp_path / "report.json").read_bytes()))
    assert again == (tmp_path / "report.md").read_text(encoding="utf-8")


def test_every_number_of_the_tables_is_a_rounded_field() -> None:
    cost = make_cost()
    fields: set[str] = set()
    for value in leaves(cost.model_dump()):
        if isinstance(value, int | float):
            shapes = ("d",) if isinstance(value, int) else (".1f", ".2f", ".3f", ".4f", ".5f", ".3g")
            fields.update(number for shape in shapes for number in numbers(format(value, shape)))
            fields.add(f"{100 * value:.2f}")
        elif value is not None:
            fields.update(numbers(str(value)))
    cells = {cell for line in section(cost).splitlines() if line.startswith("|") for cell in numbers(line)}
    headings = {"1", "8", "99", "16"}  # of "top-1", "int8", "p99" and "bfloat16"
    assert cells - headings <= fields


def test_every_model_has_its_schemes_behind_its_exact_cache() -> None:
    rows = [line for line in section(make_cost()).splitlines() if line.startswith(("| big", "| int4"))]
    assert [row.split(" | ")[1] for row in rows[:5]] == [
        "exact", "int8 published", "int8 none", "int8 hadamard", "int8 fold",
    ]  # fmt: skip
    assert rows[4] == "| big | int8 fold | 1632.0 | 0.531 | 12.2500 | 0.002 | 0.018 | 0.1 | 93.75 % |"
    assert len(rows) == 10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, '0.001 nats (standard error 0.0001) less than hadamard. `key_transform="auto"` takes fold, the same.'),
        ({"lead_stderr_nats": 0.0009}, "less than hadamard, which may be chance."),
        ({"chosen": "hadamard", "rival": "fold"}, 'less than fold. `key_transform="auto"` takes fold.'),
    ],
    ids=["agreed", "chance", "disagreed"],
)
def test_the_choice_is_named_with_its_lead_and_what_auto_would_take(changes: dict[str, Any], words: str) -> None:
    assert words in section(make_cost(models=(make_model("big", **changes),)))


def test_a_coarse_dtype_is_warned_of() -> None:
    assert "Rounding in bfloat16" in section(make_cost(), "bfloat16")
    assert "Rounding" not in section(make_cost())


def test_what_was_not_measured_is_said_and_not_guessed() -> None:
    layer = make_layer()
    broken = make_model("big", schemes=(make_scheme("published", None), make_scheme("none", 0.004)))
    text = section(make_cost(models=(broken,), layers=(layer,), needles=()))
    assert "| big | int8 published | 1632.0 | 0.531 | not measured |" in text
    assert "| 0 | 0.00600 | not measured |" in text
    assert "Needles were not measured" in text


def test_an_unknown_scheme_or_field_has_no_place_in_the_record() -> None:
    with pytest.raises(ValidationError, match="chosen"):
        make_model("x", chosen="int4")
    with pytest.raises(ValidationError, match="extra"):
        make_cost(extra=1)


class TestPicture:
    """Needs matplotlib, but for the test of its absence."""

    @pytest.fixture(autouse=True)
    def _matplotlib(self) -> None:
        pytest.importorskip("matplotlib")

    def test_it_is_drawn_named_and_small(self, tmp_path: Path) -> None:
        report = write_result(with_cost(make_cost()), tmp_path)
        assert report.plots == ("layer-error.png", "size-kl.png", kv_report.PICTURE)
        picture = (tmp_path / kv_report.PICTURE).read_bytes()
        assert picture.startswith(PNG)
        assert len(picture) <= 250_000
        assert (tmp_path / "report.md").read_text().count(f"({kv_report.PICTURE})") == 1

    @pytest.mark.parametrize("panels", [2, 3])
    def test_maps_share_one_scale_and_heads_are_set_apart(self, panels: int) -> None:
        from matplotlib.figure import Figure

        layers = make_cost().layers
        if panels == 2:
            layers = tuple(layer.model_copy(update={"folded_keys": None}) for layer in layers)
        figure = Figure()
        assert kv_report.draw_kv_outliers(figure, make_cost(layers=layers)) is None
        maps = [axis for axis in figure.axes if axis.images]
        assert len(maps) == panels
        assert {axis.images[0].get_clim() for axis in maps} == {(1.0, 9.5)}
        # Between the second and the third of four channels.
        edges: list[Any] = [axis.lines[0].get_xdata() for axis in maps]
        assert [list(edge) for edge in edges] == [[1.5, 1.5]] * panels

    def test_a_dead_channel_does_not_stretch_the_scale(self) -> None:
        from matplotlib.figure import Figure

        layer = make_layer((0.0, 1e-20, 5.0, 10.0))
        figure = Figure()
        assert kv_report.draw_kv_outliers(figure, make_cost(layers=(layer,))) is None
        assert figure.axes[0].images[0].get_clim() == (0.01, 10.0)

    def test_keys_that_are_zero_are_not_drawn_and_the_log_says_so(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        layer = make_layer((0.0, 0.0))
        with caplog.at_level(logging.WARNING):
            report = write_result(with_cost(make_cost(layers=(layer,))), tmp_path)
        assert kv_report.PICTURE not in report.plots
        assert "kv-outliers.png was not drawn: no layer has keys above zero" in caplog.text
        assert kv_report.PICTURE not in (tmp_path / "report.md").read_text()

    def test_a_report_of_one_model_has_only_this_picture(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        report = make_report()
        with caplog.at_level(logging.WARNING):
            alone = write_result(with_cost(make_cost(), report.model_copy(update={"rows": report.rows[:1]})), tmp_path)
        assert alone.plots == (kv_report.PICTURE,)
        assert caplog.text == ""
        assert (tmp_path / "report.md").read_text().startswith("# Evaluation of big\n")


def test_without_matplotlib_the_section_is_whole_and_the_log_says_once_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level(logging.WARNING):
        write_result(with_cost(make_cost()), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}
    assert "## KV cache" in (tmp_path / "report.md").read_text()
    assert len(caplog.records) == 1
    assert kv_report.PICTURE in caplog.text
