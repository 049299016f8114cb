"""Moments of gradients, gathered block by block, must be those of autograd through the whole model at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qquant
from qquant import gradients, refinement, telling
from qquant.calibrate import Sample, samples_from_ids
from qquant.capture import Stream, capture
from qquant.config import QuantizeConfig
from qquant.errors import NumericError, StoppedError, UsageError
from qquant.gradients import output_moments
from qquant.models.layouts import block_list, linears
from qquant.models.qwen.modeling import QWenLMHeadModel
from qquant.publish import REPORT_FOLDER
from qquant.run import Run
from qquant.sources import LoadedModel, StreamedModel
from qquant.unfinished import UnfinishedRun, going_on
from tests.conftest import VOCAB, Factory
from tests.make_qwen_v1 import make_qwen_v1

EPS = torch.finfo(torch.float32).eps


def some_samples(*lengths: int, seed: int = 5) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)
    return [samples_from_ids(torch.randint(0, VOCAB, (1, n), generator=generator))[0] for n in lengths]


def padded(sample: Sample, count: int) -> Sample:
    """The sample with tokens behind it that do not count."""
    ids = torch.cat([sample.input_ids, torch.zeros(count, dtype=torch.long)])
    return Sample(ids, torch.arange(len(ids)) < len(sample.input_ids))


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def moments_of(model: Any, samples: list[Sample], **options: Any) -> Mapping[str, Tensor]:
    source = LoadedModel(model)
    return output_moments(source, capture(source, samples, "cpu"), "cpu", **options)


def watched(source: LoadedModel) -> dict[str, nn.Linear]:
    return {
        f"{source.layout.blocks}.{index}.{name}": layer
        for index, block in enumerate(block_list(source.model, source.layout))
        for name, layer in linears(block).items()
    }


def autograd_gradients(
    model: Any, samples: list[Sample], seed: int = 0, chosen: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Gradients [tokens, out] of -log p(label) with respect to each linear's output, by one backward pass a sample.

    Of the samples ``chosen``, or of all.
    Labels are drawn as in the room under test: from a generator for each sample, so many tokens at a time.
    """
    layers = watched(LoadedModel(model))
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for number in range(len(samples)) if chosen is None else chosen:
        sample, generator = samples[number], gradients.label_generator(seed, number)
        outputs: dict[str, Tensor] = {}
        hooks = [
            layer.register_forward_hook(lambda _, __, output, name=name, seen=outputs: seen.__setitem__(name, output))
            for name, layer in layers.items()
        ]
        mask = None if bool(sample.mask.all()) else sample.mask.long()[None]
        scores = model(input_ids=sample.input_ids[None], attention_mask=mask, use_cache=False).logits[0]
        scores = scores.float().log_softmax(-1)
        for hook in hooks:
            hook.remove()
        pieces = scores.detach().exp().split(gradients._HEAD_TOKENS)
        labels = torch.cat([gradients.drawn_labels(piece, generator) for piece in pieces])
        loss = -scores.gather(1, labels)[:, 0][sample.mask].sum()
        slopes = torch.autograd.grad(loss, list(outputs.values()))
        for name, slope in zip(outputs, slopes, strict=True):
            found[name].append(slope[0][sample.mask])
    return {name: torch.cat(parts) for name, parts in found.items()}


def assert_moments_of(found: Mapping[str, Tensor], slopes: dict[str, Tensor]) -> None:
    """Sums in float32 are off by eps for every token, and logits are float32 on both sides."""
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        blocks, side, _ = found[name].shape
        assert side == refinement.block_side(slope.shape[1])
        assert found[name].dtype == torch.float32
        for number in range(blocks):
            g = slope[:, number * side : (number + 1) * side].double()
            expected, size = g.T @ g / len(g), g.abs().T @ g.abs() / len(g)
            bound = (len(g) + 50) * EPS * size + 16 * EPS * size.max()
            assert ((found[name][number].double() - expected).abs() <= bound).all(), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "olmo2", "gemma2"])  # the last two: known by structure only
def test_block_by_block_gradients_are_those_of_the_whole_model(
    checkpoint: Factory, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refinement, "_SIDE", 32)  # several blocks per linear
    monkeypatch.setattr(gradients, "_HEAD_TOKENS", 16)  # several pieces per sample
    model = load(checkpoint(family, **({"head_dim": 16} if family == "gemma2" else {})))
    samples = some_samples(24, 24, 17)
    assert_moments_of(moments_of(model, samples), autograd_gradients(model, samples))


def test_the_original_qwens_gradients_are_those_of_the_whole_model(tmp_path: Path) -> None:
    model = QWenLMHeadModel.from_pretrained(make_qwen_v1(tmp_path / "qwen"), dtype=torch.float64).eval()
    samples = some_samples(24, 9)
    assert_moments_of(moments_of(model, samples), autograd_gradients(model, samples))


def test_tokens_that_do_not_count_add_nothing(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2)
    samples = [padded(sample, 7) for sample in some_samples(20, 12)]
    assert_moments_of(moments_of(model, samples), autograd_gradients(model, samples))


@pytest.fixture
def likeliest_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels do not depend on chance, so that moments of different calls can be compared."""
    monkeypatch.setattr(gradients, "drawn_labels", lambda p, generator: p.argmax(1, keepdim=True))


@pytest.mark.usefixtures("likeliest_labels")
def test_moments_do_not_depend_on_how_tokens_come_in(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over two samples is that of each, weighted; padding and pieces of the head change nothing."""
    model = load(tiny_qwen2)
    one, other = some_samples(20, 30)
    together = moments_of(model, [one, other])
    apart, rest = moments_of(model, [one]), moments_of(model, [other])
    padding = moments_of(model, [padded(one, 9), other])
    monkeypatch.setattr(gradients, "_HEAD_TOKENS", 7)
    pieces = moments_of(model, [one, other])
    for name, moment in together.items():
        atol = 60 * EPS * float(moment.abs().max())
        torch.testing.assert_close(0.4 * apart[name] + 0.6 * rest[name], moment, rtol=1e-4, atol=atol)
        torch.testing.assert_close(padding[name], moment, rtol=1e-4, atol=atol)
        torch.testing.assert_close(pieces[name], moment, rtol=1e-4, atol=atol)


def test_about_so_many_tokens_are_used_in_samples_spread_evenly(tiny_qwen2: Path) -> None:
    model, samples = load(tiny_qwen2), some_samples(*[10] * 9)
    some = moments_of(model, samples, tokens=30)
    # Three of nine, each by one further on in its third, so that they do not all fall to one rank.
    assert_moments_of(some, autograd_gradients(model, samples, chosen=(0, 4, 8)))
    assert_moments_of(moments_of(model, samples, tokens=1), autograd_gradients(model, samples[:1]))


def test_a_label_comes_as_often_as_its_probability() -> None:
    """Each count is binomial: five standard deviations leave one chance in a million for each of few entries."""
    wanted, count = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0]), 20000
    drawn = gradients.drawn_labels(wanted.repeat(count, 1), torch.Generator().manual_seed(3))
    found = torch.bincount(drawn[:, 0], minlength=len(wanted)) / count
    assert drawn.shape == (count, 1)
    assert ((found - wanted).abs() <= 5 * (wanted * (1 - wanted) / count).sqrt()).all()


def test_labels_are_drawn_by_the_seed(tiny_qwen2: Path) -> None:
    model, samples = load(tiny_qwen2), some_samples(24)
    first, again, other = (moments_of(model, samples, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first)
    assert_moments_of(other, autograd_gradients(model, samples, seed=2))


def test_from_disk_and_from_memory_moments_are_the_same(tiny_qwen2: Path) -> None:
    samples = some_samples(24, 24)
    source = StreamedModel(tiny_qwen2, dtype=torch.float32)
    source.load_outside(with_head=True)
    streamed = output_moments(source, capture(source, samples, "cpu"), "cpu")
    loaded = moments_of(load(tiny_qwen2, torch.float32), samples)
    assert streamed.keys() == loaded.keys()
    assert all(torch.equal(streamed[name], loaded[name]) for name in loaded)


def test_model_and_samples_are_left_as_they_were(tiny_qwen2: Path) -> None:
    model = load(tiny_qwen2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    source = LoadedModel(model)
    stream: Stream = capture(source, some_samples(16), "cpu")
    hidden, steps = stream.hidden[0].clone(), []
    output_moments(source, stream, "cpu", on_progress=lambda _, done, of: steps.append((done, of)))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(stream.hidden[0], hidden)
    assert not any(module._forward_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def steps_of(run: Run) -> list[str]:
    return [key for key, _ in run.items() if key.startswith("gradients ")]


def shelves_of(run: UnfinishedRun) -> set[str]:
    return {path.name.removeprefix("gradients-") for path in run.folder.glob("gradients-*")}


@contextmanager
def stopped_after(pieces: int, out: Path) -> Iterator[UnfinishedRun]:
    """A run into ``out``, new or cut off before, that stops when so many pieces more are finished."""
    with suppress(StoppedError), going_on(out, REPORT_FOLDER, {}, overwrite=False) as run:
        finish = run.finish

        def count(key: str, piece: Any) -> None:
            nonlocal pieces
            pieces -= 1
            run.stop_asked = pieces <= 0
            finish(key, piece)

        run.finish = count  # type: ignore[method-assign]
        yield run


def streamed_moments(folder: Path, samples: list[Sample], run: Run | None) -> Mapping[str, Tensor]:
    source = StreamedModel(folder, dtype=torch.float32)
    source.load_outside(with_head=False)
    stream = capture(source, samples, "cpu")
    source.release_outside()
    return dict(output_moments(source, stream, "cpu", run=run))


def test_cut_off_after_any_piece_it_goes_on_to_the_same_moments(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Two blocks: two pieces forwards, one at the turn, two backwards."""
    samples = some_samples(24, 9, 17)
    whole = streamed_moments(tiny_qwen2, samples, None)
    for pieces in (1, 2, 3, 4, 5):
        out = tmp_path / str(pieces)
        with stopped_after(pieces, out) as run:
            streamed_moments(tiny_qwen2, samples, run)
        with stopped_after(100, out) as run:
            assert len(steps_of(run)) == pieces
            found = streamed_moments(tiny_qwen2, samples, run)
            assert len(steps_of(run)) == 5
            assert {path.name for path in run.folder.glob("gradients-*")} == {
                "gradients-outputs-0",
                "gradients-outputs-1",
            }
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole), pieces


@pytest.mark.parametrize(("tokens", "moments_are_larger"), [(20, True), (2000, False)])
def test_the_disk_is_taken_before_the_first_block_and_nothing_more_is_taken_later(
    tokens: int, moments_are_larger: bool, tiny_qwen2: Path, tmp_path: Path
) -> None:
    """Whenever it is cut off, what lies there is no larger than before; moments come where hidden states have gone."""
    samples, sizes = some_samples(*[tokens // 10] * 10), []
    moments = {"outputs-0", "outputs-1"}
    with stopped_after(1, tmp_path / "out") as run:
        streamed_moments(tiny_qwen2, samples, run)
    assert shelves_of(run) == {"hidden-1", "hidden-2", "slopes-0", "slopes-1"} | (
        moments if moments_are_larger else set()
    )
    sizes.append(sum(path.stat().st_size for path in run.folder.rglob("gradients-*/*")))
    for _ in range(4):
        with stopped_after(1, tmp_path / "out") as run:
            streamed_moments(tiny_qwen2, samples, run)
        sizes.append(sum(path.stat().st_size for path in run.folder.rglob("gradients-*/*")))
    assert sizes == sorted(sizes, reverse=True)
    with stopped_after(100, tmp_path / "out") as run:
        streamed_moments(tiny_qwen2, samples, run)
        assert shelves_of(run) == moments


def test_whether_a_linear_has_moments_is_known_without_reading_them(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with going_on(tmp_path / "out", REPORT_FOLDER, {}, overwrite=False) as run:
        source = StreamedModel(tiny_qwen2, dtype=torch.float32)
        source.load_outside(with_head=False)
        found = output_moments(source, capture(source, some_samples(12), "cpu"), "cpu", run=run)
        monkeypatch.setattr(run, "shelf", lambda *_: pytest.fail("a shelf was opened"))
        assert "model.layers.0.mlp.up_proj" in found
        assert "model.layers.2.mlp.up_proj" not in found


def test_what_is_finished_is_not_computed_again(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopped_after(5, tmp_path / "out") as run:
        streamed_moments(tiny_qwen2, some_samples(20), run)
    monkeypatch.setattr(StreamedModel, "load", lambda self, index: pytest.fail("a block was loaded"))
    with stopped_after(100, tmp_path / "out") as run:
        assert len(streamed_moments(tiny_qwen2, some_samples(20), run)) == 14


def test_gradients_that_are_not_finite_are_one_clear_error(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_qwen2, torch.float32)
    model.lm_head.weight.data.fill_(1e38)
    with pytest.raises(NumericError, match="logits must be finite"):
        moments_of(model, some_samples(12))
    model = load(tiny_qwen2, torch.float32)
    monkeypatch.setattr(gradients, "_head_slope", lambda source, hidden, *_: torch.full_like(hidden, 1e30))
    with pytest.raises(NumericError, match=r"gradients must be finite.*model\.layers\.1\..*float32"):
        moments_of(model, some_samples(12))


def test_outputs_that_no_block_divides_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    telling.said.clear()
    for outputs in (514, 514, 12, 688):
        gradients._moment_of(nn.Linear(2, outputs))
    assert caplog.text.count("for 514 outputs is 2: `output` gains little there") == 1
    assert "for 12 outputs" not in caplog.text
    assert "for 688 outputs" not in caplog.text


def test_under_inference_mode_it_says_what_to_do(tiny_qwen2: Path) -> None:
    config = QuantizeConfig(method="output", group_size=32)
    model = load(tiny_qwen2, torch.float32)
    with torch.inference_mode(), pytest.raises(UsageError, match=r"inference_mode.*outside"):
        qquant.quantize_model(model, some_samples(12), config)
    with torch.inference_mode():
        made_under_it = copy.deepcopy(model)
    with pytest.raises(UsageError, match=r"inference_mode.*outside"):
        qquant.quantize_model(made_under_it, some_samples(12), config)
    with torch.no_grad():
        assert len(qquant.quantize_model(model, some_samples(12), config).modules) == 14
