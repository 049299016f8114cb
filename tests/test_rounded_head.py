"""``head_bits=8``: an output projection rounded in memory, what it costs, and what such a model refuses.

No kernel is needed here: the operator's reference multiplies by panels, too.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import Result

from qquant import _native, linear, linear_kernels, results, rounded_head
from qquant.checkpoint import load_quantized
from qquant.compat.saving import save_model
from qquant.dense_linear import DenseLinear
from qquant.errors import BadModelError, NumericError, UsageError
from qquant.eval import evaluate_checkpoints
from qquant.eval_models import with_rounded
from qquant.linear import QuantLinear
from qquant.result_files import to_markdown
from qquant.results import result_from_json
from qquant.rounded_head import RoundedHead, group_of, round_head
from tests.packed import IDS, logits_of, pack_by_hand

TIES = pytest.mark.parametrize("tie", [False, True], ids=["own_head", "tied_head"])


@pytest.fixture(scope="module", autouse=True)
def kernels() -> Iterator[None]:
    """As if the compiled kernels were here; where they are not, the reference does their work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_kernels, "_missing", lambda module, key: "")
        if _native._load("qquant._C")[0] is None:
            patch.setattr(_native, "describe", lambda name: "panel_linear: avx2")
        patch.setattr(linear_kernels, "_place_of", linear_kernels._place_of.__wrapped__)
        yield


@pytest.fixture(scope="session")
def packed(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """``packed(tie)``: an int4 checkpoint whose head is its own or the embedding."""
    folders = {}
    for tie in (False, True):
        folders[tie] = tmp_path_factory.mktemp("packed") / ("tied" if tie else "own")
        pack_by_hand(checkpoint(tie=tie), folders[tie])
    return folders.__getitem__


def head_of(model: Any) -> RoundedHead:
    head = model.get_output_embeddings()
    assert isinstance(head, RoundedHead)
    return head


@TIES
def test_a_rounded_head_is_within_half_a_step_of_the_stored_one(packed: Callable[[bool], Path], tie: bool) -> None:
    stored = load_quantized(packed(tie)).get_output_embeddings().weight.detach()
    head = head_of(load_quantized(packed(tie), head_bits=8))
    columns = stored.shape[1]
    groups = stored.unflatten(-1, (columns // head.group_size, head.group_size))
    # A step is 2 / 255 of the largest in a group, and half of one is the error of rounding; the largest positive value
    # may clip by that as well. float16 scales are off by at most 2**-11 of that value.
    bound = groups.abs().amax(-1) * (1 / 255 + 2**-11)
    error = (head.dequantized() - stored).abs().view_as(groups).amax(-1)
    assert head.packed
    assert bool((error <= bound).all())
    assert float(error.max()) > 0


@TIES
def test_logits_differ_by_the_roundings_of_the_head_alone(packed: Callable[[bool], Path], tie: bool) -> None:
    plain, rounded = load_quantized(packed(tie)), load_quantized(packed(tie), head_bits=8)
    expected, found = logits_of(plain), logits_of(rounded)
    inner = rounded.model(input_ids=IDS).last_hidden_state
    # Panels take float32 activations as fixed point of 24 bits.
    torch.testing.assert_close(found, inner @ head_of(rounded).dequantized().T, rtol=1e-4, atol=1e-5)
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    # An error e per logit costs about e**2 / 2 nats; each of 32 columns brings one of at most 1/255 of its product.
    error = float((found - expected).abs().max())
    assert 0 < error < 0.02 * float(expected.abs().max())
    assert float(kl.max()) < error**2


@pytest.mark.parametrize(("rows", "columns"), [(52, 384), (16, 96), (100, 508)], ids=["groups", "divisor", "whole_row"])
def test_heads_of_other_shapes_multiply_by_the_rounded_weight(
    packed: Callable[[bool], Path], rows: int, columns: int
) -> None:
    model: Any = load_quantized(packed(False))
    plain = model.lm_head = nn.Linear(columns, rows, bias=False)
    round_head(model)
    weights = head_of(model).dequantized()
    # As above: half a step, of the largest in the row at most.
    assert bool(((weights - plain.weight).abs().amax(1) <= plain.weight.abs().amax(1) * (1 / 255 + 2**-11)).all())
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head_of(model)(x), x @ weights.T, rtol=1e-4, atol=1e-5)


@TIES
def test_the_embedding_keeps_its_matrix(packed: Callable[[bool], Path], tie: bool) -> None:
    plain: Any = load_quantized(packed(tie))
    rounded: Any = load_quantized(packed(tie), head_bits=8)
    assert torch.equal(rounded.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    vocabulary, columns = plain.get_input_embeddings().weight.shape
    held = sum(one.numel() * one.element_size() for one in head_of(rounded).buffers())
    padded = -(-vocabulary // 16) * 16
    assert held == padded * columns + 2 * padded * (columns // head_of(rounded).group_size)
    assert not [name for name, _ in rounded.named_parameters() if "lm_head" in name]


def test_a_model_in_bfloat16_has_its_dense_head_rounded(packed: Callable[[bool], Path]) -> None:
    model: Any = load_quantized(packed(False), dtype=torch.bfloat16)
    model.lm_head = DenseLinear.sharing(model.lm_head)
    expected = logits_of(model).float()
    round_head(model)
    found = logits_of(model)
    assert found.dtype == torch.bfloat16
    # 8 bits of bfloat16 beside 8 of the codes.
    assert float((found - expected).abs().max()) < 0.03 * float(expected.abs().max())


def test_a_head_with_a_bias_keeps_it(packed: Callable[[bool], Path]) -> None:
    model = load_quantized(packed(False))
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, model.lm_head.out_features))
    bias = model.lm_head.bias
    round_head(model)
    torch.testing.assert_close(head_of(model)(torch.zeros(1, model.config.hidden_size))[0], bias.detach())


def test_chunks_of_rows_round_as_the_whole(packed: Callable[[bool], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = head_of(load_quantized(packed(False), head_bits=8)).dequantized()
    monkeypatch.setattr(rounded_head, "_CHUNK_WEIGHTS", 1)
    assert torch.equal(head_of(load_quantized(packed(False), head_bits=8)).dequantized(), whole)


@TIES
def test_such_a_model_generates(packed: Callable[[bool], Path], tie: bool) -> None:
    model: Any = load_quantized(packed(tie), head_bits=8)
    found = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    with torch.inference_mode():
        following = model(input_ids=found).logits[0, IDS.shape[1] - 1 : -1].argmax(-1)
    assert found[0, IDS.shape[1] :].tolist() == following.tolist()


@TIES
def test_it_cannot_be_saved_and_nothing_is_written(packed: Callable[[bool], Path], tie: bool, tmp_path: Path) -> None:
    model = load_quantized(packed(tie), head_bits=8)
    for save in (
        lambda: model.save_pretrained(tmp_path / "out"),
        lambda: model.state_dict(),
        lambda: save_model(model, tmp_path / "out", source=packed(tie), dtype=None, run=None),
        lambda: copy.deepcopy(model).save_pretrained(tmp_path / "out"),
    ):
        with pytest.raises(UsageError, match="load it again without head_bits to save it"):
            save()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: model.to("cpu")], ids=["deepcopy", "to"])
def test_a_copy_or_a_move_computes_the_same(packed: Callable[[bool], Path], copied: Callable[[Any], Any]) -> None:
    model = load_quantized(packed(True), head_bits=8)
    expected = logits_of(model)
    again = copied(model)
    assert torch.equal(logits_of(again), expected)
    assert torch.equal(logits_of(model), expected)


def test_a_cast_keeps_the_scales(packed: Callable[[bool], Path]) -> None:
    model: Any = load_quantized(packed(True), head_bits=8)
    weights = head_of(model).dequantized()
    model.to(torch.bfloat16)
    assert torch.equal(head_of(model).dequantized(), weights)
    assert logits_of(model).dtype == torch.bfloat16


def test_a_pickled_head_computes_the_same(packed: Callable[[bool], Path]) -> None:
    head = head_of(load_quantized(packed(False), head_bits=8))
    again = pickle.loads(pickle.dumps(head))
    assert torch.equal(again.dequantized(), head.dequantized())


def test_activations_of_the_head_stay_exact(packed: Callable[[bool], Path]) -> None:
    model = load_quantized(packed(False), head_bits=8, activation_bits=8)
    bits = {name: each.activation_bits for name, each in model.named_modules() if isinstance(each, QuantLinear)}
    assert bits.pop("lm_head") is None
    assert set(bits.values()) == {8}


def test_the_reference_serves_it_where_it_is_asked_for(packed: Callable[[bool], Path]) -> None:
    usual, model = (load_quantized(packed(False), head_bits=8, kernel=kernel) for kernel in ("auto", "reference"))
    assert not head_of(model).packed
    torch.testing.assert_close(logits_of(model), logits_of(usual), rtol=1e-4, atol=1e-4)


def test_a_kernel_that_cannot_serve_the_head_is_refused(packed: Callable[[bool], Path]) -> None:
    model: Any = load_quantized(packed(False))
    model.lm_head = nn.Linear(256, 64, bias=False)
    with pytest.raises(UsageError, match="lm_head cannot be rounded to 8 bits here: kernel 'torch' needs"):
        round_head(model, kernel="torch")
    assert "lm_head.weight" in model.state_dict()


def test_a_head_that_nothing_faster_than_the_reference_serves_is_refused(
    packed: Callable[[bool], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_quantized(packed(False), kernel="reference")
    stored = model.get_output_embeddings()
    monkeypatch.setattr(linear, "place_of", lambda _: linear_kernels.Place("cpu", "avx2", "avx2", "not built"))
    with pytest.raises(UsageError, match="dequantized for every token, not built; leave head_bits out"):
        round_head(model)
    assert model.get_output_embeddings() is stored
    assert "reference" in round_head(model, kernel="reference")


def test_loading_says_what_runs_the_head(packed: Callable[[bool], Path], caplog: pytest.LogCaptureFixture) -> None:
    load_quantized(packed(False), head_bits=8)
    (line,) = [record.getMessage() for record in caplog.records if "rounded" in record.getMessage()]
    assert line.startswith("lm_head rounded as asked for, int8 row: ")
    assert line.endswith(")")


SIZES = {
    "whole": (4096, 128),
    "seven_eighths": (896, 128),
    "divisor": (1600, 100),
    "small": (32, 32),
    "odd": (508, 508),
}


@pytest.mark.parametrize(("columns", "size"), SIZES.values(), ids=SIZES)
def test_groups_divide_the_row(columns: int, size: int) -> None:
    assert group_of(columns) == size


def test_what_has_no_head_to_round_is_refused(
    packed: Callable[[bool], Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(BadModelError, match="must have quantization_config"):
        load_quantized(checkpoint(), head_bits=8)
    with pytest.raises(UsageError, match="head_bits is about quantized models"):
        load_quantized(checkpoint(), head_bits=8, use_cache_quantization=False)
    with pytest.raises(UsageError, match="head_bits must be 8"):
        load_quantized(packed(False), head_bits=4)  # type: ignore[arg-type]
    pack_by_hand(checkpoint(), tmp_path / "head", bits=8, head=True)
    with pytest.raises(UsageError, match="projection is in 8 bits already; leave head_bits out"):
        load_quantized(tmp_path / "head", head_bits=8)
    model = load_quantized(packed(False), head_bits=8)
    with pytest.raises(UsageError, match="in 8 bits already"):
        round_head(model)


HEADS: dict[str, tuple[Callable[[], nn.Module | None], str]] = {
    "none": (lambda: None, "has none"),
    "other_class": (lambda: nn.Bilinear(4, 4, 4), "has Bilinear;"),
    "subclass": (lambda: type("Scaled", (nn.Linear,), {})(32, 64, bias=False), "has Scaled;"),
    "elsewhere": (lambda: nn.Linear(32, 64, bias=False, device="meta"), "weights elsewhere"),
    "odd_rows": (lambda: nn.Linear(32, 63, bias=False), r"multiples of 4, got \[63, 32\]"),
}


@pytest.mark.parametrize(("head", "said"), HEADS.values(), ids=HEADS)
def test_what_is_no_plain_projection_is_refused(
    packed: Callable[[bool], Path], head: Callable[[], nn.Module | None], said: str
) -> None:
    model = load_quantized(packed(False))
    model.lm_head = head()
    with pytest.raises(UsageError, match=said):
        round_head(model)


def test_a_plain_model_or_one_with_hooks_is_refused(packed: Callable[[bool], Path]) -> None:
    class Plain(nn.Module):
        def get_output_embeddings(self) -> nn.Module:
            return nn.Linear(4, 4)

    with pytest.raises(UsageError, match="this model is not quantized"):
        round_head(Plain())
    model = load_quantized(packed(False))
    model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(UsageError, match="Linear with hooks"):
        round_head(model)


def test_weights_too_large_for_a_scale_leave_the_model_as_it_was(packed: Callable[[bool], Path]) -> None:
    model = load_quantized(packed(False))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e9
    with pytest.raises(NumericError, match="must fit float16"):
        round_head(model)
    assert type(model.lm_head) is nn.Linear
    assert "lm_head.weight" in model.state_dict()


@pytest.fixture(scope="module")
def report(tiny_qwen2: Path, packed: Callable[[bool], Path], held_out: Path) -> results.Result:
    """One evaluation that several tests look at."""
    options: dict[str, Any] = {"seq_len": 32, "max_tokens": 80, "speed": False}
    return evaluate_checkpoints(tiny_qwen2, [packed(False)], held_out, **options, activation_bits=8, head_bits=8)


def test_every_quantized_candidate_has_a_row_for_each_wish(report: results.Result) -> None:
    labels = [row.label for row in report.rows]
    assert labels[1:] == ["own", "own with int8 activations", "own with an int8 head"]
    assert [(row.activation_bits, row.head_bits) for row in report.rows[1:]] == [(None, None), (8, None), (None, 8)]
    assert report.rows[3].weights_bytes == report.rows[1].weights_bytes
    assert result_from_json(report.model_dump_json()) == report


def test_the_cost_of_the_head_stands_in_the_report(report: results.Result) -> None:
    exact, rounded = report.rows[1].accuracy, report.rows[3].accuracy
    assert exact is not None
    assert rounded is not None
    assert rounded.nll_mean_nats != exact.nll_mean_nats
    # 8 bits of one matrix beside 4 of all others.
    assert exact.kl_mean_nats is not None
    assert rounded.kl_mean_nats is not None
    assert abs(rounded.kl_mean_nats - exact.kl_mean_nats) < 0.1 * exact.kl_mean_nats
    markdown = to_markdown(report)
    assert "| own with an int8 head |" in markdown
    assert "*With an int8 head*: the same packed weights" in markdown


@pytest.mark.parametrize(
    ("bits", "quantized", "said"),
    [(8, False, "head_bits is about quantized models"), (4, True, "head_bits must be 8, .* got 4")],
    ids=["plain_candidate", "other_width"],
)
def test_an_evaluation_refuses_what_cannot_be_rounded(
    tiny_qwen2: Path, packed: Callable[[bool], Path], bits: int, quantized: bool, said: str
) -> None:
    folders = {"base": tiny_qwen2, "other": packed(False) if quantized else tiny_qwen2}
    with pytest.raises(UsageError, match=said):
        with_rounded(folders, torch.bfloat16, torch.device("cpu"), head_bits=bits)


def test_the_command_writes_the_row(
    run_eval: Callable[..., Result], tiny_qwen2: Path, packed: Callable[[bool], Path], held_out: Path, tmp_path: Path
) -> None:
    words = ["--baseline", tiny_qwen2, "--candidate", packed(False), "--data", held_out, "--out", tmp_path / "r"]
    result = run_eval(*words, "--no-speed", "--seq-len", 16, "--max-tokens", 40, "--head-bits", 8)
    assert result.exit_code == 0, result.stderr
    report = result_from_json((tmp_path / "r" / "report.json").read_bytes())
    assert [row.label for row in report.rows][1:] == ["own", "own with an int8 head"]
