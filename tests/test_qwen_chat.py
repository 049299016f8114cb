"""Qwen v1 chat: what ends a generation, ``chat`` and ``chat_batch``, on a tiny random model.

Prompts and answers as ids are in test_qwen_context.py, streams in test_qwen_chat_stream.py.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from qquant.errors import UsageError
from qquant.models.qwen.chat import StopSequences
from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.context import decode_tokens, make_context
from qquant.models.qwen.modeling import QWenLMHeadModel
from qquant.models.qwen.tokenization import SMALL_VOCABULARY, QWenTokenizer
from tests.qwen_chats import HISTORY, Scripted, chat_model, plain

OFFICIAL = {
    "chat_format": "chatml",
    "eos_token_id": 151643,
    "pad_token_id": 151643,
    "max_window_size": 6144,
    "max_new_tokens": 512,
    "do_sample": True,
    "top_k": 0,
    "top_p": 0.8,
    "transformers_version": "4.31.0",
}
"""generation_config.json as Qwen's chat models have it."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return QWenTokenizer(SMALL_VOCABULARY)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return chat_model(tokenizer)


class Recorder(StoppingCriteria):
    """Keeps what was generated so far."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.ids: Tensor = input_ids
        return torch.zeros(len(input_ids), dtype=torch.bool)


# ---- stop sequences


def test_each_row_stops_by_itself() -> None:
    stop = StopSequences([[7, 8], [9]], prompt_length=2)
    assert stop(torch.tensor([[0, 0, 7, 8], [0, 0, 8, 7], [0, 0, 7, 9]]), None).tolist() == [True, False, True]


STOPS: dict[str, tuple[list[int], int, bool]] = {
    "in the prompt": ([7, 8], 1, False),
    "half in the prompt": ([0, 7, 8], 1, False),
    "after the prompt": ([0, 0, 7, 8], 1, True),
    "one token earlier": ([0, 0, 7, 8, 1], 1, False),
    "among tokens that came together": ([0, 0, 7, 8, 1], 2, True),
}


@pytest.mark.parametrize(("row", "new", "done"), list(STOPS.values()), ids=list(STOPS))
def test_a_sequence_is_looked_for_where_tokens_are_new(row: list[int], new: int, done: bool) -> None:
    assert StopSequences([[7, 8]], prompt_length=2)(torch.tensor([row]), None, new).tolist() == [done]


@pytest.mark.parametrize("wrong", [[5], [[]], [["Observation:"]], "stop"], ids=["flat", "empty", "text", "a string"])
def test_stop_words_that_are_no_sequences_of_ids_are_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="stop_words_ids"):
        StopSequences(wrong, 0)


# ---- chat


def test_chat_is_the_prompt_generate_and_the_answer(model: Any, tokenizer: Any) -> None:
    prompt = make_context(tokenizer, "q", HISTORY, "be brief")[1]
    untaken = list(range(tokenizer.im_end_id + 1, model.config.vocab_size))
    output = model.generate(torch.tensor([prompt]), pad_token_id=tokenizer.eod_id, suppress_tokens=untaken)
    answer, _ = model.chat(tokenizer, "q", HISTORY, "be brief")
    assert answer == decode_tokens(output[0], tokenizer, 0, len(prompt), "chatml")
    assert answer


def test_history_is_copied_and_grows_by_the_turn(model: Any, tokenizer: Any) -> None:
    before = copy.deepcopy(HISTORY)
    answer, history = model.chat(tokenizer, "q", HISTORY)
    assert before == HISTORY
    assert history == [*HISTORY, ("q", answer)]
    assert model.chat(tokenizer, "q", None)[1] == [("q", model.chat(tokenizer, "q")[0])]


@pytest.mark.parametrize("marker", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_an_end_marker_ends_the_generation(model: Any, tokenizer: Any, marker: str) -> None:
    script = Scripted([*plain(tokenizer, "fine"), *tokenizer.encode(marker), *plain(tokenizer, "never")])
    answer, _ = model.chat(tokenizer, "q", logits_processor=[script])
    assert answer == "fine"
    assert script.calls == len(plain(tokenizer, "fine")) + 1


def test_stop_words_of_several_tokens_end_the_answer_and_stay_in_it(model: Any, tokenizer: Any) -> None:
    stop = plain(tokenizer, "Observation:")
    words = [stop]
    assert len(stop) > 1
    script = Scripted(plain(tokenizer, "Action: look\nObservation: a mountain"))
    answer, _ = model.chat(tokenizer, "q", stop_words_ids=words, logits_processor=[script], max_new_tokens=60)
    assert answer == "Action: look\nObservation:"
    assert words == [plain(tokenizer, "Observation:")]


def test_no_id_without_a_token_is_generated(model: Any, tokenizer: Any) -> None:
    class Tempt(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            scores[:, len(tokenizer) :] = 1e4
            return scores

    seen, used = Recorder(), model.used_ids
    answer, _ = model.chat(tokenizer, "q", logits_processor=[Tempt()], stopping_criteria=[seen])
    assert seen.ids.max() < len(tokenizer)
    assert answer == model.chat(tokenizer, "q")[0]
    assert model.used_ids == used


def test_the_callers_own_suppressed_tokens_stay_suppressed(model: Any, tokenizer: Any) -> None:
    seen = Recorder()
    model.chat(tokenizer, "q", stopping_criteria=[seen])
    first = int(seen.ids[0, -12])
    model.chat(tokenizer, "q", stopping_criteria=[seen], suppress_tokens=[first])
    assert first not in seen.ids[0, -12:].tolist()


def test_sampling_follows_the_seed_and_the_options(model: Any, tokenizer: Any) -> None:
    def answer(seed: int, **options: Any) -> str:
        torch.manual_seed(seed)
        return str(model.chat(tokenizer, "q", do_sample=True, top_k=0, **options)[0])

    assert answer(1) == answer(1) != answer(2)
    assert answer(1, temperature=1e-4) == answer(2, temperature=1e-4) == model.chat(tokenizer, "q")[0]


def test_the_window_comes_from_the_call_or_the_generation_config(model: Any, tokenizer: Any) -> None:
    seen = Recorder()

    def prompt_length(**options: Any) -> int:
        model.chat(tokenizer, "q", HISTORY, stopping_criteria=[seen], max_new_tokens=1, **options)
        return seen.ids.shape[1] - 1

    config = GenerationConfig(max_window_size=0, do_sample=False)
    alone = len(make_context(tokenizer, "q", system="You are a helpful assistant.")[1])
    assert prompt_length() > alone
    assert prompt_length(max_window_size=0) == prompt_length(generation_config=config) == alone


def test_nothing_that_was_handed_over_is_changed(model: Any, tokenizer: Any) -> None:
    config = GenerationConfig(do_sample=False, max_new_tokens=3)
    before, own = config.to_dict(), model.generation_config.to_dict()
    model.chat(tokenizer, "q", generation_config=config, top_p=0.5, do_sample=True)
    assert config.to_dict() == before
    assert model.generation_config.to_dict() == own


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "stream": ({"stream": True}, "chat_stream"),
    "a base model": ({"generation_config": GenerationConfig(chat_format="raw")}, '"chat_format": "chatml"'),
    "several answers": ({"num_return_sequences": 2, "do_sample": True}, "one answer"),
    "another tokenizer": ({"tokenizer": object()}, "QWenTokenizer"),
}


@pytest.mark.parametrize(("change", "message"), list(REFUSED.values()), ids=list(REFUSED))
@pytest.mark.parametrize("method", ["chat", "chat_stream"])
def test_what_cannot_be_followed_is_refused_at_once(
    model: Any, tokenizer: Any, method: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        getattr(model, method)(**{"tokenizer": tokenizer, "query": "q", **change})


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: Any) -> None:
    options: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "kv_channels": 16}
    small: Any = QWenLMHeadModel(QWenConfig(vocab_size=300, intermediate_size=192, seq_length=48, **options))
    with pytest.raises(UsageError, match="only 300 rows"):
        small.chat(tokenizer, "q")


def test_the_official_generation_config_is_read_and_kept(model: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(OFFICIAL))
    GenerationConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert {name: kept.get(name) for name in OFFICIAL if name != "transformers_version"} == {
        name: value for name, value in OFFICIAL.items() if name != "transformers_version"
    }


# ---- several at once


QUERIES = ["a", "What is a prime number?", "a question that is longer than seq_length " * 4]


def test_each_row_of_a_batch_is_answered_as_alone(model: Any, tokenizer: Any) -> None:
    histories = [HISTORY, None, [("x", "y")]]
    alone = [model.chat(tokenizer, query, turns)[0] for query, turns in zip(QUERIES, histories, strict=True)]
    assert model.chat_batch(tokenizer, QUERIES, histories) == alone
    assert len(set(alone)) == 3


def test_batches_as_in_qwens_readme(model: Any, tmp_path: Path) -> None:
    QWenTokenizer(SMALL_VOCABULARY).save_pretrained(tmp_path)
    tokenizer: Any = QWenTokenizer.from_pretrained(
        tmp_path, pad_token="<|extra_0|>", eos_token="<|endoftext|>", padding_side="left"
    )
    texts = [make_context(tokenizer, query, system="You are a helpful assistant.")[0] for query in QUERIES]
    rows = torch.tensor(tokenizer(texts, padding="longest")["input_ids"])
    padding = rows.eq(tokenizer.pad_token_id).sum(1).tolist()
    untaken = list(range(tokenizer.im_end_id + 1, model.config.vocab_size))
    output = model.generate(rows, pad_token_id=tokenizer.pad_token_id, suppress_tokens=untaken)
    answers = [
        decode_tokens(
            row[pad:],
            tokenizer,
            raw_text_len=len(text),
            context_length=rows.shape[1] - pad,
            chat_format="chatml",
            verbose=False,
            errors="replace",
        )
        for row, pad, text in zip(output, padding, texts, strict=True)
    ]
    assert answers == [model.chat(tokenizer, query)[0] for query in QUERIES]


def test_rows_end_one_by_one(model: Any, tokenizer: Any) -> None:
    stop = plain(tokenizer, " stop it")
    scripts = ["one<|im_end|>", "two stop it at once", "three and on it goes"]
    script = Scripted(*(tokenizer.encode(text) for text in scripts))
    answers = model.chat_batch(
        tokenizer, ["a", "b", "c"], stop_words_ids=[stop], logits_processor=[script], max_new_tokens=6
    )
    third = tokenizer.decode(plain(tokenizer, scripts[2])[:6])
    assert answers == ["one", "two stop it", third]


@pytest.mark.parametrize(("queries", "histories"), [("ab", None), ([], None), (["a"], [None, None])], ids=repr)
def test_a_batch_needs_one_history_per_query(model: Any, tokenizer: Any, queries: Any, histories: Any) -> None:
    with pytest.raises(UsageError, match="list of queries"):
        model.chat_batch(tokenizer, queries, histories)
