"""What ends an answer to a task: stops that are special tokens, ends of turns, and templates that would think first.

The tiny models are made to say what a test wants, token by token: their output projection follows a script. How real
random models answer is test_task_runner.py's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qquant.model_folder import load_tokenizer
from qquant.models.qwen.modeling import register_qwen
from qquant.models.qwen.tokenization import register_tokenizer
from qquant.tasks.items import Item, Question
from qquant.tasks.prompts import prompt_of
from qquant.tasks.runner import answer
from tests.conftest import CHAT_TEMPLATE, Factory
from tests.make_qwen_v1 import make_qwen_v1

ITEM = Item("0", None, "", (), "A", {})
MESSAGES = ({"role": "user", "content": "Hi"},)
Model = tuple[Any, Any]
Script = Callable[..., list[int]]


def question(**fields: Any) -> Question:
    return Question("0", None, "A", "", (), "One", **{"max_new_tokens": 8, **fields}, item=ITEM)


@pytest.fixture(scope="module")
def loaded(checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """``loaded(family)``: a tiny model."""
    register_qwen()
    register_tokenizer()
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            folder = make_qwen_v1(tmp_path_factory.mktemp("v1") / "v1") if family == "qwen" else checkpoint(family)
            made[family] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return made[family]

    return get


@pytest.fixture
def qwen2(loaded: Callable[[str], Any], tmp_path: Path) -> Model:
    """A model whose own end is ``<|endoftext|>``, and a tokenizer that a test may change.

    Its file names the ends of turns as special tokens, as those of the published chat models do.
    """
    model = loaded("qwen2")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((Path(model.name_or_path) / name).read_bytes())
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    file.write_text(json.dumps(settings), encoding="utf-8")
    return model, load_tokenizer(tmp_path)


@pytest.fixture
def qwen_v1(loaded: Callable[[str], Any]) -> Model:
    """An original Qwen whose generation config names no end."""
    model = loaded("qwen")
    return model, load_tokenizer(Path(model.name_or_path))


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Script:
    """``says(model, ids)``: from now on it says these; returns the list of those that it was asked for."""

    def follow(model: Any, script: list[int]) -> list[int]:
        said: list[int] = []

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            said.append(script[len(said)])
            logits = hidden.new_zeros(*hidden.shape[:-1], model.config.vocab_size)
            logits[..., said[-1]] = 1
            return logits

        monkeypatch.setattr(model.lm_head, "forward", forward)
        return said

    return follow


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def around(tokenizer: Any, end: int) -> list[int]:
    """Two tokens, the end, and more than is asked for."""
    before, after = ids_of(tokenizer, "ab"), ids_of(tokenizer, "cdefghij")
    assert len(before) == 2
    return [*before, end, *after, *after]


@pytest.mark.parametrize("stops", [("<|im_end|>",), ("\n\n", "<|im_end|>")], ids=["alone", "behind another"])
def test_a_stop_that_is_a_special_token_ends_the_answer(qwen2: Model, says: Script, stops: tuple[str, ...]) -> None:
    model, tokenizer = qwen2
    said = says(model, around(tokenizer, tokenizer.convert_tokens_to_ids("<|im_end|>")))
    (reply,) = answer(model, tokenizer, [question(stops=stops)], batch_size=1)
    assert reply.output == "ab"
    assert len(said) == 3  # nothing was generated behind it


def test_a_special_token_that_is_no_stop_does_not_end_it(qwen2: Model, says: Script) -> None:
    model, tokenizer = qwen2
    script = around(tokenizer, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    said = says(model, script)
    (reply,) = answer(model, tokenizer, [question()], batch_size=1)
    assert said == script[:8]
    assert reply.output == tokenizer.decode([*script[:2], *script[3:8]])


@pytest.mark.parametrize(
    ("fields", "ended"), [({"messages": MESSAGES}, True), ({}, False)], ids=["in a chat", "in base style"]
)
def test_the_tokenizer_s_end_of_turn_ends_an_answer(
    qwen2: Model, says: Script, fields: dict[str, Any], ended: bool
) -> None:
    model, tokenizer = qwen2
    tokenizer.eos_token = "<|im_end|>"
    assert tokenizer.eos_token_id != model.generation_config.eos_token_id
    said = says(model, around(tokenizer, tokenizer.eos_token_id))
    (reply,) = answer(model, tokenizer, [question(**fields)], batch_size=1)
    assert (reply.output == "ab", len(said) == 3) == (ended, ended)


def test_the_model_s_own_end_counts_in_a_chat_too(qwen2: Model, says: Script) -> None:
    model, tokenizer = qwen2
    tokenizer.eos_token = "<|im_end|>"
    said = says(model, around(tokenizer, model.generation_config.eos_token_id))
    (reply,) = answer(model, tokenizer, [question(messages=MESSAGES)], batch_size=1)
    assert (reply.output, len(said)) == ("ab", 3)


def test_without_an_end_of_its_own_a_model_ends_at_the_tokenizer_s(
    qwen2: Model, says: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = qwen2
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    said = says(model, around(tokenizer, tokenizer.eos_token_id))
    (reply,) = answer(model, tokenizer, [question()], batch_size=1)
    assert (reply.output, len(said)) == ("ab", 3)


@pytest.mark.parametrize("end", ["im_end_id", "im_start_id", "eod_id"])
def test_a_turn_of_an_original_qwen_ends_at_its_marks(
    qwen_v1: Model, says: Script, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    model, tokenizer = qwen_v1
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)  # as published: an empty or older file
    said = says(model, around(tokenizer, getattr(tokenizer, end)))
    (reply,) = answer(model, tokenizer, [question(messages=MESSAGES)], batch_size=1)
    assert (reply.output, len(said)) == ("ab", 3)


def test_a_text_of_an_original_qwen_ends_at_the_end_of_text(
    qwen_v1: Model, says: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = qwen_v1
    monkeypatch.setattr(model.generation_config, "eos_token_id", tokenizer.im_end_id)
    said = says(model, around(tokenizer, tokenizer.eod_id))
    (reply,) = answer(model, tokenizer, [question()], batch_size=1)
    assert (reply.output, len(said)) == ("ab", 3)


# As Qwen3's template: only a thinking that is switched off is written out.
THINKS_FIRST = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"


@pytest.mark.parametrize("fields", [{}, {"choices": ("A", "B"), "max_new_tokens": 0}], ids=["generate", "choices"])
def test_a_template_that_could_think_first_is_told_not_to(qwen2: Model, fields: dict[str, Any]) -> None:
    _, tokenizer = qwen2
    tokenizer.chat_template = CHAT_TEMPLATE + THINKS_FIRST
    prompt = prompt_of(tokenizer, question(messages=MESSAGES, **fields), None)
    assert tokenizer.decode(prompt.ids) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
