"""The command line: two spellings, one result; the same bytes every time; a plan before the work."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import qquant
from qquant.calibrate import samples_from_ids
from qquant.checkpoint import load_model
from qquant.cli import app
from qquant.config import ModuleRecord, QuantizeConfig
from qquant.errors import BadModelError, NumericError, UsageError
from qquant.shard_writer import ShardWriter
from qquant.shards import SINGLE_NAME
from tests.conftest import CORPUS, VOCAB, Factory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calib.txt"
    file.write_text("\n".join(f"{i} {line}" for i in range(40) for line in CORPUS), encoding="utf-8")
    return file


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def tree_hash(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_qwens_old_option_names_give_the_same_bytes(tiny_qwen2: Path, text: Path, tmp_path: Path) -> None:
    new, old, again = tmp_path / "new", tmp_path / "old", tmp_path / "again"
    ours = ["--model", tiny_qwen2, "--data", text, "--bits", 4, "--seq-len", 64, "--group-size", 32, "--n-samples", 8]
    theirs = ["--model_name_or_path", tiny_qwen2, "--data_path", text, "--bits", 4, "--max_len", 64]
    theirs += ["--group_size", 32, "--n-samples", 8]
    for out, options in ((new, [*ours, "--out"]), (old, [*theirs, "--out_path"]), (again, [*ours, "--out"])):
        code, stdout, stderr = run(*options, out)
        assert code == 0, stderr
        assert stdout == f"{out}\n"
    assert tree_hash(new) == tree_hash(old) == tree_hash(again)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_folder_stays_close_to_the_original(
    checkpoint: Factory, text: Path, tmp_path: Path, family: str, bits: int
) -> None:
    folder = checkpoint(family)
    code, _, stderr = run(
        "--model", folder, "--data", text, "--out", tmp_path / "q", "--bits", bits, "--seq-len", 64, "--group-size", 32
    )
    assert code == 0, stderr
    ids = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(1))
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    got = qquant.load_quantized(tmp_path / "q", dtype=torch.float32)(ids).logits
    assert (got - exact).norm() / exact.norm() < (0.2 if bits == 4 else 0.02)


def test_disk_and_memory_engines_choose_the_same_codes(tiny_qwen2: Path, tmp_path: Path) -> None:
    samples = samples_from_ids(torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0)))
    config = QuantizeConfig(bits=4, group_size=32)
    qquant.quantize_checkpoint(tiny_qwen2, samples, config, tmp_path / "disk")
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    qquant.quantize_model(model, samples, config)
    model.save_pretrained(tmp_path / "memory")
    disk, memory = qquant.load_quantized(tmp_path / "disk"), qquant.load_quantized(tmp_path / "memory")
    assert disk.state_dict().keys() == memory.state_dict().keys()
    for name, tensor in disk.state_dict().items():
        assert torch.equal(tensor, memory.state_dict()[name]), name


def test_progress_hears_of_every_module_once(tiny_qwen2: Path, tmp_path: Path) -> None:
    heard: list[ModuleRecord] = []
    config = QuantizeConfig(method="rtn", bits=8, group_size=32)
    log = qquant.quantize_checkpoint(tiny_qwen2, None, config, tmp_path / "q", on_module=heard.append)
    assert tuple(heard) == log.modules
    written = json.loads((tmp_path / "q" / "quant_log.json").read_text())
    assert [record["name"] for record in written["modules"]] == [record.name for record in heard]


def test_dry_run_shows_the_plan_and_writes_nothing(tiny_qwen2: Path, text: Path, tmp_path: Path) -> None:
    code, stdout, _ = run("--model", tiny_qwen2, "--data", text, "--out", tmp_path / "q", "--seq-len", 64,
                          "--group-size", 32, "--dry-run")  # fmt: skip
    assert code == 0
    assert "14 to 4 bits" in stdout
    assert list(tmp_path.iterdir()) == []


def test_planned_size_is_the_written_size(tiny_qwen2: Path, text: Path, tmp_path: Path) -> None:
    options = ["--model", tiny_qwen2, "--data", text, "--seq-len", 64, "--group-size", 32]
    _, plan, _ = run(*options, "--out", tmp_path / "q", "--dry-run")
    run(*options, "--out", tmp_path / "q")
    tensors = (tmp_path / "q" / "model.safetensors").stat().st_size / 1e6
    planned = float(plan.split("-> ")[1].split(" MB")[0])
    assert planned == pytest.approx(tensors, abs=0.02)  # the file's own header is not in the plan


def test_clashing_orders_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="act_group_aware and desc_act"):
        QuantizeConfig.from_dict({"act_group_aware": True, "desc_act": True})


def test_unknown_options_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="gruop_size"):
        QuantizeConfig.from_dict({"gruop_size": 32})


IMPOSSIBLE: dict[str, tuple[dict[str, object], str]] = {
    "more blocks than tensors": ({"num_hidden_layers": 10**12}, "asks for 1000000000000 blocks and 27 tensors"),
    "more blocks than a float": ({"num_hidden_layers": 10**400}, "every block must have tensors"),
    "dtype that is a number": ({"dtype": 5}, "dtype in .* must name a floating dtype, got 5"),
    "dtype of whole numbers": ({"torch_dtype": "int8"}, "torch_dtype in .* must name a floating dtype, got 'int8'"),
    "dtype that is a list": ({"dtype": [1]}, "must name a floating dtype"),
    "dtype that is something else of torch": ({"dtype": "load"}, "must name a floating dtype"),
}


@pytest.mark.parametrize(("keys", "words"), list(IMPOSSIBLE.values()), ids=list(IMPOSSIBLE))
def test_a_config_that_no_model_can_follow_is_refused_at_once(
    tiny_qwen2: Path, tmp_path: Path, keys: dict[str, object], words: str
) -> None:
    """Before transformers builds the configuration: even that may take for ever."""
    folder = tmp_path / "m"
    shutil.copytree(tiny_qwen2, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | keys))
    with pytest.raises(BadModelError, match=words):
        qquant.quantize_checkpoint(folder, None, QuantizeConfig(method="rtn", group_size=32), tmp_path / "q")
    with pytest.raises(BadModelError, match=words):
        load_model(folder, device=torch.device("cpu"))
    assert not (tmp_path / "q").exists()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_model_without_a_vocabulary_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_qwen2, folder)
    tensors = load_file(folder / SINGLE_NAME)
    empty = {name: tensors[name][:0].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors | empty, folder / SINGLE_NAME)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"vocab_size": 0, "pad_token_id": None}))
    with pytest.raises(BadModelError, match="vocab_size is 0"):
        qquant.quantize_checkpoint(folder, None, QuantizeConfig(method="rtn", group_size=32), tmp_path / "q")


def test_an_adapter_among_a_models_files_is_refused_with_the_remedy(tiny_qwen2: Path, tmp_path: Path) -> None:
    """With peft installed transformers would load it too, and without it nobody would hear of it."""
    folder = tmp_path / "m"
    shutil.copytree(tiny_qwen2, folder)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": null}')
    code, _, stderr = run("--model", folder, "--method", "rtn", "--group-size", 32, "--out", tmp_path / "q")
    assert code == 4
    assert "adapter_config.json; move the adapter into a folder of its own" in " ".join(stderr.split())
    assert not (tmp_path / "q").exists()
    with pytest.raises(BadModelError, match="--adapter"):
        load_model(folder, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("part", ["scales", "qweight", "qzeros"])
def test_a_layer_that_is_written_wrongly_is_never_published(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, dtype: torch.dtype
) -> None:
    plain = ShardWriter.write

    def broken(writer: ShardWriter, name: str, tensor: torch.Tensor) -> int:
        return plain(writer, name, tensor.flip(-1) if name == f"model.layers.1.mlp.up_proj.{part}" else tensor)

    monkeypatch.setattr(ShardWriter, "write", broken)
    samples = samples_from_ids(torch.randint(0, VOCAB, (2, 32), generator=torch.Generator().manual_seed(0)))
    config = QuantizeConfig(method="gptq", group_size=32, sym=False)
    with pytest.raises(NumericError, match="logits of the walk"):
        qquant.quantize_checkpoint(tiny_qwen2, samples, config, tmp_path / "q", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["q.unfinished"]
