"""Several sources in one calibration: shares, what is told of each, prompts with answers, and the chat template."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qquant.calibrate import Mixture, Sample, fingerprint, load_mixture, load_samples
from qquant.errors import BadDataError, UsageError
from qquant.source_weights import parse_sources, sample_counts, weighted
from tests.tiny_tokenizer import SYSTEM, TEMPLATE, TEXT, train, wrap

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
PAIR = {"prompt": "hello fox", "response": "hello dog"}
AS_PAIR = "[user]hello fox<|endoftext|>[assistant]hello dog<|endoftext|>"


class Bytes:
    """A tokenizer without chat template or special tokens: an id is a byte."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())


BYTES: Any = Bytes()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """With ChatML specials, chat template and end-of-text id."""
    return wrap(train(None, SPECIALS), eos_token="<|endoftext|>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def bare() -> Any:
    """Without any special token."""
    return wrap(train(None, ()))


@pytest.fixture
def letters(tmp_path: Path) -> list[str]:
    """Three texts, each of one letter, for 25, 25 and 3 windows of 8."""
    paths = {"a": 200, "b": 200, "c": 24}
    for letter, count in paths.items():
        (tmp_path / f"{letter}.txt").write_text(letter * count)
    return [str(tmp_path / f"{letter}.txt") for letter in paths]


def shares(samples: Sequence[Sample]) -> dict[str, int]:
    return dict(Counter(chr(int(sample.input_ids[0])) for sample in samples))


def items(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


# --- shares


def test_a_list_gives_equal_shares(letters: list[str]) -> None:
    assert shares(load_samples(letters[:2], BYTES, n_samples=10, seq_len=8)) == {"a": 5, "b": 5}


def test_a_mapping_gives_shares_by_weight(letters: list[str]) -> None:
    mixed = load_samples({letters[0]: 3, letters[1]: 1}, BYTES, n_samples=12, seq_len=8)
    assert shares(mixed) == {"a": 9, "b": 3}


def test_any_beginning_of_a_mixture_is_mixed(letters: list[str]) -> None:
    mixed = load_samples({letters[0]: 3, letters[1]: 1}, BYTES, n_samples=12, seq_len=8)
    assert all(1 <= shares(mixed[: 4 * n]).get("b", 0) <= n + 1 for n in (1, 2, 3))


@pytest.mark.parametrize("select", ["random", "spread"])
def test_each_source_gives_what_it_would_give_alone(select: Any, tmp_path: Path) -> None:
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    paths[0].write_text(TEXT)
    paths[1].write_text(TEXT.upper())
    options: dict[str, Any] = {"seq_len": 32, "seed": 3, "select": select}
    mixed = load_samples(paths, BYTES, n_samples=14, **options)
    alone = [load_samples(path, BYTES, n_samples=7, **options) for path in paths]
    upper = [sample for sample in mixed if bytes(sample.input_ids.tolist()).decode().isupper()]
    assert fingerprint(upper) == fingerprint(alone[1])
    assert fingerprint([sample for sample in mixed if not any(sample is one for one in upper)]) == fingerprint(alone[0])


def test_one_source_in_a_list_is_that_source(letters: list[str]) -> None:
    samples = [load_samples(source, BYTES, n_samples=5, seq_len=8) for source in (letters[0], letters[:1])]
    assert fingerprint(samples[0]) == fingerprint(samples[1])


def test_too_little_of_one_source_is_told_and_not_filled(letters: list[str], caplog: pytest.LogCaptureFixture) -> None:
    mixture = load_mixture([letters[0], letters[2]], BYTES, n_samples=16, seq_len=8)
    assert shares(mixture.samples) == {"a": 8, "c": 3}
    assert [(one.wanted, one.samples, one.tokens) for one in mixture.given] == [(8, 8, 64), (8, 3, 24)]
    assert [record.getMessage() for record in caplog.records] == [
        f"{letters[2]}: 8 samples were wanted and 3 found; all are used"
    ]


COUNTS: dict[str, tuple[list[float], int, list[int]]] = {
    "equal": ([1, 1], 10, [5, 5]),
    "the first of equals gets what is left": ([1, 1, 1], 10, [4, 3, 3]),
    "the largest remainder gets it": ([5, 3], 10, [6, 4]),
    "only ratios count": ([0.02, 0.01], 12, [8, 4]),
    "one": ([7], 3, [3]),
    "as many as sources": ([1, 1, 1], 3, [1, 1, 1]),
}


@pytest.mark.parametrize(("weights", "n_samples", "counts"), COUNTS.values(), ids=COUNTS)
def test_weights_become_whole_samples(weights: list[float], n_samples: int, counts: list[int]) -> None:
    assert sample_counts({str(i): weight for i, weight in enumerate(weights)}, n_samples) == counts


def test_a_source_that_would_get_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"10 leaves none for rare; raise --n-samples or its weight"):
        sample_counts({"often": 100, "rare": 1}, 10)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "needs a source, got none"),
        ({}, "needs a source, got none"),
        (["a", "a"], r"named once, got a twice; give it a weight, as a=2"),
        (["a", Path("a")], "named once"),
        ({"a": 0}, "a number above zero, got 0 for a"),
        ({"a": -1}, "above zero"),
        ({"a": float("nan")}, "above zero"),
        ({"a": float("inf")}, "above zero"),
        ({"a": True}, "above zero"),
        ({"a": "2"}, "above zero"),
        ([3], "a source must be a path or a hub id, got int"),
    ],
    ids=str,
)
def test_sources_that_make_no_mixture_are_refused(sources: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        weighted(sources)


# --- as typed


TYPED: dict[str, tuple[list[str], dict[str, float]]] = {
    "file": (["en.txt"], {"en.txt": 1}),
    "weight": (["en.txt", "zh.jsonl=2"], {"en.txt": 1, "zh.jsonl": 2}),
    "fraction": (["en.txt=0.5"], {"en.txt": 0.5}),
    "hub id": (["owner/name:config"], {"owner/name:config": 1}),
    "hub id with weight": (["owner/name:config=3"], {"owner/name:config": 3}),
    "name with an equals sign": (["a=b.txt"], {"a=b.txt": 1}),
    "name with both": (["a=b.txt=2"], {"a=b.txt": 2}),
}


@pytest.mark.parametrize(("words", "sources"), TYPED.values(), ids=TYPED)
def test_a_weight_stands_behind_an_equals_sign(words: list[str], sources: dict[str, float]) -> None:
    assert parse_sources(words) == sources


def test_a_file_of_exactly_that_name_is_that_file(tmp_path: Path) -> None:
    name = str(tmp_path / "run=2")
    assert parse_sources([name]) == {str(tmp_path / "run"): 2}
    Path(name).write_text(TEXT)
    assert parse_sources([name]) == {name: 1}
    assert parse_sources([f"{name}=3"]) == {name: 3}


@pytest.mark.parametrize("words", [["a", "a"], ["a=0"], ["a=nan"], ["a=-1"], ["a", "a=2"]], ids=str)
def test_words_that_make_no_mixture_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"named once|above zero"):
        parse_sources(words)


# --- kinds


def test_sources_of_different_kinds_are_mixed(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    turns = [{"from": "user", "value": "hello fox"}, {"from": "assistant", "value": "hello dog"}]
    messages = [{"role": "user", "content": "hello fox"}]
    sources = [
        tmp_path / "text.txt",
        items(tmp_path / "chats.jsonl", *[{"conversations": turns}] * 2),
        items(tmp_path / "messages.jsonl", *[{"messages": messages}] * 2),
        items(tmp_path / "pairs.jsonl", PAIR, PAIR),
    ]
    mixture = load_mixture(sources, tokenizer, n_samples=8, seq_len=64)
    assert [one.samples for one in mixture.given] == [2, 2, 2, 2]
    assert [one.read_as for one in mixture.given] == [
        "plain text",
        "conversations as ChatML",
        "messages in the chat template",
        "messages in the chat template",
    ]
    assert {tokenizer.decode(sample.input_ids)[:6] for sample in mixture.samples} >= {"<|im_s", "[user]"}
    assert mixture.hint is None


NAMED: dict[str, tuple[dict[str, str], str]] = {
    "prompt and response": (PAIR, "hello fox"),
    "prompt and completion": ({"prompt": "hello fox", "completion": "hello dog"}, "hello fox"),
    "question and answer": ({"question": "hello fox", "answer": "hello dog"}, "hello fox"),
    "instruction and output": ({"instruction": "hello fox", "output": "hello dog"}, "hello fox"),
    "instruction with input": (
        {"instruction": "hello fox", "input": "brown", "output": "hello dog"},
        "hello fox\nbrown",
    ),
    "instruction with empty input": ({"instruction": "hello fox", "input": "", "output": "hello dog"}, "hello fox"),
}


@pytest.mark.parametrize(("row", "prompt"), NAMED.values(), ids=NAMED)
def test_a_prompt_and_its_answer_go_through_the_chat_template(
    row: dict[str, str], prompt: str, tokenizer: Any, tmp_path: Path
) -> None:
    (sample,) = load_samples(items(tmp_path / "a.jsonl", row), tokenizer, n_samples=1)
    assert sample.input_ids.tolist() == ids(tokenizer, AS_PAIR.replace("hello fox", prompt))


def test_without_a_template_prompts_and_answers_are_plain_text_and_that_is_said(
    bare: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = items(tmp_path / "a.jsonl", PAIR)
    (sample,) = load_samples(path, bare, n_samples=1, packing="truncate")
    assert sample.input_ids.tolist() == ids(bare, "hello fox\nhello dog")
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: the model has no chat template; prompts and answers are taken as plain text"
    ]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"prompt": "x"}, r"line 2: an item needs 'prompt' and 'response', as the first item has, got \['prompt'\]"),
        ({"prompt": "x", "response": 3}, r"line 2: 'response' must be a string, got int"),
    ],
    ids=["half", "number"],
)
def test_half_a_pair_is_named(second: dict[str, Any], message: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match=message):
        load_samples(items(tmp_path / "a.jsonl", PAIR, second), tokenizer, n_samples=2)


# --- the chat template, on and off


@pytest.fixture
def framed(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the template puts around a user's message."""
    return ids(tokenizer, "[user]"), ids(tokenizer, "<|endoftext|>")


@pytest.mark.parametrize("packing", ["pack", "truncate"])
def test_plain_text_becomes_a_users_message(
    packing: Any, tokenizer: Any, framed: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    path = items(tmp_path / "a.jsonl", *[{"text": TEXT}] * 3)
    samples = load_samples(path, tokenizer, n_samples=3, seq_len=40, packing=packing, chat_template=True)
    before, after = framed
    room = 40 - len(before) - len(after)
    for sample in samples:
        found = sample.input_ids.tolist()
        assert len(found) == len(sample.mask) == 40
        assert (found[: len(before)], found[-len(after) :]) == (before, after)
    first = samples[0].input_ids.tolist()[len(before) : -len(after)]
    if packing == "truncate":
        assert first == ids(tokenizer, TEXT)[:room]


def test_conversations_may_go_through_the_template(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"from": "user", "value": "hello fox"}, {"from": "assistant", "value": "hello dog"}]
    path = items(tmp_path / "a.jsonl", {"conversations": turns})
    (sample,) = load_samples(path, tokenizer, n_samples=1, chat_template=True)
    assert sample.input_ids.tolist() == ids(tokenizer, AS_PAIR)


CHATS: dict[str, dict[str, Any]] = {
    "pair": PAIR,
    "messages": {"messages": [{"role": "user", "content": "hello fox"}, {"role": "assistant", "content": "hello dog"}]},
    "conversations": {
        "conversations": [{"from": "user", "value": "hello fox"}, {"from": "assistant", "value": "hello dog"}]
    },
}


@pytest.mark.parametrize("row", CHATS.values(), ids=CHATS)
def test_without_the_template_chats_are_plain_text(row: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    path = items(tmp_path / "a.jsonl", row)
    (sample,) = load_samples(path, tokenizer, n_samples=1, packing="truncate", chat_template=False)
    assert sample.input_ids.tolist() == ids(tokenizer, "hello fox\nhello dog")


def test_a_turn_that_is_no_text_cannot_become_plain_text(tokenizer: Any, tmp_path: Path) -> None:
    path = items(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": [{"type": "image"}]}]})
    with pytest.raises(BadDataError, match=r"line 1, turn 1: 'content' must be a string"):
        load_samples(path, tokenizer, n_samples=1, chat_template=False)


def test_a_template_that_is_asked_for_must_be_there(bare: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="chat_template needs a tokenizer that brings one"):
        load_samples(items(tmp_path / "a.jsonl", PAIR), bare, chat_template=True)


def test_a_template_must_show_the_message_once(tokenizer: Any, tmp_path: Path) -> None:
    twice = wrap(tokenizer.backend_tokenizer, chat_template=TEMPLATE * 2)
    with pytest.raises(BadDataError, match=r"shows a user's message once.*leave out --chat-template"):
        load_samples(items(tmp_path / "a.jsonl", {"text": TEXT}), twice, chat_template=True)


def test_samples_must_have_room_beside_the_template(tokenizer: Any, tmp_path: Path) -> None:
    long = wrap(tokenizer.backend_tokenizer, chat_template=SYSTEM * 10 + TEMPLATE)
    with pytest.raises(UsageError, match=r"seq_len must leave room .* got 32; raise --seq-len"):
        load_samples(items(tmp_path / "a.jsonl", {"text": TEXT}), long, seq_len=32, chat_template=True)


def hint(mixture: Mixture) -> bool:
    return mixture.hint is not None


def test_a_template_that_nothing_went_through_is_hinted_at_unless_declined(
    tokenizer: Any, bare: Any, tmp_path: Path
) -> None:
    path = items(tmp_path / "a.jsonl", *[{"text": TEXT}] * 2)
    options: dict[str, Any] = {"n_samples": 1, "seq_len": 32}
    assert hint(load_mixture(path, tokenizer, **options))
    assert not hint(load_mixture(path, tokenizer, chat_template=False, **options))
    assert not hint(load_mixture(path, tokenizer, chat_template=True, **options))
    assert not hint(load_mixture(path, bare, **options))


def test_load_samples_says_nothing_of_sources(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "qquant"):
        load_samples(items(tmp_path / "a.jsonl", {"text": TEXT}), tokenizer, n_samples=1, seq_len=32)
    assert caplog.text == ""
