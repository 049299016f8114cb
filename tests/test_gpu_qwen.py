"""The native Qwen v1 model on a GPU: against the same weights on the CPU, in every attention, with the int8 cache.

Skipped without a GPU; tests/test_qwen_model.py holds the CPU against the slow reference.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import qquant
from qquant.kv_cache_quant import Int8KVCache
from qquant.models.qwen.configuration import QWenConfig
from qquant.models.qwen.modeling import QWenLMHeadModel
from tests.qwen_cases import INT8, int8_error

pytestmark = pytest.mark.gpu

SEQ_LENGTH = 64
ORDER = 2 * 19 * 512**0.5 * 2.0**-24
"""What two float32 evaluations may differ by, as a share of the logits' spread; TF32 is off by default.

A sum of n terms, in whatever order, is off by about n^0.5 roundings of its size, 2^-24 each. 19 sums of at most 512
terms follow one another: queries and keys, scores, values, c_proj, w1 and c_proj again in three blocks, and the head.
Here as if all erred in one direction, and the other evaluation in the other; a CPU sees a twentieth. Scores of these
small weights are far below 1, so that softmax adds nothing.
"""


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


def assert_same_but_for_order(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=ORDER * float(expected.std()), rtol=0)


@pytest.mark.parametrize("length", [SEQ_LENGTH // 2, 3 * SEQ_LENGTH])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.inference_mode()
def test_logits_are_those_of_the_cpu(cpu_model: Any, length: int, attention: str) -> None:
    model = copy.deepcopy(cpu_model).cuda()
    model.set_attn_implementation(attention)
    expected = cpu_model(prompt(length)).logits
    assert_same_but_for_order(model(prompt(length).cuda()).logits.cpu(), expected)


@torch.inference_mode()
def test_left_padded_rows_give_what_they_give_alone(cpu_model: Any) -> None:
    model = copy.deepcopy(cpu_model).cuda()
    rows = [prompt(length)[0] for length in (20, 3 * SEQ_LENGTH)]
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat((row.new_zeros(width - len(row)), row)) for row in rows]).cuda()
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long().cuda()
    together = model(ids, attention_mask=mask).logits[:, -1]
    alone = torch.cat([model(row[None].cuda()).logits[:, -1] for row in rows])
    assert_same_but_for_order(together, alone)


@torch.inference_mode()
def test_the_int8_cache_and_its_kernel_run_on_it(cpu_model: Any) -> None:
    model = copy.deepcopy(cpu_model).to("cuda", torch.bfloat16)
    found = []
    for kernel in (True, False):
        qquant.enable_kv_quant(model, use_cache_kernel=kernel)
        options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
        output = model.generate(prompt(100).cuda(), max_new_tokens=16, do_sample=False, **options)
        assert isinstance(output.past_key_values, Int8KVCache)
        found.append(output.logits)
    assert len(found[0]) == len(found[1]) == 16
    # The prompt is exact; the token after it is the first that is attended in 8 bits, by two computations.
    assert torch.equal(found[0][0], found[1][0])
    assert int8_error(found[0][1], found[1][1]) < INT8


@torch.inference_mode()
def test_decoding_by_the_kernel_is_decoding_by_plain_torch(cpu_model: Any) -> None:
    model = copy.deepcopy(cpu_model)
    # One block: in a second one, keys that differ by a rounding may land on neighbouring codes.
    model.transformer.h = model.transformer.h[:1]
    model.config.num_hidden_layers = 1
    qquant.enable_kv_quant(model.cuda())
    ids, steps = prompt(116).cuda(), []
    for kernel in (True, False):
        cache = Int8KVCache(model.config, use_cache_kernel=kernel)
        parts = [ids[:, :100], *ids[:, 100:].split(1, 1)]
        steps.append(torch.cat([model(part, past_key_values=cache).logits[:, -1] for part in parts]))
    assert torch.equal(steps[0][0], steps[1][0])  # the prompt's
    assert_same_but_for_order(*steps)  # tests/test_gpu_kv.py: the kernel is exact to float32


@torch.inference_mode()
def test_a_compiled_step_gives_the_same(cpu_model: Any) -> None:
    model = copy.deepcopy(cpu_model).cuda()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt(100).cuda(), **options)
    assert torch.equal(model.generate(prompt(100).cuda(), cache_implementation="static", **options), expected)
