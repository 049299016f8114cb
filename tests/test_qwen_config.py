"""What a Qwen v1 folder may say in config.json, and what the model takes as masks and positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from qquant.errors import BadModelError, UsageError
from qquant.model_folder import read_config
from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.modeling import QWenLMHeadModel
from qquant.models.qwen.positions import from_mask
from tests.make_qwen_v1 import make_qwen_v1

REFUSED: dict[str, Any] = {
    "layer_norm_epsilon": ["1e-6", None, 0, float("inf")],
    "rotary_emb_base": [float("inf"), 0, "10000"],
    "rotary_pct": [float("nan"), 0, 2],
    "emb_dropout_prob": [2, -1],
    "attn_dropout_prob": [1.0, float("nan")],
    "initializer_range": [-1],
    "seq_length": ["16", None, 0],
    "max_position_embeddings": ["16"],
    "intermediate_size": [None, 0, 95],
    "num_hidden_layers": [0],
    "num_attention_heads": [0],
    "vocab_size": [-1],
    "use_dynamic_ntk": ["yes", None],
    "bf16": ["yes"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in REFUSED.items() for value in values])
def test_a_field_that_makes_no_sense_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises((BadModelError, StrictDataclassError), match=field):
        QWenConfig(**{field: value})
    folder = make_qwen_v1(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(BadModelError, match=field):
        read_config(folder)


def test_the_names_of_the_first_release_are_taken() -> None:
    first = {
        "n_embd": 64,
        "n_head": 2,
        "n_layer": 5,
        "ffn_hidden_size": 96,
        "n_positions": 99,
        "padded_vocab_size": 300,
        "embd_pdrop": 0.25,
        "attn_pdrop": 0.5,
        "resid_pdrop": 0.1,
    }
    config = QWenConfig.from_dict({**first, "kv_channels": 32, "vocab_size": 290})
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (64, 2, 5)
    assert (config.intermediate_size, config.max_position_embeddings, config.vocab_size) == (96, 99, 300)
    assert (config.emb_dropout_prob, config.attn_dropout_prob) == (0.25, 0.5)


def test_a_folder_that_names_no_tokenizer_class_still_has_this_one() -> None:
    assert QWenConfig(tokenizer_class=None).tokenizer_class == "QWenTokenizer"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return QWenLMHeadModel.from_pretrained(make_qwen_v1(tmp_path_factory.mktemp("qwen"), num_hidden_layers=1))


@torch.inference_mode()
def test_positions_without_a_batch_serve_every_row(model: Any) -> None:
    ids, positions = torch.arange(20).reshape(2, 10), torch.arange(3, 13)
    assert torch.equal(model(ids, position_ids=positions).logits, model(ids, position_ids=positions[None]).logits)


@pytest.mark.parametrize("kept", [True, 2, 1.0], ids=["bool", "two", "float"])
@torch.inference_mode()
def test_any_mask_that_is_not_zero_keeps_a_token(model: Any, kept: Any) -> None:
    ids = torch.arange(40)[None] + 5
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[:, :4] = 0
    other = mask * kept
    expected = model(ids, attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(model(ids, attention_mask=other).logits[:, 4:], expected, atol=0, rtol=0)


def test_a_folder_cannot_bring_its_own_generate(tmp_path: Path) -> None:
    folder = make_qwen_v1(tmp_path / "model", num_hidden_layers=1)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text('raise AssertionError("remote code was run")\n')
    model: Any = QWenLMHeadModel.from_pretrained(folder, trust_remote_code=True)
    assert model.generate.__func__ is QWenLMHeadModel.generate


def test_a_precision_asked_for_takes_the_place_of_the_files(tmp_path: Path) -> None:
    folder = make_qwen_v1(tmp_path / "model", num_hidden_layers=1, fp16=True)
    assert QWenLMHeadModel.from_pretrained(folder).dtype == torch.float16
    assert QWenLMHeadModel.from_pretrained(folder, bf16=True).dtype == torch.bfloat16


def test_continuous_batching_is_right_up_to_seq_length_and_refused_beyond(model: Any) -> None:
    ids = torch.arange(24)[None] + 5
    lengths = [10, 14]  # of two sequences in one row
    marks = torch.tensor([0, 10, 24])
    same = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool()[None, None]
    packed: dict[str, Any] = {"cu_seq_lens_q": marks, "cu_seq_lens_k": marks, "max_length_q": 14, "use_cache": False}
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.inference_mode():
        alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], 1)
        found = model(ids, attention_mask=same, position_ids=positions, max_length_k=14, **packed).logits
        # float32 sums of a row of 24 keys, most of them masked, in another order; the logits are of size 1.
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
        with pytest.raises(UsageError, match="got 17"):
            model(ids, attention_mask=same, position_ids=positions, max_length_k={"full_attention": 17}, **packed)


def test_a_hole_in_the_mask_moves_no_position() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    assert from_mask(mask, 7).tolist() == [[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]
    assert from_mask(mask, 2).tolist() == [[3, 4], [5, 6]]
