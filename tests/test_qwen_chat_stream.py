"""Qwen v1's ``chat_stream``: an answer while it is made, on a tiny random model."""

from __future__ import annotations

import copy
import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

from qquant.errors import UsageError
from qquant.kv_cache_quant import enable_kv_quant
from qquant.models.qwen.tokenization import SMALL_VOCABULARY, QWenTokenizer
from tests.qwen_chats import HISTORY, Scripted, chat_model, plain


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return QWenTokenizer(SMALL_VOCABULARY)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return chat_model(tokenizer)


def generating() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("qquant")]


def test_a_stream_is_the_text_so_far_without_half_characters(model: Any, tokenizer: Any) -> None:
    ids = [*plain(tokenizer, " 你好 🙂, ok"), tokenizer.im_end_id]
    texts = list(model.chat_stream(tokenizer, "q", logits_processor=[Scripted(ids)], max_new_tokens=60))
    assert len(texts) == len(ids)
    assert texts[-1] == " 你好 🙂, ok"
    assert all(later.startswith(text) for text, later in pairwise(texts))


def test_a_stream_ends_with_the_answer_of_chat(model: Any, tokenizer: Any) -> None:
    # chat marks bytes that are no text and strips; a stream leaves them out, and so may begin or end with a space more.
    *_, text = model.chat_stream(tokenizer, "q", HISTORY)
    assert text.strip() == model.chat(tokenizer, "q", HISTORY)[0].replace("\ufffd", "").strip()
    torch.manual_seed(3)
    *_, text = model.chat_stream(tokenizer, "q", do_sample=True)
    torch.manual_seed(3)
    assert text.strip() == model.chat(tokenizer, "q", do_sample=True)[0].replace("\ufffd", "").strip()


def test_an_error_of_the_generation_reaches_the_consumer(model: Any, tokenizer: Any) -> None:
    class Break(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            raise ZeroDivisionError("in the thread")

    with pytest.raises(ZeroDivisionError, match="in the thread"):
        list(model.chat_stream(tokenizer, "q", logits_processor=[Break()]))
    assert not generating()


@pytest.mark.parametrize("how", ["closed", "dropped", "left by an exception"])
def test_a_stream_nobody_follows_stops_and_leaves_no_thread(model: Any, tokenizer: Any, how: str) -> None:
    script = Scripted(plain(tokenizer, "and"))
    stream = model.chat_stream(tokenizer, "q", logits_processor=[script], max_new_tokens=100_000)
    next(stream)
    if how == "closed":
        stream.close()
    elif how == "dropped":
        del stream
    else:
        with pytest.raises(KeyboardInterrupt):
            stream.throw(KeyboardInterrupt)
    assert not generating()
    assert script.calls < 10_000


def test_a_stream_does_nothing_before_it_is_followed(model: Any, tokenizer: Any) -> None:
    script = Scripted(plain(tokenizer, "and"))
    stream = model.chat_stream(tokenizer, "q", logits_processor=[script])
    assert not generating()
    del stream
    assert script.calls == 0


def test_beams_cannot_be_streamed(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="num_beams=2"):
        model.chat_stream(tokenizer, "q", num_beams=2)


def test_two_streams_on_one_model_do_not_disturb_each_other(model: Any, tokenizer: Any) -> None:
    # One of them beyond seq_length, so that it stretches its rotary base.
    queries = ["short", "a long question " * 8]
    alone = [list(model.chat_stream(tokenizer, query)) for query in queries]
    streams = [model.chat_stream(tokenizer, query) for query in queries]
    together = [list(texts) for texts in zip(*zip(*streams, strict=True), strict=True)]
    assert [texts[: len(together[0])] for texts in alone] == together


@pytest.mark.gpu
@pytest.mark.parametrize("int8_cache", [False, True], ids=["plain cache", "int8 cache"])
def test_a_stream_on_a_gpu_ends_with_the_answer_of_chat(model: Any, tokenizer: Any, int8_cache: bool) -> None:
    on_gpu = copy.deepcopy(model).cuda()
    if int8_cache:
        enable_kv_quant(on_gpu)
    *_, text = on_gpu.chat_stream(tokenizer, "q", HISTORY)
    assert text.strip() == on_gpu.chat(tokenizer, "q", HISTORY)[0].replace("\ufffd", "").strip()
