"""The record round-trips, the Markdown is a function of it alone, and pictures are drawn where there is data."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qquant import accuracy, measure, records
from qquant import results as record
from qquant.errors import BadDataError
from qquant.layer_names import error_grid
from qquant.result_files import to_markdown, write_result
from qquant.results import LayerError, ModelRow, Result, ratios_to_baseline, result_from_json, shown_command

PNG = b"\x89PNG\r\n\x1a\n"


def make_accuracy(perplexity: float, kl: float | None, *, top1: float = 0.9375) -> records.Accuracy:
    return records.Accuracy(
        tokens=999,
        nll_mean_nats=2.5,
        perplexity=perplexity,
        nll_difference_nats=None if kl is None else 0.0123,
        nll_difference_stderr_nats=None if kl is None else 0.0011,
        kl_mean_nats=kl,
        kl_p99_nats=None if kl is None else kl * 9,
        kl_max_nats=None if kl is None else kl * 50,
        top1_agreement=None if kl is None else top1,
    )


def make_speed(prefill: tuple[float, ...], decode: tuple[float, ...]) -> records.Speed:
    return records.Speed(
        prompt_tokens=512,
        decode_tokens=8,
        prefill_tokens_per_second=1234.5,
        decode_tokens_per_second=67.8,
        prefill_seconds=prefill,
        decode_seconds=decode,
    )


def make_memory(tensors: int) -> records.Memory:
    return records.Memory(
        tensor_bytes=tensors,
        rss_before_bytes=100_000_000,
        peak_rss_bytes=200_000_000,
        peak_rss_source="vmhwm_since_reset",
        cuda_before_bytes=None,
        cuda_peak_bytes=None,
    )


def make_row(label: str, **changes: Any) -> ModelRow:
    fields: dict[str, Any] = {
        "label": label,
        "role": "candidate",
        "method": "gptq",
        "bits": 4,
        "group_size": 128,
        "checkpoint_dtype": "bfloat16",
        "weights_bytes": 30_000_000,
        "folder_bytes": 31_000_000,
        "bits_per_weight": 4.8,
        "accuracy": make_accuracy(12.5, 0.02),
        "speed": make_speed((0.5, 0.5, 0.5), (0.1, 0.1, 0.1)),
        "memory": make_memory(28_000_000),
        "ratios": None,
        "layer_errors": tuple(
            LayerError(name=f"model.layers.{layer}.{name}_proj", relative_error=1e-3 * (layer + 1))
            for layer in range(3)
            for name in ("self_attn.q", "mlp.down")
        ),
    }
    return ModelRow(**{**fields, **changes})


BASELINE = make_row(
    "big",
    role="baseline",
    method=None,
    bits=None,
    group_size=None,
    weights_bytes=100_000_000,
    accuracy=make_accuracy(12.0, None),
    speed=make_speed((1.0, 1.0, 4.0), (0.2, 0.2, 0.2)),
    memory=make_memory(99_000_000),
    layer_errors=(),
)


def make_report(*candidates: ModelRow) -> Result:
    rows = candidates or (make_row("int4"),)
    return Result(
        created="2026-01-02T03:04:05+00:00",
        command="qquant eval --baseline big --candidate int4",
        seed=7,
        compute_dtype="bfloat16",
        environment=records.Environment(
            python="3.11.7",
            torch="2.13.0",
            transformers="5.23.0",
            qquant="0.1.0",
            platform="Linux x86_64",
            cpu="A CPU",
            threads=2,
            device="A CPU",
        ),
        data=record.Data(name="eval.txt", sha256="ab" * 32, tokens=1000, window_tokens=512, stride_tokens=256),
        rows=(
            BASELINE,
            *(row.model_copy(update={"ratios": ratios_to_baseline(row, BASELINE)}) for row in rows),
        ),
    )


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:\.\d+)?", text))


def leaves(value: Any) -> Iterator[Any]:
    """Everything in a dumped record that is no container."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def test_the_record_survives_json() -> None:
    report = make_report(make_row("int4"), make_row("int8", bits=8, speed=None, memory=None))
    assert result_from_json(report.model_dump_json()) == report


def test_markdown_is_a_function_of_the_json_alone(tmp_path: Path) -> None:
    write_result(make_report(), tmp_path)
    again = to_markdown(result_from_json((tmp_path / "report.json").read_bytes()))
    assert again == (tmp_path / "report.md").read_text(encoding="utf-8")


def test_every_measured_number_of_the_markdown_is_a_rounded_field() -> None:
    report = make_report()
    fields: set[str] = set()
    for value in leaves(report.model_dump()):
        if isinstance(value, int | float):
            shapes = ("d",) if isinstance(value, int) else (".1f", ".2f", ".3f", ".4f", ".5f", ".3g")
            fields.update(format(value, shape) for shape in shapes)
            fields.update((f"{value / 1e6:.2f}", f"{100 * value:.2f}"))
        elif value is not None:
            fields.update(numbers(str(value)))
    tables = to_markdown(report).split("## Accuracy")[1].split("## How it was run")[0]
    cells = {cell for line in tables.splitlines() if line.startswith("|") for cell in numbers(line)}
    headings = {"1", "99"}  # of "top-1" and "p99"
    assert cells - headings <= fields


def test_markdown_shows_the_baseline_first_and_each_candidate_with_its_ratio() -> None:
    lines = to_markdown(make_report()).splitlines()
    table = lines[lines.index("## Accuracy") + 2 :]
    assert table[2].startswith("| big (baseline) | bfloat16 | 12.0000 | - |")
    assert table[3].startswith("| int4 | 4-bit gptq, group 128 | 12.5000 | 1.0417 | +0.01230 | 0.00110 | 0.02 |")


def test_what_was_not_measured_is_said_and_not_guessed() -> None:
    markdown = to_markdown(make_report(make_row("int4", accuracy=None, speed=None, memory=None, weights_bytes=None)))
    for heading in ("Accuracy", "Speed, one sequence at a time", "Memory", "Size"):
        line = next(x for x in markdown.split(f"## {heading}\n")[1].splitlines() if x.startswith("| int4"))
        assert "not measured" in line


def test_speed_ratios_are_medians_of_neighbouring_turns() -> None:
    row = make_row("int4", speed=make_speed((0.5, 0.5, 2.0), (0.1, 0.4, 0.1)))
    ratios = ratios_to_baseline(row, BASELINE)
    assert ratios.prefill_tokens_per_second == 2.0  # (1/0.5, 1/0.5, 4/2): the machine was slow for both
    assert ratios.decode_tokens_per_second == 2.0
    assert ratios.weights_bytes == 0.3


def test_a_label_cannot_break_the_table() -> None:
    assert "| a\\|b |" in to_markdown(make_report(make_row("a|b")))


def test_a_whole_row_group_is_said_in_words() -> None:
    assert "4-bit gptq, whole row" in to_markdown(make_report(make_row("x", group_size=-1)))


def test_rtn_errors_are_marked_as_errors_of_the_weights() -> None:
    assert "x (error of the weights: rtn uses no data)" in to_markdown(make_report(make_row("x", method="rtn")))


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["qquant", "eval", "--out", "/home/someone/x/report"], "qquant eval --out report"),
        (["qquant", "--data=/srv/a b/text.txt"], "qquant --data=text.txt"),
        (["qquant", "--candidate", "out/int4", "Qwen/Qwen2-7B"], "qquant --candidate out/int4 Qwen/Qwen2-7B"),
        (["qquant", "~/models/m"], "qquant m"),
        (["qquant", "/"], "qquant /"),
        (["qquant", "a b"], "qquant 'a b'"),
    ],
    ids=["path", "equals", "relative", "home", "root", "quoted"],
)
def test_a_shown_command_holds_no_absolute_path(argv: list[str], shown: str) -> None:
    assert shown_command(argv) == shown


@pytest.mark.parametrize(
    ("path", "value"),
    [(("seed",), "7"), (("extra",), 1), (("schema_version",), 3), (("data", "tokens"), 1.5)],
    ids=["mistyped", "unknown_field", "future_schema", "fraction"],
)
def test_a_report_that_is_not_ours_is_refused_by_field(path: tuple[str, ...], value: Any) -> None:
    content = json.loads(make_report().model_dump_json())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(BadDataError, match=path[-1]):
        result_from_json(json.dumps(content))


def test_text_that_is_no_json_is_refused() -> None:
    with pytest.raises(BadDataError, match="not a report"):
        result_from_json("# Evaluation")


def test_a_number_that_is_not_finite_has_no_place_in_a_report() -> None:
    with pytest.raises(ValidationError):
        record.Data(name="x", sha256="", tokens=1, window_tokens=1, stride_tokens=float("nan"))  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        LayerError(name="x", relative_error=float("inf"))


@pytest.mark.parametrize(
    ("stored", "measured"),
    [
        (records.Accuracy, accuracy.Accuracy),
        (records.Speed, measure.Speed),
        (records.Memory, measure.Memory),
        (records.Environment, measure.Environment),
    ],
    ids=["accuracy", "speed", "memory", "environment"],
)
def test_a_stored_record_has_the_fields_of_what_was_measured(stored: Any, measured: Any) -> None:
    assert list(stored.model_fields) == list(measured.__dataclass_fields__)


class TestPictures:
    """Need matplotlib, but for the test of its absence."""

    @pytest.fixture(autouse=True)
    def _matplotlib(self) -> None:
        pytest.importorskip("matplotlib")

    def test_both_pictures_are_drawn_and_named_in_the_record(self, tmp_path: Path) -> None:
        report = write_result(make_report(), tmp_path)
        assert report.plots == ("layer-error.png", "size-kl.png")
        assert all((tmp_path / name).read_bytes().startswith(PNG) for name in report.plots)
        assert "![size-kl](size-kl.png)" in (tmp_path / "report.md").read_text()

    def test_the_same_record_gives_the_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            write_result(make_report(), tmp_path / name)
        for file in sorted((tmp_path / "a").iterdir()):
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()

    def test_names_of_other_families_find_their_places(self) -> None:
        names = ["transformer.h.3.attn.c_attn", "transformer.h.3.attn.c_proj", "transformer.h.3.mlp.c_proj", "lm_head"]
        grid = error_grid((name, 0.1) for name in names)
        assert set(grid) == {("qkv", 3), ("o", 3), ("down", 3)}

    def test_what_has_no_data_is_left_out_and_said(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            report = write_result(make_report(make_row("x", layer_errors=(), accuracy=None)), tmp_path)
        assert report.plots == ()
        assert "layer-error.png was not drawn: no candidate has" in caplog.text
        assert "size-kl.png was not drawn: no candidate has" in caplog.text


def test_without_matplotlib_the_report_is_whole_and_the_log_says_once_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level(logging.WARNING):
        write_result(make_report(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}
    assert len(caplog.records) == 1
    assert "qquant[plots]" in caplog.text
