"""Reading a model folder block by block: the same model as from_pretrained's, and nothing that does not belong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qquant import sources
from qquant.calibrate import samples_from_ids
from qquant.capture import capture, head
from qquant.code_keys import ignoring_code
from qquant.errors import BadModelError, UsageError
from qquant.hooks import first_output
from qquant.model_folder import QWEN_CODE, load_tokenizer, read_config, resolve_folder
from qquant.models.layouts import block_list
from qquant.shards import SINGLE_NAME, CheckpointReader
from qquant.sources import LoadedModel, StreamedModel, pick_device, pick_dtype
from tests.conftest import Factory

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


@torch.inference_mode()
def streamed_logits(source: Any, ids: list[int] = IDS) -> Tensor:
    """Logits of one sample with one block in memory at a time."""
    if isinstance(source, StreamedModel):
        source.load_outside(with_head=True)
    stream = capture(source, samples_from_ids([ids]), "cpu")
    hidden = stream.hidden[0]
    for index in range(len(block_list(source.model, source.layout))):
        hidden = first_output(source.load(index)(hidden, **stream.calls[0][index]))
        source.release(index)
    return head(source, hidden, "cpu")


@torch.inference_mode()
def whole_logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    logits: Tensor = model(input_ids=torch.tensor([IDS])).logits
    return logits


def edited(source: Path, target: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
    """A copy of a single-file checkpoint with other tensors and config values."""
    shutil.copytree(source, target)
    tensors = load_file(target / SINGLE_NAME)
    change(tensors)
    save_file(tensors, target / SINGLE_NAME, metadata={"format": "pt"})
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | config))
    return target


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral", "olmo2", "phi3", "starcoder2"])
def test_streamed_logits_are_those_of_the_whole_model(checkpoint: Factory, family: str) -> None:
    folder = checkpoint(family)
    assert torch.equal(streamed_logits(StreamedModel(folder)), whole_logits(folder))


@pytest.mark.parametrize("options", [{"tie": True}, {"shards": 3}, {"tie": True, "shards": 2}], ids=str)
def test_ties_and_shards_change_nothing(checkpoint: Factory, options: dict[str, Any]) -> None:
    folder = checkpoint("qwen2", **options)
    assert torch.equal(streamed_logits(StreamedModel(folder)), whole_logits(folder))


def test_a_sliding_window_reaches_the_blocks_that_have_one(checkpoint: Factory) -> None:
    folder = checkpoint("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert torch.equal(streamed_logits(StreamedModel(folder)), whole_logits(folder))


def test_a_model_in_memory_gives_its_own_logits(tiny_qwen2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2).eval()
    assert torch.equal(streamed_logits(LoadedModel(model)), whole_logits(tiny_qwen2))


def test_only_one_block_is_in_memory(tiny_qwen2: Path) -> None:
    source = StreamedModel(tiny_qwen2)
    assert all(parameter.is_meta for parameter in source.model.parameters())
    block = source.load(1)
    held = {name for name, parameter in source.model.named_parameters() if not parameter.is_meta}
    assert held == {f"model.layers.1.{name}" for name, _ in block.named_parameters()}
    source.release(1)
    assert all(parameter.is_meta for parameter in source.model.parameters())


def test_the_head_is_read_only_when_it_is_wanted(tiny_qwen2: Path) -> None:
    source = StreamedModel(tiny_qwen2)
    source.load_outside(with_head=False)
    assert source.model.get_parameter("lm_head.weight").is_meta
    source.load_outside(with_head=True)
    assert not source.model.get_parameter("lm_head.weight").is_meta
    source.release_outside()
    assert all(parameter.is_meta for parameter in source.model.parameters())


@pytest.mark.parametrize("options", [{}, {"tie": True}], ids=["untied", "tied"])
def test_of_an_embedding_only_the_rows_that_are_named_are_read(
    checkpoint: Factory, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen2", **options)
    embedding = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings()
    source = StreamedModel(folder)
    source.load_outside(with_head=False)
    monkeypatch.setattr(CheckpointReader, "read", lambda self, name: pytest.fail(f"{name} was read"))
    asked: list[int] = []
    rows = CheckpointReader.rows

    def noted(self: CheckpointReader, name: str, places: Sequence[int]) -> Tensor:
        asked.extend(places)
        return rows(self, name, places)

    monkeypatch.setattr(CheckpointReader, "rows", noted)
    ids = torch.tensor([IDS])
    module = source.model.get_submodule("model.embed_tokens")
    assert torch.equal(module(ids), embedding(ids))
    assert asked == sorted(set(IDS))
    assert source.model.get_parameter("model.embed_tokens.weight").is_meta


def test_what_an_embedding_does_with_its_rows_it_still_does(checkpoint: Factory) -> None:
    """Gemma scales them, and padding may be a row that is not among those read."""
    folder = checkpoint("gemma2", head_dim=16, pad_token_id=60)
    assert torch.equal(streamed_logits(StreamedModel(folder)), whole_logits(folder))
    source = StreamedModel(folder)
    source.load_outside(with_head=False)
    module = source.model.get_submodule("model.embed_tokens")
    assert isinstance(module, torch.nn.Embedding)
    module(torch.tensor([IDS]))
    assert module.padding_idx == 60


def test_a_row_that_is_not_finite_is_refused_when_it_is_read(tiny_qwen2: Path, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name][5, 3] = float("nan")

    with pytest.raises(BadModelError, match=name):
        streamed_logits(StreamedModel(edited(tiny_qwen2, tmp_path / "bad", spoil)))


def test_once_released_an_embedding_is_as_it_was(tiny_qwen2: Path) -> None:
    source = StreamedModel(tiny_qwen2)
    source.load_outside(with_head=False)
    source.release_outside()
    assert "forward" not in vars(source.model.get_submodule("model.embed_tokens"))
    assert torch.equal(streamed_logits(source), whole_logits(tiny_qwen2))


def test_a_block_that_is_not_there_is_not_read_ahead(tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(sources, "read_ahead", lambda entries: asked.append({entry.file.name for entry in entries}))
    source = StreamedModel(tiny_qwen2)
    for index in (-1, 1, 2):
        source.prefetch(index)
    assert asked == [{SINGLE_NAME}]


def test_a_tied_head_is_the_embedding_and_is_not_stored(checkpoint: Factory) -> None:
    source = StreamedModel(checkpoint("qwen2", tie=True))
    source.load_outside(with_head=True)
    assert source.model.get_parameter("lm_head.weight") is source.model.get_parameter("model.embed_tokens.weight")
    assert "lm_head.weight" not in source.stored_names()


DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}


@pytest.mark.parametrize("stored", list(DTYPES), ids=str)
def test_the_compute_dtype_is_the_stored_one_but_for_float16_on_a_cpu(checkpoint: Factory, stored: torch.dtype) -> None:
    assert StreamedModel(checkpoint("qwen2", dtype=stored)).dtype == DTYPES[stored]


def test_bfloat16_streams_as_the_whole_model_computes(checkpoint: Factory) -> None:
    folder = checkpoint("qwen2", dtype=torch.bfloat16)
    assert torch.equal(streamed_logits(StreamedModel(folder)), whole_logits(folder, torch.bfloat16))


def test_a_tied_head_that_is_stored_too_is_accepted_if_it_is_the_same(checkpoint: Factory, tmp_path: Path) -> None:
    def add_head(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    tied = checkpoint("qwen2", tie=True)
    folder = edited(tied, tmp_path / "same", add_head)
    assert torch.equal(streamed_logits(StreamedModel(folder)), whole_logits(tied))


def test_a_computed_buffer_of_old_checkpoints_is_left_out_with_a_warning(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = edited(tiny_llama, tmp_path / "old", lambda tensors: tensors.update({name: torch.ones(8)}))
    assert name not in StreamedModel(folder).stored_names()
    assert name in caplog.text


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensor})


UP = "model.layers.1.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], dict[str, Any], str]] = {
    "tensor missing": (drop(UP), {}, f"tensor {UP} is missing"),
    "norm missing": (drop("model.norm.weight"), {}, "model.norm.weight is missing"),
    "tensor unexpected": (put("model.extra", torch.ones(2)), {}, "model.extra"),
    "shape unexpected": (put(UP, torch.ones(64, 128)), {}, r"\[128, 64\] by config.json"),
    "integers": (put(UP, torch.ones(128, 64, dtype=torch.int8)), {}, "must not be stored as I8"),
    "packed without a config": (put(UP.replace("weight", "qweight"), torch.ones(2)), {}, "quantized already"),
    "packed by its config": (dict, {"quantization_config": {"quant_method": "awq"}}, "quantized already"),
    "another config": (dict, {"num_hidden_layers": 3, "layer_types": None}, "missing"),
    "config against itself": (dict, {"num_hidden_layers": 3}, "cannot be built.*layer_types"),
    "no such activation": (dict, {"hidden_act": "nosuch"}, "cannot|can be built"),
    "text for a size": (dict, {"hidden_size": "wide"}, "cannot be built.*wide"),
    "a negative size": (dict, {"hidden_size": -4}, "cannot|can be built"),
    "unknown type": (dict, {"model_type": "nosuch"}, "cannot be built.*nosuch"),
    "no language model": (dict, {"model_type": "vit"}, "no causal language model"),
    "tied, but different": (dict, {"tie_word_embeddings": True}, "two different tensors"),
}


@pytest.mark.parametrize(("change", "config", "words"), list(FAULTS.values()), ids=list(FAULTS))
def test_a_folder_that_does_not_fit_its_config_is_refused(
    tiny_qwen2: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], object],
    config: dict[str, Any],
    words: str,
) -> None:
    folder = edited(tiny_qwen2, tmp_path / "bad", change, **config)
    with pytest.raises(BadModelError, match=words):
        StreamedModel(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_by_name_when_it_is_read(
    tiny_qwen2: Path, tmp_path: Path, value: float
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[UP][3, 5] = value

    source = StreamedModel(edited(tiny_qwen2, tmp_path / "bad", spoil))
    source.load(0)
    with pytest.raises(BadModelError, match=UP):
        source.load(1)
    with pytest.raises(BadModelError, match=UP):
        list(source.finite_chunks(UP))


@pytest.mark.parametrize("content", ["{", "[]", '"text"', "{}", '{"model_type": 3}'])
def test_a_config_that_is_no_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadModelError, match="cannot be built"):
        read_config(tmp_path)


def test_code_beside_a_model_is_never_run(tiny_qwen2: Path, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    folder = edited(tiny_qwen2, tmp_path / "m", dict, model_type="nosuch", auto_map=auto_map)
    (folder / "code.py").write_text(f"open({str(canary)!r}, 'w')")
    with pytest.raises(BadModelError, match=r"auto_map in config\.json of .* names code.*--ignore-code"):
        read_config(folder)
    with ignoring_code(), pytest.raises(BadModelError, match="cannot be built"):
        read_config(folder)
    assert not canary.exists()


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModelError, match=r"must hold config\.json"):
        read_config(tmp_path)
    with pytest.raises(BadModelError, match="local folder"):
        read_config(tmp_path / "nosuch")


def test_a_name_is_a_folder_or_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert resolve_folder("~/m") == tmp_path / "m"
    (tmp_path / "file").write_text("x")
    for name in (str(tmp_path / "file"), str(tmp_path / "nosuch"), "nosuch", "a/b/c", ""):
        with pytest.raises(BadModelError, match="folder or a hub id"):
            resolve_folder(name)


def test_a_hub_id_that_cannot_be_fetched_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError("cannot reach\nthe hub")

    monkeypatch.setattr("qquant.model_folder.snapshot_download", refuse)
    with pytest.raises(BadModelError, match=r"owner/name is no local folder.*cannot reach the hub$"):
        resolve_folder("owner/name")


def test_of_code_only_the_files_that_qwen_carries_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("qquant.model_folder.snapshot_download", lambda _, **options: asked.update(options) or tmp_path)
    assert resolve_folder("owner/name") == tmp_path
    patterns = set(asked["allow_patterns"])
    assert patterns > set(QWEN_CODE)  # by name; they are copied and never run
    assert not any("*" in name or "/" in name for name in QWEN_CODE)
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in patterns - set(QWEN_CODE))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, tiny_qwen2: Path) -> None:
    shutil.copy(tiny_qwen2 / "config.json", tmp_path)
    with pytest.raises(BadModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_devices_and_dtypes_have_names() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")
    assert (pick_dtype("auto"), pick_dtype("bfloat16")) == (None, torch.bfloat16)
    with pytest.raises(UsageError, match="dtype must be"):
        pick_dtype("int4")
    with pytest.raises(UsageError, match="device must be"):
        pick_device("nosuch")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="--device cpu"):
            pick_device("cuda:1")


@pytest.mark.parametrize(
    ("dtype", "capability", "told"),
    [(torch.bfloat16, "AVX2", True), (torch.bfloat16, "AVX512", False), (torch.float32, "AVX2", False)],
)
def test_a_dtype_that_is_slow_on_this_processor_is_told(
    dtype: torch.dtype, capability: str, told: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sources, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("qquant.telling.said", set())
    sources.tell_slow_dtype(dtype, torch.device("cpu"))
    assert ("--dtype float32 is faster" in caplog.text) == told
    sources.tell_slow_dtype(dtype, torch.device("cuda"))
    assert len(caplog.records) == told
