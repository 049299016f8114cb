"""Qwen v1's tokenizer as transformers sees it: calls, batches, decoding, folders and AutoTokenizer."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, StopStringCriteria

from qquant.errors import BadModelError, UsageError
from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.tokenization import CHATML_TEMPLATE, SMALL_VOCABULARY, QWenTokenizer, register_tokenizer
from qquant.models.qwen.vocabulary import rank_file
from tests.qwen_v1 import TEXTS, VOCABULARY_SHA256, real_vocabulary_or_skip

REFERENCE_MODEL = Path(__file__).parent.parent / "examples" / "reference-model"
OFFICIAL = {
    "model_max_length": 8192,
    "tokenizer_class": "QWenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
}
"""tokenizer_config.json of the published folders."""


@pytest.fixture(scope="module")
def tokenizer() -> QWenTokenizer:
    """Shared, so no test may set anything on it."""
    return QWenTokenizer(SMALL_VOCABULARY, pad_token="<|extra_0|>", padding_side="left")


@pytest.fixture
def own() -> QWenTokenizer:
    return QWenTokenizer(SMALL_VOCABULARY)


@pytest.fixture(scope="module")
def real() -> QWenTokenizer:
    return QWenTokenizer(real_vocabulary_or_skip())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as published, its code replaced by code that fails when it is run."""
    shutil.copy(SMALL_VOCABULARY, tmp_path / "qwen.tiktoken")
    config = {"model_type": "qwen", "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"tokenizer_class": "QWenTokenizer"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(OFFICIAL))
    for name in ("tokenization_qwen.py", "configuration_qwen.py"):
        (tmp_path / name).write_text("raise SystemExit('remote code ran')\n")
    return tmp_path


@pytest.fixture
def registered() -> None:
    AutoConfig.register("qwen", QWenConfig, exist_ok=True)
    register_tokenizer()


# ---- the vocabulary


def test_the_real_vocabulary_has_151851_ids(real: QWenTokenizer) -> None:
    assert len(real) == real.vocab_size == len(real.get_vocab()) == 151851
    assert (real.eod_id, real.im_start_id, real.im_end_id) == (151643, 151644, 151645)
    assert sorted(real.get_vocab().values()) == list(range(151851))


def test_the_small_vocabulary_gives_the_reference_models_ids(tokenizer: QWenTokenizer) -> None:
    reference = AutoTokenizer.from_pretrained(REFERENCE_MODEL)
    for text in (*TEXTS.values(), (REFERENCE_MODEL / "eval.txt").read_text(encoding="utf-8")):
        assert tokenizer.encode(text.replace("<|extra", "<extra")) == reference.encode(
            text.replace("<|extra", "<extra")
        )


def test_vocabulary_keys_are_what_ids_convert_to(tokenizer: QWenTokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    assert list(vocabulary) == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert tokenizer.convert_tokens_to_ids(list(vocabulary)) == list(vocabulary.values())
    assert (vocabulary[b"!"], vocabulary["<|endoftext|>"]) == (0, tokenizer.eod_id)


def test_tokens_convert_one_by_one_too(tokenizer: QWenTokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.im_end_id
    assert tokenizer.convert_ids_to_tokens(tokenizer.im_end_id) == "<|im_end|>"
    assert tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(b" the")) == b" the"
    assert tokenizer.convert_ids_to_tokens([0, tokenizer.eod_id], skip_special_tokens=True) == [b"!"]
    assert tokenizer.convert_tokens_to_ids("<|im_stop|>") is None


def test_a_regular_token_cannot_be_added(own: QWenTokenizer) -> None:
    with pytest.raises(ValueError, match=r"takes no new tokens and \['<tool>'\] is not in it"):
        own.add_tokens(["<tool>"])
    with pytest.raises(ValueError, match="takes no new tokens"):
        own.add_special_tokens({"pad_token": "<pad>"})
    assert own.add_special_tokens({"pad_token": "<|extra_1|>"}) == 0
    assert (own.pad_token, len(own)) == ("<|extra_1|>", 4301)


def test_special_tokens_take_roles_by_name_and_by_id(own: QWenTokenizer) -> None:
    assert (own.pad_token, own.eos_token, own.bos_token, own.unk_token) == (None, None, None, None)
    own.pad_token_id = own.eod_id
    own.eos_token = "<|im_end|>"
    assert (own.pad_token, own.eos_token_id) == ("<|endoftext|>", own.im_end_id)
    assert own.all_special_ids == list(range(4093, 4301))


@pytest.mark.parametrize("name", ["pad_token", "eos_token", "extra_special_tokens"])
def test_an_unknown_name_takes_no_role(own: QWenTokenizer, name: str) -> None:
    value: Any = ["<pad>"] if name == "extra_special_tokens" else "<pad>"
    with pytest.raises(ValueError, match="takes no new tokens"):
        setattr(own, name, value)
    options = {name: value}
    with pytest.raises(ValueError, match="takes no new tokens"):
        QWenTokenizer(SMALL_VOCABULARY, **options)


@pytest.mark.parametrize("index", [0, 4301], ids=["a regular token", "no token"])
def test_an_id_that_is_not_special_takes_no_role(own: QWenTokenizer, index: int) -> None:
    with pytest.raises(ValueError, match=r"non-string value|has none"):
        own.pad_token_id = index


# ---- text to ids


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("allowed", ["all", set(), {"<|im_end|>"}], ids=["all", "none", "one"])
def test_every_way_to_ids_agrees_with_the_vocabulary(tokenizer: QWenTokenizer, text: str, allowed: Any) -> None:
    expected = tokenizer.vocabulary.encode(text, allowed)
    assert tokenizer.encode(text, allowed_special=allowed) == expected
    assert tokenizer(text, allowed_special=allowed)["input_ids"] == expected
    assert tokenizer([text, "x"], allowed_special=allowed)["input_ids"] == [expected, [tokenizer.get_vocab()[b"x"]]]
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text, allowed_special=allowed)) == expected


def test_special_tokens_are_parsed_unless_they_are_not_allowed(tokenizer: QWenTokenizer) -> None:
    text = "a<|im_end|>b"
    assert tokenizer.tokenize(text) == [b"a", "<|im_end|>", b"b"]
    plain = tokenizer(text, allowed_special=set())["input_ids"]
    assert tokenizer.im_end_id not in plain
    assert tokenizer(text, split_special_tokens=True)["input_ids"] == plain
    assert tokenizer.encode(text, split_special_tokens=True) == plain
    assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text, split_special_tokens=True)) == plain


CALLS: dict[str, Callable[..., Any]] = {
    "call": QWenTokenizer.__call__,
    "encode": QWenTokenizer.encode,
    "tokenize": QWenTokenizer.tokenize,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_disallowed_special_token_is_a_value_error(tokenizer: QWenTokenizer, call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"must not hold a disallowed special token, it holds <\|im_end\|>"):
        call(tokenizer, "a<|im_end|>", allowed_special=set(), disallowed_special="all")


def test_a_batch_is_padded_on_the_left(tokenizer: QWenTokenizer) -> None:
    batch = tokenizer(["a", "bb 1", ""], padding="longest", return_tensors="pt")
    pad, a = tokenizer.convert_tokens_to_ids("<|extra_0|>"), tokenizer.encode("a")
    row = tokenizer.encode("bb 1")
    n = len(row)
    assert batch["input_ids"].tolist() == [[pad] * (n - 1) + a, row, [pad] * n]
    assert batch["attention_mask"].tolist() == [[0] * (n - 1) + [1], [1] * n, [0] * n]
    assert batch["input_ids"].dtype == torch.int64


def test_truncation_pairs_and_masks_are_transformers_own(tokenizer: QWenTokenizer) -> None:
    one, other = tokenizer.encode("one"), tokenizer.encode("<|im_end|>")
    assert (
        tokenizer("one two three", truncation=True, max_length=2)["input_ids"] == tokenizer.encode("one two three")[:2]
    )
    assert tokenizer("one", "<|im_end|>")["input_ids"] == one + other
    assert tokenizer("one", return_attention_mask=False).keys() == {"input_ids"}
    assert tokenizer(one)["input_ids"] == one
    assert tokenizer("", return_tensors="pt")["input_ids"].shape == (1, 0)


def test_offsets_are_refused(tokenizer: QWenTokenizer) -> None:
    with pytest.raises(UsageError, match="return_offsets_mapping"):
        tokenizer("a", return_offsets_mapping=True)


# ---- ids to text

FORMS: dict[str, Callable[[list[int]], Any]] = {"list": list, "tuple": tuple, "tensor": torch.tensor, "array": np.array}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_ids_of_any_form_are_decoded(tokenizer: QWenTokenizer, form: Callable[[list[int]], Any]) -> None:
    ids = tokenizer.encode("hi <|im_end|> 你好")
    assert tokenizer.decode(form(ids)) == "hi <|im_end|> 你好"
    assert tokenizer.decode(form(ids), skip_special_tokens=True) == "hi  你好"
    assert tokenizer.batch_decode(form([ids, ids])) == ["hi <|im_end|> 你好"] * 2
    assert tokenizer.decode(form(ids)[0]) == "h"


def test_text_is_never_cleaned_up(own: QWenTokenizer) -> None:
    own.clean_up_tokenization_spaces = True
    text = " it 's , n't . 're ?"
    assert own.decode(own.encode(text), clean_up_tokenization_spaces=True) == text
    assert own.batch_decode([own.encode(text)], clean_up_tokenization_spaces=True) == [text]


def test_bytes_that_are_not_text_follow_errors(tokenizer: QWenTokenizer) -> None:
    ids = tokenizer.convert_tokens_to_ids([b"a", b"\xe4", b"\xbd", b"b"])
    assert tokenizer.decode(ids) == "a\ufffdb"
    assert tokenizer.decode(ids, errors="ignore") == "ab"
    assert tokenizer.batch_decode([ids], errors="ignore") == ["ab"]
    assert tokenizer.convert_tokens_to_string([b"\xe4\xbd", b"\xa0", "<|im_end|>"]) == "你<|im_end|>"
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(ids, errors="strict")


def test_an_id_past_the_vocabulary_is_a_replacement_character_or_skipped(tokenizer: QWenTokenizer) -> None:
    ids = [*tokenizer.encode("a"), 4301, 151935]
    assert tokenizer.decode(ids) == "a\ufffd\ufffd"
    assert tokenizer.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, errors="ignore") == "a"
    assert tokenizer.decode(4301) == "\ufffd"
    with pytest.raises(UsageError, match="ids are 0 or more, got -100"):
        tokenizer.decode([-100])


def test_stop_strings_of_generate_read_the_vocabulary(tokenizer: QWenTokenizer) -> None:
    stops = StopStringCriteria(tokenizer, ["Observation:"])
    done = [stops(torch.tensor([tokenizer.encode(text)]), None).item() for text in ("say Observation:", "say Observ")]
    assert done == [True, False]


# ---- folders


def test_a_saved_tokenizer_loads_as_it_was(tmp_path: Path, tokenizer: QWenTokenizer) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == SMALL_VOCABULARY.read_bytes()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "QWenTokenizer"
    twin = QWenTokenizer.from_pretrained(tmp_path)
    assert (twin.pad_token, twin.eos_token, twin.padding_side) == ("<|extra_0|>", None, "left")
    assert twin.chat_template == CHATML_TEMPLATE
    assert twin.encode(TEXTS["special"]) == tokenizer.encode(TEXTS["special"])
    twin.save_pretrained(tmp_path / "again")
    for name in ("tokenizer_config.json", "qwen.tiktoken", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_real_vocabulary_is_saved_byte_for_byte(tmp_path: Path, real: QWenTokenizer) -> None:
    (path,) = real.save_vocabulary(tmp_path)
    assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == VOCABULARY_SHA256


def test_an_extra_vocabulary_is_saved_and_found_again(tmp_path: Path) -> None:
    extra = tmp_path / "mine"
    extra.write_bytes(rank_file([(b"quantization", 4301), (b"quant", 4302), (b"ization", 4303)]))
    grown = QWenTokenizer(SMALL_VOCABULARY, extra_vocab_file=extra)
    grown.save_pretrained(tmp_path / "out")
    again = QWenTokenizer.from_pretrained(tmp_path / "out")
    assert len(again) == len(grown) == 4304
    assert again.encode(" quantization") == grown.encode(" quantization")
    assert again.get_vocab() == grown.get_vocab()
    settings_file = (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert "mine" not in settings_file


def test_a_folder_cannot_name_a_vocabulary_outside_of_it(tmp_path: Path, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"extra_vocab_file": str(tmp_path / "config.json")}))
    assert len(QWenTokenizer.from_pretrained(folder)) == 4301


def test_a_vocabulary_is_not_saved_where_no_folder_is(tmp_path: Path, tokenizer: QWenTokenizer) -> None:
    with pytest.raises(UsageError, match="a folder that exists"):
        tokenizer.save_vocabulary(tmp_path / "absent")


def test_a_folder_without_its_vocabulary_is_named(folder: Path) -> None:
    (folder / "qwen.tiktoken").unlink()
    with pytest.raises(BadModelError, match=f"needs the vocabulary qwen.tiktoken, {folder} has none"):
        QWenTokenizer.from_pretrained(folder)


def test_a_folder_with_added_tokens_is_refused(folder: Path) -> None:
    added = {"4301": {"content": "<tool>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(OFFICIAL | {"added_tokens_decoder": added}))
    with pytest.raises(BadModelError, match="adds <tool> as 4301"):
        QWenTokenizer.from_pretrained(folder)


CLONES: dict[str, Callable[[QWenTokenizer], QWenTokenizer]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda tokenizer: pickle.loads(pickle.dumps(tokenizer)),
}


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES.keys())
def test_a_copy_encodes_the_same(own: QWenTokenizer, clone: Callable[[QWenTokenizer], QWenTokenizer]) -> None:
    own.pad_token = "<|extra_3|>"
    twin = clone(own)
    assert (twin.pad_token, twin.encode(TEXTS["special"])) == (own.pad_token, own.encode(TEXTS["special"]))
    twin.pad_token = "<|extra_4|>"
    assert own.pad_token == "<|extra_3|>"


# ---- AutoTokenizer


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("trust", [None, False, True], ids=["trust unset", "trust off", "trust on"])
def test_auto_tokenizer_takes_an_official_folder_without_its_code(folder: Path, trust: bool | None) -> None:
    loaded = AutoTokenizer.from_pretrained(
        folder, pad_token="<|extra_0|>", eos_token="<|endoftext|>", padding_side="left", trust_remote_code=trust
    )
    assert isinstance(loaded, QWenTokenizer)
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.padding_side) == (4096, loaded.eod_id, "left")
    assert loaded.model_max_length == 8192


@pytest.mark.usefixtures("registered")
def test_auto_tokenizer_takes_a_folder_without_tokenizer_settings(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    assert isinstance(AutoTokenizer.from_pretrained(folder), QWenTokenizer)


@pytest.mark.usefixtures("registered")
def test_auto_tokenizer_takes_what_we_saved(tmp_path: Path, tokenizer: QWenTokenizer) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), QWenTokenizer)


BAD_OPTIONS: dict[str, dict[str, Any]] = {
    "unknown errors": {"errors": "bogus"},
    "errors of a number": {"errors": 5},
    "a length of text": {"model_max_length": "x"},
    "no length": {"model_max_length": float("nan")},
    "a negative length": {"model_max_length": -1},
}


@pytest.mark.parametrize("options", list(BAD_OPTIONS.values()), ids=list(BAD_OPTIONS))
def test_an_option_that_would_fail_later_is_refused_at_once(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(BadModelError, match=f"^{name} of a .*tokenizer_config.json"):
        QWenTokenizer(SMALL_VOCABULARY, **options)
