"""What tests of Qwen v1's chat share: a tiny model that chats, answers laid down in advance, and ids of plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor

from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.modeling import QWenLMHeadModel

HISTORY = [("first question", "first answer"), ("second", "a second, longer answer with more words in it")]


def chat_model(tokenizer: Any) -> Any:
    """Weights large enough for the answer to depend on the whole prompt; 51 rows of lm_head belong to no token."""
    options: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 16}
    config = QWenConfig(
        vocab_size=len(tokenizer) + 51, intermediate_size=192, seq_length=48, initializer_range=0.3, **options
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = QWenLMHeadModel(config)
    model.eval()
    # No trained model says <|extra_n|>, which chat shows and chat_stream, as published, leaves out.
    model.generation_config = GenerationConfig(
        chat_format="chatml",
        max_window_size=6144,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=tokenizer.eod_id,
        suppress_tokens=list(range(tokenizer.im_end_id + 1, len(tokenizer))),
    )
    return model


class Scripted(LogitsProcessor):
    """Lets each row generate given ids, and counts the calls."""

    def __init__(self, *rows: Sequence[int]) -> None:
        self.rows, self.calls = rows, 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        forced = torch.full_like(scores, -torch.inf)
        for row, script in enumerate(self.rows):
            forced[row, script[min(self.calls, len(script) - 1)]] = 0.0
        self.calls += 1
        return forced


def plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, allowed_special=set())
    return ids
