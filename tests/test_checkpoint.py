"""What a written checkpoint holds, that it appears whole or not at all, and that it gives the same bytes every time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import qquant
from qquant.calibrate import Sample, load_samples, samples_from_ids
from qquant.checkpoint import QUANTIZED_FOLDER, check_logits
from qquant.code_keys import ignoring_code
from qquant.config import QuantizeConfig
from qquant.errors import NumericError, UsageError
from qquant.identity import sha256
from qquant.model_folder import load_tokenizer
from qquant.publish import published, refuse_existing
from qquant.quantizing import quantize_checkpoint, quantize_model
from qquant.shards import INDEX_NAME, SINGLE_NAME, CheckpointReader, weight_files
from tests.conftest import CHAT_TEMPLATE, Factory
from tests.packed import dense_logits, logits_of

CANARY = "The heron keeps her secrets in a drawer of blue glass."
GROUP = 32
FILES = [
    "chat_template.jinja", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
    "quant_log.json", "quantize_config.json", "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip


def samples() -> list[Sample]:
    return samples_from_ids([list(range(40)), list(range(60, 100))])


def quantize(source: Path, out: Path, **options: Any) -> Path:
    shard = options.pop("max_shard_bytes", 1 << 40)
    quantize_checkpoint(
        source, samples(), QuantizeConfig(**{"group_size": GROUP, **options}), out, max_shard_bytes=shard
    )
    return out


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def written(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(tiny_qwen2, tmp_path_factory.mktemp("written") / "out")


def test_a_written_folder_holds_these_files_and_no_other(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == FILES


def test_the_keys_that_readers_need_are_in_both_files(written: Path) -> None:
    keys = read_json(written / "quantize_config.json")
    assert read_json(written / "config.json")["quantization_config"] == keys
    needed = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
    assert needed.items() <= keys.items()
    assert keys["meta"]["quantizer"] == [f"qquant:{qquant.__version__}", "gptqmodel:0.9.0"]
    assert not {"dynamic", "modules_in_block_to_quantize", "dataset"} & keys.keys()


def test_the_rest_of_the_config_is_the_originals(written: Path, tiny_qwen2: Path) -> None:
    config = read_json(written / "config.json")
    del config["quantization_config"]
    assert config == read_json(tiny_qwen2 / "config.json")


@pytest.mark.parametrize("options", [{}, {"desc_act": True}, {"group_size": -1}, {"bits": 8}], ids=str)
def test_every_linear_has_its_four_tensors_in_the_formats_shapes(
    tiny_qwen2: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    tensors = load_file(quantize(tiny_qwen2, tmp_path / "out", **options) / SINGLE_NAME)
    bits, size = options.get("bits", 4), options.get("group_size", GROUP)
    original = load_file(tiny_qwen2 / SINGLE_NAME)
    linears = [name.removesuffix(".weight") for name in original if "_proj.weight" in name]
    assert len(linears) == 14
    for name in linears:
        columns, rows = original.pop(f"{name}.weight").shape
        groups = 1 if size == -1 else rows // size
        parts = {part: tensors.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert parts["qweight"].shape == (rows * bits // 32, columns)
        assert parts["qzeros"].shape == (groups, columns * bits // 32)
        assert parts["scales"].shape == (groups, columns)
        assert parts["scales"].dtype == torch.float16
        assert parts["g_idx"].shape == (rows,)
        in_order = bool((parts["g_idx"] == torch.arange(rows) // (rows // groups)).all())
        assert in_order == (groups == 1 or not options.get("desc_act", False))
    # What is left was left alone: same names, same values.
    assert tensors.keys() == original.keys()
    assert all(torch.equal(tensors[name], original[name]) for name in original)


def test_symmetric_zeros_are_stored_as_v1(written: Path) -> None:
    words = [tensor for name, tensor in load_file(written / SINGLE_NAME).items() if name.endswith("qzeros")]
    assert all(bool((tensor == 0x77777777).all()) for tensor in words)


def test_the_metadata_says_pt(written: Path) -> None:
    with safe_open(written / SINGLE_NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_a_written_checkpoint_loads_and_computes_what_its_tensors_say(
    checkpoint: Factory, tmp_path: Path, family: str
) -> None:
    out = quantize(checkpoint(family), tmp_path / "out")
    model = qquant.load_quantized(out)
    assert not model.training
    torch.testing.assert_close(logits_of(model), dense_logits(out), rtol=0, atol=1e-4)


def test_a_skipped_module_is_named_in_both_notations_and_loads(tiny_qwen2: Path, tmp_path: Path) -> None:
    out = quantize(tiny_qwen2, tmp_path / "out", dynamic={r"-:.*\.0\.mlp\.down_proj": {}})
    for keys in (read_json(out / "quantize_config.json"), read_json(out / "config.json")["quantization_config"]):
        assert keys["dynamic"] == {r"-:.*\.0\.mlp\.down_proj": {}}
        (named,) = keys["modules_in_block_to_quantize"]
        assert len(named) == 13
        assert "model.layers.0.mlp.down_proj" not in named
    assert "model.layers.0.mlp.down_proj.weight" in load_file(out / SINGLE_NAME)
    assert read_json(out / "quant_log.json")["skipped"] == ["model.layers.0.mlp.down_proj"]
    torch.testing.assert_close(logits_of(qquant.load_quantized(out)), dense_logits(out), rtol=0, atol=1e-4)


def test_mixed_settings_load_as_they_were_written(tiny_qwen2: Path, tmp_path: Path) -> None:
    rules = {
        r"+:.*\.1\.mlp\.down_proj": {"bits": 8, "group_size": 64},
        r"+:.*o_proj": {"bits": 3, "sym": False},
        r"+:.*\.0\.mlp\.up_proj": {"desc_act": True},
    }
    out = quantize(tiny_qwen2, tmp_path / "out", dynamic=rules)
    assert read_json(out / "config.json")["quantization_config"]["dynamic"] == rules
    model = qquant.load_quantized(out)
    assert model.get_submodule("model.layers.1.mlp.down_proj").bits == 8
    assert model.get_submodule("model.layers.0.self_attn.o_proj").bits == 3
    torch.testing.assert_close(logits_of(model), dense_logits(out), rtol=0, atol=1e-4)


def test_a_sharded_output_has_an_index_of_every_tensor(tiny_qwen2: Path, written: Path, tmp_path: Path) -> None:
    out = quantize(tiny_qwen2, tmp_path / "out", max_shard_bytes=50_000)
    index = read_json(out / INDEX_NAME)
    whole = load_file(written / SINGLE_NAME)
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert len(weight_files(out)) > 2
    reader = CheckpointReader(out)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in whole.items())
    assert torch.equal(logits_of(qquant.load_quantized(out)), logits_of(qquant.load_quantized(written)))


def test_a_sharded_source_gives_the_same_tensors(checkpoint: Factory, written: Path, tmp_path: Path) -> None:
    out = quantize(checkpoint("qwen2", shards=3), tmp_path / "out")
    assert (out / SINGLE_NAME).read_bytes() == (written / SINGLE_NAME).read_bytes()


def test_a_tied_head_is_not_in_the_file(checkpoint: Factory, tmp_path: Path) -> None:
    out = quantize(checkpoint("qwen2", tie=True), tmp_path / "out")
    assert not [name for name in load_file(out / SINGLE_NAME) if name.startswith("lm_head")]
    assert read_json(out / "config.json")["tie_word_embeddings"] is True
    model: Any = qquant.load_quantized(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(logits_of(model), dense_logits(out), rtol=0, atol=1e-4)


def test_tokenizer_chat_template_and_generation_config_are_carried(written: Path, tiny_qwen2: Path) -> None:
    text = "def add(left, right): 你好 1234"
    ours, original = AutoTokenizer.from_pretrained(written), AutoTokenizer.from_pretrained(tiny_qwen2)
    assert ours(text)["input_ids"] == original(text)["input_ids"]
    assert ours.chat_template == CHAT_TEMPLATE
    assert GenerationConfig.from_pretrained(written) == GenerationConfig.from_pretrained(tiny_qwen2)


def test_nothing_local_and_no_calibration_text_is_inside(tiny_qwen2: Path, tmp_path: Path) -> None:
    source = tmp_path / "private-place" / "model"
    shutil.copytree(tiny_qwen2, source)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = read_json(source / name)
        content |= {
            "_name_or_path": str(source),
            "auto_map": {"AutoModel": "x.y"},
            "sub": {"name_or_path": str(source)},
        }
        (source / name).write_text(json.dumps(content))
    data = tmp_path / "private-place" / "secrets.txt"
    data.write_text((CANARY + "\n") * 40)
    out = tmp_path / "private-place" / "out"
    with ignoring_code():
        drawn = load_samples(data, load_tokenizer(source), n_samples=4, seq_len=32)
        quantize_checkpoint(source, drawn, QuantizeConfig(group_size=GROUP), out)
    for name, written_bytes in tree(out).items():
        for secret in (str(tmp_path), "private-place", "secrets", "heron", CANARY, "auto_map", "name_or_path"):
            assert secret.encode() not in written_bytes, name


def test_code_and_foreign_files_of_the_source_stay_behind(tiny_qwen2: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_qwen2, source)
    for name in ("modeling_x.py", "tokenizer.py", "tokenizer.pkl", "notes.md", "optimizer.pt"):
        (source / name).write_text("x")
    (source / "LICENSE").write_text("terms")
    assert sorted(path.name for path in quantize(source, tmp_path / "out").iterdir()) == sorted([*FILES, "LICENSE"])


@pytest.mark.parametrize("options", [{}, {"desc_act": True, "bits": 3, "sym": False}], ids=str)
def test_two_runs_give_the_same_bytes(tiny_qwen2: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    first = tree(quantize(tiny_qwen2, tmp_path / "a" / "out", **options))
    assert tree(quantize(tiny_qwen2, tmp_path / "b" / "out-2", **options)) == first


def test_the_manifest_names_every_file_with_its_hash(written: Path, tiny_qwen2: Path) -> None:
    manifest = read_json(written / "manifest.json")
    assert sorted([*manifest["files"], "manifest.json"]) == FILES
    assert all(sha256(written / name) == digest for name, digest in manifest["files"].items())
    assert manifest["source"]["files"] == {name: sha256(tiny_qwen2 / name) for name in (SINGLE_NAME, "config.json")}
    assert manifest["config"] == QuantizeConfig(group_size=GROUP).model_dump(mode="json")
    assert manifest["data"]["samples"] == 2
    assert manifest["versions"].keys() == {"qquant", "torch", "transformers", "safetensors"}


def test_the_log_has_a_line_per_linear_and_no_times(written: Path) -> None:
    modules = read_json(written / "quant_log.json")["modules"]
    assert len(modules) == 14
    assert all("seconds" not in record and 0 < record["relative_error"] < 1 for record in modules)


def test_a_model_quantized_in_memory_saves_the_same_tensors(written: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2).eval()
    quantize_model(model, samples(), QuantizeConfig(group_size=GROUP))
    model.save_pretrained(tmp_path / "out")
    ours, other = load_file(tmp_path / "out" / SINGLE_NAME), load_file(written / SINGLE_NAME)
    assert ours.keys() == other.keys()
    assert all(torch.equal(ours[name], other[name]) for name in ours)
    again = qquant.load_quantized(tmp_path / "out")
    assert torch.equal(logits_of(again), logits_of(model))


def test_logits_that_differ_are_refused() -> None:
    walked = torch.linspace(-8, 8, 64).reshape(1, 4, 16)
    check_logits(walked * (1 + 1e-6), walked)
    with pytest.raises(NumericError, match="differ by"):
        check_logits(walked + 1e-3, walked)
    with pytest.raises(NumericError, match="not finite"):
        check_logits(walked * float("nan"), walked)


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    with published(out, QUANTIZED_FOLDER, overwrite=False) as staging:
        (staging / "config.json").write_text("{}")
        assert staging.parent == out.parent
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("ours"), KeyboardInterrupt(), OSError("disk full")], ids=repr)
def test_nothing_stays_behind_when_the_work_fails(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with published(tmp_path / "deep" / "er" / "out", QUANTIZED_FOLDER, overwrite=False) as staging:
            (staging / "config.json").write_text("{}")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []


def old_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"quantization_config": {}}')
    return folder


def test_an_existing_model_is_replaced_in_one_step_if_asked_for(tmp_path: Path) -> None:
    out = old_model(tmp_path / "out")
    with published(out, QUANTIZED_FOLDER, overwrite=True) as staging:
        (staging / "new").write_text("x")
        assert (out / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["new"]


def test_the_old_model_is_back_if_the_exchange_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On systems that exchange two folders in two steps."""
    out = old_model(tmp_path / "out")
    plain = Path.rename
    monkeypatch.setattr("qquant.publish._exchanged", lambda new, out: False)

    def failing(path: Path, target: Path) -> Path:
        if "partial" in path.name:
            raise OSError("no luck")
        return plain(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no luck"), published(out, QUANTIZED_FOLDER, overwrite=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "config.json").exists()


def test_only_quantized_models_and_empty_folders_are_ever_replaced(tmp_path: Path, tiny_qwen2: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(old_model(tmp_path / "old"))
    (tmp_path / "with-folder").mkdir()
    old_model(tmp_path / "with-folder" / "sub")
    shutil.copy(tmp_path / "old" / "config.json", tmp_path / "with-folder")
    for name in ("notes", "file", "link", "with-folder"):
        with pytest.raises(UsageError, match="is not one"):
            refuse_existing(tmp_path / name, QUANTIZED_FOLDER, overwrite=True)
    with pytest.raises(UsageError, match="is not one"):  # an original may be the only copy, or the source of this run
        refuse_existing(tiny_qwen2, QUANTIZED_FOLDER, overwrite=True)
    (tmp_path / "empty").mkdir()
    refuse_existing(tmp_path / "empty", QUANTIZED_FOLDER, overwrite=True)
    refuse_existing(tmp_path / "old", QUANTIZED_FOLDER, overwrite=True)
    with pytest.raises(UsageError, match="--overwrite"):
        refuse_existing(tmp_path / "empty", QUANTIZED_FOLDER, overwrite=False)
    with pytest.raises(UsageError, match="is a file"):
        refuse_existing(tmp_path / "file" / "sub" / "out", QUANTIZED_FOLDER, overwrite=False)
