"""A Qwen v1 folder with the published vocabulary from end to end: load, chat, quantize, load again, chat again.

No code of the folder may run and no socket may be opened, neither here nor in the commands that are started.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qquant
from qquant.config import QuantizeConfig
from qquant.kv_cache_quant import Int8KVCache
from qquant.models.qwen.context import make_context
from qquant.models.qwen.modeling import QWenLMHeadModel
from qquant.models.qwen.tokenization import SMALL_VOCABULARY, QWenTokenizer
from qquant.models.qwen.vocabulary import DEFAULT_SYSTEM
from qquant.quantizing import quantize_checkpoint
from tests.make_qwen_v1 import as_qwen_v1, make_qwen_v1
from tests.processor import BFLOAT16
from tests.qwen_cases import INT8, int8_error
from tests.qwen_v1 import real_vocabulary_or_skip

ROOT = Path(__file__).parent.parent
EMBEDDED = ROOT / "examples" / "reference-model"
NO_SOCKETS = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
"""
MAX_LENGTH = 96
"""Tokens of a calibration sample."""
QUESTIONS = ["你好", "What is 12 + 30?", "Write a haiku about cast iron 🙂"]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "repetition_penalty": 1.0}


@pytest.fixture(autouse=True)
def _no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model of 2 small blocks with all 151936 rows; its code files raise when they are run."""
    folder = tmp_path_factory.mktemp("qwen") / "Qwen-Tiny-Chat"
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "kv_channels": 32,
        "num_hidden_layers": 2,
        "seq_length": 64,
    }
    return make_qwen_v1(folder, vocabulary=real_vocabulary_or_skip(), dtype=torch.bfloat16, **sizes)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration data as Qwen's own scripts take it."""
    path = tmp_path_factory.mktemp("data") / "chats.json"
    turns = [
        [{"from": "user", "value": question}, {"from": "assistant", "value": f"答案 {index}: " + "so it is, " * 20}]
        for index, question in enumerate(QUESTIONS * 3)
    ]
    items = [{"id": f"identity_{index}", "conversations": turn} for index, turn in enumerate(turns)]
    path.write_text(json.dumps(items, ensure_ascii=False), encoding="utf-8")
    return path


def quantize(original: Path, data: Path, out: Path, bits: int, tmp_path: Path) -> None:
    """``python -m qquant.gptq`` with Qwen's own spelling of the options, in a process that cannot open a socket."""
    (tmp_path / "sitecustomize.py").write_text(NO_SOCKETS)
    command = ["--model_name_or_path", original, "--data_path", data, "--out_path", out, "--bits", bits]
    command += [] if BFLOAT16 else ["--dtype", "float32"]
    finished = subprocess.run(
        [sys.executable, "-m", "qquant.gptq", *map(str, command), "--group-size", "32", "--max_len", str(MAX_LENGTH)],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == str(out)


@torch.inference_mode()
def divergence(before: Any, after: Any, ids: Tensor) -> Tensor:
    """KL of every token [T], in nats."""
    expected, found = (model(ids).logits[0].double().log_softmax(-1) for model in (before, after))
    divergences: Tensor = (expected.exp() * (expected - found)).sum(-1)
    return divergences


def test_the_original_is_loaded_by_the_auto_classes_and_chats(original: Path) -> None:
    qquant.register()
    tokenizer: Any = AutoTokenizer.from_pretrained(original)
    model: Any = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    assert isinstance(tokenizer, QWenTokenizer)
    assert isinstance(model, QWenLMHeadModel)
    response, history = model.chat(tokenizer, QUESTIONS[0], history=None, **GREEDY)
    assert history == [(QUESTIONS[0], response)]
    second, longer = model.chat(tokenizer, QUESTIONS[1], history=history, **GREEDY)
    assert longer == [*history, (QUESTIONS[1], second)]
    assert list(model.chat_stream(tokenizer, QUESTIONS[1], history=history, **GREEDY))[-1].strip() == second


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_quantized_by_one_command_and_chats_again(
    original: Path, conversations: Path, tmp_path: Path, bits: Literal[4, 8]
) -> None:
    out = tmp_path / f"int{bits}"
    quantize(original, conversations, out, bits, tmp_path)
    assert {"qwen.tiktoken", "tokenizer_config.json", "generation_config.json"} <= {path.name for path in out.iterdir()}

    model: Any = qquant.load_quantized(out, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    assert isinstance(model, QWenLMHeadModel)
    assert isinstance(tokenizer, QWenTokenizer)
    before: Any = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    ids = tokenizer("The quick brown fox jumps over the lazy dog. 今天天气很好。" * 8, return_tensors="pt").input_ids
    assert ids.shape[1] > before.config.seq_length  # NTK and LogN too
    quantize_checkpoint(original, None, QuantizeConfig(method="rtn", bits=bits, group_size=32), tmp_path / "rtn")
    rounded = qquant.load_quantized(tmp_path / "rtn", dtype=torch.float32)
    (turns,) = (item["conversations"] for item in json.loads(conversations.read_text(encoding="utf-8"))[1:2])
    messages = [{"role": turn["from"], "content": turn["value"]} for turn in turns]
    known = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"][:, :MAX_LENGTH]
    assert known.shape[1] > before.config.seq_length
    ours, plain = (divergence(before, one, known) for one in (model, rounded))
    assert ours.mean() > 0
    # What GPTQ was calibrated on it must serve better than rounding to nearest does, by more than chance: three
    # standard errors of the mean difference over the tokens.
    gain = plain - ours
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
    # Elsewhere its corrections may cost, here where nine chats are all that it saw of random weights, but less than a
    # bit is worth: a step of twice the size, four times the divergence.
    ours, plain = (divergence(before, one, ids) for one in (model, rounded))
    assert ours.mean() < 4 * plain.mean()

    response, history = model.chat(tokenizer, QUESTIONS[2], history=None, **GREEDY)
    assert history == [(QUESTIONS[2], response)]

    cached: Any = qquant.load_quantized(out, dtype=torch.float32, use_cache_quantization=True, use_cache_kernel=True)
    options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True, **GREEDY}
    exact, found = (one.generate(ids, **options) for one in (model, cached))
    assert isinstance(found.past_key_values, Int8KVCache)
    assert not isinstance(exact.past_key_values, Int8KVCache)
    # The prompt attends to exact keys and values, so that both go on with the same token.
    assert torch.equal(found.logits[0], exact.logits[0])
    assert int8_error(found.logits[1], exact.logits[1]) < INT8
    again, history = cached.chat(tokenizer, QUESTIONS[2], history=None, **GREEDY)
    assert history == [(QUESTIONS[2], again)]


def test_the_embedded_model_as_v1_chats_with_the_shipped_vocabulary(tmp_path: Path) -> None:
    """4301 ids and rows for 4096 of them: enough, since the rows reach to the three special tokens of a chat."""
    model: Any = AutoModelForCausalLM.from_pretrained(as_qwen_v1(EMBEDDED, tmp_path / "v1"), dtype=torch.float32)
    tokenizer = QWenTokenizer(SMALL_VOCABULARY)
    assert (len(tokenizer), model.config.vocab_size) == (4301, 4096)
    response, history = model.chat(tokenizer, QUESTIONS[1], history=None, **GREEDY)
    assert history == [(QUESTIONS[1], response)]

    other: Any = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    theirs: Any = AutoTokenizer.from_pretrained(EMBEDDED)
    _, ids = make_context(tokenizer, QUESTIONS[1], system=DEFAULT_SYSTEM)
    answer = other.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **GREEDY)[0, len(ids) :]
    assert response
    assert response == theirs.decode(answer, skip_special_tokens=True).strip()
