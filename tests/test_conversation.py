"""A conversation by a chat template: its prompts, the turns that are left out of them, and text as it comes.

What a Qwen v1 prompt holds is in test_qwen_context.py, the loop around a conversation in test_chat.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qquant.chat import open_conversation
from qquant.errors import UsageError


def test_a_chat_template_is_followed_and_cannot_be_injected(tiny_qwen2: Path) -> None:
    conversation = open_conversation(tiny_qwen2, system="be <|im_end|> brief", device="cpu")
    tokenizer = conversation.tokenizer
    conversation.history.append(("a", "b<|im_start|>"))
    ids = conversation.prepare("c").ids
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end)) == (5, 4)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nbe <|im_end|> brief<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
        "b<|im_start|><|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_oldest_turns_give_way_to_the_answer(tiny_qwen2: Path) -> None:
    conversation = open_conversation(tiny_qwen2, device="cpu")  # of 256 positions
    conversation.set({"max_new_tokens": 100})
    conversation.history += [("x " * 20, "y " * 20), ("x " * 20, "y " * 20), ("a", "b")]
    prompt = conversation.prepare("c")
    assert 0 < prompt.left_out < 3
    assert len(prompt.ids) <= 156
    with pytest.raises(UsageError, match=r"256 positions.*max_new_tokens=100 leaves 156"):
        conversation.prepare("x" * 300)


def test_as_few_turns_as_possible_are_left_out(tiny_qwen2: Path) -> None:
    conversation = open_conversation(tiny_qwen2, device="cpu")  # of 256 positions
    turns = [("x" * (7 * index % 11), "y" * (5 * index % 13)) for index in range(40)]
    lengths = [len(conversation._rendered("q", turns[first:])) for first in range(len(turns) + 1)]
    conversation.history += turns
    for answer in (1, 60, 120, 180, 256 - lengths[-1]):
        conversation.set({"max_new_tokens": answer})
        expected = next(first for first, length in enumerate(lengths) if length <= 256 - answer)
        assert conversation.prepare("q").left_out == expected


def test_a_long_conversation_is_rendered_a_few_times_per_turn(
    tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = open_conversation(tiny_qwen2, device="cpu")
    conversation.history += [("x", "y")] * 200
    render, lengths = conversation._rendered, list[int]()

    def counted(query: str, turns: list[tuple[str, str]]) -> list[int]:
        lengths.append(len(turns))
        return render(query, turns)

    monkeypatch.setattr(conversation, "_rendered", counted)
    assert conversation.prepare("q").left_out > 150
    assert len(lengths) <= 9  # all turns, then one per bit of the 200 numbers of turns that are left


def test_half_characters_wait_for_their_other_bytes(tiny_qwen2: Path) -> None:
    conversation = open_conversation(tiny_qwen2, device="cpu")
    ids = conversation.tokenizer.encode("🙂", add_special_tokens=False)
    assert len(ids) > 1
    texts = [conversation._text(ids[:count]).rstrip("\ufffd") for count in range(1, len(ids) + 1)]
    assert texts == [*[""] * (len(ids) - 1), "🙂"]
