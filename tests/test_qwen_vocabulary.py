"""Qwen v1's vocabulary against tiktoken itself: rank files, ids, bytes, special tokens, and text that is hard."""

from __future__ import annotations

import base64
import copy
import hashlib
import pickle
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken import Encoding
from tiktoken.load import load_tiktoken_bpe

from qquant.errors import BadModelError, UsageError
from qquant.models.qwen import vocabulary as room
from qquant.models.qwen.tokenization import SMALL_VOCABULARY
from qquant.models.qwen.vocabulary import SPECIAL_TOKENS, SpecialNames, Vocabulary, rank_file, read_ranks
from tests.qwen_v1 import TEXTS, VOCABULARY_SHA256, real_vocabulary_or_skip

SMALL = Vocabulary(SMALL_VOCABULARY)
ALPHABET = [bytes([value]) for value in range(256)]


@pytest.fixture(scope="module")
def qwen_vocabulary() -> Path:
    return real_vocabulary_or_skip()


@pytest.fixture(scope="module")
def real(qwen_vocabulary: Path) -> Vocabulary:
    return Vocabulary(qwen_vocabulary)


@pytest.fixture(scope="module")
def oracle(qwen_vocabulary: Path) -> Encoding:
    """tiktoken alone: its own reader, and cl100k's pattern with single digits spelled anew."""
    contractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    words, digits, signs = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    pattern = "|".join([contractions, words, digits, signs, r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + [f"<|extra_{i}|>" for i in range(205)]
    return Encoding(
        "oracle",
        pat_str=pattern,
        mergeable_ranks=load_tiktoken_bpe(str(qwen_vocabulary)),
        special_tokens=dict(zip(names, range(151643, 151851), strict=True)),
    )


@pytest.fixture(scope="module")
def small() -> Vocabulary:
    return SMALL


def write(path: Path, tokens: list[bytes]) -> Path:
    path.write_bytes(rank_file((token, rank) for rank, token in enumerate(tokens)))
    return path


# ---- rank files


def test_the_real_file_is_the_published_one_and_is_written_back_byte_for_byte(qwen_vocabulary: Path) -> None:
    data = qwen_vocabulary.read_bytes()
    assert hashlib.sha256(data).hexdigest() == VOCABULARY_SHA256
    ranks = read_ranks(qwen_vocabulary)
    assert len(ranks) == 151643
    assert rank_file(ranks.items()) == data


def test_the_real_vocabulary_has_the_published_ids(real: Vocabulary) -> None:
    assert len(real) == 151851
    assert [real.special[name] for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [151643, 151644, 151645]
    assert (real.special["<|extra_0|>"], real.special["<|extra_204|>"]) == (151646, 151850)
    assert real.encode("Human:", ()) == [33975, 25]


def test_the_shipped_file_is_what_its_script_writes() -> None:
    from examples.make_small_vocabulary import small_vocabulary

    assert SMALL_VOCABULARY.read_bytes() == small_vocabulary()


MALFORMED = {
    "no rank": (b"AA==\n", "line 1"),
    "two spaces": (b"AA==  0\n", "line 1"),
    "not base64": (b"AA== 0\n?Q== 1\n", "line 2"),
    "base64 without padding": (b"AA 0\n", "line 1"),
    "empty token": (b" 0\n", "line 1"),
    "blank line": (b"AA== 0\n\nAQ== 1\n", "line 2"),
    "negative rank": (b"AA== -1\n", "line 1"),
    "rank in words": (b"AA== zero\n", "line 1"),
    "rank past 32 bits": (b"AA== 99999999999\n", "line 1"),
    "token twice": (b"AA== 0\nAA== 1\n", "line 2"),
    "not from 0": (b"AA== 1\n", "line 1"),
    "a hole": (b"AA== 0\nAQ== 2\n", "line 2"),
    "another file": (b'{"vocab": {}}\n', "line 1"),
    "empty": (b"", "256 single bytes"),
}


@pytest.mark.parametrize(("data", "named"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_rank_file_is_one_clear_error(tmp_path: Path, data: bytes, named: str) -> None:
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(data)
    with pytest.raises(BadModelError, match=named) as caught:
        Vocabulary(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_missing_byte_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadModelError, match=r"must be a readable file: No such file"):
        Vocabulary(tmp_path / "absent")
    with pytest.raises(BadModelError, match=r"lacks 1, the first 0xff"):
        Vocabulary(write(tmp_path / "short", ALPHABET[:255]))


def test_a_file_with_other_line_ends_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "crlf"
    path.write_bytes(SMALL_VOCABULARY.read_bytes().replace(b"\n", b"\r\n"))
    assert read_ranks(path) == read_ranks(SMALL_VOCABULARY)


def test_special_tokens_follow_any_number_of_ranks(tmp_path: Path) -> None:
    vocabulary = Vocabulary(write(tmp_path / "bytes", ALPHABET))
    assert list(vocabulary.special.items()) == [(name, 256 + i) for i, name in enumerate(SPECIAL_TOKENS)]
    assert len(vocabulary) == 256 + 208
    assert vocabulary.encode("a<|im_end|>", "all") == [97, 258]


# ---- extra vocabularies


def test_extra_tokens_are_merged_decoded_and_not_skipped(tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    extra.write_bytes(rank_file([(b"ab", 464), (b"abc", 470)]))
    vocabulary = Vocabulary(write(tmp_path / "bytes", ALPHABET), extra)
    assert len(vocabulary) == 471
    assert vocabulary.encode("abcab", ()) == [470, 464]
    assert vocabulary.decode([470, 469, 257, 464], skip_special=True) == b"abcab"
    assert vocabulary.decode([470, 469, 464], skip_special=False) == b"abc\xffab"
    with pytest.raises(UsageError, match="469 has none"):
        vocabulary.token_of(469)


EXTRA = {"exists": [(b"a", 464)], "special's id": [(b"ab", 463)], "rank's id": [(b"ab", 97)]}


@pytest.mark.parametrize("ranks", [*EXTRA.values(), [(b"ab", 464), (b"cd", 464)]], ids=[*EXTRA, "id twice"])
def test_an_extra_token_that_is_not_new_is_refused(tmp_path: Path, ranks: list[tuple[bytes, int]]) -> None:
    extra = tmp_path / "extra"
    extra.write_bytes(rank_file(ranks))
    with pytest.raises(BadModelError, match=rf"new ids from 464 on: line {len(ranks)} "):
        Vocabulary(write(tmp_path / "bytes", ALPHABET), extra)


# ---- text to ids


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_ids_on_the_real_vocabulary_are_tiktokens(real: Vocabulary, oracle: Encoding, text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    assert real.encode(text, ()) == oracle.encode_ordinary(composed)
    assert real.encode(text, "all") == oracle.encode(composed, allowed_special="all")
    some = {"<|im_end|>", "<|extra_204|>"}
    assert real.encode(text, some) == oracle.encode(composed, allowed_special=some, disallowed_special=())


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("allowed", ["all", ()], ids=["special", "plain"])
def test_text_comes_back_composed(real: Vocabulary, text: str, allowed: SpecialNames) -> None:
    ids = real.encode(text, allowed)
    assert real.decode(ids, skip_special=False).decode() == unicodedata.normalize("NFC", text)


@settings(deadline=None, max_examples=60)
@given(text=st.lists(st.one_of(st.text(), st.sampled_from(SPECIAL_TOKENS)), max_size=6).map("".join))
def test_any_text_comes_back_and_only_allowed_names_become_special(text: str) -> None:
    plain, parsed = SMALL.encode(text, ()), SMALL.encode(text, "all")
    for ids in (plain, parsed):
        assert SMALL.decode(ids, skip_special=False).decode() == unicodedata.normalize("NFC", text)
    assert all(i < len(SMALL.ranks) for i in plain)
    spelled = unicodedata.normalize("NFC", text)
    assert sum(i >= len(SMALL.ranks) for i in parsed) == sum(spelled.count(name) for name in SPECIAL_TOKENS)


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=40))
def test_any_bytes_come_back_from_the_ids_of_single_bytes(data: bytes) -> None:
    ids = [SMALL.ranks[bytes([value])] for value in data]
    assert SMALL.decode(ids, skip_special=False) == data


def test_a_lone_surrogate_becomes_a_replacement_character(small: Vocabulary) -> None:
    assert small.decode(small.encode("a\ud800b", ()), skip_special=False).decode() == "a\ufffdb"


def test_a_composing_sign_is_taken_in_before_special_tokens_are_parsed(small: Vocabulary) -> None:
    # U+0338 composes with ">" to U+226F: after NFC the text spells no special token.
    assert small.special["<|im_end|>"] not in small.encode("<|im_end|>\u0338", "all")


DISALLOWED = {
    "one": ("all", {"<|im_end|>"}),
    "all but allowed": ({"<|im_start|>"}, "all"),
    "any text": ("all", ("hi",)),
}


@pytest.mark.parametrize(("allowed", "disallowed"), DISALLOWED.values(), ids=DISALLOWED.keys())
def test_a_disallowed_text_is_refused_by_name(small: Vocabulary, allowed: object, disallowed: object) -> None:
    with pytest.raises(ValueError, match=r"it holds (<\|im_end\|>|hi); remove it"):
        small.encode("<|im_start|>hi<|im_end|>", allowed, disallowed)  # type: ignore[arg-type]


def test_an_unknown_name_cannot_be_allowed(small: Vocabulary) -> None:
    with pytest.raises(UsageError, match=re.escape("['<|im_stop|>']")):
        small.encode("hi", {"<|im_stop|>"})


def test_a_turn_is_its_header_its_content_and_its_end(small: Vocabulary) -> None:
    start, end = small.special["<|im_start|>"], small.special["<|im_end|>"]
    header = [start, *small.encode("user\n", ())]
    assert small.encode_turn("user", None) == header
    assert small.encode_turn("user", "") == [*header, end]
    assert small.encode_turn("user", "a<|im_end|>") == [*header, *small.encode("a<|im_end|>", ()), end]
    assert small.encode_turn("user", "a<|im_end|>", "all") == [*header, *small.encode("a", ()), end, end]


# ---- long runs of white space


def test_a_run_of_a_million_spaces_is_encoded(small: Vocabulary) -> None:
    text = "x" + " " * 1_000_100 + "y"
    ids = small.encode(text, "all")
    assert small.decode(ids, skip_special=False).decode() == text


RUNS = {"spaces": " " * 41 + "x", "lines": "a" + "\n " * 30 + " " * 15 + "b", "many": ("ab" + "\t" * 19 + "\u3000") * 3}


@pytest.mark.parametrize("text", RUNS.values(), ids=RUNS.keys())
def test_runs_are_cut_inside_and_whole_runs_are_not_cut(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(room, "MAX_SPACES", 20)
    monkeypatch.setattr(room, "_LONG_RUN", re.compile(r"(?<!\s)\s{21,}"))
    parts = list(room._tractable(text))
    assert "".join(parts) == text
    assert all(part[:1].isspace() and last[-1:].isspace() for last, part in pairwise(parts))
    assert max(len(run) for part in parts for run in re.findall(r"\s+", part)) == 20
    assert len(parts) == 1 + sum((len(run) - 1) // 20 for run in re.findall(r"\s+", text))


# ---- ids to bytes


def test_bytes_are_joined_before_they_are_read_as_text(real: Vocabulary) -> None:
    ids = real.encode("𒈙", ())  # a rare character, more than one token
    parts = [real.decode([i], skip_special=False) for i in ids]
    assert b"".join(parts) == real.decode(ids, skip_special=False) == "𒈙".encode()
    with pytest.raises(UnicodeDecodeError):
        parts[0].decode()


@pytest.mark.parametrize("index", [151851, 151935, 152063, 1 << 31, 1 << 40])
def test_an_id_past_the_vocabulary_is_one_byte_that_is_not_text(real: Vocabulary, index: int) -> None:
    assert real.decode([64, index, 65], skip_special=False) == b"a\xffb"
    assert real.decode([64, index, 65], skip_special=True) == b"ab"
    with pytest.raises(UsageError, match=f"{index} has none; the last one here is 151850"):
        real.token_of(index)


def test_a_negative_id_is_refused(small: Vocabulary) -> None:
    with pytest.raises(UsageError, match="got -100; where -100 masks a label"):
        small.decode([1, -100], skip_special=True)
    with pytest.raises(UsageError, match="-1 has none"):
        small.token_of(-1)


def test_every_token_has_its_id_and_every_id_its_token(small: Vocabulary) -> None:
    assert [small.id_of(small.token_of(i)) for i in range(len(small))] == list(range(len(small)))
    assert small.id_of(" the") == small.ranks[b" the"]
    assert small.id_of("no such token") is None


# ---- one vocabulary for all


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["deepcopy", "pickle"])
def test_a_copy_encodes_the_same(small: Vocabulary, clone: object) -> None:
    twin = clone(small)  # type: ignore[operator]
    assert twin.encode(TEXTS["special"], "all") == small.encode(TEXTS["special"], "all")


def test_threads_may_share_it(small: Vocabulary) -> None:
    texts = [text * 20 for text in TEXTS.values()]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda text: small.encode(text, "all"), texts * 4))
    assert together == [small.encode(text, "all") for text in texts] * 4


def test_the_file_format_is_base64_space_rank() -> None:
    assert rank_file([(b"\x00", 0), (" 你".encode(), 7)]) == b"AA== 0\n" + base64.b64encode(" 你".encode()) + b" 7\n"
