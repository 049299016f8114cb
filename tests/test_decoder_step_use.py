"""Models with the decoder step through what else is done with models: copies, files, compiling, caches, generation.

Each is compared with the same weights without the step, bit for bit. The step itself is in test_decoder_step.py.
"""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import qquant
from qquant import plain_attention
from qquant.decoder_step import step_of, use_decoder_step
from qquant.layer_ops import kernels_are_live
from qquant.linear import QuantLinear
from qquant.model_kernels import attach_kernels
from tests.test_decoder_step import continued, counted, layers_of, make, plain, prompted, same, tokens

pytestmark = pytest.mark.skipif(not kernels_are_live(), reason="qquant._C is not built")

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def ready() -> Any:
    """A model that no test changes."""
    return make()


@pytest.fixture(scope="module")
def without(ready: Any) -> Any:
    """The same weights without the step; no test changes it either."""
    return plain(ready)


def generated(model: Any, batch: int = 2, **options: Any) -> list[Tensor]:
    mask = torch.ones(batch, 5, dtype=torch.long)
    mask[0, :2] = int(batch == 1)
    given = {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True}
    found = model.generate(tokens(batch, 5), **given | GREEDY | options)
    return [found.sequences, *found.logits]


def assert_copy(twin: Any, model: Any, theirs: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy's step is the copy's own, steps aside until kernels are attached, and is right before and after."""
    for layer, original in zip(layers_of(twin), layers_of(model), strict=True):
        step = step_of(layer)
        assert step is not None
        assert step.layer is layer
        assert not set(layer.modules()) & set(original.modules())
    calls = counted(twin, monkeypatch)
    assert same(continued(twin, prompted(twin), 3), theirs)
    assert not calls
    attach_kernels(twin)
    calls.clear()
    assert same(continued(twin, prompted(twin), 3), theirs)
    assert len(calls) == 3 * len(layers_of(twin))


def test_a_deep_copy_has_a_step_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    theirs = continued(model, prompted(model), 3)
    twin = copy.deepcopy(model)
    assert_copy(twin, model, theirs, monkeypatch)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.get_parameter("input_layernorm.weight").zero_()
    assert same(continued(twin, prompted(twin), 3), theirs)


def test_hooks_on_a_part_of_a_copy_are_called() -> None:
    twin: Any = copy.deepcopy(make())
    calls: list[int] = []
    attach_kernels(twin)
    cache = prompted(twin)
    part: Any = layers_of(twin)[0].get_submodule("mlp.down_proj")
    own = part.forward

    def forward(x: Tensor) -> Tensor:
        calls.append(1)
        found: Tensor = own(x)
        return found

    part.forward = forward
    continued(twin, cache, 1)
    assert calls == [1]


def test_a_whole_model_goes_through_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = make(), io.BytesIO()
    theirs = continued(model, prompted(model), 3)
    torch.save(model, file)
    file.seek(0)
    assert_copy(torch.load(file, weights_only=False), model, theirs, monkeypatch)


def test_a_state_dict_goes_into_another_model(ready: Any, without: Any) -> None:
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(ready.state_dict())
    assert same(*(continued(one, prompted(one), 2) for one in (other, without)))


def test_norms_whose_weight_is_replaced_are_used(ready: Any) -> None:
    model = copy.deepcopy(ready)
    attach_kernels(model)
    continued(model, prompted(model), 1)
    norm: Any = layers_of(model)[0].get_submodule("post_attention_layernorm")
    norm.weight = nn.Parameter(norm.weight.detach() * 2)
    assert same(*(continued(one, prompted(one), 2) for one in (model, plain(model))))


def test_a_changed_eps_and_a_changed_scaling_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make()
    model.model.layers[0].input_layernorm.eps = 0.5
    calls = counted(model, monkeypatch)
    assert same(continued(model, prompted(model), 2), continued(plain(model), prompted(plain(model)), 2))
    assert len(calls) == 2 * len(layers_of(model))
    calls.clear()
    model.model.layers[0].self_attn.scaling = 3.0
    assert same(continued(model, prompted(model), 2), continued(plain(model), prompted(plain(model)), 2))
    assert len(calls) == 2 * (len(layers_of(model)) - 1)


def test_what_is_saved_is_what_it_is_without_the_step(ready: Any, without: Any, tmp_path: Path) -> None:
    for name, model in (("with", ready), ("without", without)):
        model.save_pretrained(tmp_path / name)
    files = [
        sorted((path.name, path.read_bytes()) for path in (tmp_path / name).iterdir()) for name in ("with", "without")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_gives_the_same(
    ready: Any, without: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = continued(without, prompted(without), 1)
    cache = prompted(ready)
    calls = counted(ready, monkeypatch)
    torch._dynamo.reset()
    compiled = torch.compile(ready, backend=backend)
    assert same(continued(compiled, cache, 1), theirs)
    torch._dynamo.reset()
    assert not calls


def test_a_layer_is_exported_without_the_step(ready: Any) -> None:
    layer: Any = layers_of(ready)[0]
    x, position = torch.randn(1, 1, 128).bfloat16(), torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        options = {"position_embeddings": ready.model.rotary_emb(x, position)}
        program = torch.export.export(layer, (x,), options, strict=False)
        assert "layer_output" not in str(program.graph)
        assert torch.equal(program.module()(x, **options), layer(x, **options))


def test_more_than_one_thread_gives_the_same(two_threads: None) -> None:
    with torch.random.fork_rng(devices=[]):
        model = make(sizes={"hidden_size": 512, "intermediate_size": 2048})
    wide, theirs = continued(model, prompted(model, 8), 3, 8), continued(plain(model), prompted(plain(model), 8), 3, 8)
    assert same(wide, theirs)
    torch.set_num_threads(1)
    assert same(wide, continued(model, prompted(model, 8), 3, 8))


@pytest.mark.parametrize(
    "mode", [(torch.no_grad, torch.inference_mode), (torch.inference_mode, torch.no_grad)], ids=["into", "out_of"]
)
def test_a_cache_goes_between_modes(ready: Any, without: Any, mode: tuple[Callable[[], Any], ...]) -> None:
    found = []
    for model in (ready, without):
        cache = DynamicCache(config=model.config)
        logits = []
        for step, context in enumerate((mode[0], mode[0], mode[1], mode[1], mode[0])):
            with context():
                logits.append(model(input_ids=tokens(1, 5 if step == 0 else 1), past_key_values=cache).logits)
        found.append(logits)
    assert same(*found)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"batch": 1, "prompt_lookup_num_tokens": 2, "max_new_tokens": 12},
        {"num_return_sequences": 3, "do_sample": True},
        {"use_cache": False},
        {"output_hidden_states": True, "output_attentions": False},
        {"num_beams": 2, "batch": 3},
    ],
    ids=["beams", "static_cache", "prompt_lookup", "several_samples", "no_cache", "hidden_states", "more_beams"],
)
@pytest.mark.filterwarnings("ignore:.*sliding.*")
def test_generation_gives_the_same(ready: Any, without: Any, options: dict[str, Any]) -> None:
    found = []
    for model in (ready, without):
        torch.manual_seed(0)
        found.append(generated(model, **options))
    assert same(*found)


def test_assisted_generation_gives_the_same(ready: Any, without: Any) -> None:
    assistant = make("llama")
    options = {"batch": 1, "max_new_tokens": 10, "num_assistant_tokens": 3}
    assert same(
        *(
            generated(one, assistant_model=other, **options)
            for one, other in ((ready, assistant), (without, plain(assistant)))
        )
    )


def test_an_int8_cache_gives_the_same_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    other = plain(model)
    calls = counted(model, monkeypatch)
    for change in (qquant.enable_kv_quant, qquant.disable_kv_quant):
        for one in (model, other):
            change(one)
        assert same(generated(model), generated(other))
        assert len(calls) == (GREEDY["max_new_tokens"] - 1) * len(layers_of(model))
        calls.clear()


def test_a_batch_is_repeated_and_chosen_from(ready: Any, without: Any) -> None:
    found = []
    for model in (ready, without):
        cache: Any = prompted(model, 2)
        logits = continued(model, cache, 2, 2)
        cache.batch_repeat_interleave(2)
        logits += continued(model, cache, 2, 4)
        cache.batch_select_indices(torch.tensor([3, 0]))
        logits += continued(model, cache, 2, 2)
        cache.reorder_cache(torch.tensor([1, 1]))
        found.append(logits + continued(model, cache, 2, 2))
    assert same(*found)


def test_a_cache_that_is_emptied_begins_anew(ready: Any, without: Any) -> None:
    found = []
    for model in (ready, without):
        cache = prompted(model)
        logits = continued(model, cache, 3)
        cache.reset()
        found.append(logits + continued(model, cache, 3))
    assert same(*found)


def test_a_cache_in_float32_fails_as_without_the_step(ready: Any, without: Any) -> None:
    said = []
    for model in (ready, without):
        cache: Any = prompted(model)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.float(), layer.values.float()
        with pytest.raises(RuntimeError) as caught:
            continued(model, cache, 1)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_model_cast_after_loading_gives_the_same(ready: Any) -> None:
    model = copy.deepcopy(ready)
    attach_kernels(model)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        assert same(*(continued(one, prompted(one), 2) for one in (model, plain(model))))


def test_attentions_are_given_out(ready: Any, without: Any) -> None:
    with torch.no_grad():
        found = [model(input_ids=tokens(1, 1), output_attentions=True).attentions for model in (ready, without)]
    assert len(found[0]) == len(found[1])


@pytest.mark.skipif(not plain_attention.kernel_is_live(), reason="no attention kernel for this processor")
def test_a_cache_does_not_grow_when_a_step_fails(ready: Any, without: Any) -> None:
    cache = prompted(ready)
    layer: Any = layers_of(ready)[0]
    held: Any = cache.layers[0]
    x, position = torch.randn(1, 1, 128).bfloat16(), torch.full((1, 1), 5)
    with torch.no_grad():
        options = {"position_embeddings": ready.model.rotary_emb(x, position), "past_key_values": cache}
        bad = torch.ones(1, 3, 1, 6, dtype=torch.bool)  # there are 4 heads
        with pytest.raises(RuntimeError, match="mask must be"):
            layer(x, attention_mask=bad, **options)
        assert held.keys.shape[2] == held.values.shape[2] == 5
    assert same(continued(ready, cache, 2), continued(without, prompted(without), 2))


def test_a_forward_set_on_a_part_is_called_and_may_be_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = make(), []
    theirs = continued(model, prompted(model), 2)
    calls = counted(model, monkeypatch)
    part: Any = layers_of(model)[1].get_submodule("mlp.gate_proj")

    def hooked(original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        seen.append(x.shape)
        return original(x)

    part.forward = functools.partial(hooked, part.forward)
    assert same(continued(model, prompted(model), 2), theirs)
    assert len(seen) == 3
    assert len(calls) == 2 * (len(layers_of(model)) - 1)
    del part.forward
    calls.clear()
    assert same(continued(model, prompted(model), 2), theirs)
    assert len(calls) == 2 * len(layers_of(model))


def test_accelerates_hooks_on_a_layer_keep_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = make()
    theirs = continued(model, prompted(model), 2)
    for layer in layers_of(model):
        hooks.add_hook_to_module(layer, hooks.ModelHook())
    calls = counted(model, monkeypatch)
    assert same(continued(model, prompted(model), 2), theirs)
    assert len(calls) == 2 * len(layers_of(model))
    hooks.remove_hook_from_module(model, recurse=True)
    assert all(step_of(layer) is not None for layer in layers_of(model))


class Wrapped(nn.Module):
    """As an adapter wraps a linear."""

    def __init__(self, base: QuantLinear) -> None:
        super().__init__()
        self.base, self.low = base, nn.Linear(base.in_features, base.out_features, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.base(x) + self.low(x)
        return found


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"])
def test_an_adapter_around_a_linear_counts_and_may_be_taken_off(name: str) -> None:
    model = make()
    theirs = continued(model, prompted(model), 2)
    parent, _, leaf = name.rpartition(".")
    part: Any = layers_of(model)[0].get_submodule(parent)
    base = getattr(part, leaf)
    setattr(part, leaf, Wrapped(base))
    ours = continued(model, prompted(model), 2)
    assert not same(ours, theirs)
    assert same(ours, continued(plain(model), prompted(plain(model)), 2))
    setattr(part, leaf, base)
    assert same(continued(model, prompted(model), 2), theirs)


@pytest.mark.parametrize("kernel", ["reference", "torch"])
def test_linears_of_other_kernels_have_no_step(ready: Any, kernel: str) -> None:
    if kernel == "torch" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("torch's int4 kernel is chosen on AVX-512 only")
    model = copy.deepcopy(ready)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.kernel = kernel
    assert not any("decoder layers" in line for line in use_decoder_step(model))
    assert not any("forward" in vars(layer) for layer in layers_of(model))
