"""The native Qwen v1 model on a GPU: against the same weights on the CPU, in every attention, with the int8 cache.

Skipped without a GPU; tests/test_qwen_model.py holds the CPU against the slow reference.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import qquant
from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.modeling import QWenLMHeadModel

pytestmark = pytest.mark.gpu

SEQ_LENGTH = 64


@pytest.fixture(scope="module")
def cpu_model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 2, "num_hidden_layers": 3}
    config = QWenConfig(vocab_size=500, intermediate_size=1024, seq_length=SEQ_LENGTH, **sizes)
    model: Any = QWenLMHeadModel(config)
    model.eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model


def prompt(length: int) -> torch.Tensor:
    return torch.randint(500, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [SEQ_LENGTH // 2, 3 * SEQ_LENGTH])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.inference_mode()
def test_logits_are_those_of_the_cpu(cpu_model: Any, length: int, attention: str) -> None:
    model = copy.deepcopy(cpu_model).cuda()
    model.set_attn_implementation(attention)
    expected = cpu_model(prompt(length)).logits
    # TF32 is off by default: float32 sums in another order, as between any two machines.
    torch.testing.assert_close(model(prompt(length).cuda()).logits.cpu(), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_left_padded_rows_give_what_they_give_alone(cpu_model: Any) -> None:
    model = copy.deepcopy(cpu_model).cuda()
    rows = [prompt(length)[0] for length in (20, 3 * SEQ_LENGTH)]
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat((row.new_zeros(width - len(row)), row)) for row in rows]).cuda()
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long().cuda()
    together = model(ids, attention_mask=mask).logits[:, -1]
    alone = torch.cat([model(row[None].cuda()).logits[:, -1] for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_the_int8_cache_and_its_kernel_run_on_it(cpu_model: Any) -> None:
    model = copy.deepcopy(cpu_model).to("cuda", torch.bfloat16)
    texts = []
    for kernel in (True, False):
        qquant.enable_kv_quant(model, use_cache_kernel=kernel)
        output = model.generate(prompt(100).cuda(), max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
        assert type(output.past_key_values).__name__ == "Int8KVCache"
        texts.append(output.sequences)
    assert texts[0].shape == texts[1].shape


@torch.inference_mode()
def test_a_compiled_step_gives_the_same(cpu_model: Any) -> None:
    model = copy.deepcopy(cpu_model).cuda()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt(100).cuda(), **options)
    assert torch.equal(model.generate(prompt(100).cuda(), cache_implementation="static", **options), expected)
