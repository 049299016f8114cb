"""``qquant chat`` on tiny random models, through a pipe and on a terminal.

How commands and settings are read, and what may be shown, is in test_chat_terminal.py; prompts
by a chat template are in test_conversation.py.
"""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, StoppingCriteria
from typer.testing import CliRunner

from qquant.calibrate import samples_from_ids
from qquant.chat import converse, open_conversation
from qquant.cli import app
from qquant.config import QuantizeConfig
from qquant.console import printable
from qquant.conversation import Conversation, Style, choose_style
from qquant.errors import BadModelError, DoesNotFitError, NumericError, UsageError
from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.context import make_context
from qquant.models.qwen.modeling import QWenLMHeadModel
from qquant.models.qwen.tokenization import SMALL_VOCABULARY, QWenTokenizer
from qquant.quantizing import quantize_checkpoint


@pytest.fixture(scope="module")
def qwen_v1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen v1 chat folder with a window of 60 tokens and answers of 8. Shared: never write to it."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer: Any = QWenTokenizer(SMALL_VOCABULARY)
    options: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 16}
    config = QWenConfig(vocab_size=4352, intermediate_size=192, seq_length=128, initializer_range=0.3, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = QWenLMHeadModel(config)
    end = tokenizer.eod_id
    model.generation_config = GenerationConfig(
        chat_format="chatml", max_window_size=60, max_new_tokens=8, do_sample=True, top_k=0, top_p=0.8, eos_token_id=end
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def conversation(qwen_v1: Path) -> Conversation:
    return open_conversation(qwen_v1, device="cpu")


def run(folder: Path, lines: str | bytes, *options: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["chat", str(folder), "--device", "cpu", *options], input=lines)
    return result.exit_code, result.stdout, result.stderr


# ---- through a pipe


def test_answers_go_to_stdout_and_all_else_to_stderr(qwen_v1: Path) -> None:
    code, out, err = run(qwen_v1, "hello\n:help\n:seed\n:conf\n:history\n\n:exit\nnever\n", "--seed", "3")
    assert code == 0, err
    assert len(out.strip()) > 0
    assert ":clear" in err
    assert "seed 3" in err
    assert "top_p=0.8" in err
    assert f"> hello\n{out.strip()}" in err
    assert "never" not in err


def test_an_answer_is_the_one_of_model_chat(qwen_v1: Path, conversation: Conversation) -> None:
    _, out, _ = run(qwen_v1, "hello\nand now\n", "--conf", "do_sample=false", "--system", "be brief")
    conversation.system, history = "be brief", list[tuple[str, str]]()
    conversation.set({"do_sample": False})
    answers = []
    for query in ("hello", "and now"):
        prompt = make_context(conversation.tokenizer, query, history, "be brief", 60)[1]
        assert conversation.prepare(query).ids == prompt
        *_, answer = conversation.answer(conversation.prepare(query))
        answers.append(answer)
        history.append((query, answer.strip()))
        assert conversation.history == history
    assert out == "".join(printable(answer) + "\n" for answer in answers)


def test_the_same_seed_gives_the_same_answer(qwen_v1: Path) -> None:
    _, out, _ = run(qwen_v1, "hello\n:clear\nhello\n:clear\n:seed 9\nhello\n", "--conf", "max_new_tokens=5")
    first, second, third = out.split("\n")[:3]
    assert first == second != third


def test_history_is_cleared_and_settings_are_undone(qwen_v1: Path) -> None:
    lines = "hello\n:clear\n:history\n:conf top_p=0.3\n:conf top_p=none\n"
    _, _, err = run(qwen_v1, lines, "--max-new-tokens", "2")
    assert "nothing was said yet" in err
    shown = [line for line in err.splitlines() if "top_p" in line]
    assert ["top_p=0.3" in line for line in shown] == [True, False]
    assert "max_new_tokens=2" in shown[1]


def test_turns_that_do_not_fit_are_noted_once(qwen_v1: Path) -> None:
    lines = "a question of some length\n" * 6
    code, out, err = run(qwen_v1, lines)
    assert code == 0
    assert err.count("no longer fit") == 1
    assert len(out.splitlines()) >= 6


BAD_LINES: dict[str, tuple[str, str]] = {
    "unknown command": (":hepl\n", "did you mean :help"),
    "unknown setting": (":conf topp=1\n", "did you mean top_p"),
    "a word too many": (":clear all\n", ":clear takes nothing after it"),
}


@pytest.mark.parametrize(("lines", "message"), list(BAD_LINES.values()), ids=list(BAD_LINES))
def test_a_line_in_a_pipe_that_cannot_be_followed_ends_it(qwen_v1: Path, lines: str, message: str) -> None:
    code, out, err = run(qwen_v1, lines + "hello\n")
    assert code == 2
    assert message in err
    assert out == ""


@pytest.mark.parametrize("family", ["qwen_v1", "tiny_qwen2"])
def test_bytes_in_a_pipe_that_are_no_text_end_it(family: str, request: pytest.FixtureRequest) -> None:
    code, out, err = run(request.getfixturevalue(family), b"caf\xe9\nhello\n", "--max-new-tokens", "2")
    assert code == 2
    assert err.startswith("error: a query must be text, and character 4 ")
    assert err.count("\n") == 1
    assert out == ""


def test_bytes_that_not_even_python_can_keep_are_refused(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = io.TextIOWrapper(io.BytesIO(b"h"), encoding="utf-16-le", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", half)
    with pytest.raises(UsageError, match="the terminal's encoding, utf-16"):
        converse(conversation, interactive=False)


def test_a_system_prompt_that_is_no_text_is_refused(qwen_v1: Path) -> None:
    with pytest.raises(UsageError, match="a system prompt must be text, and character 2 "):
        open_conversation(qwen_v1, system="a\udcff", device="cpu")


@pytest.mark.parametrize("style", ["chatml", "template", "raw"])
def test_half_a_character_is_refused_before_it_becomes_tokens(conversation: Conversation, style: Style) -> None:
    conversation.style = style
    for half in ("\ud83d", "\udc80"):
        with pytest.raises(UsageError, match="a query must be text, and character 7 "):
            conversation.prepare(f"hello {half}")
    assert conversation.history == []


def test_a_person_may_try_again(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(":hepl\nhello\nbroken \udc80\n"))
    converse(conversation, interactive=True)
    captured = capsys.readouterr()
    assert "error: there is no command" in captured.err
    assert "no text" in captured.err
    assert [query for query, _ in conversation.history] == ["hello"]
    assert captured.out.strip() == printable(conversation.history[0][1])


class _Interrupt(StoppingCriteria):
    """Presses Ctrl-C while the fifth token is being made."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate, press = conversation.model.generate, _Interrupt()

    def pressed(*args: Any, stopping_criteria: Any, **kwargs: Any) -> Any:
        return generate(*args, stopping_criteria=[*stopping_criteria, press], **kwargs)

    monkeypatch.setattr(conversation.model, "generate", pressed)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n:conf max_new_tokens=3\nbye\n"))
    conversation.set({"max_new_tokens": 1_000_000, "do_sample": False})
    converse(conversation, interactive=True)
    assert "stopped" in capsys.readouterr().err
    assert [query for query, _ in conversation.history] == ["hello", "bye"]
    assert conversation.history[0][1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qquant")]


def test_an_error_leaves_the_history_as_it_was(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(conversation.model, "generate", full)
    with pytest.raises(DoesNotFitError, match=":clear"):
        list(conversation.answer(conversation.prepare("hello")))
    assert conversation.history == []


def test_logits_that_are_not_finite_are_named(conversation: Conversation) -> None:
    conversation.model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(NumericError, match="--dtype float32"):
        list(conversation.answer(conversation.prepare("hello")))


# ---- models of other families


def test_a_pipe_through_another_family_works(tiny_llama: Path) -> None:
    code, out, err = run(tiny_llama, "hello\nbye\n", "--max-new-tokens", "4", "--conf", "do_sample=false")
    assert code == 0, err
    assert len(out.splitlines()) >= 2
    assert err == ""


@pytest.fixture(scope="module")
def base_models(qwen_v1: Path, tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same models without what makes them chat."""
    folders = {}
    for name, source in (("qwen v1", qwen_v1), ("qwen2", tiny_qwen2)):
        folder = folders[name] = tmp_path_factory.mktemp("base") / "model"
        shutil.copytree(source, folder)
    GenerationConfig(chat_format="raw", max_new_tokens=4).save_pretrained(folders["qwen v1"])
    (folders["qwen2"] / "chat_template.jinja").unlink()
    return folders


@pytest.mark.parametrize(("name", "message"), [("qwen v1", "chat_format"), ("qwen2", "chat template")], ids=str)
def test_a_base_model_is_asked_to_continue_text_instead(base_models: dict[str, Path], name: str, message: str) -> None:
    code, _, err = run(base_models[name], "hello\n")
    assert code == 2
    assert message in err
    assert "raw" in err
    code, out, err = run(base_models[name], "def f(\ndef f(\n:history\n", "--format", "raw", "--max-new-tokens", "4")
    assert code == 0, err
    assert "nothing was said yet" in err
    lines = out.rstrip("\n")
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 + 1 :]  # the second does not follow the first


def test_a_format_can_be_forced_only_where_it_belongs(base_models: dict[str, Path], tiny_qwen2: Path) -> None:
    forced = open_conversation(base_models["qwen v1"], wanted="chatml", device="cpu")
    assert forced.style == "chatml"
    for asked, message in (("chatml", "original Qwen"), ("alpaca", "must be one of")):
        with pytest.raises(UsageError, match=message):
            open_conversation(tiny_qwen2, wanted=asked, device="cpu")
    with pytest.raises(UsageError, match="no system prompt"):
        Conversation(forced.model, forced.tokenizer, choose_style(forced.model, forced.tokenizer, "raw"), "be brief")


# ---- loading


@pytest.fixture(scope="module")
def quantized(qwen_v1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chat") / "int4"
    quantize_checkpoint(qwen_v1, samples_from_ids([list(range(40))]), QuantizeConfig(method="gptq", group_size=32), out)
    return out


@pytest.mark.parametrize("cache", ["auto", "int8", "off"])
def test_a_quantized_model_chats_with_either_cache(quantized: Path, cache: str) -> None:
    code, out, err = run(quantized, "hello\n", "--kv-cache", cache)
    assert code == 0, err
    assert out.strip()
    conversation = open_conversation(quantized, kv_cache=cache, device="cpu")
    assert type(conversation.model.transformer.h[0].attn.c_attn).__name__ == "QuantLinear"
    assert bool(getattr(conversation.model.config, "use_cache_quantization", False)) == (cache == "int8")


def test_config_json_chooses_the_cache_unless_the_user_does(qwen_v1: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen_v1, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_cache_quantization": True}))
    prepared = "_prepare_cache_for_generation"
    assert prepared in vars(open_conversation(folder, device="cpu").model)
    assert prepared not in vars(open_conversation(folder, device="cpu", kv_cache="off").model)


@pytest.mark.parametrize("tie", [False, True], ids=["own head", "tied head"])
def test_a_missing_tensor_is_not_made_up(tiny_qwen2: Path, checkpoint: Any, tmp_path: Path, tie: bool) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen2", tie=True) if tie else tiny_qwen2, tmp_path / "model"))
    open_conversation(folder, device="cpu")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadModelError, match=r"model\.norm\.weight is missing"):
        open_conversation(folder, device="cpu")


def test_a_model_that_is_none_is_one_line(tmp_path: Path) -> None:
    code, _, err = run(tmp_path, "hello\n")
    assert code == 4
    assert err.startswith("error: ")
    assert err.count("\n") == 1


# ---- on a terminal


def read_until(descriptor: int, end: str) -> str:
    """What a terminal shows until it shows ``end`` last; fails where nothing comes for a minute."""
    seen = ""
    while not seen.endswith(end):
        assert select.select([descriptor], [], [], 60)[0], seen
        seen += os.read(descriptor, 1 << 16).decode("utf-8", "replace")
    return seen


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(qwen_v1: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qquant", "chat", str(qwen_v1), "--device", "cpu", "--max-new-tokens", "1000000"]
    environment = {**os.environ, "TERM": "dumb"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        try:
            read_until(ours, "> ")
            os.write(ours, b"hello\n")
            read_until(ours, "hello\r\n")
            assert os.read(ours, 1)  # the answer has begun
            process.send_signal(signal.SIGINT)
            read_until(ours, "stopped\r\n> ")
            os.write(ours, b":history\n")
            assert ":history\r\n> hello\r\n" in read_until(ours, "\r\n> ")
            os.write(ours, b"\x04")
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            os.close(ours)
