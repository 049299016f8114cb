"""What goes beside the weights: a tokenizer that wins, Qwen's code by name, nothing from outside the folder."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import qquant
from qquant.config import QuantizeConfig
from qquant.errors import BadModelError
from qquant.model_folder import QWEN_CODE, load_tokenizer
from qquant.quantizing import quantize_checkpoint
from qquant.side_files import collect, tokenizer_folder
from tests.adapters import saved, trained
from tests.make_qwen_v1 import make_qwen_v1

AUTO_MAP = {
    "AutoConfig": "configuration_qwen.QWenConfig",
    "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
}


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A small folder with every kind of file that an official Qwen v1 folder has."""
    folder = make_qwen_v1(tmp_path / "official", hidden_size=64, kv_channels=32, intermediate_size=256)
    for name in QWEN_CODE:
        (folder / name).write_text("never run")
    for name in ("LICENSE", "NOTICE", "README.md", "setup.py", "weights.pt", "logo.png"):
        (folder / name).write_text(name)
    (folder / "assets").mkdir()
    return folder


def written(source: Path, target: Path, **options: Any) -> Path:
    target.mkdir()
    collect(source, **options).write(target, {"bits": 4})
    return target


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(read(path) | keys))


def test_an_official_qwen_folder_is_whole_without_copying_anything(official: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize_checkpoint(official, None, QuantizeConfig(method="rtn", group_size=32), out)
    ours = {"manifest.json", "quant_log.json", "quantize_config.json", "model.safetensors", "config.json"}
    carried = {"generation_config.json", "tokenizer_config.json", "qwen.tiktoken", "LICENSE", "NOTICE", *QWEN_CODE}
    assert {path.name for path in out.iterdir()} == ours | carried
    for name in carried:
        assert (out / name).read_bytes() == (official / name).read_bytes(), name
    config = read(out / "config.json")
    assert config.pop("quantization_config") == read(out / "quantize_config.json")
    assert config == read(official / "config.json")
    qquant.load_quantized(out)  # none of the code could even be parsed
    assert AutoTokenizer.from_pretrained(out)("state")["input_ids"]


def test_the_code_of_any_other_family_stays_behind(official: Path, tmp_path: Path) -> None:
    change(official / "config.json", model_type="qwen2")
    out = written(official, tmp_path / "out")
    assert not [path.name for path in out.iterdir() if path.suffix in (".py", ".cpp", ".cu")]
    assert "auto_map" not in read(out / "config.json")
    assert "auto_map" not in read(out / "tokenizer_config.json")


def test_auto_map_goes_where_a_file_that_it_names_is_missing(official: Path, tmp_path: Path) -> None:
    (official / "modeling_qwen.py").unlink()
    out = written(official, tmp_path / "out")
    assert "auto_map" not in read(out / "config.json")
    assert "auto_map" in read(out / "tokenizer_config.json")  # this one's file is there
    assert (out / "tokenization_qwen.py").is_file()


@pytest.mark.parametrize(
    "entry",
    [
        "../secret.Model",
        "owner/name--modeling_qwen.Model",
        "a.b.Model",
        "/etc/passwd.Model",
        "modeling_qwen",
        "",
        3,
        {},
    ],
    ids=repr,
)
def test_an_entry_of_auto_map_that_is_no_plain_file_here_drops_it(
    official: Path, tmp_path: Path, entry: object
) -> None:
    (tmp_path / "secret.py").write_text("secret")
    change(official / "config.json", auto_map=AUTO_MAP | {"AutoModel": entry})
    out = written(official, tmp_path / "out")
    assert "auto_map" not in read(out / "config.json")
    assert "secret.py" not in {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    "name", ["LICENSE", "qwen.tiktoken", "tokenizer_config.json", "modeling_qwen.py", "cpp_kernels.py", "config.json"]
)
def test_a_link_out_of_the_folder_is_refused(official: Path, tmp_path: Path, name: str) -> None:
    shutil.move(official / name, tmp_path / "elsewhere")
    (official / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadModelError, match=f"{name} is a link out of it"):
        collect(official)


def test_the_links_of_a_hub_cache_are_followed(official: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "abc"
    shutil.copytree(official, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    out = written(snapshot, tmp_path / "out")
    assert (out / "LICENSE").read_text() == "LICENSE"
    assert not (out / "LICENSE").is_symlink()


def test_a_missing_generation_config_says_only_what_is_certain(
    official: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    end = read(official / "generation_config.json")["eos_token_id"]
    (official / "generation_config.json").unlink()
    with caplog.at_level(logging.WARNING):
        out = written(official, tmp_path / "out")
    assert read(out / "generation_config.json") == {"eos_token_id": end, "pad_token_id": end}
    assert "chat_format" in caplog.text


def test_without_a_vocabulary_no_generation_config_is_made_up(
    official: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("generation_config.json", "qwen.tiktoken"):
        (official / name).unlink()
    assert not (written(official, tmp_path / "out") / "generation_config.json").exists()
    assert "none was written" in caplog.text


def test_no_generation_config_is_made_up_for_other_families(tiny_qwen2: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_qwen2, source)
    (source / "generation_config.json").unlink()
    assert not (written(source, tmp_path / "out") / "generation_config.json").exists()


def test_changes_reach_the_key_where_the_file_has_it(tiny_qwen2: Path, tmp_path: Path) -> None:
    out = written(tiny_qwen2, tmp_path / "flat", changes={"vocab_size": 7})
    assert read(out / "config.json")["vocab_size"] == 7
    change(tiny_qwen2 / "config.json", padded_vocab_size=512)
    both = written(tiny_qwen2, tmp_path / "both", changes={"vocab_size": 7})
    assert "padded_vocab_size" not in read(both / "config.json")
    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "config.json").write_text('{"model_type": "x", "text_config": {"vocab_size": 5, "layers": 2}}')
    changes = {"vocab_size": 7, "tie_word_embeddings": False}
    assert collect(nested, changes=changes).config == {
        "model_type": "x",
        "text_config": {"vocab_size": 7, "layers": 2},
        "tie_word_embeddings": False,
    }


def test_a_whole_tokenizer_beside_the_adapter_replaces_the_models(tiny_qwen2: Path, tmp_path: Path) -> None:
    source, adapter = tmp_path / "source", tmp_path / "adapter"
    shutil.copytree(tiny_qwen2, source)
    (source / "merges.txt").write_text("of the old vocabulary")
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    tokenizer.add_tokens(["zzyzx"])
    tokenizer.save_pretrained(adapter)
    (adapter / "generation_config.json").write_text("{}")
    (adapter / "LICENSE").write_text("x")
    (adapter / "code.py").write_text("x")
    out = written(source, tmp_path / "out", adapter=adapter)
    assert (out / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert (out / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert not any((out / name).exists() for name in ("merges.txt", "LICENSE", "code.py"))
    with tokenizer_folder(source, adapter) as folder:
        assert load_tokenizer(folder)("zzyzx")["input_ids"] == AutoTokenizer.from_pretrained(out)("zzyzx")["input_ids"]
        assert folder != source
    assert not folder.exists()


def test_a_part_of_a_tokenizer_beside_the_adapter_replaces_that_part(tiny_qwen2: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    out = written(tiny_qwen2, tmp_path / "out", adapter=adapter)
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "tokenizer.json").read_bytes() == (tiny_qwen2 / "tokenizer.json").read_bytes()


BROKEN = b"{% for x in %}"


@pytest.mark.parametrize("beside", ["model", "adapter"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen.tiktoken", "tokenizer in the model and its adapter cannot be loaded.*every file"),
        ("special_tokens_map.json", "cannot be loaded"),
        ("added_tokens.json", "cannot be loaded"),
        ("tokenizer_config.json", "not JSON"),
        ("chat_template.jinja", "chat template must be Jinja"),
    ],
)
def test_a_broken_file_of_a_tokenizer_is_never_published(
    official: Path, tmp_path: Path, beside: str, name: str, words: str
) -> None:
    """Rounding to nearest needs no tokenizer, and a folder that nothing can load helps nobody."""
    adapter = tmp_path / "adapter"
    if beside == "adapter":
        adapter = saved(trained(official, target_modules=["c_attn"]), adapter)
    ((official if beside == "model" else adapter) / name).write_bytes(BROKEN)
    config, tuned = QuantizeConfig(method="rtn", group_size=32), adapter if beside == "adapter" else None
    with pytest.raises(BadModelError, match=words):
        quantize_checkpoint(official, None, config, tmp_path / "out", adapter=tuned)
    assert not (tmp_path / "out").exists()


def test_a_broken_template_inside_the_config_is_found_too(official: Path) -> None:
    change(official / "tokenizer_config.json", chat_template={"default": "{{ messages }}", "tool": BROKEN.decode()})
    with pytest.raises(BadModelError, match="chat template must be Jinja"):
        collect(official).check_tokenizer()


def test_a_folder_without_a_tokenizer_has_none_to_check(official: Path) -> None:
    (official / "qwen.tiktoken").unlink()
    collect(official).check_tokenizer()


def test_ids_without_rows_are_only_refused_where_rows_were_taken_away(official: Path) -> None:
    """Of the small vocabulary's special tokens some have no row, and the model came so."""
    change(official / "config.json", vocab_size=300)
    collect(official).check_tokenizer()
    collect(official, changes={"vocab_size": 304}).check_tokenizer()
    with pytest.raises(BadModelError, match="296 rows and the tokenizer ids up to 495"):
        collect(official, changes={"vocab_size": 296}).check_tokenizer()


def test_an_adapter_without_a_tokenizer_leaves_the_models(tiny_qwen2: Path, tmp_path: Path) -> None:
    with tokenizer_folder(tiny_qwen2, tmp_path) as folder:
        assert folder == tiny_qwen2


def test_a_link_out_of_the_adapter_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(BadModelError, match="link out of it"):
        collect(tiny_qwen2, adapter=tmp_path / "adapter")
    with pytest.raises(BadModelError, match="link out of it"), tokenizer_folder(tiny_qwen2, tmp_path / "adapter"):
        pass
