"""MLPs padded so that a model can be cut over cards: what zeros change (nothing), what they cannot mend, who says it.

What can be cut at all is test_tensor_parallel.py's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import qquant
from qquant import telling
from qquant.calibrate import samples_from_ids
from qquant.checkpoint import is_quantized
from qquant.config import ModuleOverride, QuantizeConfig
from qquant.errors import UsageError
from qquant.linear import QuantLinear
from qquant.padding import PaddedReader, fit_to_ranks
from qquant.quantizing import quantize_checkpoint
from qquant.shapes import model_shapes
from qquant.shards import CheckpointReader
from qquant.sources import StreamedModel
from qquant.tensor_parallel import Packing, uncut
from tests.adapters import run, saved, trained
from tests.conftest import CORPUS, VOCAB, Factory
from tests.make_qwen_v1 import make_qwen_v1

IDS = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
ODD: dict[str, Any] = {"intermediate_size": 96}
"""Three groups of 32 channels, which two cards cannot share; 128 are four."""
CONFIG = QuantizeConfig(method="gptq", group_size=32)
DOWN = "model.layers.0.mlp.down_proj"
WHERE_PADDED = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}


def padded(folder: Path, config: QuantizeConfig = CONFIG, ranks: int = 2, **options: Any) -> StreamedModel:
    source = StreamedModel(folder, **options)
    fit_to_ranks(source, config, ranks)
    return source


def whole_model(source: StreamedModel) -> Any:
    """The plain model of a source, all in memory."""
    model = AutoModelForCausalLM.from_config(source.config, dtype=source.dtype).eval()
    model.load_state_dict({name: source.reader.read(name) for name in source.stored_names()})
    return model


def packed(folder: Path, out: Path, config: QuantizeConfig = CONFIG, ranks: int = 1, **options: Any) -> Path:
    samples = samples_from_ids(torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0)))
    quantize_checkpoint(folder, samples, config, out, tensor_parallel=ranks, **options)
    return out


def matrices(folder: Path) -> dict[str, Tensor]:
    """What the packed linears stand for, [out, in] float32."""
    model = qquant.load_quantized(folder, dtype=torch.float32, kernel="reference")
    return {name: layer.dequantized() for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_only_the_mlp_gets_zeros_and_everything_else_is_as_stored(checkpoint: Factory, family: str) -> None:
    folder = checkpoint(family, **ODD, **({"mlp_bias": True} if family == "llama" else {}))
    source, stored = padded(folder), CheckpointReader(folder)
    changed = set()
    for name in source.stored_names():
        old, new = stored.read(name), source.reader.read(name)
        assert source.reader.spec(name).shape == tuple(new.shape)
        assert torch.equal(new[tuple(slice(size) for size in old.shape)], old)
        assert int(new.count_nonzero()) == int(old.count_nonzero())
        if new.shape != old.shape:
            changed.add(name.split(".", 4)[-1])
    biases = {"gate_proj.bias", "up_proj.bias"} if family == "llama" else set()
    assert changed == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"} | biases
    assert source.config_changes == {"intermediate_size": 128}


@pytest.mark.parametrize("piece", [7, 96, 1000, 1 << 20])
def test_a_padded_tensor_is_the_same_in_pieces(checkpoint: Factory, monkeypatch: Any, piece: int) -> None:
    source = padded(checkpoint("llama", mlp_bias=True, **ODD))
    monkeypatch.setattr("qquant.shards._CHUNK", 4 * piece)  # bytes, of float32
    monkeypatch.setattr("qquant.padding.PIECE", piece)
    for name in source.stored_names():
        pieces = list(source.finite_chunks(name))
        assert torch.equal(torch.cat(pieces), source.reader.read(name).view(-1))
        # With the row that the piece before had begun, and its zeros.
        assert max(len(one) for one in pieces) <= (piece + 96) * 128 / 96


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_logits_of_the_padded_original_are_unchanged(checkpoint: Factory, family: str, dtype: torch.dtype) -> None:
    folder = checkpoint(family, dtype=dtype, **ODD, **({"mlp_bias": True} if family == "llama" else {}))
    plain, wide = AutoModelForCausalLM.from_pretrained(folder), whole_model(padded(folder))
    seen: list[Tensor] = []
    wide.get_submodule(DOWN).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        # Sums of 96 and of 128 products, 32 of them 0, are taken in one go each: the same order, the same bits.
        assert torch.equal(wide(IDS).logits, plain(IDS).logits)
    assert not seen[0][..., 96:].any()
    assert seen[0][..., :96].all()


def test_logits_move_by_no_more_than_the_order_of_sums_where_a_product_is_taken_in_parts(checkpoint: Factory) -> None:
    folder = checkpoint("llama", intermediate_size=352)
    plain, wide = AutoModelForCausalLM.from_pretrained(folder), whole_model(padded(folder, ranks=2))
    with torch.inference_mode():
        expected, got = plain(IDS).logits, wide(IDS).logits
    # 352 products of float32 in another order, in each of two blocks that add to one stream.
    limit = 2 * 352 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    assert float((got - expected).abs().max()) <= limit


METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "left to right": {"method": "fast"},
    "pivot": {"method": "gptq+pivot"},
    "act-order": {"method": "gptq", "desc_act": True},
    "asymmetric": {"method": "gptq", "sym": False},
    "qep": {"method": "qep+residual:0.5+clip-weight+signed+refine:2"},
    "tuned and folded": {"method": "awq+rotate+gptq+tune:2"},
}


@pytest.mark.parametrize("options", list(METHODS.values()), ids=list(METHODS))
def test_what_is_padded_is_packed_as_exact_zeros_and_the_rest_gets_the_codes_it_would_get(
    checkpoint: Factory, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder, config = checkpoint("qwen2", **ODD), QuantizeConfig(group_size=32, **options)
    plain = matrices(packed(folder, tmp_path / "plain", config))
    wide = matrices(packed(folder, tmp_path / "wide", config, ranks=2))
    differing = 0
    for name, matrix in plain.items():
        axis = WHERE_PADDED.get(name.rpartition(".")[2])
        kept, more = wide[name], None
        if axis is not None:
            kept, more = wide[name].split([96, 32], axis)
        assert more is None or not more.any(), name
        differing += int((kept != matrix).sum())
    # Columns without input come last and touch no other, but the factorization's sums run over other blocks: a code on
    # a rounding tie may fall either way.
    assert differing <= 0.002 * sum(matrix.numel() for matrix in plain.values())


def test_weighing_outputs_sees_other_blocks_of_them_and_costs_no_accuracy(checkpoint: Factory, tmp_path: Path) -> None:
    """Rows are weighed in blocks of the largest divisor up to 256 of their number: 96 before, 128 after."""
    folder = checkpoint("qwen2", **ODD)
    exact = AutoModelForCausalLM.from_pretrained(folder)
    losses = []
    for ranks in (1, 2):
        out = packed(folder, tmp_path / f"{ranks}", QuantizeConfig(method="gptq+output", group_size=32), ranks)
        for name, matrix in matrices(out).items() if ranks == 2 else ():
            axis = WHERE_PADDED.get(name.rpartition(".")[2])
            assert axis is None or not matrix.split([96, 32], axis)[1].any(), name
        with torch.inference_mode():
            model = qquant.load_quantized(out, dtype=torch.float32)
            mine, theirs = (one(IDS).logits.log_softmax(-1) for one in (exact, model))
        losses.append(float((mine.exp() * (mine - theirs)).sum(-1).mean()))
    # Two roundings of one model, as good as one another but for luck; codes without any calibration lose 3 times that.
    assert losses[1] < 1.5 * losses[0]


def test_the_written_folder_says_its_width_and_can_be_cut(checkpoint: Factory, tmp_path: Path) -> None:
    out = packed(checkpoint("qwen3", **ODD), tmp_path / "q", ranks=2)
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 128
    assert json.loads((out / "manifest.json").read_text())["config_changes"] == {"intermediate_size": 128}
    assert load_file(out / "model.safetensors")[f"{DOWN}.scales"].shape[0] == 4
    model: Any = qquant.load_quantized(out)
    assert uncut(model_shapes(model.config), lambda name: Packing(4, 32), 2) is None
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape[1] == IDS.shape[1] + 2


def test_a_model_that_can_be_cut_is_left_as_it_is(tiny_qwen2: Path, tmp_path: Path) -> None:
    plain = packed(tiny_qwen2, tmp_path / "plain") / "model.safetensors"
    asked = packed(tiny_qwen2, tmp_path / "asked", ranks=2) / "model.safetensors"
    assert plain.read_bytes() == asked.read_bytes()


QWEN: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "kv_channels": 32}


def test_the_original_qwen_keeps_twice_the_width_in_its_config(tmp_path: Path) -> None:
    folder = make_qwen_v1(tmp_path / "base", chat=False, **QWEN)
    out = packed(folder, tmp_path / "q", ranks=2)
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 256
    shapes = {name: tuple(matrix.shape) for name, matrix in matrices(out).items()}
    assert shapes["transformer.h.0.mlp.w1"] == shapes["transformer.h.0.mlp.w2"] == (128, 64)
    assert shapes["transformer.h.0.mlp.c_proj"] == (64, 128)


def test_the_first_release_of_qwen_named_the_width_otherwise(tmp_path: Path) -> None:
    folder = make_qwen_v1(tmp_path / "base", chat=False, **QWEN)
    content = json.loads((folder / "config.json").read_text())
    content["ffn_hidden_size"] = content.pop("intermediate_size")
    (folder / "config.json").write_text(json.dumps(content))
    keys = json.loads((packed(folder, tmp_path / "q", ranks=2) / "config.json").read_text())
    assert (keys["intermediate_size"], "ffn_hidden_size" in keys) == (256, False)
    assert is_quantized(tmp_path / "q")


def test_an_adapter_is_merged_before_zeros_are_added(checkpoint: Factory, tmp_path: Path) -> None:
    base = checkpoint("llama", **ODD)
    tuned = trained(base, target_modules=["gate_proj", "down_proj", "q_proj"])
    adapter = saved(tuned, tmp_path / "a")
    source = padded(base, adapter=adapter)
    assert isinstance(source.reader, PaddedReader)
    with torch.inference_mode():
        # The merge rounds each weight once more than running beside it: 96 and 64 products of each.
        torch.testing.assert_close(whole_model(source)(IDS).logits, tuned(IDS).logits, rtol=0, atol=1e-5)
    out = packed(base, tmp_path / "q", QuantizeConfig(bits=8, group_size=32), ranks=2, adapter=adapter)
    with torch.inference_mode():
        exact, got = tuned(IDS).logits, qquant.load_quantized(out, dtype=torch.float32)(IDS).logits
    assert (got - exact).norm() < 2**-6 * exact.norm()


RULES: dict[str, tuple[dict[str, Any], int]] = {
    "a coarser tail in one block": ({"+:.*0.mlp.down_proj": {"group_size": 96}}, 192),
    "a finer one everywhere": ({"+:.*down_proj": {"group_size": 16}}, 96),
    "the row of a tail": ({"+:.*down_proj": {"group_size": -1}}, 96),
    "three bits, words of 32 codes": ({"+:.*up_proj": {"bits": 3}}, 128),
    "tails left alone": ({"-:.*down_proj": {}}, 96),
}


@pytest.mark.parametrize(("rules", "width"), list(RULES.values()), ids=list(RULES))
def test_rules_for_single_modules_decide_on_the_width(
    checkpoint: Factory, rules: dict[str, dict[str, Any]], width: int
) -> None:
    dynamic = {pattern: ModuleOverride(**change) for pattern, change in rules.items()}
    source = padded(checkpoint("qwen2", **ODD), QuantizeConfig(group_size=32, dynamic=dynamic))
    assert source.config_changes.get("intermediate_size", 96) == width


def test_linears_that_rules_leave_alone_are_padded_too(checkpoint: Factory, tmp_path: Path) -> None:
    config = QuantizeConfig(method="gptq", group_size=32, dynamic={"-:.*gate_proj": ModuleOverride()})
    out = packed(checkpoint("llama", mlp_bias=True, **ODD), tmp_path / "q", config, ranks=2)
    tensors = load_file(out / "model.safetensors")
    for leaf, shape in (("weight", (128, 64)), ("bias", (128,))):
        tensor = tensors[f"model.layers.1.mlp.gate_proj.{leaf}"]
        assert tuple(tensor.shape) == shape
        assert not tensor[96:].any()


REFUSED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "heads": ("qwen2", ODD, 8, r"4 query heads by 8; choose a number of cards that divides them"),
    "key and value heads": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3},
        2,
        "3 key and value heads by 2; choose",
    ),
    "groups of an attention": ("qwen2", ODD, 4, r"o_proj: 64 / 32 = 2 groups by 4; only MLPs can be padded"),
    "a family known by its structure": ("olmo2", ODD, 2, r"96 / 32 = 3 groups by 2; which linears of a olmo2 are"),
    "no card": ("qwen2", {}, 0, "at least 1, got 0"),
}


@pytest.mark.parametrize(("family", "options", "ranks", "words"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_zeros_cannot_mend_is_refused_before_anything_is_made(
    checkpoint: Factory, tmp_path: Path, family: str, options: dict[str, Any], ranks: int, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        packed(checkpoint(family, **options), tmp_path / "q", ranks=ranks)
    assert list(tmp_path.iterdir()) == []


def test_a_family_known_by_its_structure_only_is_served_where_it_divides(checkpoint: Factory, tmp_path: Path) -> None:
    assert is_quantized(packed(checkpoint("olmo2"), tmp_path / "q", ranks=2))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "t.txt").write_text("\n".join(f"{i} {line}" for i in range(20) for line in CORPUS), encoding="utf-8")
    return tmp_path / "t.txt"


def command(folder: Path, text: Path, out: Path, *more: object, ranks: int = 2) -> Sequence[object]:
    return ("--model", folder, "--data", text, "--out", out, "--group-size", 32, "--seq-len", 64, "--tp", ranks, *more)


def test_the_command_pads_and_says_it_once(
    checkpoint: Factory, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    telling.said.clear()
    folder, out = checkpoint("qwen2", **ODD), tmp_path / "q"
    code, _, stderr = run(*command(folder, text, out, "--n-samples", 4, "--method", "fast"))
    assert code == 0, stderr
    (line,) = [record.getMessage() for record in caplog.records if "padded" in record.getMessage()]
    # Two blocks, three matrices, 32 channels more of 64 codes each: words, and a group or a row of scales and zeros
    # for each 32 codes. Of down_proj also 32 places in g_idx.
    more = 2 * 3 * 32 * 64 // 2 + 2 * 3 * 32 * 64 // 32 * 5 // 2 + 2 * 32 * 4
    assert "from 96 to 128 channels" in line
    assert f"{more / 1e6:.2f} MB larger" in line


def test_a_dry_run_shows_the_padded_sizes(checkpoint: Factory, text: Path, tmp_path: Path) -> None:
    folder = checkpoint("qwen2", **ODD)
    arguments = ("--n-samples", 4, "--dry-run")
    outputs = []
    for ranks in (1, 2):
        code, stdout, stderr = run(*command(folder, text, tmp_path / "q", *arguments, ranks=ranks))
        assert code == 0, stderr
        outputs.append(stdout)
    plain, wide = (next(line for line in out.splitlines() if line.startswith("weights")) for out in outputs)
    assert plain.split("->")[0] == wide.split("->")[0]
    assert plain != wide


def test_a_mix_of_bits_is_chosen_from_padded_sizes(checkpoint: Factory, text: Path, tmp_path: Path) -> None:
    arguments = command(checkpoint("llama", **ODD), text, tmp_path / "q", "--n-samples", 8, "--method", "gptq")
    code, _, stderr = run(*arguments, "--target-size", "235KB", "--sensitivity-tokens", 256)
    assert code == 0, stderr
    assert json.loads((tmp_path / "q" / "config.json").read_text())["intermediate_size"] == 128
    assert (tmp_path / "q" / "model.safetensors").stat().st_size <= 235_000
    assert isinstance(qquant.load_quantized(tmp_path / "q").get_submodule(DOWN), nn.Module)
