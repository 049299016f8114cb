"""``qquant chat`` on folders whose settings, tokens, templates or weights are bad: one line and an exit code each.

Chats with sound folders are in test_chat.py, the tokenizer's own checks in test_qwen_tokenization.py.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from typer.testing import CliRunner

from qquant.chat import chat_command, converse, open_conversation
from qquant.cli import app
from qquant.console import user_errors
from qquant.errors import BadModelError, NumericError, UsageError
from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.modeling import QWenLMHeadModel
from qquant.models.qwen.tokenization import SMALL_VOCABULARY, QWenTokenizer


@pytest.fixture(scope="module")
def qwen_v1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen v1 chat folder that samples, with answers of 3 tokens. Shared: never write to it."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer: Any = QWenTokenizer(SMALL_VOCABULARY)
    options: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "kv_channels": 16}
    config = QWenConfig(vocab_size=4352, intermediate_size=64, seq_length=64, max_position_embeddings=64, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = QWenLMHeadModel(config)
    model.generation_config = GenerationConfig(
        chat_format="chatml", max_window_size=60, max_new_tokens=3, do_sample=True, top_k=0, top_p=0.8
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bad(qwen_v1: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(qwen_v1, tmp_path / "bad"))


@pytest.fixture
def bad_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "bad"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def run(folder: Path, lines: str, *options: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["chat", str(folder), "--device", "cpu", *options], input=lines)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


# ---- settings

BAD_SETTINGS: dict[str, dict[str, Any]] = {
    "a negative temperature": {"temperature": -1},
    "no temperature": {"temperature": float("nan")},
    "a negative top_k": {"top_k": -1},
    "a broken top_k": {"top_k": 1.5},
    "a top_k of text": {"top_k": "a"},
    "a huge top_k": {"top_k": 10**400},
    "a top_p of text": {"top_p": "x"},
    "no penalty": {"repetition_penalty": 0},
    "a penalty that is no number": {"repetition_penalty": float("nan")},
    "an end of text": {"eos_token_id": "x"},
    "ends of text": {"eos_token_id": ["x"]},
    "a window of text": {"max_window_size": "x"},
    "no length": {"max_new_tokens": float("nan")},
    "no time": {"max_time": "x"},
    "a truth of text": {"do_sample": "yes"},
    "a cache that needs a package": {"cache_implementation": "quantized"},
    "stop strings": {"stop_strings": ["a"]},
    "bad words of text": {"bad_words_ids": "x"},
    "bad words that are no lists": {"bad_words_ids": [1]},
    "a forced end of text": {"forced_eos_token_id": "q"},
    "layers to contrast": {"dola_layers": "high"},
}


@pytest.mark.parametrize("family", ["bad", "bad_llama"])
@pytest.mark.parametrize("values", list(BAD_SETTINGS.values()), ids=list(BAD_SETTINGS))
def test_a_setting_of_the_model_that_is_none_is_one_line(
    values: dict[str, Any], family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    change(folder / "generation_config.json", **{"do_sample": True, "max_new_tokens": 3, **values})
    code, out, err = run(folder, "hello\n")
    assert (code, out.strip()) == (4, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_typed_setting_takes_the_place_of_a_bad_one(bad: Path) -> None:
    change(bad / "generation_config.json", top_p="x")
    assert run(bad, "hello\n", "--conf", "top_p=0.5")[0] == 0
    assert run(bad, "hello\n", "--conf", "do_sample=false")[0] == 0


def test_a_temperature_of_0_means_greedy_and_is_said_once(
    bad: Path, qwen_v1: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(bad / "generation_config.json", temperature=0)
    code, out, err = run(bad, "hello\nbye\n")
    assert code == 0, err
    assert caplog.text.count("greedy") == 1
    assert out == run(qwen_v1, "hello\nbye\n", "--conf", "do_sample=false")[1]


UNREADABLE = {
    "bad JSON": b"{",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "other bytes": b'{"a": "\xff"}',
    "a list": b"[]",
}


@pytest.mark.parametrize("content", list(UNREADABLE.values()), ids=list(UNREADABLE))
def test_a_generation_config_that_cannot_be_read_is_named(bad: Path, content: bytes) -> None:
    (bad / "generation_config.json").write_bytes(content)
    code, _, err = run(bad, "hello\n")
    assert code == 4
    assert "generation_config.json" in err
    assert "chat_format" not in err


# ---- tokens


@pytest.mark.parametrize("style", ["chatml", "raw"])
def test_a_token_without_a_row_is_refused(bad: Path, style: str) -> None:
    (bad / "qwen_extra.tiktoken").write_bytes(base64.b64encode(b"zqzq") + b" 5000\n")
    code, out, err = run(bad, "zqzq\n", "--format", style)
    assert (code, out) == (4, "")
    assert "id 5000" in err
    assert run(bad, "hello\n", "--format", style)[0] == 0
    conversation = open_conversation(bad, device="cpu")
    model, tokenizer = conversation.model, conversation.tokenizer
    for call in (model.chat, model.chat_stream, lambda t, query: model.chat_batch(t, ["hello", query])):
        with pytest.raises(BadModelError, match="id 5000"):
            call(tokenizer, "zqzq")


@pytest.mark.parametrize("style", ["chatml", "raw"])
def test_a_line_without_end_is_refused_unless_the_window_is_widened(qwen_v1: Path, style: str) -> None:
    conversation = open_conversation(qwen_v1, wanted=style, device="cpu")  # of 64 positions and a window of 60
    assert conversation.prepare("a b " * 50).ids
    with pytest.raises(UsageError, match=r"here 316, it has .* or set max_window_size="):
        conversation.prepare("a b " * 75_000)
    conversation.set({"max_window_size": 10**6})
    assert len(conversation.prepare("a b " * 1000).ids) > 316


# ---- weights


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_end_either_way_of_answering(qwen_v1: Path, value: float, sample: bool) -> None:
    conversation = open_conversation(qwen_v1, device="cpu")
    conversation.set({"do_sample": sample})
    conversation.model.lm_head.weight.data[:9] = value
    with pytest.raises(NumericError, match="--dtype float32"):
        list(conversation.answer(conversation.prepare("hello")))
    assert conversation.history == []


def test_weights_that_are_not_finite_end_a_pipe(bad_llama: Path) -> None:
    file = bad_llama / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, file, metadata={"format": "pt"})
    assert run(bad_llama, "hello\n", "--conf", "do_sample=false")[0] == 6


# ---- templates

BAD_TEMPLATES: dict[str, tuple[str, int]] = {
    "division by zero": ("{{ 1 // 0 }}", 4),
    "no end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", 4),
    "another kind": ("{{ messages + 1 }}", 4),
    "an attribute of Python": ("{{ messages.__class__.__mro__ }}", 2),
    "what is not there": ("{{ nothing.at.all }}", 2),
    "no template": ("{% if %}", 2),
}


@pytest.mark.parametrize(("template", "expected"), list(BAD_TEMPLATES.values()), ids=list(BAD_TEMPLATES))
def test_a_hostile_template_is_one_line(bad_llama: Path, template: str, expected: int) -> None:
    (bad_llama / "chat_template.jinja").write_text(template)
    code, out, err = run(bad_llama, "hello\n")
    assert (code, out) == (expected, ""), err
    assert "chat template" in err
    assert err.count("\n") == 1


# ---- the terminal


@pytest.mark.parametrize("debug", [False, True], ids=["line", "traceback"])
def test_a_name_in_an_error_cannot_steer_the_terminal(debug: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), user_errors(debug=debug):
        raise BadModelError("a tensor a\x1b[31m\x9b\u202eb")
    err = capsys.readouterr().err
    assert err.endswith("error: a tensor a\\x1b[31m\\x9b\\u202eb\n")
    assert not {"\x1b", "\x9b", "\u202e"} & set(err)


def test_an_error_shown_to_a_person_cannot_steer_the_terminal(
    qwen_v1: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = open_conversation(qwen_v1, device="cpu")

    def refuse(query: str) -> None:
        raise UsageError(f"no \x1b[31m{query}")

    monkeypatch.setattr(conversation, "prepare", refuse)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    converse(conversation, interactive=True)
    assert "error: no \\x1b[31mhello\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_a_closed_stream_is_one_line(
    qwen_v1: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, name, None)
        with pytest.raises(SystemExit) as ended:
            chat_command(str(qwen_v1))
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: a chat needs an open stdin and stdout, {name} is closed")
