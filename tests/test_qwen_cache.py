"""The native Qwen v1 model going on from a cache, and generating: what decoding, chunks, batches and beams must give.

The rule for all of them: each row is what the slow reference gives for the row alone, with the alpha of its prefill.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

import qquant
from qquant.errors import UsageError
from qquant.kv_cache_quant import Int8KVCache
from tests.qwen_cases import (
    DIFFERENT,
    INT8,
    Case,
    Differences,
    collect,
    difference,
    int8_error,
    left_padded,
    small,
    tokens,
)

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "repetition_penalty": 1.0,
    "max_new_tokens": 12,
    "min_new_tokens": 12,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.fixture(scope="module")
def differences(request: pytest.FixtureRequest) -> Iterator[Differences]:
    """Prints what the tests of this file saw."""
    yield from collect(request, "Qwen v1, cache and generation")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A checkpoint with NTK and LogN; its model is left as it was."""
    return small(tmp_path_factory.mktemp("qwen"))


def generate(case: Case, ids: Tensor, **options: Any) -> Any:
    """Output with logits and cache."""
    return case.model.generate(ids, **GREEDY | {"attention_mask": torch.ones_like(ids)} | options)


def check_rows(
    differences: Differences, name: str, case: Case, output: Any, rows: Sequence[Tensor], prefill: Sequence[int] = ()
) -> None:
    """Every step's logits of every row are the reference's for the prompt and what was generated after it."""
    steps = torch.stack(output.logits, 1)
    for i, row in enumerate(rows):
        whole = torch.cat((row, output.sequences[i, -steps.shape[1] :]))[:-1]
        expected = case.expected(whole, prefill=prefill[i] if prefill else len(row))[len(row) - 1 :]
        differences.check(f"{name}, row of {len(row)}", steps[i], expected)


def step_by_step(case: Case, ids: Tensor, cuts: Sequence[int], cache: Cache | None = None) -> Tensor:
    """Logits of ``ids`` put in by several calls, each up to the next of ``cuts``."""
    cache = DynamicCache(config=case.model.config) if cache is None else cache
    parts, start = [], 0
    for stop in cuts:
        parts.append(case.logits(ids[:, start:stop], past_key_values=cache, use_cache=True))
        start = stop
    return torch.cat(parts, 1)


@pytest.mark.parametrize("prompt", [10, 16, 17, 30], ids=lambda n: f"prompt_{n}")
def test_decoding_keeps_the_alpha_of_its_prompt(case: Case, prompt: int, differences: Differences) -> None:
    ids = tokens(1, 40)
    found = step_by_step(case, ids, [prompt, *range(prompt + 1, 41)])
    expected = case.expected(ids[0], prefill=prompt)
    # LogN looks at the total length; the prompt's own queries stay below seq_length or are beyond it in both.
    differences.check(f"decode to 40 after a prompt of {prompt}", found[0], expected)
    assert difference(found[0, -1], case.expected(ids[0])[-1]) > DIFFERENT  # and is no fresh prefill of 40


def test_no_cache_given_one_is_made_and_goes_on(case: Case, differences: Differences) -> None:
    ids = tokens(1, 20)
    with torch.no_grad():
        first = case.model(ids[:, :17])
        assert isinstance(first.past_key_values, DynamicCache)
        second = case.model(ids[:, 17:], past_key_values=first.past_key_values)
    differences.check("cache made by the model", second.logits[0], case.expected(ids[0], prefill=17)[17:])
    assert case.model(ids, use_cache=False).past_key_values is None


def test_two_generations_on_one_model_do_not_disturb_one_another(case: Case, differences: Differences) -> None:
    rows, caches = [tokens(1, 30, seed=1), tokens(1, 30, seed=2)], [DynamicCache(), DynamicCache()]
    prompts = (10, 20)
    logits: list[list[Tensor]] = [[], []]
    for i in (0, 1):
        logits[i].append(case.logits(rows[i][:, : prompts[i]], past_key_values=caches[i], use_cache=True))
    for step in range(10):
        for i in (1, 0):
            at = prompts[i] + step
            logits[i].append(case.logits(rows[i][:, at : at + 1], past_key_values=caches[i], use_cache=True))
    for i in (0, 1):
        found = torch.cat(logits[i], 1)[0]
        expected = case.expected(rows[i][0, : len(found)], prefill=prompts[i])
        differences.check(f"interleaved with another, prompt of {prompts[i]}", found, expected)


def test_a_copied_cache_goes_on_as_the_original_does(case: Case, differences: Differences) -> None:
    ids, cache = tokens(1, 24), DynamicCache()
    case.logits(ids[:, :20], past_key_values=cache, use_cache=True)
    found = case.logits(ids[:, 20:], past_key_values=copy.deepcopy(cache), use_cache=True)
    differences.check("copied cache", found[0], case.expected(ids[0], prefill=20)[20:])


@pytest.mark.parametrize("cuts", [(5, 12, 24), (17, 20, 40), (20, 21, 30, 40)], ids=str)
def test_chunks_are_causal(case: Case, cuts: tuple[int, ...], differences: Differences) -> None:
    ids = tokens(1, cuts[-1])
    expected = case.expected(ids[0], prefill=cuts[0])  # the first call is all that is known when alpha is fixed
    differences.check(f"own chunks up to {cuts}", step_by_step(case, ids, cuts)[0], expected)


@pytest.mark.parametrize("chunk", [4, 7, 16, 64], ids=lambda n: f"chunk_{n}")
def test_generating_from_chunks_is_generating_from_the_whole_prompt(
    case: Case, chunk: int, differences: Differences
) -> None:
    rows = [tokens(33, seed=1), tokens(20, seed=2), tokens(9, seed=3)]
    ids, mask = left_padded(*rows)
    output = generate(case, ids, attention_mask=mask, prefill_chunk_size=chunk)
    check_rows(differences, f"generate, prefill_chunk_size {chunk}", case, output, rows)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_left_padded_batch_generates_row_by_row(case: Case, kind: str, differences: Differences) -> None:
    rows = [tokens(length, seed=length) for length in (33, 20, 12)]  # alpha 7, 3, 1; the last one crosses seq_length
    ids, mask = left_padded(*rows)
    output = generate(case, ids, attention_mask=mask, cache_implementation=kind)
    check_rows(differences, f"generate, {kind} cache", case, output, rows)


def test_a_draft_is_verified_as_if_decoded_token_by_token(case: Case, differences: Differences) -> None:
    row = tokens(10).repeat(2)  # repeats itself, so that drafts are found in it
    output = generate(case, row[None], prompt_lookup_num_tokens=3)
    check_rows(differences, "generate, prompt lookup", case, output, [row])


def test_the_int8_cache_keeps_the_alpha_of_each_row(case: Case, differences: Differences) -> None:
    """What 8 bits cost is less than what a wrong alpha does."""
    rows = [tokens(33, seed=1), tokens(20, seed=2), tokens(12, seed=3)]
    ids, mask = left_padded(*rows)
    quantized = Case(case.folder)
    qquant.enable_kv_quant(quantized.model)
    output = generate(quantized, ids, attention_mask=mask)
    assert isinstance(output.past_key_values, Int8KVCache)
    steps = torch.stack(output.logits, 1)
    for i, row in enumerate(rows):
        # The prompt is read before it is quantized, so that the first step is exact.
        differences.check("generate, int8 cache, first step", steps[i, :1], case.expected(row)[-1:])
        whole = torch.cat((row, output.sequences[i, -12:]))[:-1]
        right = case.expected(whole, prefill=len(row))[len(row) - 1 :]
        assert int8_error(steps[i], right) < INT8
        for wrong in {12, 20, 33} - {len(row)}:
            other = case.expected(whole, prefill=wrong)[len(row) - 1 :]
            assert int8_error(steps[i], other) > INT8


def test_a_cache_given_to_generate_comes_back_and_goes_on(case: Case, differences: Differences) -> None:
    ids, cache = tokens(1, 20), DynamicCache(config=case.model.config)
    first = generate(case, ids, past_key_values=cache)
    assert first.past_key_values is cache
    longer = torch.cat((first.sequences, tokens(1, 5, seed=4)), 1)
    second = generate(case, longer, past_key_values=cache)
    assert second.past_key_values is cache
    check_rows(differences, "second turn on the cache of the first", case, second, [longer[0]], [20])


def test_an_int8_cache_goes_in_and_comes_back(case: Case) -> None:
    ids = tokens(1, 20)
    quantized = qquant.enable_kv_quant(Case(case.folder).model)
    cache = Int8KVCache(quantized.config)
    with torch.no_grad():
        first = quantized(ids, past_key_values=cache, use_cache=True)
        second = quantized(tokens(1, 1, seed=4), past_key_values=first.past_key_values, use_cache=True)
    assert first.past_key_values is second.past_key_values is cache
    assert cache.get_seq_length() == 21
    right, fresh = (case.expected(torch.cat((ids, tokens(1, 1, seed=4)), 1)[0], prefill=n)[-1] for n in (20, 33))
    assert int8_error(second.logits[0, -1], right) < INT8 < int8_error(second.logits[0, -1], fresh)


def test_a_static_cache_may_be_used_again(case: Case, differences: Differences) -> None:
    cache = StaticCache(config=case.model.config, max_cache_len=48)
    for length in (33, 12, 20):
        ids = tokens(1, length, seed=length)
        found = step_by_step(case, ids, [length - 2, length - 1, length], cache)
        differences.check(f"static cache, used again for {length}", found[0], case.expected(ids[0], prefill=length - 2))
        cache.reset()


def test_a_static_cache_used_again_for_one_token_forgets_the_alpha_before(case: Case, differences: Differences) -> None:
    cache = StaticCache(config=case.model.config, max_cache_len=48)
    step_by_step(case, tokens(1, 33), [33], cache)
    cache.reset()
    ids = tokens(1, 10, seed=3)
    found = step_by_step(case, ids, range(1, 11), cache)
    differences.check("static cache, used again from one token", found[0], case.expected(ids[0], prefill=1))


def test_beams_are_scored_as_the_reference_scores_them(case: Case) -> None:
    rows = [tokens(20, seed=1), tokens(12, seed=2)]
    ids, mask = left_padded(*rows)
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "length_penalty": 0.0}
    output = generate(case, ids, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        for beam in range(3):
            answer = output.sequences[3 * i + beam, 20:]
            logits = case.expected(torch.cat((row, answer)), prefill=len(row))[len(row) - 1 : -1]
            score = logits.log_softmax(-1).gather(-1, answer[:, None]).sum()
            # A sum of twelve log probabilities, each within twice the tolerance of a logit.
            assert abs(float(output.sequences_scores[3 * i + beam]) - float(score)) < 24 * 1e-4


def test_rows_of_different_stretch_cannot_be_mixed_up(case: Case) -> None:
    ids, mask = left_padded(tokens(33, seed=1), tokens(20, seed=2))
    cache = DynamicCache(config=case.model.config)
    case.logits(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    cache.batch_select_indices(torch.tensor([1]))
    with pytest.raises(UsageError, match="prefill the rows that go on by themselves"):
        case.logits(tokens(1, 1), past_key_values=cache, use_cache=True)


def test_ids_that_only_pad_the_matrix_are_never_generated(case: Case) -> None:
    mine = Case(case.folder)
    mine.model.used_ids = 5
    output = generate(mine, tokens(2, 10))
    assert int(output.sequences[:, 10:].max()) < 5
    free = generate(case, tokens(2, 10))
    assert int(free.sequences[:, 10:].max()) >= 5


def test_a_prompt_of_embeddings_generates_the_same(case: Case) -> None:
    ids = tokens(1, 20)
    embedded = case.model.get_input_embeddings()(ids).detach()
    by_ids = generate(case, ids).sequences[:, 20:]
    by_embeddings = case.model.generate(inputs_embeds=embedded, **GREEDY).sequences
    assert torch.equal(by_ids, by_embeddings)


def test_sampling_repeats_itself_from_a_seed(case: Case) -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(generate(case, tokens(1, 20), do_sample=True, top_p=0.8).sequences)
    assert torch.equal(*drawn)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [False, True], ids=["one_row", "padded_batch"])
def test_compiled_prefill_and_decode_are_the_eager_ones(tmp_path: Path, padded: bool) -> None:
    case = small(tmp_path, num_hidden_layers=1)
    ids, mask = left_padded(tokens(33, seed=1), tokens(20, seed=2)) if padded else (tokens(1, 33), None)
    compiled: Any = torch.compile(case.model, fullgraph=True, backend="aot_eager", dynamic=False)
    caches = [StaticCache(config=case.model.config, max_cache_len=48) for _ in range(2)]
    for step in range(2):
        part = tokens(len(ids), 1, seed=step) if step else ids
        options: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
        with torch.no_grad():
            found = compiled(part, past_key_values=caches[0], **options).logits
        # The same operations in the same order, but for those that the backend takes apart.
        assert difference(found, case.logits(part, past_key_values=caches[1], **options)) < 1e-5
        if mask is not None:
            mask = torch.cat((mask, torch.ones(len(ids), 1, dtype=torch.long)), 1)
