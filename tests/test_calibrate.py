from __future__ import annotations

import gzip
import json
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qquant import calibrate, samples, text_sources, token_coding, tokenizer_check
from qquant.calibrate import Sample, check_samples, check_tokenizer, fingerprint, load_samples, samples_from_ids
from qquant.errors import BadDataError, BadModelError, UsageError
from tests.tiny_tokenizer import SYSTEM, TEMPLATE, TEXT, train, wrap

CHAT = {
    "id": "0",
    "conversations": [
        {"from": "user", "value": "hello fox"},
        {"from": "assistant", "value": "hello <|endoftext|> dog"},
    ],
}
MESSAGES = {"messages": [{"role": "user", "content": "hello fox"}, {"role": "assistant", "content": "hello dog"}]}


@pytest.fixture(scope="module", params=["gpt2", "qwen2"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    return wrap(train(None if request.param == "gpt2" else PRETOKENIZE_REGEX, ("<|endoftext|>",)))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """With ChatML specials, chat template and end-of-text id."""
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return wrap(train(None, specials), eos_token="<|endoftext|>", chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def bare() -> Any:
    """Without any special token."""
    return wrap(train(None, ()))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    def file(name: str, content: Any) -> Path:
        data = content if isinstance(content, bytes) else str(content).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return file


def _jsonl(items: list[Any]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _rows(samples: list[Sample]) -> list[list[int]]:
    return [sample.input_ids.tolist() for sample in samples]


# --- plain text and packing


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "text", "a.txt.gz", "a.md.gz"])
def test_packing_cuts_a_text_into_exact_windows(name: str, write: Any, tokenizer: Any) -> None:
    samples = load_samples(write(name, TEXT), tokenizer, n_samples=10_000, seq_len=32)
    whole = _ids(tokenizer, TEXT)
    assert _rows(samples) == [whole[i : i + 32] for i in range(0, len(whole) - 31, 32)]
    assert all(s.input_ids.dtype == torch.int64 and s.mask.dtype == torch.bool and s.mask.all() for s in samples)


def test_drawn_windows_are_distinct_and_in_source_order(write: Any, tokenizer: Any) -> None:
    path = write("a.txt", TEXT)
    everything = _rows(load_samples(path, tokenizer, n_samples=10_000, seq_len=16))
    drawn = [everything.index(row) for row in _rows(load_samples(path, tokenizer, n_samples=9, seq_len=16, seed=3))]
    assert len(drawn) == 9
    assert drawn == sorted(set(drawn))


def test_the_seed_decides_the_draw(write: Any, tokenizer: Any) -> None:
    path = write("a.txt", TEXT)
    names = [fingerprint(load_samples(path, tokenizer, n_samples=5, seq_len=16, seed=s)) for s in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


def test_samples_are_the_same_in_every_process(write: Any) -> None:
    class Bytes:
        def encode(self, text: str, **_: Any) -> list[int]:
            return list(text.encode())

    samples = load_samples(write("a.txt", TEXT), Bytes(), n_samples=5, seq_len=16)  # type: ignore[arg-type]
    assert fingerprint(samples) == "4b28b190c57029d940b824b48ab5c6a71aae9fbc026d7bbb266b3ed99c30e6e3"


def test_texts_are_parted_by_the_end_of_text_id(write: Any, tokenizer: Any) -> None:
    path = write("a.jsonl", _jsonl([{"text": "hello fox"}, {"text": " \n"}, {"text": "hello dog"}]))
    eos = tokenizer.eos_token_id
    expected = [*_ids(tokenizer, "hello fox"), eos, *_ids(tokenizer, "hello dog")]
    assert _rows(load_samples(path, tokenizer, n_samples=1, seq_len=len(expected))) == [expected]


def test_texts_are_joined_bare_if_there_is_no_end_of_text_id(write: Any, bare: Any) -> None:
    path = write("a.jsonl", _jsonl([{"text": "hello fox"}, {"text": "hello dog"}]))
    expected = _ids(bare, "hello fox") + _ids(bare, "hello dog")
    assert _rows(load_samples(path, bare, n_samples=1, seq_len=len(expected))) == [expected]


def test_a_text_starts_as_the_tokenizer_starts_it(write: Any, tokenizer: Any) -> None:
    from tokenizers import Tokenizer, processors

    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    start = inner.token_to_id("<|im_start|>")
    inner.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    llama_like = wrap(inner, bos_token="<|im_start|>", eos_token="<|endoftext|>")
    path = write("a.jsonl", _jsonl([{"text": "hello fox"}] * 2))
    text, eos = _ids(tokenizer, "hello fox"), tokenizer.eos_token_id
    samples = load_samples(path, llama_like, n_samples=1, seq_len=2 * len(text) + 3)
    assert _rows(samples) == [[start, *text, eos, start, *text]]


@pytest.mark.parametrize("size", [40, 100, 333])
def test_blocks_give_the_ids_of_the_whole_text(
    size: int, write: Any, any_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Start.\n\n\n  indented\n\tfoo();\n}\n\nend  \nNext 12\n34 你好\n世界。\nWhy?\n" * 20
    monkeypatch.setattr(text_sources, "BLOCK_CHARS", size)
    assert len(list(text_sources.blocks([text[i : i + size] for i in range(0, len(text), size)]))) > 2
    whole = _ids(any_tokenizer, text)
    for path in (write("a.txt", text), write("a.jsonl", _jsonl([{"text": text}]))):
        assert _rows(load_samples(path, any_tokenizer, n_samples=1, seq_len=len(whole))) == [whole]


@pytest.mark.parametrize("text", ["word " * 500, "x" * 2500], ids=["spaces", "nothing"])
def test_a_text_without_lines_is_still_cut_into_blocks(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sources, "BLOCK_CHARS", 100)
    found = list(text_sources.blocks([text[i : i + 100] for i in range(0, len(text), 100)]))
    assert "".join(found) == text
    assert max(map(len, found)) <= 600


def test_a_source_is_read_only_as_far_as_it_is_considered(
    write: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(calibrate, "POOL", 2)
    path = write("a.jsonl", _jsonl([{"text": "hello fox " * 8}] * 30) + "{broken")
    for packing in ("pack", "truncate"):
        caplog.clear()
        assert len(load_samples(path, tokenizer, n_samples=2, seq_len=8, packing=packing)) == 2
        assert "only its first" in caplog.text


def test_line_ends_and_byte_order_mark_change_nothing(write: Any, tokenizer: Any) -> None:
    plain = load_samples(write("a.txt", TEXT), tokenizer, n_samples=5, seq_len=16)
    dos = load_samples(
        write("b.txt", b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode()), tokenizer, n_samples=5, seq_len=16
    )
    assert fingerprint(plain) == fingerprint(dos)
    marked = b"\xef\xbb\xbf" + json.dumps([{"text": TEXT}]).encode()
    assert fingerprint(load_samples(write("c.json", marked), tokenizer, n_samples=5, seq_len=16)) == fingerprint(plain)


def test_a_long_text_brings_no_word_from_the_tokenizer(
    write: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_samples(write("a.txt", TEXT), tokenizer, n_samples=2, seq_len=16)
            long = {"messages": [{"role": "user", "content": TEXT}]}
            load_samples(write("a.json", json.dumps([long, long])), tokenizer, n_samples=2, seq_len=16)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_too_few_windows_are_all_used_and_counted_in_one_warning(
    write: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = write("a.txt", TEXT)
    samples = load_samples(path, tokenizer, n_samples=1000, seq_len=100)
    assert len(samples) == len(_ids(tokenizer, TEXT)) // 100
    assert [r.getMessage() for r in caplog.records] == [
        f"{path}: 1000 samples were wanted and {len(samples)} found; all are used"
    ]
    assert caplog.records[0].name == "qquant"


# --- truncating


def test_truncating_makes_one_sample_of_each_text(write: Any, tokenizer: Any) -> None:
    texts = ["hello fox", "hello dog jumps over", "the quick brown fox"]
    path = write("a.jsonl", _jsonl([{"text": text} for text in texts]))
    samples = load_samples(path, tokenizer, n_samples=3, seq_len=3, packing="truncate")
    assert _rows(samples) == [_ids(tokenizer, text)[:3] for text in texts]


def test_truncating_a_text_file_takes_its_head(write: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_sources, "BLOCK_CHARS", 100)
    samples = load_samples(write("a.txt", TEXT), tokenizer, n_samples=1, seq_len=64, packing="truncate")
    assert _rows(samples) == [_ids(tokenizer, TEXT)[:64]]


def test_truncating_passes_over_texts_too_short_to_count(write: Any, tokenizer: Any) -> None:
    path = write("a.jsonl", _jsonl([{"text": "a"}, {"text": "hello fox"}, {"text": "b"}]))
    samples = load_samples(path, tokenizer, n_samples=1, seq_len=8, packing="truncate")
    assert _rows(samples) == [_ids(tokenizer, "hello fox")]


def test_truncated_documents_are_drawn_without_replacement_in_source_order(write: Any, tokenizer: Any) -> None:
    texts = [f"hello fox number {i}" for i in range(30)]
    path = write("a.jsonl", _jsonl([{"text": text} for text in texts]))
    rows = _rows(load_samples(path, tokenizer, n_samples=7, seq_len=99, packing="truncate"))
    drawn = [[_ids(tokenizer, text) for text in texts].index(row) for row in rows]
    assert len(drawn) == 7
    assert drawn == sorted(set(drawn)) != list(range(7))


# --- Qwen conversations


def _chatml(tokenizer: Any, turns: list[tuple[str, str]]) -> list[int]:
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    newline = _ids(tokenizer, "\n")
    ids: list[int] = []
    for role, text in [("system", SYSTEM), *turns]:
        ids += [start, *_ids(tokenizer, role), *newline, *_ids(tokenizer, text), end, *newline]
    return ids


@pytest.mark.parametrize("layout", ["list", "lines", "indented", "gz"])
def test_a_conversation_becomes_the_chatml_ids_of_qwen(layout: str, write: Any, tokenizer: Any) -> None:
    indent = 1 if layout == "indented" else None
    content = _jsonl([CHAT]) if layout == "lines" else json.dumps([CHAT], indent=indent)
    name = {"lines": "a.jsonl", "gz": "a.json.gz"}.get(layout, "a.json")
    (sample,) = load_samples(write(name, content), tokenizer, n_samples=1, seq_len=2048)
    expected = _chatml(tokenizer, [("user", "hello fox"), ("assistant", "hello <|endoftext|> dog")])
    assert sample.input_ids.tolist() == expected


def test_the_ids_are_those_of_the_chatml_text(write: Any, tokenizer: Any) -> None:
    (sample,) = load_samples(write("a.json", json.dumps([CHAT])), tokenizer, n_samples=1, seq_len=2048)
    text = (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nhello fox<|im_end|>\n"
        "<|im_start|>assistant\nhello <|endoftext|> dog<|im_end|>\n"
    )
    assert tokenizer.decode(sample.input_ids) == text


def test_only_the_end_of_text_id_is_masked_out(write: Any, tokenizer: Any) -> None:
    (sample,) = load_samples(write("a.json", json.dumps([CHAT])), tokenizer, n_samples=1, seq_len=2048)
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert sample.input_ids[~sample.mask].tolist() == [end_of_text]


def test_a_leading_turn_of_the_assistant_is_dropped(write: Any, tokenizer: Any) -> None:
    turns = [{"from": "assistant", "value": "welcome"}, *CHAT["conversations"]]
    both = write("a.json", json.dumps([{"conversations": turns}, CHAT]))
    first, second = load_samples(both, tokenizer, n_samples=2, seq_len=2048)
    assert first.input_ids.tolist() == second.input_ids.tolist()


def test_a_conversation_is_cut_at_seq_len(write: Any, tokenizer: Any) -> None:
    (sample,) = load_samples(write("a.json", json.dumps([CHAT])), tokenizer, n_samples=1, seq_len=7)
    assert sample.input_ids.tolist() == _chatml(tokenizer, [])[:7]


def test_packed_conversations_keep_their_mask(write: Any, tokenizer: Any) -> None:
    path = write("a.json", json.dumps([CHAT, CHAT]))
    ids = 2 * _chatml(tokenizer, [("user", "hello fox"), ("assistant", "hello <|endoftext|> dog")])
    (sample,) = load_samples(path, tokenizer, n_samples=1, seq_len=len(ids), packing="pack")
    assert sample.input_ids.tolist() == ids
    assert int((~sample.mask).sum()) == 2


def test_conversations_need_the_chatml_tokens(write: Any, bare: Any) -> None:
    with pytest.raises(BadDataError, match=r"a\.json, item 1: .*<\|im_start\|>.*give plain text"):
        load_samples(write("a.json", json.dumps([CHAT])), bare)


# --- OpenAI messages


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_messages_go_through_the_chat_template(lines: bool, write: Any, tokenizer: Any) -> None:
    path = write("a.jsonl" if lines else "a.json", _jsonl([MESSAGES]) if lines else json.dumps([MESSAGES]))
    (sample,) = load_samples(path, tokenizer, n_samples=1, seq_len=2048)
    expected = _ids(tokenizer, "[user]hello fox<|endoftext|>[assistant]hello dog<|endoftext|>")
    assert sample.input_ids.tolist() == expected
    assert sample.mask.all()


def test_messages_need_a_chat_template(write: Any, bare: Any) -> None:
    with pytest.raises(BadDataError, match=r"a\.json, item 1: .*chat template.*this one has none; give"):
        load_samples(write("a.json", json.dumps([MESSAGES])), bare)


def test_what_a_template_refuses_is_one_line_with_the_item(write: Any, tokenizer: Any) -> None:
    strict = wrap(tokenizer.backend_tokenizer, chat_template="{{ raise_exception('roles\nmust alternate') }}")
    with pytest.raises(
        BadDataError, match=r"a\.jsonl, line 1: the chat template refuses.*roles must alternate; change"
    ):
        load_samples(write("a.jsonl", _jsonl([MESSAGES])), strict)


# --- parquet and hub


@pytest.fixture
def fake_datasets(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Iterator[Any]:
        calls.append((args, kwargs))
        if args[0] == "no/such":
            raise ValueError("not found\non the hub")
        yield from [{"text": "hello fox", "other": 1}, {"text": "hello dog", "other": 2}]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_parquet_file_is_read_by_datasets(write: Any, tokenizer: Any, fake_datasets: list[Any]) -> None:
    path = write("a.parquet", b"PAR1")
    samples = load_samples(path, tokenizer, n_samples=2, seq_len=9, packing="truncate")
    assert _rows(samples) == [_ids(tokenizer, "hello fox"), _ids(tokenizer, "hello dog")]
    assert fake_datasets == [(("parquet", None), {"split": "train", "streaming": True, "data_files": str(path)})]


def test_a_hub_id_may_name_a_config(tokenizer: Any, fake_datasets: list[Any]) -> None:
    assert len(load_samples("someone/texts:en", tokenizer, n_samples=2, seq_len=9, packing="truncate")) == 2
    assert fake_datasets == [(("someone/texts", "en"), {"split": "train", "streaming": True})]


def test_what_datasets_cannot_read_is_one_line(tokenizer: Any, fake_datasets: list[Any]) -> None:
    with pytest.raises(BadDataError, match=r"^no/such \(no file .*datasets cannot read it \(not found on the hub\)"):
        load_samples("no/such", tokenizer)


@pytest.mark.parametrize("source", ["a.parquet", "someone/texts"])
def test_without_datasets_the_extra_is_named(
    source: str, write: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadDataError, match=r"pip install 'qquant\[data\]'"):
        load_samples(write(source, b"PAR1") if source == "a.parquet" else source, tokenizer)


# --- errors


BAD = {
    "empty": ("a.txt", "", r"must hold text, and .*a\.txt holds none"),
    "blank": ("a.txt", " \n\n", r"must hold text"),
    "empty list": ("a.json", "[]", r"must hold text, and .*a\.json"),
    "empty lines": ("a.jsonl", "\n\n", r"must hold text"),
    "empty json": ("a.json", "", r"must hold text"),
    "short": ("a.txt", "hello", r"at least seq_len = 2048 tokens .*a\.txt has \d; lower --seq-len or give more text"),
    "bad line": (
        "a.jsonl",
        '{"text": "x"}\n\n{"text": oops}\n',
        r"a\.jsonl, line 3, column 10: not JSON .*; write one",
    ),
    "bad list": ("a.json", '[\n {"text": "x"},\n {]\n', r"a\.json, line 3, column 3: not JSON"),
    "indented object": ("a.json", '{\n "text": "x"\n}', r"a\.json, line 2, column 1: .*write one object per line"),
    "deep": ("a.json", "[" * 200_000, r"a\.json, line 1: JSON that cannot be read"),
    "not an object": ("a.jsonl", '{"text": "x"}\n3\n', r"a\.jsonl, line 2: an item must be an object, got int"),
    "no field": ("a.jsonl", '{"txt": "x"}\n', r"a\.jsonl, line 1: an item needs 'text', .* got \['txt'\]"),
    "other field": (
        "a.json",
        '[{"text": "x"}, {"messages": []}]',
        r"a\.json, item 2: an item needs 'text', as the first",
    ),
    "not a string": ("a.jsonl", '{"text": 5}\n', r"line 1: 'text' must be a string, got int"),
    "surrogate": ("a.jsonl", '{"text": "x\\ud800"}\n', r"line 1: 'text' holds half a character"),
    "latin-1": ("a.txt", b"one\ntwo\ncaf\xe9\n", r"a\.txt, line 3, byte 4: text must be UTF-8 .*convert the file"),
    "latin-1 json": ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', r"a\.jsonl, line 2, byte 11: text must be UTF-8"),
    "utf-16": ("a.txt", "hello".encode("utf-16"), r"a\.txt, line 1, byte 1: text must be UTF-8"),
    "no turns": ("a.json", '[{"conversations": []}]', r"item 1: 'conversations' must be a list of turns, got '\[\]'"),
    "turn is text": ("a.json", '[{"messages": ["hi"]}]', r"item 1, turn 1: a turn needs 'role' and 'content', got str"),
    "no value": ("a.json", '[{"conversations": [{"from": "user"}]}]', r"turn 1: .* 'from' and 'value', got \['from'\]"),
    "system": (
        "a.jsonl",
        '{"conversations": [{"from": "system", "value": "x"}]}',
        r"a\.jsonl, line 1, turn 1: 'from' must be 'user' or 'assistant', got 'system'; rename it",
    ),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_bad_data_is_one_line_that_says_where(
    name: str, content: Any, message: str, write: Any, tokenizer: Any
) -> None:
    with pytest.raises(BadDataError, match=message) as caught:
        load_samples(write(name, content), tokenizer)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)


def test_a_bad_line_is_found_in_a_packed_file_too(write: Any, tokenizer: Any) -> None:
    with pytest.raises(BadDataError, match=r"a\.txt\.gz, line 2, byte 1: text must be UTF-8"):
        load_samples(write("a.txt.gz", b"one\n\xff\n"), tokenizer)


@pytest.mark.parametrize("data", [b"no gzip at all", gzip.compress(TEXT.encode())[:-20]], ids=["not", "cut"])
def test_a_broken_gzip_file_is_named(data: bytes, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(data)
    with pytest.raises(BadDataError, match=r"a\.txt\.gz: \.gz must be a whole gzip file"):
        load_samples(path, tokenizer, seq_len=16)


@pytest.mark.parametrize("source", ["missing.txt", "missing", "data/missing.json", "text " * 1000], ids=str.split)
def test_a_missing_file_is_named(source: str, tokenizer: Any) -> None:
    with pytest.raises(BadDataError, match=r"there is no file (data/)?(missing|text)") as caught:
        load_samples(source, tokenizer)
    assert len(str(caught.value)) < 400


def test_a_folder_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(BadDataError, match="is a folder; give a file inside it"):
        load_samples(tmp_path, tokenizer)


def test_a_file_that_may_not_be_read_is_named(write: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    path = write("a.txt", TEXT)
    monkeypatch.setattr(text_sources, "_binary", refuse)
    with pytest.raises(BadDataError, match=r"a\.txt: the file must be readable, got: Permission denied"):
        load_samples(path, tokenizer)


def test_text_of_nothing_but_single_tokens_cannot_be_truncated(write: Any, tokenizer: Any) -> None:
    with pytest.raises(BadDataError, match="needs 2 tokens that count"):
        load_samples(write("a.jsonl", _jsonl([{"text": "a"}])), tokenizer, packing="truncate")


@pytest.mark.parametrize(
    "option",
    [
        {"n_samples": 0},
        {"n_samples": 2.5},
        {"seq_len": 0},
        {"seq_len": 1},
        {"seed": -1},
        {"seed": 2**63},
        {"packing": "x"},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_a_usage_error(option: dict[str, Any], write: Any, tokenizer: Any) -> None:
    (name,) = option
    with pytest.raises(UsageError, match=rf"^{name} must be .*got"):
        load_samples(write("a.txt", TEXT), tokenizer, **option)


# --- a user's own ids


def test_own_ids_become_samples_of_a_copy() -> None:
    rows = torch.arange(6, dtype=torch.int32).view(2, 3)
    samples = samples_from_ids(rows)
    rows.zero_()
    assert _rows(samples) == [[0, 1, 2], [3, 4, 5]]
    assert all(s.input_ids.dtype == torch.int64 and s.mask.all() for s in samples)


def test_own_ids_may_be_ragged_masked_and_cut() -> None:
    samples = samples_from_ids([[1, 2, 3, 4], [5, 6]], [[0, 1, 1, 1], [True, True]], seq_len=3)
    assert _rows(samples) == [[1, 2, 3], [5, 6]]
    assert [s.mask.tolist() for s in samples] == [[False, True, True], [True, True]]


@pytest.mark.parametrize(
    "ids", [[1, 2, 3], [[1.5, 2.0]], [[[1, 2]]], ["text"], [{"input_ids": [1, 2]}], [[True, False]], [[2**70]]], ids=str
)
def test_ids_that_are_no_rows_of_integers_are_refused(ids: Any) -> None:
    with pytest.raises(BadDataError, match=r"^row 0 of ids must be .*; give"):
        samples_from_ids(ids)


def test_masks_must_fit_their_ids() -> None:
    with pytest.raises(BadDataError, match=r"one row per row of ids: got 1 for 2"):
        samples_from_ids([[1, 2], [3, 4]], [[1, 1]])
    with pytest.raises(BadDataError, match=r"mask of row 0 must have its row's shape, got \[1\] for \[2\]"):
        samples_from_ids([[1, 2]], [[1]])


# --- checks


def test_good_samples_pass_the_check() -> None:
    check_samples(samples_from_ids([[0, 9]]), vocab_size=10)


REFUSED: dict[str, tuple[list[Sample], str]] = {
    "none": ([], "at least one sample, got none"),
    "empty row": (samples_from_ids([[]]), "sample 0 needs at least 2 counted tokens, but it has 0 of 0"),
    "one token": (samples_from_ids([[1, 2], [3]]), "sample 1 needs at least 2 counted tokens, but it has 1 of 1"),
    "one counted": (samples_from_ids([[1, 2, 3]], [[0, 0, 1]]), "but it has 1 of 3"),
    "all masked": (samples_from_ids([[1, 2]], [[0, 0]]), "all of its 2 are masked"),
    "too high": (samples_from_ids([[1, 2], [1, 10]]), r"must be in 0\.\.9, .* sample 1 has 10; tokenize with"),
    "negative": (samples_from_ids([[1, -1]]), "sample 0 has -1"),
    "wrong type": ([Sample(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))], r"must be \[T\] int64 ids"),
    "wrong shape": (
        [Sample(torch.tensor([1, 2]), torch.tensor([True]))],
        r"got \[2\] torch.int64 and \[1\] torch.bool",
    ),
}


@pytest.mark.parametrize(("samples", "message"), REFUSED.values(), ids=REFUSED)
def test_samples_that_calibrate_nothing_are_refused(samples: list[Sample], message: str) -> None:
    with pytest.raises(BadDataError, match=message):
        check_samples(samples, vocab_size=10)


def test_the_fingerprint_is_stable_and_sees_ids_masks_order_and_borders() -> None:
    plain = fingerprint(samples_from_ids([[1, 2], [3, 4]]))
    assert plain == "00ed64c9d9815c24dc68c5930ed80f1b4d3ae73592977a1d02aadfe546f2cea8"
    others = [
        samples_from_ids([[1, 2], [3, 5]]),
        samples_from_ids([[1, 2], [3, 4]], [[1, 1], [1, 0]]),
        samples_from_ids([[3, 4], [1, 2]]),
        samples_from_ids([[1, 2, 3, 4]]),
    ]
    assert len({plain, *map(fingerprint, others)}) == 5


def test_a_tokenizer_that_follows_its_file_is_not_warned_of(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert check_tokenizer(tokenizer, tmp_path) is None


def test_a_folder_without_tokenizer_json_cannot_be_compared(tokenizer: Any, tmp_path: Path) -> None:
    assert check_tokenizer(tokenizer, tmp_path) is None


def test_a_qwen2_folder_with_another_pre_tokenizer_is_warned_of(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "Qwen2Tokenizer"}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    warning = check_tokenizer(loaded, tmp_path)
    assert warning is not None
    assert "Qwen2Tokenizer does not give the ids of tokenizer.json" in warning
    assert "first different at token" in warning
    assert "PreTrainedTokenizerFast" in warning
    assert "\n" not in warning


def test_a_probe_of_the_user_is_not_quoted(tokenizer: Any, bare: Any, tmp_path: Path) -> None:
    bare.save_pretrained(tmp_path)
    warning = check_tokenizer(tokenizer, tmp_path, probe="secret <|im_start|>")
    assert warning is not None
    assert "character 7" in warning
    assert "im_start" not in warning
    assert check_tokenizer(tokenizer, tmp_path, probe="secret") is None


def test_an_unreadable_tokenizer_json_is_named(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(BadModelError, match=r"tokenizer\.json must be readable, got: .*; fetch it again"):
        check_tokenizer(tokenizer, tmp_path)


def test_optional_packages_are_imported_where_they_are_used() -> None:
    for module in (calibrate, samples, text_sources, token_coding, tokenizer_check):
        lines = Path(str(module.__file__)).read_text().splitlines()
        names = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
        assert not names & {"transformers", "tokenizers", "datasets", "numpy"}
