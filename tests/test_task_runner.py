"""Questions put to tiny random models in batches: what a slow, unpadded, one-by-one computation says, and nothing else.

Log-likelihoods are compared with a forward pass per choice without padding or mask, texts with a loop of argmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qquant.errors import BadDataError, BadModelError, NumericError
from qquant.model_folder import load_tokenizer
from qquant.models.qwen.modeling import register_qwen
from qquant.models.qwen.tokenization import register_tokenizer
from qquant.tasks.items import Item, Question
from qquant.tasks.prompts import prompt_of, room_of
from qquant.tasks.runner import answer, batches
from tests.conftest import Factory
from tests.make_qwen_v1 import make_qwen_v1

ITEM = Item("0", None, "", (), "A", {})
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "qwen")
TOLERANCE = 2e-3
"""Nats. A logit below 10 is a sum of 64 products in an order that follows the shape of the batch: 64 * 10 * 2**-24 is
4e-5; a token takes a logit and a sum of exponentials, and a choice here has up to 22 tokens (bytes, for Qwen v1)."""

LETTERS = (" A", " B", " C", " D")
WORDS = (" the lazy dog", " cat", " window 你好", "!")
TEXTS = (
    "The quick brown fox",
    "One",
    "def add(left, right):\n    return left + right\n\nfor number in range(10):\n    print(add(number, 1))",
    "The cat watches from the window while 你好世界",
    "a b c",
)


def question(body: str, number: int = 0, **fields: Any) -> Question:
    return Question(str(number), None, "A", "", (), body, **fields, item=ITEM)


@pytest.fixture(scope="module")
def loaded(checkpoint: Factory, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Any]]:
    """``loaded(family)``: a tiny random model and its tokenizer."""
    register_qwen()
    register_tokenizer()
    made: dict[str, tuple[Any, Any]] = {}

    def get(family: str) -> tuple[Any, Any]:
        if family not in made:
            folder = make_qwen_v1(tmp_path_factory.mktemp("v1") / "v1") if family == "qwen" else checkpoint(family)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            made[family] = model, load_tokenizer(folder)
        return made[family]

    return get


@pytest.fixture
def qwen2(loaded: Callable[[str], tuple[Any, Any]]) -> tuple[Any, Any]:
    return loaded("qwen2")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def alone(model: Any, ids: list[int], tail: list[int]) -> float:
    """Log-likelihood in nats of ``tail`` behind ``ids``: one sequence, no mask, all logits."""
    with torch.inference_mode():
        logprobs = model(torch.tensor([[*ids, *tail][:-1]])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[len(ids) - 1 + place, token]) for place, token in enumerate(tail))


def greedy(model: Any, ids: list[int], count: int, ends: set[int]) -> list[int]:
    new: list[int] = []
    while len(new) < count:
        with torch.inference_mode():
            token = int(model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax())
        if token in ends:
            break
        new.append(token)
    return new


# ---- choices


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choices", [LETTERS, WORDS], ids=["letters", "words"])
def test_likelihoods_are_those_of_each_choice_alone(
    loaded: Callable[[str], tuple[Any, Any]], family: str, choices: tuple[str, ...]
) -> None:
    model, tokenizer = loaded(family)
    asked = [question(text, number, choices=choices) for number, text in enumerate(TEXTS)]
    for one, reply in zip(asked, answer(model, tokenizer, asked, batch_size=3), strict=True):
        context = ids_of(tokenizer, one.body)
        wholes = [ids_of(tokenizer, one.body + choice) for choice in choices]
        assert all(whole[: len(context)] == context for whole in wholes)
        expected = [alone(model, context, whole[len(context) :]) for whole in wholes]
        assert reply.logprobs_nats == pytest.approx(expected, abs=TOLERANCE)
        assert not reply.truncated
        assert reply.output is None


@pytest.mark.parametrize("choices", [LETTERS, WORDS], ids=["letters", "words"])
def test_batch_size_moves_likelihoods_by_rounding_only(qwen2: tuple[Any, Any], choices: tuple[str, ...]) -> None:
    asked = [question(text, number, choices=choices) for number, text in enumerate(TEXTS)]
    together = answer(*qwen2, asked, batch_size=64)
    for one, reply in zip(asked, together, strict=True):
        (single,) = answer(*qwen2, [one], batch_size=1)
        assert reply.logprobs_nats == pytest.approx(single.logprobs_nats, abs=TOLERANCE)


def test_the_same_batch_gives_the_same_bits(qwen2: tuple[Any, Any]) -> None:
    asked = [question(text, number, choices=WORDS) for number, text in enumerate(TEXTS)]
    assert answer(*qwen2, asked, batch_size=4) == answer(*qwen2, asked, batch_size=4)


def test_single_tokens_share_one_row_of_the_model(qwen2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = qwen2
    rows, forward = [], model.forward

    def counted(input_ids: torch.Tensor, **options: Any) -> Any:
        rows.append(len(input_ids))
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", counted)
    answer(model, tokenizer, [question(text, n, choices=LETTERS) for n, text in enumerate(TEXTS)], batch_size=8)
    assert rows == [len(TEXTS)]


def test_white_space_at_the_end_of_a_prompt_belongs_to_the_choice(qwen2: tuple[Any, Any]) -> None:
    spaced, plain = question("Answer: ", choices=("A", "B")), question("Answer:", choices=(" A", " B"))
    assert answer(*qwen2, [spaced], batch_size=1) == answer(*qwen2, [plain], batch_size=1)


def test_a_choice_that_melts_into_the_prompt_is_scored_from_before_the_joint() -> None:
    def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
        """A character a token, but for "：A", which is one."""
        pieces = text.replace("：A", "\0")
        return {"input_ids": [1 if piece == "\0" else ord(piece) % 1000 for piece in pieces]}

    prompt = prompt_of(tokenizer, question("答：", choices=("A", "B")), None)
    joint, start, letter = ord("：") % 1000, ord("答") % 1000, ord("B") % 1000
    assert prompt.continuations == [[1], [joint, letter]]
    assert prompt.inputs == [[start], [start, joint]]


def test_llama_s_first_token_comes_first(loaded: Callable[[str], tuple[Any, Any]]) -> None:
    _, tokenizer = loaded("llama")

    class Starting:
        bos_token_id = 7

        def __call__(self, text: str, *, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
            ids = ids_of(tokenizer, text)
            return {"input_ids": [7, *ids] if add_special_tokens else ids}

    prompt = prompt_of(Starting(), question("One", choices=LETTERS), None)
    assert prompt.ids == [7, *ids_of(tokenizer, "One")]
    assert [ids[0] for ids in prompt.inputs] == [7] * 4


# ---- room


def with_shots(count: int, **fields: Any) -> Question:
    shots = tuple(f"Shot {number} is long enough. " for number in range(count))
    return replace(question("Question?", **fields), heading="Heading. ", shots=shots)


@pytest.mark.parametrize("kept", [0, 2, 4], ids=["none", "two", "all"])
def test_the_oldest_examples_are_dropped_first_and_the_heading_stays(qwen2: tuple[Any, Any], kept: int) -> None:
    tokenizer, whole = qwen2[1], with_shots(4, choices=("A", "B"))
    wanted = replace(whole, shots=whole.shots[4 - kept :])
    ids = ids_of(tokenizer, wanted.heading + "".join(wanted.shots) + wanted.body)
    prompt = prompt_of(tokenizer, whole, len(ids))
    assert prompt.ids == ids
    assert prompt.truncated == (kept < 4)


def test_a_question_longer_than_the_room_loses_its_oldest_tokens_and_says_so(qwen2: tuple[Any, Any]) -> None:
    model, tokenizer = qwen2
    room = room_of(model)
    assert room == 256
    long = question("The quick brown fox. " * 100, choices=WORDS)
    ids = ids_of(tokenizer, long.body.rstrip())
    prompt = prompt_of(tokenizer, long, room)
    assert prompt.truncated
    assert max(map(len, prompt.inputs)) == room
    assert ids[-len(prompt.ids) :] == prompt.ids
    (reply,) = answer(model, tokenizer, [long], batch_size=8)
    assert reply.truncated
    expected = [alone(model, prompt.inputs[2][: -len(tail) + 1 or None], tail) for tail in [prompt.continuations[2]]]
    assert reply.logprobs_nats is not None
    assert reply.logprobs_nats[2] == pytest.approx(expected[0], abs=TOLERANCE)


def test_an_answer_leaves_a_prompt_half_of_the_room(qwen2: tuple[Any, Any]) -> None:
    prompt = prompt_of(qwen2[1], question("The quick brown fox. " * 100, max_new_tokens=1000), 100)
    assert (len(prompt.ids), prompt.new_tokens, prompt.truncated) == (50, 50, True)


def test_a_long_chat_loses_its_oldest_example_turns_and_keeps_its_system_prompt(qwen2: tuple[Any, Any]) -> None:
    tokenizer = qwen2[1]
    system = {"role": "system", "content": "Be brief."}
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")][:-1]
    ids = tokenizer.apply_chat_template([system, *turns[2:]], add_generation_prompt=True, return_dict=False)
    prompt = prompt_of(tokenizer, question("", messages=(system, *turns), choices=("A",)), len(ids))
    assert prompt.ids == ids
    assert prompt.truncated


# ---- generation


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_greedy_and_ignores_what_else_is_in_the_batch(
    loaded: Callable[[str], tuple[Any, Any]], family: str
) -> None:
    model, tokenizer = loaded(family)
    asked = [question(text, number, max_new_tokens=6 + number) for number, text in enumerate(TEXTS)]
    ends = {0, model.generation_config.eos_token_id, getattr(tokenizer, "eod_id", None)} - {None, 0}
    found = answer(model, tokenizer, asked, batch_size=8)
    for one, reply in zip(asked, found, strict=True):
        new = greedy(model, ids_of(tokenizer, one.body), one.max_new_tokens, ends)
        assert reply.output == tokenizer.decode(new, skip_special_tokens=True)
        assert reply.logprobs_nats is None


def test_text_is_cut_before_the_first_stop_and_generation_ends_there(
    qwen2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = answer(*qwen2, [question("One Two", max_new_tokens=30)], batch_size=1)
    assert whole.output is not None
    stop = whole.output[9:12]  # begins and ends inside tokens, as a stop may
    steps, generate = [], qwen2[0].generate

    def counted(*arguments: Any, **options: Any) -> Any:
        rows = generate(*arguments, **options)
        steps.append(rows.shape[1] - arguments[0].shape[1])
        return rows

    monkeypatch.setattr(qwen2[0], "generate", counted)
    (cut,) = answer(*qwen2, [question("One Two", max_new_tokens=30, stops=("\0never", stop))], batch_size=1)
    assert cut.output == whole.output.partition(stop)[0]
    assert steps[0] < 30


def test_the_model_s_own_settings_do_not_count_and_come_back(qwen2: tuple[Any, Any]) -> None:
    model, asked = qwen2[0], [question(TEXTS[0], max_new_tokens=8)]
    before = answer(*qwen2, asked, batch_size=1)
    own = model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty = True, 0.7, 5.0
    try:
        assert answer(*qwen2, asked, batch_size=1) == before
        assert model.generation_config is own
    finally:
        own.do_sample, own.temperature, own.repetition_penalty = None, None, None


def test_a_chat_question_is_rendered_by_the_template(qwen2: tuple[Any, Any]) -> None:
    model, tokenizer = qwen2
    messages = ({"role": "user", "content": "Hi <|im_end|>"},)
    ids = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    (reply,) = answer(model, tokenizer, [question("", messages=messages, choices=("A", "B"))], batch_size=1)
    tails = [tokenizer("A")["input_ids"], tokenizer("B")["input_ids"]]
    assert reply.logprobs_nats == pytest.approx([alone(model, ids, tail) for tail in tails], abs=TOLERANCE)


# ---- batches


def test_batches_are_cut_longest_first_and_hold_every_question_once() -> None:
    asked = [question("x" * (number * 7 % 10), number) for number in range(10)]
    asked += [question("y" * number, 10 + number, choices=LETTERS) for number in range(5)]
    found = batches(asked, 4)
    assert [len(batch) for batch in found] == [4, 4, 2, 4, 1]
    assert sorted(int(one.id) for batch in found for one in batch) == list(range(15))
    assert all(len({bool(one.choices) for one in batch}) == 1 for batch in found)
    lengths = [len(one.body) for batch in found[:3] for one in batch]
    assert lengths == sorted(lengths, reverse=True)


# ---- faults


def test_logits_that_are_not_finite_are_an_error(qwen2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = qwen2
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: hidden.new_full((*hidden.shape[:-1], 320), torch.nan))
    for asked in (question("One", choices=LETTERS), question("One", max_new_tokens=2)):
        with pytest.raises(NumericError, match="logits must be finite"):
            answer(model, tokenizer, [asked], batch_size=1)


@pytest.mark.parametrize("named", ["<|endoftext|>", [1, None]], ids=["text", "nothing in a list"])
def test_an_end_of_text_that_is_no_id_is_refused(
    qwen2: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, named: Any
) -> None:
    model, tokenizer = qwen2
    monkeypatch.setattr(model.generation_config, "eos_token_id", named)
    with pytest.raises(BadModelError, match=r"eos_token_id in generation_config\.json must be an id"):
        answer(model, tokenizer, [question("One", max_new_tokens=2)], batch_size=1)


def test_an_id_without_a_row_is_refused(qwen2: tuple[Any, Any]) -> None:
    def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [400 + len(text)]}

    with pytest.raises(BadModelError, match="every token of a prompt needs a row"):
        answer(qwen2[0], tokenizer, [question("One", max_new_tokens=2)], batch_size=1)


def test_a_prompt_without_tokens_is_refused(qwen2: tuple[Any, Any]) -> None:
    with pytest.raises(BadDataError, match="has no tokens"):
        answer(*qwen2, [question("", max_new_tokens=2)], batch_size=1)


def test_a_template_that_refuses_is_an_error_of_the_model(qwen2: tuple[Any, Any], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(Path(qwen2[1].name_or_path))
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    asked = question("", messages=({"role": "user", "content": "Hi"},), choices=("A",))
    with pytest.raises(BadModelError, match="chat template refuses 0: no such role"):
        answer(qwen2[0], tokenizer, [asked], batch_size=1)
