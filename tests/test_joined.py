"""Results are found, joined where they may be compared and marked where they may not; published cells stand beside."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path

import pytest

from qquant.errors import BadDataError, UsageError
from qquant.page import grids as joined_grids
from qquant.page import models as joined_models
from qquant.page import plans as joined_plans
from qquant.page import scores as joined_scores
from qquant.page.html import page
from qquant.page.joined import Joined, Source, find_results, published_size
from qquant.page.tables import SECTIONS, Table, make_table, markdown_text
from qquant.results import Data, Result, result_from_json
from tests.joined_results import (
    GIB,
    HOSTILE,
    PARAMETERS_7B,
    make_accuracy,
    make_plan_result,
    make_profile_result,
    make_result,
    make_row,
    make_tasks,
)

REPORTS = Path(__file__).parent.parent / "reports"


def put(folder: Path, result: Result) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(result.model_dump_json(), encoding="utf-8")
    return folder


def all_tables(*results: Result) -> list[Table]:
    return [
        *joined_scores.tables(results),
        *joined_models.tables(results),
        *joined_grids.tables(results),
        *joined_plans.tables(results),
    ]


def joined(*results: Result) -> Joined:
    sources = tuple(Source(f"results/{place}", result) for place, result in enumerate(results, 1))
    return Joined(sources, joined_scores.verdicts(results), tuple(all_tables(*results)))


def titled(tables: list[Table], start: str) -> Table:
    return next(table for table in tables if table.title.startswith(start))


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.body]


class TestFinding:
    def test_every_result_below_the_folders_is_read_once_and_named_without_its_place(self, tmp_path: Path) -> None:
        put(tmp_path / "runs" / "b", make_result())
        put(tmp_path / "runs" / "a" / "deep", make_profile_result())
        found = find_results([tmp_path / "runs", tmp_path / "runs" / "b"])
        assert [source.name for source in found] == ["runs/a/deep", "runs/b"]

    def test_an_unfinished_folder_is_left_out(self, tmp_path: Path) -> None:
        put(tmp_path / "runs", make_result())
        put(tmp_path / "runs" / ".x.partial-12", make_result())
        assert len(find_results([tmp_path / "runs"])) == 1

    def test_a_copy_of_a_result_is_named_and_counted_once(self, tmp_path: Path) -> None:
        put(tmp_path / "runs" / "a", make_result())
        put(tmp_path / "runs" / "b", make_result())
        assert [source.name for source in find_results([tmp_path / "runs"])] == ["runs/a (the same: runs/b)"]

    def test_links_that_go_round_end(self, tmp_path: Path) -> None:
        put(tmp_path / "runs" / "a", make_result())
        (tmp_path / "runs" / "a" / "again").symlink_to(tmp_path / "runs")
        (tmp_path / "runs" / "other").symlink_to(tmp_path / "runs" / "a")
        assert len(find_results([tmp_path / "runs"])) == 1

    def test_a_byte_order_mark_is_read_over(self, tmp_path: Path) -> None:
        put(tmp_path, make_result())
        whole = (tmp_path / "report.json").read_bytes()
        (tmp_path / "report.json").write_bytes(b"\xef\xbb\xbf" + whole)
        assert find_results([tmp_path])[0].result == make_result()

    def test_a_folder_or_pipe_of_the_name_of_a_report_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "a" / "report.json").mkdir(parents=True)
        (tmp_path / "b").mkdir()
        os.mkfifo(tmp_path / "b" / "report.json")
        with pytest.raises(BadDataError, match="there is none"):
            find_results([tmp_path])

    def test_a_number_of_hundreds_of_digits_is_refused_by_name(self, tmp_path: Path) -> None:
        put(tmp_path, make_result())
        text = (tmp_path / "report.json").read_text()
        (tmp_path / "report.json").write_text(text.replace("5862000000", "9" * 400))
        with pytest.raises(BadDataError, match=r"rows\.1\.weights_bytes has 400 digits"):
            find_results([tmp_path])

    def test_a_folder_whose_name_is_no_utf8_can_be_written_down(self, tmp_path: Path) -> None:
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff"))
        try:
            put(folder, make_result())
        except OSError:
            pytest.skip("this file system takes no such name")
        (found,) = find_results([folder])
        assert found.name == "bad\\xff"

    def test_both_schemas_are_read(self) -> None:
        found = find_results([REPORTS])
        assert {source.result.schema_version for source in found} >= {1}
        assert joined(*[source.result for source in found]).tables

    def test_a_folder_that_is_not_there_is_a_usage_error(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="nowhere is not a folder"):
            find_results([tmp_path / "nowhere"])

    def test_a_folder_without_a_result_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadDataError, match=r"report\.json"):
            find_results([tmp_path])

    def test_a_report_that_is_not_ours_is_named_with_its_first_wrong_field(self, tmp_path: Path) -> None:
        content = json.loads(make_result().model_dump_json())
        content["seed"] = "seven"
        (tmp_path / "report.json").write_text(json.dumps(content))
        with pytest.raises(BadDataError, match=r"report\.json is not a report of schema 1 or 2: seed"):
            find_results([tmp_path])


class TestComparing:
    def test_a_baseline_that_two_results_hold_stands_once_with_both_numbers(self) -> None:
        second = make_result(make_row("qwen", "baseline"), make_row("qwen-int8", bits=8, sha256="d" * 64))
        table = titled(joined_models.tables([make_result(), second]), "Perplexity")
        assert [row[:3] for row in texts(table)] == [
            ["qwen (baseline)", "BF16", "1, 2"],
            ["qwen-int4", "Int4 gptq, group 128", "1"],
            ["qwen-int8", "Int8 gptq, group 128", "2"],
        ]
        assert not table.notes

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"compute_dtype": "float32"}, r"another dtype \(bfloat16 there, float32 here\)"),
            (
                {"data": Data(name="b.txt", sha256="cd" * 32, tokens=9, window_tokens=512, stride_tokens=256)},
                "another text",
            ),
            (
                {"data": Data(name="eval.txt", sha256="ab" * 32, tokens=1000, window_tokens=64, stride_tokens=64)},
                "another window",
            ),
            ({"environment": make_profile_result().environment}, r"another device \(A CPU there, A GPU here\)"),
        ],
        ids=["dtype", "text", "windows", "device"],
    )
    def test_unlike_results_stand_in_tables_of_their_own_with_the_reason(self, changes: dict, reason: str) -> None:  # type: ignore[type-arg]
        tables = [t for t in joined_models.tables([make_result(), make_result(**changes)]) if "divergence" in t.title]
        assert len(tables) == 2
        assert not tables[0].notes
        assert re.search(reason, tables[1].notes[0])
        assert tables[1].notes[0].count("another") == 1

    def test_another_baseline_of_the_same_name_is_another_baseline(self) -> None:
        other = make_result(make_row("qwen", "baseline", sha256="e" * 64), make_row("qwen-int4"))
        tables = [table for table in joined_models.tables([make_result(), other]) if "divergence" in table.title]
        assert (
            "another baseline (qwen (sha256 bbbbbbbbbbbb) there, qwen (sha256 eeeeeeeeeeee) here)" in tables[1].notes[0]
        )

    def test_what_calibration_had_seen_of_the_text_is_said_under_the_table_and_on_the_page(self) -> None:
        seen = make_row("qwen-int4", calibration_overlap=0.912)
        second = make_row("qwen-int8", bits=8, sha256="d" * 64, calibration_overlap=0.01)  # as texts of one kind have
        found = joined(make_result(make_row("qwen", "baseline"), seen, second))
        (note,) = titled(list(found.tables), "Perplexity").notes
        assert "runs of 16 tokens calibration had seen about 91.2% (qwen-int4): what" in note
        assert note in found.to_markdown()
        assert note in html.unescape(page(found, [], "{}"))

    def test_what_calibration_had_seen_of_the_questions_is_said_under_the_scores(self) -> None:
        seen = make_row("qwen-int4", calibration_overlap=0.5)
        result = make_result(make_row("qwen", "baseline"), seen, data=None, tasks=make_tasks())
        (note,) = titled(joined_scores.tables([result]), "Accuracy by task").notes
        assert note.startswith("Of the questions' runs of 16 tokens calibration had seen about 50.0% (qwen-int4)")

    def test_a_score_of_other_shots_is_marked_in_its_column(self) -> None:
        first = make_result(data=None, tasks=make_tasks())
        second = make_result(data=None, tasks=make_tasks(shots=5))
        table = titled(joined_scores.tables([first, second]), "Accuracy by task")
        marks = [[cell.unlike for cell in row] for row in table.body if row[2].text.startswith("measured")]
        assert [any(row) for row in marks] == [False, False, True, True]
        assert texts(table)[2][3].endswith("(1)")
        assert "MMLU, mark 1: not to be compared with the others of its column: 1000 items, 5 shots" in table.notes[0]

    def test_tasks_of_one_model_from_two_results_share_a_row(self) -> None:
        tasks = make_tasks()
        only = {
            name: tasks.model_copy(update={"scores": tuple(s for s in tasks.scores if s.task == name)})
            for name in ("mmlu", "gsm8k")
        }
        results = [make_result(data=None, tasks=found) for found in only.values()]
        table = titled(joined_scores.tables(results), "Accuracy by task")
        assert texts(table)[0] == ["qwen (baseline)", "BF16", "measured [1, 2]", "55.8 ± 1.6", "50.3 ± 1.6"]

    def test_what_one_result_does_not_know_of_a_model_another_fills_in(self) -> None:
        bare = make_row("qwen-int4", parameters=None, ratios=None)
        second = make_profile_result(rows=(bare,))
        table = titled(joined_models.tables([make_result(), second]), "Size of the weights")
        assert [row[:4] for row in texts(table)] == [
            ["qwen (baseline)", "BF16", "1", "7,721.32"],
            ["qwen-int4", "Int4 gptq, group 128", "1, 2", "7,721.32"],
        ]

    def test_a_model_of_megabytes_beside_one_of_gigabytes_is_not_nothing(self) -> None:
        small = make_result(make_row("small", "baseline", weights_bytes=11_555_048, sha256="f" * 64))
        table = titled(joined_models.tables([make_result(), small]), "Size of the weights")
        assert "weights (MB)" in table.head
        assert [row[table.head.index("weights (MB)")] for row in texts(table)] == ["15,442.65", "5,862.00", "11.56"]


class TestPublished:
    def test_readme_scores_stand_beside_a_chat_model_of_the_same_size(self) -> None:
        table = titled(joined_scores.tables([make_result(data=None, tasks=make_tasks())]), "Accuracy by task")
        assert ["qwen-7b-chat", "Int4", "Qwen's README", "55.1", "49.7"] in texts(table)
        assert {cell.origin for cell in table.body[-1]} == {"published"}

    @pytest.mark.parametrize(
        ("row", "style"),
        [
            (make_row("qwen", "baseline", random_weights=True), "chat"),
            (make_row("qwen", "baseline", parameters=1), "chat"),
            (make_row("qwen", "baseline", model_type="qwen2"), "chat"),
            (make_row("qwen", "baseline"), "base"),
        ],
        ids=["random_weights", "other_size", "other_family", "base_prompts"],
    )
    def test_readme_scores_stand_beside_nothing_else(self, row: object, style: str) -> None:
        result = make_result(row, data=None, tasks=make_tasks(style=style))  # type: ignore[arg-type]
        cells = [cell for table in joined_scores.tables([result]) for line in table.body for cell in line]
        assert not [cell for cell in cells if cell.origin == "published"]

    def test_memory_by_batch_holds_measured_predicted_and_published_with_their_hardware(self) -> None:
        table = titled(joined_grids.tables([make_profile_result()]), "Memory by batch: qwen-7b, BF16, 1+1024")
        assert table.head == ("KV cache", "source", "bs=1", "bs=4", "bs=16", "bs=32", "bs=64", "bs=100")
        rows = {(row[0], row[1].split(",")[0]): row[2:] for row in texts(table)}
        assert rows["bf16", "measured on A GPU"] == ["15.50", "17.00", "23.00", "31.00", "OOM", "n/a"]
        assert rows["bf16", "Qwen's README"] == ["16.30", "24.10", "31.70", "48.70", "OOM", "OOM"]
        assert rows["int8", "Qwen's README"] == ["15.50", "17.20", "22.30", "30.20", "48.20", "72.40"]
        assert "A100-80G" in next(row[1].text for row in table.body if row[0].origin == "published")

    def test_a_plan_and_a_profile_of_one_model_are_one_table(self) -> None:
        tables = [t for t in joined_grids.tables([make_profile_result(), make_plan_result()]) if "by batch" in t.title]
        assert len(tables) == 1
        sources = [row[1] for row in texts(tables[0])]
        assert "predicted, qquant [2]" in sources
        assert "measured on A GPU, random weights [1]" in sources

    def test_predictions_of_two_plans_that_agree_share_a_row(self) -> None:
        plan = make_plan_result()
        assert plan.plan
        longer = [cell.model_copy(update={"new_tokens": 2048}) for cell in plan.plan.cells]
        second = plan.model_copy(update={"plan": plan.plan.model_copy(update={"cells": (*plan.plan.cells, *longer)})})
        table = titled(joined_grids.tables([plan, second]), "Memory by length")
        assert [row[1] for row in texts(table) if row[1].startswith("predicted")] == ["predicted, qquant [1, 2]"]

    def test_what_two_plans_say_alike_stands_once(self) -> None:
        plan = make_plan_result()
        other = plan.model_copy(update={"plan": plan.plan and plan.plan.model_copy(update={"device_bytes": 80 * GIB})})
        tables = joined_plans.tables([plan, other])
        assert len([table for table in tables if table.title.startswith("Largest qwen-7b on a card")]) == 2
        (parallel,) = [table for table in tables if table.title.startswith("Tensor parallelism")]
        assert parallel.intro.endswith("results 1, 2.")
        assert parallel.head == ("precision", "2 devices", "8 devices")
        assert texts(parallel) == [["Int4", "yes", "no"]]
        assert parallel.notes == ("Does not divide (Int4): 86 groups of mlp.c_proj.",)

    def test_the_speed_table_has_the_readme_figure_of_the_same_run_only(self) -> None:
        table = titled(joined_grids.tables([make_profile_result()]), "Speed and memory")
        run, speed, memory = (table.head.index(name) for name in (
            "run", "published speed (tokens/s)", "published memory (GiB)"))  # fmt: skip
        rows = {row[run]: row for row in texts(table) if row[2] == "bf16"}
        assert (rows["1 x 1+2048"][speed], rows["1 x 1+2048"][memory]) == ("40.93", "16.99")
        assert rows["1 x 1+1024"][speed] == "n/a"
        assert "encoding 2048 tokens" in table.notes[0]
        assert "Random weights at the model's shapes: qwen-7b." in table.intro

    def test_parameters_and_family_decide_and_not_the_name(self) -> None:
        assert published_size(make_row("anything", parameters=PARAMETERS_7B)) == "qwen-7b"
        assert published_size(make_row("qwen-7b", parameters=PARAMETERS_7B + 1)) is None

    def test_speed_is_all_new_tokens_by_the_whole_generation(self) -> None:
        table = titled(joined_grids.tables([make_profile_result()]), "Speed and memory")
        # The median of 10.0, 9.9 and 10.5 seconds for 1024 tokens.
        assert texts(table)[0][table.head.index("speed (tokens/s)")] == "102.40"


class TestVerdict:
    def test_a_verdict_gathers_what_all_results_say_of_a_candidate(self) -> None:
        (verdict,) = joined_scores.verdicts([make_result(), with_tasks()])
        assert verdict.label == "qwen-int4"
        assert verdict.sentence() == (
            "size 38 % of BF16 (5.86 GB), perplexity +0.10 %, same next token 95.9 %, "
            "GSM8K −0.6 points (95 %: −2.1 to +0.9, 1,000 items, may be chance), "
            "MMLU −4.7 points (95 %: −6.1 to −3.3, 1,000 items)"
        )

    def test_a_plan_for_a_card_says_what_fits(self) -> None:
        (verdict,) = joined_plans.verdicts([make_result(), make_plan_result()])
        assert (verdict.label, verdict.baseline) == ("qwen-7b", "a card of 24 GiB")
        assert verdict.sentence() == "BF16 fits (batch to 7, its whole context)"

    def test_two_texts_are_told_apart(self) -> None:
        other = make_result(
            make_row("qwen", "baseline"),
            make_row("qwen-int4", accuracy=make_accuracy(12.6, 0.01)),
            data=Data(name="books.txt", sha256="cd" * 32, tokens=9, window_tokens=512, stride_tokens=256),
        )
        (verdict,) = joined_scores.verdicts([make_result(), other])
        assert "perplexity +0.10 % (on eval.txt in bfloat16)" in verdict.sentence()
        assert "perplexity +5.00 % (on books.txt in bfloat16)" in verdict.sentence()


def with_tasks() -> Result:
    rows = make_row("qwen", "baseline", accuracy=None), make_row("qwen-int4", accuracy=None)
    return make_result(*rows, data=None, tasks=make_tasks())


class TestMissing:
    def test_what_no_result_holds_is_named_with_its_command(self) -> None:
        found = {one.what: one.command for one in joined(make_result()).missing}
        assert "Divergence from a baseline, error by layer" not in found
        assert found["Sample answers"].endswith("--answers 3 --out DIR")
        assert found["What fits a card"].startswith("python -m qquant.plan")

    def test_what_some_result_holds_is_not_missing(self) -> None:
        full = joined(make_result(tasks=make_tasks()), make_profile_result(), make_plan_result())
        assert [one.what for one in full.missing] == [
            "Sample answers", "What a KV cache of 8 bits costs", "Perplexity by length",
        ]  # fmt: skip

    def test_the_commands_are_ones_that_exist(self) -> None:
        for one in joined().missing:
            module, *options = one.command.removeprefix("python -m ").split()
            source = (Path(__file__).parent.parent / f"{module.replace('.', '/')}.py").read_text()
            for option in options:
                name = option.removeprefix("--").replace("-", "_")
                assert not option.startswith("--") or name in source, one.command

    def test_markdown_tells_of_it_too(self) -> None:
        assert "- Sample answers, not measured: `python -m qquant.eval" in joined(make_result()).to_markdown()


class TestMarkdown:
    def test_published_numbers_are_italic_and_measured_ones_are_not(self) -> None:
        text = joined(make_profile_result()).to_markdown()
        assert "| *16.30* | *24.10* |" in text
        assert "| 15.50 | 17.00 |" in text

    def test_text_of_a_result_stays_text(self) -> None:
        result = make_result(make_row(HOSTILE, "baseline"), make_row(f"a|b\n`{HOSTILE}"), command=HOSTILE)
        text = joined(result).to_markdown()
        assert not re.search(r"(?<!\\)<", text)
        assert "\u202e" not in text
        for line in text.splitlines():
            if line.startswith("| a"):
                assert line.startswith("| a\\|b \\`")

    def test_every_result_is_listed_with_its_command(self) -> None:
        text = joined(make_result(), make_plan_result()).to_markdown()
        assert "1. results/1: python -m qquant.eval --baseline qwen" in text
        assert "2. results/2: python -m qquant.plan qwen-7b --gpu 24GiB" in text

    @pytest.mark.parametrize("mark", ["`", "*", "<", "[", "\\"])
    def test_a_mark_of_markdown_is_escaped(self, mark: str) -> None:
        assert markdown_text(f"a{mark}b") == f"a\\{mark}b"


def test_data_in_one_line_reads_back_as_the_same_results() -> None:
    results = (make_result(), make_profile_result(), make_plan_result())
    content = json.loads(joined(*results).to_json())["results"]
    assert [entry["number"] for entry in content] == [1, 2, 3]
    assert tuple(result_from_json(json.dumps(entry["result"])) for entry in content) == results


def test_a_column_without_a_single_number_is_left_out_and_a_label_is_not() -> None:
    table = make_table("plan", "t", ("a", "b", "c"), [["", "n/a", "1"], ["", "-", "2"]], labels=1)
    assert table.head == ("a", "c")


def test_every_table_belongs_to_a_section_and_has_rows_as_wide_as_its_head() -> None:
    for table in all_tables(make_result(), with_tasks(), make_profile_result(), make_plan_result()):
        assert table.section in SECTIONS
        assert {len(row) for row in table.body} == {len(table.head)}
        assert table.labels <= len(table.head)
