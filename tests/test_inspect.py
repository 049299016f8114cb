"""``qquant inspect`` says what a folder is, adds its sizes up right, and finds what is amiss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from qquant.calibrate import samples_from_ids
from qquant.cli import app
from qquant.config import QuantizeConfig
from qquant.inspect import examine
from qquant.quantizing import quantize_checkpoint
from qquant.shards import SINGLE_NAME
from tests.packed import edit_keys, edit_tensors, pack_by_hand

GOLDEN = Path(__file__).parent / "golden" / "gptqmodel-tiny"


def run(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["inspect", str(folder), *options])


@pytest.fixture(scope="module")
def written(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspect") / "out"
    rules: Any = {r"-:.*\.0\.mlp\.up_proj": {}, r"+:.*o_proj": {"bits": 8, "group_size": 64}}
    config = QuantizeConfig(group_size=32, dynamic=rules)
    quantize_checkpoint(tiny_qwen2, samples_from_ids([list(range(40))]), config, out)
    return out


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_plain_checkpoint_is_counted(tiny_qwen2: Path) -> None:
    tensors = load_file(tiny_qwen2 / SINGLE_NAME)
    facts = examine(tiny_qwen2)
    assert facts["model_type"] == "qwen2"
    assert facts["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert facts["bits_per_parameter"] == 32
    assert facts["files"] == {path.name: path.stat().st_size for path in tiny_qwen2.iterdir()}
    assert facts["full_precision"]["tensors"] == len(tensors)
    assert [facts[key] for key in ("quantization", "relative_errors", "manifest", "problems")] == [None, None, None, []]


def test_a_quantized_checkpoint_has_the_parameters_of_its_original(written: Path, tiny_qwen2: Path) -> None:
    assert examine(written)["parameters"] == examine(tiny_qwen2)["parameters"]


def test_packed_linears_are_counted_by_bits_and_group_size(written: Path) -> None:
    facts = examine(written)
    done = facts["quantization"]
    assert {key: done[key] for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format")} == {
        "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq",
    }  # fmt: skip
    kinds = [(kind["bits"], kind["group_size"], kind["linears"]) for kind in done["packed"]]
    assert kinds == [(4, 32, 11), (8, 64, 2)]
    assert sum(kind["bytes"] for kind in done["packed"]) + facts["full_precision"]["bytes"] == facts["tensor_bytes"]
    assert 4 < done["bits_per_packed_weight"] < 8
    # Per group of 64 a scale of 16 bits and a zero of 8; per row of 64 outputs one g_idx of 32 bits.
    o_proj = done["packed"][1]
    assert 8 * o_proj["bytes"] / o_proj["weights"] == 8 + (16 + 8) / 64 + 32 / 64


def test_modules_that_lost_most_and_least_are_named(written: Path) -> None:
    records = json.loads((written / "quant_log.json").read_text())["modules"]
    errors = sorted(record["relative_error"] for record in records)
    found = examine(written)["relative_errors"]
    assert [record["relative_error"] for record in found["lowest"]] == errors[:3]
    assert [record["relative_error"] for record in found["highest"]] == errors[:-4:-1]


def test_every_file_is_as_in_the_manifest(written: Path) -> None:
    facts = examine(written)
    assert all(facts["manifest"].values())
    assert facts["manifest"].keys() | {"manifest.json"} == facts["files"].keys()
    assert facts["problems"] == []


def test_json_and_table_tell_the_same(written: Path) -> None:
    result = run(written, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json.loads(json.dumps(examine(written)))
    table = run(written)
    assert table.exit_code == 0
    for words in ("qwen2", "4 bits, group size 32, symmetric", "2 linears at 8 bits", "as in the manifest", "o_proj"):
        assert words in table.stdout
    assert str(written.parent) not in table.stdout + result.stdout


def test_another_tools_checkpoint_is_understood() -> None:
    facts = examine(GOLDEN)
    assert facts["problems"] == []
    assert facts["manifest"] is None
    assert facts["quantization"]["packed"][0]["linears"] == 14


def test_a_changed_file_is_a_problem_with_exit_code_4(copied: Path) -> None:
    (copied / "tokenizer_config.json").write_text("{}")
    (copied / "generation_config.json").unlink()
    result = run(copied, "--json")
    assert result.exit_code == 4
    facts = json.loads(result.stdout)
    assert [name for name, same in facts["manifest"].items() if not same] == [
        "generation_config.json",
        "tokenizer_config.json",
    ]
    assert result.stderr.startswith("error: generation_config.json is not as the manifest says")
    assert "CHANGED" in run(copied).stdout


def test_a_manifest_cannot_make_us_read_outside_the_folder(copied: Path) -> None:
    (copied.parent / "secret").write_text("x")
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"files": {"../secret": "0" * 64}}))
    assert examine(copied)["manifest"] == {"../secret": False}


@pytest.mark.parametrize("part", ["g_idx", "scales", "qzeros"])
def test_a_missing_tensor_is_named_and_the_rest_still_listed(tiny_qwen2: Path, tmp_path: Path, part: str) -> None:
    pack_by_hand(tiny_qwen2, tmp_path / "m", desc_act=True)
    name = f"model.layers.1.mlp.up_proj.{part}"
    edit_tensors(tmp_path / "m", lambda tensors: tensors.pop(name))
    facts = examine(tmp_path / "m")
    (problem,) = facts["problems"]
    assert name in problem
    assert facts["quantization"]["packed"][0]["linears"] == 14


def test_a_plain_checkpoint_that_lacks_a_tensor_is_a_problem(tiny_qwen2: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_qwen2, tmp_path / "m")
    edit_tensors(tmp_path / "m", lambda tensors: tensors.pop("model.norm.weight"))
    assert "model.norm.weight is missing" in examine(tmp_path / "m")["problems"][0]


def test_keys_that_are_not_understood_are_a_problem(tiny_qwen2: Path, tmp_path: Path) -> None:
    pack_by_hand(tiny_qwen2, tmp_path / "m")
    edit_keys(tmp_path / "m", quant_method="awq")
    facts = examine(tmp_path / "m")
    assert "awq" in facts["problems"][0]
    assert facts["quantization"] is None


def test_a_damaged_log_or_manifest_is_no_reason_to_fail(copied: Path) -> None:
    (copied / "quant_log.json").write_text('{"modules": [{}]}')
    (copied / "manifest.json").write_text('{"files": 3}')
    facts = examine(copied)
    assert facts["relative_errors"] is None
    assert facts["manifest"] == {"manifest.json": False}


def test_a_folder_that_is_no_model_ends_in_one_line(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert result.exit_code == 4
    assert result.stdout == ""
    assert result.stderr.startswith("error: a model folder must hold config.json")
    (tmp_path / "config.json").write_text("[]")
    assert "must hold a JSON object" in run(tmp_path).stderr
    (tmp_path / "config.json").write_text("{}")
    assert "must hold model.safetensors" in run(tmp_path).stderr
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE_NAME)
    assert "cannot be built" in run(tmp_path).stderr
