"""Sample answers: the tokens of transformers' greedy search, text that loses nothing, Markdown that nothing escapes.

Models are tiny and random, so answers are mostly single bytes: characters that end tokens later are the rule here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from qquant.answer_report import Answer, Answers, AnswerToken, ModelAnswer, answer_sections
from qquant.answers import cut_prompts, sample_answers
from qquant.errors import BadDataError, NumericError, UsageError
from qquant.models.qwen.modeling import QWenLMHeadModel
from qquant.models.qwen.tokenization import SMALL_VOCABULARY, QWenTokenizer
from tests.qwen_folders import make_qwen

CPU = torch.device("cpu")
PROMPT = torch.tensor([50, 60, 70, 80, 90, 100])
ROWS = 400
"""Vocabulary of the scripted models below; a token is one byte below 256."""


class Scripted(nn.Module):
    """A model that writes given ids one after the other, each with the same certainty, whatever it reads."""

    def __init__(self, ids: Sequence[int], end: int | None = None) -> None:
        super().__init__()
        self.ids = ids
        self.generation_config = type("Config", (), {"eos_token_id": end})()

    def forward(self, input_ids: Tensor, past_key_values: int | None = None, use_cache: bool = True) -> Any:
        place = past_key_values or 0
        logits = torch.zeros(1, input_ids.shape[1], ROWS)
        logits[0, -1, self.ids[min(place, len(self.ids) - 1)]] = 10.0
        return type("Output", (), {"logits": logits, "past_key_values": place + 1})()


class Bytes:
    """A tokenizer of single bytes; 300 is the end of a text. It drops a space at the beginning, as Llama's does."""

    eos_token_id = 300
    chat_template = None

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        found = b"".join(b"<end>" if index == self.eos_token_id else bytes([index]) for index in ids)
        return found.decode("utf-8", "replace").removeprefix(" ")


def _scripted(text: str | bytes) -> Scripted:
    return Scripted([*(text.encode() if isinstance(text, str) else text), Bytes.eos_token_id])


def _answers(texts: dict[str, str | bytes], *, prompt: bytes = b"ab", new_tokens: int = 40) -> Answers:
    models = {label: _scripted(text) for label, text in texts.items()}
    return sample_answers(models, Bytes(), [torch.tensor(list(prompt))], new_tokens=new_tokens, device=CPU)


def _pieces(answers: Answers, place: int = 0) -> list[str]:
    return [token.text for token in answers.samples[0].models[place].tokens]


def test_answers_are_greedy_search_and_its_probabilities(tiny_qwen2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    expected = model.generate(PROMPT[None], attention_mask=torch.ones(1, 6), do_sample=False, max_new_tokens=12)[0]
    sample = sample_answers({"only": model}, tokenizer, [PROMPT], new_tokens=12, device=CPU).samples[0]
    found = sample.models[0]
    with torch.inference_mode():
        log_p = torch.log_softmax(model(expected[None]).logits[0].float(), -1)
    count = len(expected) - len(PROMPT)
    logprobs = [log_p[place - 1, expected[place]].item() for place in range(len(PROMPT), len(expected))]
    assert len(found.tokens) == count
    assert found.same_tokens is None
    assert sample.prompt + "".join(token.text for token in found.tokens) == tokenizer.decode(expected)
    # One token at a time or all at once differ by the order of sums: some 64 roundings of logits around 1.
    assert [token.logprob_nats for token in found.tokens] == pytest.approx(logprobs, abs=64 * 1.2e-7)


def test_answers_of_a_qwen_v1_model_keep_every_byte(tmp_path: Path) -> None:
    tokenizer = QWenTokenizer(SMALL_VOCABULARY)
    model: Any = QWenLMHeadModel.from_pretrained(make_qwen(tmp_path / "qwen", vocab_size=4352)).eval()
    found = sample_answers({"a": model, "b": model}, tokenizer, [PROMPT], new_tokens=8, device=CPU)
    generated = PROMPT.tolist()
    for _ in found.samples[0].models[0].tokens:
        with torch.inference_mode():
            generated.append(int(model(torch.tensor([generated])).logits[0, -1].argmax()))
    assert found.samples[0].prompt + "".join(_pieces(found)) == tokenizer.decode(generated)
    assert found.samples[0].models[1].same_tokens == len(_pieces(found))


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    found = _answers({"only": "é你!"}, new_tokens=6)
    assert _pieces(found) == ["", "é", "", "", "你", "!"]


def test_a_character_that_is_never_completed_is_shown_as_unknown_at_the_end() -> None:
    assert _pieces(_answers({"only": "a你"}, new_tokens=3)) == ["a", "", "\ufffd"]


def test_bytes_that_are_no_text_are_kept_in_their_place() -> None:
    assert "".join(_pieces(_answers({"only": b"a\xffb\xff\xffc"}, new_tokens=6))) == "a\ufffdb\ufffd\ufffdc"


def test_a_character_begun_by_the_prompt_is_the_answers() -> None:
    whole = "x你".encode()
    found = _answers({"only": whole[2:] + b"y"}, prompt=whole[:2], new_tokens=3)
    assert found.samples[0].prompt == "x"
    assert _pieces(found) == ["", "你", "y"]


def test_a_space_at_the_beginning_of_an_answer_is_kept() -> None:
    assert _pieces(_answers({"only": " b"}, prompt=b"a", new_tokens=2)) == [" ", "b"]


@pytest.mark.parametrize(
    ("texts", "same"),
    [(("abcd", "abcd"), 5), (("abcd", "abxd"), 2), (("abcd", "ab"), 2), (("ab", "abcd"), 2), (("abcd", "xbcd"), 0)],
    ids=["alike", "one_other_token", "ends_earlier", "ends_later", "from_the_first"],
)
def test_tokens_before_the_first_different_one_are_counted(texts: tuple[str, str], same: int) -> None:
    found = _answers({"base": texts[0], "other": texts[1]})
    assert [row.same_tokens for row in found.samples[0].models] == [None, same]


def test_an_answer_ends_with_its_end_token_or_when_it_is_long_enough() -> None:
    assert _pieces(_answers({"only": "abc"})) == ["a", "b", "c", "<end>"]
    assert _pieces(_answers({"only": "abc"}, new_tokens=2)) == ["a", "b"]


@pytest.mark.parametrize("end", [98, [97 + 5, 98]], ids=["an_id", "a_list"])
def test_the_models_own_end_tokens_count(end: Any) -> None:
    models = {"only": Scripted(list(b"abc"), end)}
    assert _pieces(sample_answers(models, Bytes(), [torch.tensor([65])], new_tokens=9, device=CPU)) == ["a", "b"]


def test_a_long_prompt_is_shown_by_its_end() -> None:
    shown = _answers({"only": "a"}, prompt=b"x" * 700 + b"end").samples[0].prompt
    assert shown == "…" + "x" * 597 + "end"


def test_every_answer_is_reported_while_they_are_made() -> None:
    told: list[tuple[str, int, int]] = []
    models = {"a": _scripted("ab"), "b": _scripted("ab")}
    prompts = [torch.tensor([65])] * 2
    sample_answers(models, Bytes(), prompts, new_tokens=1, device=CPU, on_progress=lambda *words: told.append(words))
    assert told == [("sample answers", done, 4) for done in range(5)]


def test_prompts_are_cut_at_even_distances() -> None:
    prompts = cut_prompts(torch.arange(103), count=4, prompt_tokens=10)
    assert [(int(prompt[0]), len(prompt)) for prompt in prompts] == [(0, 10), (25, 10), (51, 10), (77, 10)]


def test_prompts_may_take_all_of_a_text() -> None:
    assert torch.cat(cut_prompts(torch.arange(12), count=4, prompt_tokens=3)).tolist() == list(range(12))


def test_a_text_too_short_for_the_prompts_is_refused() -> None:
    with pytest.raises(BadDataError, match="4 prompts of 3 tokens need a text of 12 tokens, got 11"):
        cut_prompts(torch.arange(11), count=4, prompt_tokens=3)


@pytest.mark.parametrize("counts", [(0, 3), (3, 0)], ids=["no_prompts", "no_tokens"])
def test_counts_below_one_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        cut_prompts(torch.arange(11), count=counts[0], prompt_tokens=counts[1])


@pytest.mark.parametrize(
    ("models", "prompts", "new_tokens"),
    [({}, [PROMPT], 1), ({"a": None}, [], 1), ({"a": None}, [PROMPT[:0]], 1), ({"a": None}, [PROMPT], 0)],
    ids=["no_model", "no_prompt", "empty_prompt", "no_tokens"],
)
def test_what_cannot_be_answered_is_refused(models: dict[str, Any], prompts: list[Tensor], new_tokens: int) -> None:
    with pytest.raises(UsageError, match="sample answers need"):
        sample_answers(models, Bytes(), prompts, new_tokens=new_tokens, device=CPU)


def test_logits_that_are_not_finite_are_an_error_with_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Scripted, input_ids: Tensor, **options: Any) -> Any:
        return type("Output", (), {"logits": torch.full((1, 1, ROWS), torch.nan), "past_key_values": None})()

    monkeypatch.setattr(Scripted, "forward", broken)
    with pytest.raises(NumericError, match="damaged-model returned a logit that is not finite"):
        sample_answers({"damaged-model": _scripted("a")}, Bytes(), [PROMPT], new_tokens=1, device=CPU)


def test_record_goes_through_json_unchanged() -> None:
    found = _answers({"base": "é你", "other": "éa"})
    assert Answers.model_validate_json(found.model_dump_json()) == found


def _markdown(**texts: str) -> str:
    """The section for answers of single-letter tokens."""
    base = next(iter(texts.values()))
    rows: list[ModelAnswer] = []
    for label, text in texts.items():
        same = next((n for n, (a, b) in enumerate(zip(base, text, strict=False)) if a != b), min(len(base), len(text)))
        tokens = tuple(AnswerToken(text=letter, logprob_nats=-0.25) for letter in text)
        rows.append(ModelAnswer(label=label, tokens=tokens, same_tokens=same if rows else None))
    sample = Answer(prompt="Once upon", prompt_tokens=2, models=tuple(rows))
    return "\n\n".join(answer_sections(Answers(new_tokens=9, samples=(sample, sample))))


def test_markdown_says_where_a_model_leaves_the_baseline() -> None:
    text = _markdown(base="a time", int4="a tale", int8="a time", short="a t")
    assert "| model | answer 1 | answer 2 |" in text
    assert "| int4 | 3 of 6 | 3 of 6 |" in text
    assert "| int8 | all | all |" in text
    assert (
        "int4: the same 3 tokens, then ` a ` (ln p -0.25) where base has ` i ` (ln p -0.25):\n\n```text\nale\n```"
        in text
    )
    assert "int8: the same 6 tokens." in text
    assert "short: the same 3 tokens, then no further token where base has ` i `" in text
    assert "```text\nOnce upon\n```" in text


def test_markdown_of_one_model_compares_nothing() -> None:
    text = _markdown(base="a time")
    assert "base (baseline):\n\n```text\na time\n```" in text
    assert "|" not in text


@pytest.mark.parametrize("marks", ["`", "```", "``````"], ids=["one", "three", "six"])
def test_text_of_a_model_cannot_end_its_code_block(marks: str) -> None:
    text = _markdown(base=f"{marks}\n# not a heading", other="x")
    fence = "`" * max(3, len(marks) + 1)
    assert f"\n\n{fence}text\n{marks}\n# not a heading\n{fence}\n\n" in text


def test_control_characters_are_not_passed_on() -> None:
    text = _markdown(base="a\x1b[2Jb\u202ec\r", other="a\nd")
    assert not set(text) & set("\x1b\u202e\r")
    assert "a\ufffd[2Jb\ufffdc\ufffd" in text
    assert "then ` \\n ` (ln p" in text
