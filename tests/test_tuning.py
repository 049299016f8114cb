"""Tuned scales must be storable, never worse on samples that were held out, and the same every time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qquant
from qquant import memory_room
from qquant.activations import Activations
from qquant.calibrate import Sample, samples_from_ids
from qquant.capture import capture
from qquant.config import QuantizeConfig
from qquant.errors import StoppedError
from qquant.hooks import first_output
from qquant.models.layouts import linears
from qquant.quantizing import quantize_checkpoint
from qquant.shards import SINGLE_NAME
from qquant.solver import Solution, solve
from qquant.sources import LoadedModel
from qquant.tuning import HELD_OUT, RATE, Lesson, Lessons, tuned_scales
from qquant.unfinished import UnfinishedRun
from tests.block_reference import tune_slowly
from tests.conftest import VOCAB, Factory

Case = tuple[Any, dict[str, Solution], list[Lesson]]


def some_samples(count: int = 9, length: int = 16, seed: int = 3) -> list[Sample]:
    return samples_from_ids(torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed)))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


@torch.no_grad()
def rounded_block(
    folder: Path, count: int = 9, length: int = 16, dtype: torch.dtype = torch.float32, **options: Any
) -> Case:
    """The first block with all weights rounded to 4 bits, their solutions, and what should leave it."""
    model = load(folder, dtype)
    source = LoadedModel(model)
    stream = capture(source, some_samples(count, length), "cpu")
    block = source.load(0)
    lessons = []
    for hidden, call in zip(stream.hidden, stream.calls, strict=True):
        lessons.append(Lesson(hidden, call[0], first_output(block(hidden, **call[0])), None))
    config = QuantizeConfig.from_dict({"method": "rtn", "group_size": 32, **options})
    solved = {name: solve(layer.weight, None, config) for name, layer in linears(block).items()}
    for name, solution in solved.items():
        put(block, name, solution)
    return block, solved, lessons


def put(block: Any, name: str, solution: Solution) -> None:
    layer = block.get_submodule(name)
    layer.weight = nn.Parameter(solution.weight().to(layer.weight.dtype), requires_grad=False)


@torch.no_grad()
def error(block: Any, lessons: list[Lesson]) -> float:
    return sum(float(one.error(first_output(block(one.hidden, **one.call)))) for one in lessons)


class Mlp(nn.Module):
    """A block of two linears in float64 that takes an argument and returns a tuple, as some decoder layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (
            nn.Linear(*shape, dtype=torch.float64).requires_grad_(False) for shape in ((8, 12), (12, 8))
        )

    def forward(self, hidden: Tensor, share: float) -> tuple[Tensor, None]:
        return hidden + share * self.down(self.up(hidden).tanh()), None


@torch.no_grad()
def mlp_case(
    count: int = 9, length: int = 10, *, masked: bool = False, felt: bool = False, halved: bool = False
) -> Case:
    """Columns of a group lie apart and some scales are negative; everything is float64 as ``g_idx`` is in no order."""
    random = torch.Generator().manual_seed(count)
    block, solved = Mlp(), {}
    for name, layer in linears(block).items():
        rows, columns = layer.weight.shape
        layer.weight.copy_(torch.randn(rows, columns, generator=random, dtype=torch.float64))
        layer.bias.copy_(torch.randn(rows, generator=random, dtype=torch.float64))
        g_idx = torch.arange(columns)[torch.randperm(columns, generator=random)] % (columns // 4)
        scales = (torch.rand(rows, columns // 4, generator=random) * 0.2 + 0.3).half()
        scales[torch.rand(scales.shape, generator=random) < 0.5] *= -1
        zeros = torch.randint(6, 10, scales.shape, generator=random).double()
        codes = (layer.weight / scales[:, g_idx] + zeros[:, g_idx]).round().clamp(0, 15)
        if halved:  # what is best lies farther away than a scale may go
            scales /= 2
            scales[0, 0] = 2.0**-24  # the smallest float16
        solved[name] = Solution(codes.to(torch.uint8), scales.double(), zeros, g_idx.int(), 0.01, 0, 0)
    blocks = torch.randn(2, 4, 4, generator=random, dtype=torch.float64)
    lessons = []
    for i in range(count):
        hidden = torch.randn(1, length + i, 8, generator=random, dtype=torch.float64)
        wanted = first_output(block(hidden + 0.05 * torch.randn(hidden.shape, generator=random), share=0.5))
        mask = torch.rand(length + i, generator=random) < 0.7 if masked else None
        lessons.append(Lesson(hidden, {"share": 0.5}, wanted, mask, blocks @ blocks.mT if felt else None))
    for name, solution in solved.items():
        put(block, name, solution)
    return block, solved, lessons


TUNINGS: dict[str, tuple[dict[str, Any], int, float]] = {
    "plain": ({}, 6, 0.02),
    "usual rate": ({"count": 16}, 8, RATE),
    "few samples": ({"count": 3}, 5, 0.05),
    "eight samples": ({"count": 8}, 5, 0.05),
    "several held out": ({"count": 26}, 5, 0.05),
    "masked and felt": ({"count": 10, "masked": True, "felt": True}, 6, 0.05),
    # 2048 tokens are three samples: a batch goes on where the last one ended.
    "several batches": ({"count": 11, "length": 700}, 7, 0.02),
    "to the end": ({"count": 12, "halved": True}, 12, 0.1),
}
"""What the block is, steps and rate. Rates are above the usual one where float16 would hide what a step does."""


@pytest.mark.parametrize(("options", "steps", "rate"), list(TUNINGS.values()), ids=list(TUNINGS))
def test_tuned_scales_are_those_of_the_slow_reference(options: dict[str, Any], steps: int, rate: float) -> None:
    """Both compute in float64, some 1e-12 apart; equal in float16 but for a tie within that, one in 10^8."""
    block, solved, lessons = mlp_case(**options)
    expected = tune_slowly(block, solved, lessons, steps, rate)
    assert all(not torch.equal(expected.scales[name], solution.scales) for name, solution in solved.items())
    farthest = max(float(move.abs().max()) for move in expected.moves.values())
    assert (farthest == 0.5) == ("halved" in options)
    found = tuned_scales(block, solved, lessons, steps, rate=rate)
    assert (found is not None) == (expected.after < expected.before)
    assert found is not None
    assert all(torch.equal(found[name], scales) for name, scales in expected.scales.items())


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_tuned_scales_of_a_decoder_block_are_those_of_the_slow_reference(checkpoint: Factory, family: str) -> None:
    """Weights are dequantized in float32, 2^-24 from the reference's: far less than float16 tells apart.

    So a scale may at most fall on the other side of a tie: one step, which is 2^-10 of it or less.
    """
    block, solved, lessons = rounded_block(checkpoint(family), 16, 32, torch.float64)
    found, expected = tuned_scales(block, solved, lessons, 4, rate=0.005), tune_slowly(block, solved, lessons, 4, 0.005)
    assert found is not None
    assert expected.after < expected.before
    for name, scales in expected.scales.items():
        torch.testing.assert_close(found[name].double(), scales, rtol=2.0**-10, atol=2.0**-24)
        assert not torch.equal(scales, solved[name].scales.double())


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_scales_that_were_trained_err_less_on_samples_that_were_not(checkpoint: Factory, family: str) -> None:
    block, solved, lessons = rounded_block(checkpoint(family), 16, 32)
    held = lessons[HELD_OUT - 1 :: HELD_OUT]
    before = error(block, held)
    found = tuned_scales(block, solved, lessons, 12)
    assert found is not None
    for name, scales in found.items():
        put(block, name, replace(solved[name], scales=scales))
    assert error(block, held) < before


def test_scales_are_float16_and_nothing_else_changes(tiny_qwen2: Path) -> None:
    block, solved, lessons = rounded_block(tiny_qwen2, sym=False)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    codes = {name: solution.codes.clone() for name, solution in solved.items()}
    found = tuned_scales(block, solved, lessons, 3)
    assert found is not None
    assert found.keys() == solved.keys()
    for name, scales in found.items():
        assert torch.equal(scales, scales.half().float())
        assert not torch.equal(scales, solved[name].scales)
        assert torch.equal(solved[name].codes, codes[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_scales_that_are_worse_on_held_out_samples_are_not_taken(tiny_qwen2: Path) -> None:
    block, solved, lessons = rounded_block(tiny_qwen2)
    # What the held-out samples want is what the block does already.
    for i in range(HELD_OUT - 1, len(lessons), HELD_OUT):
        output = first_output(block(lessons[i].hidden, **lessons[i].call))
        lessons[i] = replace(lessons[i], wanted=output.detach())
    assert tuned_scales(block, solved, lessons, 3) is None


def test_no_two_lessons_are_held_at_a_time() -> None:
    block, solved, lessons = mlp_case(count=17)
    held: weakref.WeakSet[Lesson] = weakref.WeakSet()
    asked: list[int] = []

    def made(i: int) -> Lesson:
        assert not held
        asked.append(i)
        lesson = Kept(lessons[i].hidden, lessons[i].call, lessons[i].wanted, None)
        held.add(lesson)
        return lesson

    found = tuned_scales(block, solved, Lessons(17, made), 3)
    expected = tuned_scales(block, solved, lessons, 3)
    assert found is not None
    assert expected is not None
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert set(asked) == set(range(17))


class Kept(Lesson):
    """One that can be told from others by what it is and not by what it holds."""

    __eq__, __hash__ = object.__eq__, object.__hash__


def test_a_single_sample_trains_nothing(tiny_qwen2: Path) -> None:
    block, solved, lessons = rounded_block(tiny_qwen2)
    assert tuned_scales(block, solved, lessons[:1], 3) is None


def test_masked_tokens_do_not_count() -> None:
    hidden, wanted = torch.randn(2, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < 4
    lesson = Lesson(hidden, {}, wanted, mask)
    assert lesson.tokens == 4
    assert float(lesson.error(hidden)) == pytest.approx(float((hidden - wanted)[:, :4].square().sum()), rel=1e-6)


def test_errors_are_weighted_by_what_is_felt() -> None:
    random = torch.Generator().manual_seed(0)
    hidden, wanted = torch.randn(2, 1, 6, 8, generator=random, dtype=torch.float64)
    felt = torch.randn(2, 4, 4, generator=random, dtype=torch.float64)
    felt = felt @ felt.mT
    missed = (hidden - wanted)[0]
    expected = float((missed @ torch.block_diag(*felt) * missed).sum())
    assert float(Lesson(hidden, {}, wanted, None, felt).error(hidden)) == pytest.approx(expected, rel=1e-12)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_scales_do_not_depend_on_the_number_of_threads(tiny_qwen2: Path, one_thread: None) -> None:
    results: list[dict[str, Tensor] | None] = []
    block, solved, lessons = rounded_block(tiny_qwen2)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(tuned_scales(block, solved, lessons[:4], 1))
    first, second = results
    assert first is not None
    assert second is not None
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("options", [{}, {"desc_act": True}], ids=["plain", "g_idx"])
def test_a_checkpoint_holds_the_tuned_scales(tiny_qwen2: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """quantize_checkpoint itself compares the reopened folder's logits with the walk's."""
    packed = {}
    for method in ("gptq", "gptq+tune:2"):
        config = QuantizeConfig.from_dict({"method": method, "group_size": 32, **options})
        log = quantize_checkpoint(tiny_qwen2, some_samples(), config, tmp_path / method)
        assert len(log.modules) == 14
        packed[method] = load_file(tmp_path / method / SINGLE_NAME)
    block = "model.layers.0."
    different = [n for n in packed["gptq"] if n.startswith(block) and not torch.equal(*(p[n] for p in packed.values()))]
    assert different
    assert {name.rpartition(".")[2] for name in different} == {"scales"}


def test_samples_on_the_disk_are_read_one_by_one_and_give_the_same_scales(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, samples = QuantizeConfig(method="gptq+tune:2", group_size=32), some_samples(24)
    quantize_checkpoint(tiny_qwen2, samples, config, tmp_path / "memory")
    here, most = 0, 0

    def watch(name: str) -> None:
        read: Callable[[Activations, int], Tensor] = getattr(Activations, name)

        def counted(self: Activations, i: int) -> Tensor:
            nonlocal here, most
            assert self.spilled
            tensor = read(self, i)
            here, most = here + 1, max(most, here + 1)
            weakref.finalize(tensor, gone)
            return tensor

        monkeypatch.setattr(Activations, name, counted)

    def gone() -> None:
        nonlocal here
        here -= 1

    watch("__getitem__")
    watch("committed")
    monkeypatch.setattr(memory_room, "activations_spill", lambda *_: (True, 0))
    quantize_checkpoint(tiny_qwen2, samples, config, tmp_path / "disk")
    one, other = (load_file(tmp_path / name / SINGLE_NAME) for name in ("memory", "disk"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert 2 <= most <= 6  # a lesson's two, and what a block makes of one


def test_a_tuned_model_in_memory_has_the_scales_of_the_tuned_folder(tiny_qwen2: Path, tmp_path: Path) -> None:
    config, samples = QuantizeConfig(method="gptq+tune:2", group_size=32), some_samples()
    quantize_checkpoint(tiny_qwen2, samples, config, tmp_path / "out")
    model = load(tiny_qwen2)
    qquant.quantize_model(model, samples, config)
    stored = load_file(tmp_path / "out" / SINGLE_NAME)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items() if name.endswith(".scales"))


def test_linears_that_are_left_alone_are_not_tuned(tiny_qwen2: Path) -> None:
    config = QuantizeConfig.from_dict(
        {"method": "gptq+tune:2", "group_size": 32, "dynamic": {r"-:.*mlp": {}, r"-:model\.layers\.1\.": {}}}
    )
    model = load(tiny_qwen2)
    log = qquant.quantize_model(model, some_samples(), config)
    assert [record.name.rpartition(".")[2] for record in log.modules] == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("spills", [False, True], ids=["in memory", "on the disk"])
def test_a_tuned_run_that_is_cut_off_anywhere_goes_on_to_the_same_scales(
    spills: bool, tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first block, between two, and behind the last."""
    config, samples = QuantizeConfig(method="gptq+tune:1", group_size=32), some_samples(4)
    quantize_checkpoint(tiny_qwen2, samples, config, tmp_path / "whole")
    monkeypatch.setattr(memory_room, "activations_spill", lambda *_: (spills, 0))
    finish, stops = UnfinishedRun.finish, 0

    def stopping(self: UnfinishedRun, key: str, piece: Any) -> None:
        self.stop_asked = self.finished(key) != piece
        finish(self, key, piece)

    monkeypatch.setattr(UnfinishedRun, "finish", stopping)
    while not (tmp_path / "parts").exists():
        with suppress(StoppedError):
            quantize_checkpoint(tiny_qwen2, samples, config, tmp_path / "parts")
        stops += 1
        assert stops < 12
    assert stops >= 4
    one, other = (load_file(tmp_path / name / SINGLE_NAME) for name in ("whole", "parts"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
