"""The page is one file without a script or a request, shows every table and chart, and lets no text act as markup."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from qquant.charts.of_results import charts
from qquant.charts.svg import Chart
from qquant.page import grids as joined_grids
from qquant.page import html as html_page
from qquant.page import models as joined_models
from qquant.page import plans as joined_plans
from qquant.page import scores as joined_scores
from qquant.page.html import page
from qquant.page.joined import Joined, Source
from qquant.results import Data, Result
from tests import browser
from tests.joined_results import (
    HOSTILE,
    make_answers,
    make_plan_result,
    make_profile_result,
    make_result,
    make_row,
    make_tasks,
)

VOID = {"meta", "link", "br", "path", "rect", "circle"}
ANSWER = ["The", " cat", " sat", " on", " the", " mat", "."]
OTHER = ["The", " cat", " lay", " on", " the", " rug", "."]


def joined(*results: Result) -> Joined:
    sources = tuple(Source(f"results/{place}", result) for place, result in enumerate(results, 1))
    tables = (
        *joined_scores.tables(results),
        *joined_models.tables(results),
        *joined_grids.tables(results),
        *joined_plans.tables(results),
    )
    return Joined(sources, joined_scores.verdicts(results), tables)


def page_of(*results: Result) -> str:
    found = joined(*results)
    return page(found, charts(results), found.to_json())


def everything() -> tuple[Result, ...]:
    hostile = make_result(
        make_row(HOSTILE, "baseline"),
        make_row(f"int4\n{HOSTILE}"),
        command=HOSTILE,
        data=Data(name=HOSTILE, sha256="cd" * 32, tokens=9, window_tokens=4, stride_tokens=4),
        answers=make_answers(HOSTILE, ["<b>", HOSTILE, "\x07"], ["<b>", "\n", "&amp;"]),
    )
    return (
        make_result(tasks=make_tasks(), answers=make_answers("Once", ANSWER, OTHER)),
        make_profile_result(),
        make_plan_result(),
        hostile,
    )


class Elements(HTMLParser):
    """Start tags, ids and text by element of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[tuple[tuple[str, ...], str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append((tuple(self.open), data))


@pytest.fixture(scope="module")
def full() -> str:
    return page_of(*everything())


def test_the_page_has_no_script_no_event_handler_and_nothing_to_fetch(full: str) -> None:
    for tag, attributes in Elements(full).tags:
        assert tag not in {"script", "iframe", "object", "embed", "form", "img", "base"}
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:"))
    assert "@import" not in full
    assert not re.search(r"url\((?!#)", full)


def test_a_policy_in_the_page_forbids_scripts_and_requests(full: str) -> None:
    policy = next(dict(a)["content"] for t, a in Elements(full).tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert "script-src" not in policy


def test_every_element_is_closed_and_every_id_is_unique(full: str) -> None:
    found = Elements(full)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert found.open == []
    assert len(ids) == len(set(ids))
    for _, attributes in found.tags:
        for name in ("aria-labelledby", "href"):
            value = attributes.get(name) or ""
            for target in value.split() if name == "aria-labelledby" else [value[1:]] if value.startswith("#") else []:
                assert target in ids


def test_text_of_a_result_is_shown_and_never_acts(full: str) -> None:
    assert "<script" not in full
    assert "\u202e" not in full
    assert "\x07" not in full
    shown = "".join(text for _, text in Elements(full).words)
    assert "</td><script>alert('x')</script>\\u202etxt.\"exe'" in shown
    assert "\\x07" in shown
    assert "&amp;amp;" in full  # a token that reads &amp; stays those five letters


def test_every_table_has_a_caption_scopes_and_a_scrolling_box_that_the_keyboard_reaches(full: str) -> None:
    found = Elements(full)
    count = len([tag for tag, _ in found.tags if tag == "table"])
    assert count == len(joined(*everything()).tables)
    assert count == len([tag for tag, _ in found.tags if tag == "caption"])
    assert count == len([a for _, a in found.tags if a.get("class") == "scroll" and a.get("tabindex") == "0"])
    assert {a.get("scope") for t, a in found.tags if t == "th"} == {"col", "row"}


def test_headings_do_not_skip_a_level(full: str) -> None:
    levels = [int(tag[1]) for tag, _ in Elements(full).tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_every_chart_is_in_the_page_as_it_was_drawn(full: str) -> None:
    drawn = charts(everything())
    assert drawn
    for chart in drawn:
        assert chart.svg in full


def test_a_chart_stands_in_the_section_of_its_question_and_names_its_result() -> None:
    found = joined(make_result(), make_profile_result())
    text = page(found, [Chart("Title <i>", "Caption & more", "<svg></svg>", "memory-batch-2")], "{}")
    memory = text.index('<h2 id="memory">')
    assert memory < text.index("Title &lt;i&gt;") < text.index("Caption &amp; more") < text.index('id="table-memory-1"')
    assert '<a class="place" href="#result-2">' in text


def test_colours_that_charts_use_are_defined_for_light_and_dark_and_print(full: str) -> None:
    used = set(re.findall(r"var\(--([a-z]+\d?)\)", "".join(chart.svg for chart in charts(everything()))))
    agreed = {"ink", "muted", "line", "paper", "panel", "good", "bad"}
    agreed |= {f"c{number}" for number in range(1, 9)} | {f"s{number}" for number in range(9)}
    blocks = re.findall(r":root \{(.*?)\}", full, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert used | agreed <= set(re.findall(r"--([a-z]+\d?):", block))


def test_published_cells_look_different_and_are_explained(full: str) -> None:
    classes = [(a.get("class") or "").split() for t, a in Elements(full).tags if t in ("td", "th")]
    assert any("published" in names for names in classes)
    assert "published in Qwen’s README" in full
    assert "published in Qwen’s README" not in page_of(make_result())


def test_a_score_of_other_conditions_is_marked() -> None:
    text = page_of(make_result(tasks=make_tasks()), make_result(tasks=make_tasks(shots=5)))
    assert re.search(r'class="unlike">55.8 ± 1.6 \(1\)', text)


class TestAnswers:
    def marked(self, text: str) -> list[str]:
        return [word for tags, word in Elements(text).words if "mark" in tags]

    def test_tokens_that_the_other_text_does_not_have_are_marked_in_both(self) -> None:
        assert self.marked(page_of(make_result(answers=make_answers("Once", ANSWER, OTHER)))) == [
            " sat", " mat", " lay", " rug",
        ]  # fmt: skip

    def test_of_three_texts_the_baseline_stays_plain(self) -> None:
        answers = make_answers("Once", ANSWER, OTHER, [*ANSWER[:-1], "!"])
        assert self.marked(page_of(make_result(answers=answers))) == [" lay", " rug", "!"]

    def test_a_marked_line_feed_can_be_seen(self) -> None:
        assert self.marked(page_of(make_result(answers=make_answers("Once", ["a", "b"], ["a", "\n", "b"])))) == ["↵\n"]

    def test_a_token_tells_its_probability(self) -> None:
        text = page_of(make_result(answers=make_answers("Once", ANSWER, OTHER)))
        # make_answers gives the third token exp(-0.8) = 0.449.
        assert '<span class="p2" title="p = 0.45"> sat</span>' in text

    def test_the_samples_that_differ_most_are_shown_and_the_others_counted(self) -> None:
        answers = make_answers("Once", ANSWER, OTHER)
        same = make_answers("Same", ANSWER, ANSWER)
        many = answers.model_copy(update={"samples": same.samples * 5 + answers.samples * 9})
        text = page_of(make_result(answers=many))
        assert text.count('class="answer"') == 12
        assert text.index(">Once<") < text.index(">Same<")
        assert "2 more with fewer differences are in the data" in text

    def test_a_long_answer_is_cut_and_says_so(self) -> None:
        many = [f"w{place} " for place in range(5000)]
        text = page_of(make_result(answers=make_answers("p" * 9000, many, many)))
        assert "the same 5000 tokens; the first 400 are shown" in text
        assert "w399 " in text
        assert "w400 " not in text
        assert "p" * 4001 not in text


def test_an_endless_name_is_cut_in_its_middle() -> None:
    found = joined(make_result(make_row("a" * 10_000, "baseline"), make_row("b" * 10_000)))
    text = page(found, charts([source.result for source in found.sources]), "{}")
    assert f"<h3>{'b' * 80} … {'b' * 80}</h3>" in text


def test_cards_stand_under_what_they_are_compared_with() -> None:
    text = page_of(make_result(), make_result(make_row("other", "baseline", sha256="e" * 64), make_row("other-int8")))
    places = [text.index(part) for part in ("<b>qwen</b>", "<h3>qwen-int4</h3>", "<b>other</b>", "<h3>other-int8</h3>")]
    assert places == sorted(places)
    assert "<b>Same next token</b>: how often" in text


def test_what_is_missing_is_said_with_the_command_that_measures_it() -> None:
    text = page_of(make_result())
    assert '<h2 id="missing">Not measured</h2>' in text
    assert "<dt>Sample answers</dt><dd><code>python -m qquant.eval" in text
    assert '<span class="option">--answers</span> 3' in text


class TestData:
    def test_all_results_can_be_saved_from_the_page(self) -> None:
        found = joined(make_result())
        link = re.search(r'href="data:application/json;base64,([^"]+)" download', page(found, [], found.to_json()))
        assert link
        assert base64.b64decode(link[1]).decode() == found.to_json()

    def test_data_that_would_make_the_page_large_stays_in_the_file_beside_it(self) -> None:
        found = joined(make_result())
        text = page(found, [], json.dumps("x" * html_page._PAGE_BYTES))
        assert len(text) < 100_000
        assert '<a href="results.json" download="results.json">' in text

    def test_origin_says_command_commit_model_and_machine(self) -> None:
        text = page_of(make_result())
        for fact in ("python -m qquant.eval", "0123456789abcdef", "sha256 " + "b" * 64, "A CPU", "2.13.0", "seed"):
            assert fact in text


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs chromium")
class TestInABrowser:
    def test_the_page_asks_for_nothing_logs_nothing_and_never_scrolls_sideways(self, full: str, tmp_path: Path) -> None:
        file = tmp_path / "report.html"
        file.write_text(full, encoding="utf-8")
        with browser.browser() as tab:
            for width, dark in ((1280, False), (360, True)):
                tab.open(file, width=width, dark=dark)
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
                assert tab.complaints() == []
                assert tab.requests() == [file.as_uri()]

    def test_a_page_that_does_those_things_is_caught(self, tmp_path: Path) -> None:
        file = tmp_path / "bad.html"
        file.write_text(
            "<!doctype html><meta name=viewport content='width=device-width'><img src='missing.png'>"
            "<div style='width:900px'>wide</div><script>console.error('no')</script>"
        )
        with browser.browser() as tab:
            tab.open(file, width=360)
            assert tab.evaluate("document.documentElement.scrollWidth") > 360
            assert tab.complaints()
            assert len(tab.requests()) == 2


@pytest.mark.parametrize("result", [make_plan_result(), make_profile_result()], ids=["plan", "profile"])
def test_a_result_without_rows_has_a_page_too(result: Result) -> None:
    assert "qwen-7b" in page_of(result.model_copy(update={"rows": ()}))
