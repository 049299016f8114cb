"""The native Qwen v1 model against the slow reference, one call at a time: logits, states, padding, positions, losses.

Calls that go on from a cache, and generation, are test_qwen_cache.py; files are test_qwen_checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qquant.errors import UsageError
from qquant.models.qwen.modeling import QWenLMHeadModel
from tests.qwen_cases import (
    CLOSE,
    DIFFERENT,
    LENGTHS,
    SEQ_LENGTH,
    Case,
    Differences,
    collect,
    difference,
    left_padded,
    small,
    tokens,
)
from tests.qwen_reference import bfloat16, forward

VARIANTS: dict[str, dict[str, Any]] = {
    "ntk_and_logn": {},
    "ntk": {"use_logn_attn": False},
    "logn": {"use_dynamic_ntk": False},
    "neither": {"use_dynamic_ntk": False, "use_logn_attn": False},
    "half_rotary": {"rotary_pct": 0.5},
    "large_base": {"rotary_emb_base": 1000000},
    "biases": {"no_bias": False},
    "wider_epsilon": {"layer_norm_epsilon": 0.1},
}


@pytest.fixture(scope="module")
def differences(request: pytest.FixtureRequest) -> Iterator[Differences]:
    """Prints what the tests of this file saw."""
    yield from collect(request, "Qwen v1, model")


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Case]:
    """A checkpoint per variant."""
    name: str = request.param
    return name, small(tmp_path_factory.mktemp(name), **VARIANTS[name])


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A checkpoint with both; its model is left as it was."""
    return small(tmp_path_factory.mktemp("qwen"))


@pytest.mark.parametrize("length", LENGTHS)
def test_logits_are_the_references(variant: tuple[str, Case], length: int, differences: Differences) -> None:
    name, case = variant
    ids = tokens(1, length)
    differences.check(f"logits, {name}, 8 to 70 tokens", case.logits(ids)[0], case.expected(ids[0]))


def test_the_reference_notices_what_it_is_there_for(case: Case) -> None:
    ids = tokens(33)
    expected = case.expected(ids)
    for field in ("use_dynamic_ntk", "use_logn_attn"):
        other = torch.from_numpy(forward(case.tensors, case.settings | {field: False}, ids.tolist())[0])
        assert difference(other, expected) > DIFFERENT
    assert difference(case.expected(ids, prefill=SEQ_LENGTH), expected) > DIFFERENT
    assert difference(case.expected(ids, positions=range(1, 34)), expected) > DIFFERENT


def test_eager_is_sdpa_and_gives_its_weights(case: Case, differences: Differences) -> None:
    eager = Case(case.folder, attn_implementation="eager")
    ids, mask = left_padded(tokens(9, seed=1), tokens(33, seed=2))
    found = eager.model(ids, attention_mask=mask, output_attentions=True)
    for row, start in enumerate((24, 0)):
        differences.check(f"logits, eager, row {row}", found.logits[row, start:], case.expected(ids[row, start:]))
    assert len(found.attentions) == 3
    weights = found.attentions[0][1]
    assert weights.shape == (2, 33, 33)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 33))
    assert not weights.triu(1).any()


def test_hidden_states_are_the_references(case: Case, differences: Differences) -> None:
    ids = tokens(1, 33)
    found = case.model(ids, output_hidden_states=True).hidden_states
    _, expected = forward(case.tensors, case.settings, ids[0].tolist())
    assert len(found) == len(expected) == case.settings["num_hidden_layers"] + 1
    names = ["embedding", "after block 0", "after block 1", "after ln_f"]
    for name, ours, theirs in zip(names, found, expected, strict=True):
        differences.check(f"hidden states, {name}", ours[0].detach(), theirs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_padded_batch_is_itself_alone(case: Case, side: str, differences: Differences) -> None:
    rows = [tokens(length, seed=length) for length in (33, 20, 16, 5)]  # alpha 7, 3, 1, 1
    ids, mask = left_padded(*rows)
    if side == "right":
        ids, mask = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7), mask.flip(1)
    found = case.logits(ids, attention_mask=mask)
    for i, row in enumerate(rows):
        differences.check(f"logits, {side}-padded, {len(row)} of 33", found[i][mask[i].bool()], case.expected(row))


def test_what_stands_in_the_padding_changes_nothing(case: Case) -> None:
    ids, mask = left_padded(tokens(20, seed=1), tokens(33, seed=2))
    other = torch.where(mask.bool(), ids, 99)
    kept = mask.bool()
    assert torch.equal(case.logits(ids, attention_mask=mask)[kept], case.logits(other, attention_mask=mask)[kept])
    assert (
        difference(case.logits(ids, attention_mask=mask.bool())[kept], case.logits(ids, attention_mask=mask)[kept]) == 0
    )


def test_a_padded_single_row_is_itself_without_padding(case: Case, differences: Differences) -> None:
    ids = tokens(20)
    padded = torch.cat((torch.full((13,), 7), ids))[None]
    mask = torch.cat((torch.zeros(13), torch.ones(20))).long()[None]
    found = case.logits(padded, attention_mask=mask)[0, 13:]
    differences.check("logits, one row with 13 of padding", found, case.expected(ids))


def test_positions_that_are_given_are_honoured(case: Case, differences: Differences) -> None:
    ids, where = tokens(1, 24), torch.arange(3, 27)[None]
    found = case.logits(ids, position_ids=where)[0]
    differences.check("logits, position_ids given", found, case.expected(ids[0], positions=where[0].tolist()))


def test_no_token_sees_a_later_one(case: Case) -> None:
    ids = tokens(2, 33)
    changed = ids.clone()
    changed[:, 20:] = tokens(2, 13, seed=5)
    torch.testing.assert_close(case.logits(ids)[:, :20], case.logits(changed)[:, :20], rtol=0, atol=CLOSE)


def test_a_mask_that_was_prepared_is_taken_as_it_is(case: Case, differences: Differences) -> None:
    ids = tokens(1, 33)
    seen = torch.ones(33, 33).tril().bool()[None, None]
    found = case.logits(ids, attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min))
    differences.check("logits, prepared mask", found[0], case.expected(ids[0]))


def test_embeddings_stand_in_for_ids(case: Case, differences: Differences) -> None:
    ids = tokens(1, 20)
    embedded = case.model.get_input_embeddings()(ids).detach()
    assert torch.equal(case.logits(ids), case.model(inputs_embeds=embedded).logits.detach())
    given = torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(3))
    expected, _ = forward(case.tensors, case.settings, [], embeddings=given[0].double().numpy())
    differences.check("logits, inputs_embeds", case.model(inputs_embeds=given).logits[0].detach(), expected)


@pytest.mark.parametrize("both", [False, True], ids=["neither", "both"])
def test_ids_or_embeddings_must_be_given(case: Case, both: bool) -> None:
    inputs = {"input_ids": tokens(1, 4), "inputs_embeds": torch.zeros(1, 4, 32)} if both else {}
    with pytest.raises(UsageError, match="input_ids or inputs_embeds, exactly one"):
        case.model(**inputs)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 5])], ids=["last", "last_three", "chosen"])
def test_logits_are_made_of_the_tokens_kept(case: Case, keep: int | Tensor) -> None:
    ids = tokens(2, 8)
    whole = case.logits(ids)
    expected = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
    torch.testing.assert_close(case.logits(ids, logits_to_keep=keep), expected, rtol=0, atol=1e-5)


def test_loss_is_that_of_the_next_token(case: Case, differences: Differences) -> None:
    ids = tokens(1, 20)
    labels = ids.clone()
    labels[:, :5] = -100
    loss = case.model(ids, labels=labels).loss.detach()
    expected = nn.functional.cross_entropy(case.expected(ids[0])[4:-1], ids[0, 5:])
    differences.check("loss", loss, expected)


def test_training_has_neither_ntk_nor_logn(case: Case, differences: Differences) -> None:
    ids = tokens(1, 40)
    model = Case(case.folder).model.train()
    found = model(ids).logits[0].detach()
    differences.check("logits, training", found, case.expected(ids[0], training=True))
    assert difference(case.logits(ids)[0], found) > DIFFERENT


def test_gradients_are_the_same_with_checkpointing(case: Case) -> None:
    ids = tokens(2, 24)
    ordinary, saving = Case(case.folder).model.train(), Case(case.folder).model.train()
    saving.activation_checkpointing_enable()
    for model in (ordinary, saving):
        model(ids, labels=ids).loss.backward()
    gradients = dict(saving.named_parameters())
    for name, parameter in ordinary.named_parameters():
        assert parameter.grad.abs().max() > 0
        torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("length", LENGTHS)
def test_bfloat16_loses_no_more_than_a_plain_computation(
    length: int, tmp_path_factory: pytest.TempPathFactory, differences: Differences
) -> None:
    case = small(tmp_path_factory.mktemp("bf16"), dtype=torch.bfloat16)  # the reference reads the rounded weights
    model = QWenLMHeadModel.from_pretrained(case.folder, dtype=torch.bfloat16)
    ids = tokens(1, length)
    found = model(ids).logits[0].detach()
    assert found.dtype == torch.bfloat16
    # The plain computation rounds after every operation. Two such computations round differently, hence the factor.
    plain = difference(case.expected(ids[0], cast=bfloat16), case.expected(ids[0]))
    differences.check(f"logits, bfloat16, {length} tokens", found, case.expected(ids[0]), 2 * plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "half"])
def test_casting_a_model_keeps_its_angles_in_float32(case: Case, dtype: torch.dtype) -> None:
    ids = tokens(1, SEQ_LENGTH)
    cast, loaded = Case(case.folder).model.to(dtype), Case(case.folder, dtype=dtype).model
    assert difference(cast(ids).logits, loaded(ids).logits) == 0


def test_meta_tensors_go_through(case: Case) -> None:
    with torch.device("meta"):
        model: Any = QWenLMHeadModel(case.model.config)
        assert model.eval()(torch.zeros(2, 40, dtype=torch.long)).logits.shape == (2, 40, 512)
