"""Defects to plant in a sound checkpoint, each with the check that must find it; for tests and the interop check.

Every defect takes a copy of a folder with one ``model.safetensors`` and Qwen2's names, by any tool, and damages it.
"""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qquant.packing import pack_zeros, unpack_zeros

LINEAR = "model.layers.0.mlp.up_proj"
ATTENTION = "model.layers.1.self_attn.o_proj"
NORM = "model.layers.1.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PROSE = "She had kept the letters of all these years in a drawer that nobody but her ever opened."
CHINESE = "她把这些年所有的信都放在一个除了她谁也没有打开过的抽屉里。"
Change = Callable[[Path], object]


@dataclass(frozen=True)
class Defect:
    """One way to damage a folder."""

    check: str
    """Name of the check that is meant to find it."""
    subject: str
    """A part of the subject that it must name."""
    plant: Change
    level: str = "problem"
    needs: str = ""
    """What the folder must be: "sym", "asym", "in order", "shuffled", "manifest"; empty: nothing."""


def suits(folder: Path, defect: Defect) -> bool:
    """Whether a defect can be planted in a folder."""
    keys = json.loads((folder / "config.json").read_text())["quantization_config"]
    sym, shuffled = bool(keys["sym"]), bool(keys["desc_act"])
    return {
        "": True,
        "sym": sym,
        "asym": not sym,
        "in order": not shuffled,
        "shuffled": shuffled,
        "manifest": (folder / "manifest.json").exists(),
    }[defect.needs]


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """Change a JSON file, made if it is not there."""

    def plant(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        change(content)
        path.write_text(json.dumps(content))

    return plant


def config(**changes: Any) -> Change:
    """Set keys of config.json."""
    return edit("config.json", lambda content: content.update(changes))


def keys(*, only: str = "", **changes: Any) -> Change:
    """Set quantization keys where they stand, or in one file only; None removes a key."""

    def update(content: dict[str, Any]) -> None:
        content.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            content.pop(key)

    def plant(folder: Path) -> None:
        if only != "quantize_config.json":
            edit("config.json", lambda content: update(content["quantization_config"]))(folder)
        if only != "config.json" and (only or (folder / "quantize_config.json").exists()):
            edit("quantize_config.json", update)(folder)

    return plant


def text(name: str, content: str | bytes) -> Change:
    """Write a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    """Change the stored tensors."""

    def plant(folder: Path) -> None:
        stored = load_file(folder / SINGLE)
        change(stored)
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / SINGLE, {"format": "pt"})

    return plant


def without(name: str) -> Change:
    """Drop a tensor."""
    return tensors(lambda stored: stored.pop(name))


def one(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    """Change one tensor."""
    return tensors(lambda stored: stored.update({name: change(stored[name])}))


def put(name: str, value: float, *place: int) -> Change:
    """Set one number of a tensor."""

    def change(tensor: Tensor) -> Tensor:
        tensor[place] = value
        return tensor

    return one(name, change)


def whole(name: str, value: float) -> Change:
    """Set every number of a tensor."""
    return one(name, lambda tensor: torch.full_like(tensor, value))


def both(*changes: Change) -> Change:
    """One after the other."""

    def plant(folder: Path) -> None:
        for change in changes:
            change(folder)

    return plant


def zeros(change: Callable[[Tensor], object]) -> Change:
    """Change the decoded zeros of a linear; its v1 file stores one less."""

    def repack(stored: Tensor) -> Tensor:
        found = unpack_zeros(stored, 4)
        change(found)
        return pack_zeros(found, 4)

    return one(f"{LINEAR}.qzeros", repack)


def plain(folder: Path) -> None:
    """Store a linear both packed and plain."""
    content = json.loads((folder / "config.json").read_text())
    shape = content["intermediate_size"], content["hidden_size"]
    tensors(lambda stored: stored.update({f"{LINEAR}.weight": torch.ones(shape)}))(folder)


def only_plain(folder: Path) -> None:
    """Store a linear plain, and say so nowhere."""
    plain(folder)
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        without(f"{LINEAR}.{part}")(folder)


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the header of the weight file and leave its bytes."""

    def plant(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + length])
        change(content)
        new = json.dumps(content).encode()
        (folder / SINGLE).write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])

    return plant


def cut(folder: Path) -> None:
    """Lose the end of the weight file."""
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-64])


def indexed(change: Callable[[dict[str, str], Path], object]) -> Change:
    """Rename the weight file to a shard with an index, and change what the index says."""

    def plant(folder: Path) -> None:
        shard = folder / "model-00001-of-00001.safetensors"
        names = list(load_file(folder / SINGLE))
        (folder / SINGLE).rename(shard)
        places = dict.fromkeys(names, shard.name)
        change(places, folder)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return plant


def link_out(folder: Path) -> None:
    """A link to something beside the folder."""
    (folder.parent / "outside.txt").write_text("outside")
    (folder / "notes.txt").symlink_to(folder.parent / "outside.txt")


def moved_out(folder: Path) -> None:
    """A weight file that is a link out of the folder."""
    (folder / SINGLE).rename(folder.parent / "elsewhere.safetensors")
    (folder / SINGLE).symlink_to(folder.parent / "elsewhere.safetensors")


def archive(folder: Path) -> None:
    """What torch.save writes, under a harmless name."""
    with zipfile.ZipFile(folder / "extra.data", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02.")


def token_beyond(folder: Path) -> None:
    """A token whose id has no row."""

    def add(content: dict[str, Any]) -> None:
        like = content["added_tokens"][0]
        content["added_tokens"].append({**like, "id": 100_000, "content": "<|beyond|>"})

    edit("tokenizer.json", add)(folder)


def chat(template: str) -> Change:
    """Set the chat template."""
    return text("chat_template.jinja", template)


def hashed(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the manifest."""
    return edit("manifest.json", change)


def logged(**changes: Any) -> Change:
    """Change what the log says of its first module."""
    return edit("quant_log.json", lambda content: content["modules"][0].update(changes))


def nested(depth: int) -> str:
    """JSON so many lists deep."""
    return '{"a":' + "[" * depth + "]" * depth + "}"


def moved_group(index: Tensor) -> Tensor:
    """One column moved from its group to another."""
    index[0] = (index[0] + 1) % (int(index.max()) + 1)
    return index


def swapped_groups(index: Tensor) -> Tensor:
    """Two columns that changed groups."""
    first, last = int(index[0]), int(index[-1])
    index[0], index[-1] = last, first
    return index


def lost_group(stored: dict[str, Tensor]) -> None:
    """A scale that became zero."""
    stored[f"{LINEAR}.scales"][0, 3] = 0


def hole(words: Tensor) -> Tensor:
    """Two rows of words that were never written."""
    words[:2] = 0
    return words


def blank(*, shift: int) -> Callable[[Tensor], Tensor]:
    """8 kB of a matrix that were never written, from so many numbers behind the start of its tenth row on."""

    def change(matrix: Tensor) -> Tensor:
        start = 9 * matrix.shape[1] + shift
        matrix.view(-1)[start : start + 8192 // matrix.element_size()] = 0
        return matrix

    return change


def flipped(scales: Tensor) -> Tensor:
    """One bit of a float16 exponent turned: the median scale times 2^16."""
    scales[0, 0] = scales.abs().median() * 2**16
    return scales


def other_version(folder: Path) -> None:
    """The tag of the version in which the zeros are not stored."""
    content = json.loads((folder / "config.json").read_text())["quantization_config"]
    other = "gptq" if content["checkpoint_format"] == "gptq_v2" else "gptq_v2"
    keys(**{key: other for key in ("checkpoint_format", "format") if key in content})(folder)


def unnamed_writer(folder: Path) -> None:
    """Nobody vouches for the rule of asymmetric zeros."""
    keys(meta={})(folder)


DEFECTS: dict[str, Defect] = {
    "a pickle beside the weights": Defect("files", "pytorch_model.bin", text("pytorch_model.bin", b"x")),
    "a pickle in a folder": Defect(
        "files",
        "old/optimizer.pt",
        both(lambda folder: (folder / "old").mkdir(), text("old/optimizer.pt", b"x")),
    ),
    "a pickle by another name": Defect("files", "notes.data", text("notes.data", pickle.dumps([1]))),
    "an archive of torch": Defect("files", "extra.data", archive),
    "a link out of the folder": Defect("files", "notes.txt", link_out),
    "weights that are a link out": Defect("files", SINGLE, moved_out),
    "a link to nothing": Defect("files", "lost.txt", lambda folder: (folder / "lost.txt").symlink_to("nowhere")),
    "a pipe": Defect("files", "chat_template.json", lambda folder: os.mkfifo(folder / "chat_template.json")),
    "names that differ in capitals": Defect("files", "onfig.json", text("Config.json", "{}"), "warning"),
    "a key twice": Defect("json", "generation_config.json", text("generation_config.json", '{"a": 1, "a": 2}')),
    "NaN as JSON": Defect("json", "generation_config.json", text("generation_config.json", '{"temperature": NaN}')),
    "JSON cut off": Defect("json", "tokenizer_config.json", text("tokenizer_config.json", '{"a": ')),
    "JSON too deep": Defect("json", "extra.json", text("extra.json", nested(5000))),
    "JSON that is a list": Defect("json", "special_tokens_map.json", text("special_tokens_map.json", "[]")),
    "a module": Defect("code", "modeling_custom.py", text("modeling_custom.py", "import os")),
    "a library": Defect("code", "data.blob", text("data.blob", b"\x7fELF\x02\x01")),
    "a script without an ending": Defect("code", "setup", text("setup", "#!/bin/sh\n")),
    "auto_map": Defect("code", "config.json: auto_map", config(auto_map={"AutoModelForCausalLM": "m.Model"})),
    "auto_map of the tokenizer": Defect(
        "code",
        "tokenizer_config.json: auto_map",
        edit("tokenizer_config.json", lambda content: content.update(auto_map={"AutoTokenizer": ["t.T", None]})),
    ),
    "trust_remote_code": Defect(
        "code", "quantization_config.trust_remote_code", keys(only="config.json", trust_remote_code=True)
    ),
    "attention from a hub": Defect("code", "_attn_implementation", config(_attn_implementation="someone/kernels")),
    "attention from a hub, inside": Defect(
        "code", "_attn_implementation_internal", config(_attn_implementation_internal="someone/kernels")
    ),
    "a pipeline of its own": Defect("code", "custom_pipelines", config(custom_pipelines={"x": {"impl": "p.P"}})),
    "other files to be read": Defect("code", "config.json", config(configuration_files=["config.4.0.0.json"])),
    "no quantization keys": Defect(
        "keys",
        "quantization_config",
        both(
            edit("config.json", lambda content: content.pop("quantization_config")),
            lambda folder: (folder / "quantize_config.json").unlink(),
        ),
    ),
    "keys that only AutoGPTQ sees": Defect(
        "keys",
        "quantization_config",
        edit("config.json", lambda content: content.pop("quantization_config")),
        "warning",
    ),
    "bits as text": Defect("keys", "quantization_config", keys(bits="four")),
    "five bits": Defect("keys", "quantization_config", keys(bits=5)),
    "another method": Defect("keys", "quantization_config", keys(quant_method="awq")),
    "a key that nobody knows": Defect("keys", "quantization_config", keys(zero_shift=3)),
    "two group sizes": Defect("keys", "quantization_config", keys(only="quantize_config.json", group_size=16)),
    "two opinions on the head": Defect("keys", "lm_head", keys(only="quantize_config.json", lm_head=True)),
    "two formats": Defect("keys", "quantization_config", keys(format="gptq", checkpoint_format="gptq_v2")),
    "another packing": Defect("keys", "quantization_config", keys(pack_dtype="int16")),
    "Marlin's layout": Defect("keys", "quantization_config", keys(is_marlin_format=True)),
    "a rule that takes for ever": Defect(
        "keys", "quantization_config", keys(dynamic={"+:(model|layers|mlp|.)+x+$": {"bits": 4}})
    ),
    "a rule that is no pattern": Defect("keys", "quantization_config", keys(dynamic={"+:(": {"bits": 4}})),
    "a rule that leaves packed alone": Defect("keys", "dynamic", keys(dynamic={"-:.*up_proj": {}})),
    "a list without what is packed": Defect(
        "keys", "modules_in_block_to_quantize", keys(modules_in_block_to_quantize=[["mlp.down_proj"]])
    ),
    "a head that is said to be packed": Defect("keys", "lm_head", keys(lm_head=True)),
    "a plain linear that no key names": Defect("keys", "dynamic", only_plain),
    "zeros whose writer is not named": Defect("keys", "meta.quantizer", unnamed_writer, "warning", "asym"),
    "a weight file cut off": Defect("shards", "", cut),
    "a header that is no JSON": Defect("shards", "", text(SINGLE, b"\x08\0\0\0\0\0\0\0{{{{{{{{")),
    "a header longer than the file": Defect("shards", "", text(SINGLE, b"\xff" * 7 + b"\x7f{}")),
    "tensors that overlap": Defect(
        "shards", "", header(lambda content: content[NORM].update(data_offsets=content[EMBEDDING]["data_offsets"]))
    ),
    "a shape larger than the file": Defect(
        "shards", "", header(lambda content: content[NORM].update(shape=[2**40, 2**40]))
    ),
    "a dtype that nobody knows": Defect("shards", "", header(lambda content: content[NORM].update(dtype="F5"))),
    "an index that names a missing file": Defect(
        "shards", "", indexed(lambda places, _: places.update({NORM: "model-00002-of-00002.safetensors"}))
    ),
    "an index that leads out": Defect(
        "shards", "", indexed(lambda places, _: places.update({NORM: "../other.safetensors"}))
    ),
    "an index with a tensor too many": Defect(
        "shards", "", indexed(lambda places, _: places.update({"more.weight": "model-00001-of-00001.safetensors"}))
    ),
    "an index without a tensor": Defect("shards", NORM, indexed(lambda places, _: places.pop(NORM))),
    "an index and a single file": Defect(
        "shards", "", indexed(lambda _, folder: save_file({"a": torch.ones(1)}, folder / SINGLE))
    ),
    "a weight file that nobody reads": Defect(
        "shards", "stray", lambda folder: save_file({"a": torch.ones(1)}, folder / "stray.safetensors"), "warning"
    ),
    "a stray weight file that is damaged": Defect("shards", "stray", text("stray.safetensors", b"\x80\x04")),
    "a weight file without metadata": Defect(
        "shards", SINGLE, header(lambda content: content.pop("__metadata__")), "warning"
    ),
    "scales that are missing": Defect("tensors", f"{LINEAR}.scales", without(f"{LINEAR}.scales")),
    "zeros that are missing": Defect("tensors", f"{LINEAR}.qzeros", without(f"{LINEAR}.qzeros")),
    "codes that are missing": Defect("tensors", f"{LINEAR}.qweight", without(f"{LINEAR}.qweight")),
    "an order that is missing": Defect("tensors", f"{LINEAR}.g_idx", without(f"{LINEAR}.g_idx"), needs="shuffled"),
    "a plain order that is missing": Defect(
        "tensors", f"{LINEAR}.g_idx", without(f"{LINEAR}.g_idx"), "warning", "in order"
    ),
    "a norm that is missing": Defect("tensors", NORM, without(NORM)),
    "an embedding that is missing": Defect("tensors", EMBEDDING, without(EMBEDDING)),
    "a tensor too many": Defect(
        "tensors", "adapter", tensors(lambda stored: stored.update({"model.adapter.weight": torch.ones(3)}))
    ),
    "a packed layer that the model has not": Defect(
        "tensors",
        "layers.7",
        tensors(
            lambda stored: stored.update({"model.layers.7.mlp.up_proj.qweight": stored[f"{LINEAR}.qweight"].clone()})
        ),
    ),
    "codes that lie transposed": Defect("tensors", LINEAR, one(f"{LINEAR}.qweight", lambda words: words.T)),
    "keys of another group size": Defect("tensors", LINEAR, keys(group_size=16)),
    "keys of other bits": Defect("tensors", LINEAR, keys(bits=8)),
    "codes in another dtype": Defect("tensors", LINEAR, one(f"{LINEAR}.qweight", lambda words: words.long())),
    "whole numbers for scales": Defect("tensors", LINEAR, one(f"{LINEAR}.scales", lambda scales: scales.int())),
    "a group too few": Defect("tensors", LINEAR, one(f"{LINEAR}.scales", lambda scales: scales[:-1])),
    "a norm of another width": Defect("tensors", NORM, one(NORM, lambda norm: norm[:-1])),
    "a linear packed and plain": Defect("tensors", f"{LINEAR}.weight", plain),
    "a bias that is missing": Defect("tensors", "q_proj.bias", without("model.layers.0.self_attn.q_proj.bias")),
    "a model of another size": Defect("tensors", "qweight", config(hidden_size=32, head_dim=8)),
    "a model of another type": Defect("tensors", "", config(model_type="nosuch")),
    "a group that is not there": Defect("groups", LINEAR, put(f"{LINEAR}.g_idx", 99, 0)),
    "a group below zero": Defect("groups", LINEAR, put(f"{LINEAR}.g_idx", -1, 5)),
    "a group with a row too many": Defect("groups", LINEAR, one(f"{LINEAR}.g_idx", moved_group)),
    "an order that the keys deny": Defect("groups", LINEAR, one(f"{LINEAR}.g_idx", swapped_groups), needs="in order"),
    "a key that denies the order": Defect("groups", "g_idx", keys(desc_act=False), needs="shuffled"),
    "a symmetric zero moved": Defect("zeros", LINEAR, zeros(lambda found: found[0, :3].add_(1)), needs="sym"),
    "the tag of the other version": Defect("zeros", "qzeros", other_version, needs="sym"),
    "the tag of the other version, asymmetric": Defect("zeros", "checkpoint_format", other_version, "warning", "asym"),
    "a zero that v1 cannot hold": Defect(
        "zeros", LINEAR, one(f"{LINEAR}.qzeros", lambda words: words | 15), "warning", "asym"
    ),
    "a scale that is no number": Defect("scales", LINEAR, put(f"{LINEAR}.scales", float("nan"), 0, 0)),
    "a scale without an end": Defect("scales", LINEAR, put(f"{LINEAR}.scales", float("-inf"), 0, 5)),
    "a scale that loses weights": Defect("scales", LINEAR, tensors(lost_group)),
    "a scale beyond float16's weights": Defect("scales", LINEAR, put(f"{LINEAR}.scales", 60000.0, 0, 0)),
    "a scale with a flipped bit": Defect("scales", LINEAR, one(f"{LINEAR}.scales", flipped), "warning"),
    "a scale that is hardly there": Defect("scales", LINEAR, put(f"{LINEAR}.scales", 6e-8, 0, 0), "warning"),
    "codes that were never written": Defect("codes", LINEAR, whole(f"{LINEAR}.qweight", 0)),
    "codes with a hole": Defect("codes", LINEAR, one(f"{LINEAR}.qweight", hole)),
    "codes that are all the same": Defect("codes", LINEAR, whole(f"{LINEAR}.qweight", 0x33333333)),
    "an embedding that is no number": Defect("values", EMBEDDING, put(EMBEDDING, float("nan"), 7, 7)),
    "a norm without an end": Defect("values", NORM, put(NORM, float("inf"), 3)),
    "a bias that is no number": Defect(
        "values", "k_proj.bias", put("model.layers.1.self_attn.k_proj.bias", float("nan"), 0)
    ),
    "an embedding that was never written": Defect("values", EMBEDDING, whole(EMBEDDING, 0)),
    "an embedding with a hole": Defect("values", EMBEDDING, one(EMBEDDING, blank(shift=5))),
    "an embedding with rows of zeros": Defect("values", EMBEDDING, one(EMBEDDING, blank(shift=0)), "warning"),
    "a norm that was never written": Defect("values", NORM, whole(NORM, 0)),
    "a bias that the model has not": Defect(
        "values",
        f"{ATTENTION}.bias",
        tensors(
            lambda stored: stored.update({f"{ATTENTION}.bias": torch.ones(stored[f"{ATTENTION}.qweight"].shape[1])})
        ),
    ),
    "two tensors that are tied": Defect(
        "values",
        "lm_head.weight",
        both(
            config(tie_word_embeddings=True),
            tensors(lambda stored: stored.update({"lm_head.weight": stored[EMBEDDING] + 1})),
        ),
    ),
    "a number beyond float16": Defect(
        "values", NORM, tensors(lambda stored: stored.update({NORM: stored[NORM].float() * 1e6})), "warning"
    ),
    "a token without a row": Defect("tokenizer", "tokenizer", token_beyond),
    "an end that has no row": Defect("tokenizer", "eos_token_id", config(eos_token_id=100_000)),
    "an end of generations that has no row": Defect(
        "tokenizer",
        "generation_config.json: eos_token_id",
        edit("generation_config.json", lambda content: content.update(eos_token_id=[1, 100_000])),
    ),
    "a tokenizer that is no JSON": Defect("tokenizer", "tokenizer", text("tokenizer.json", "{")),
    "no tokenizer": Defect("tokenizer", "", lambda folder: (folder / "tokenizer.json").unlink(), "warning"),
    "a template that is no Jinja": Defect("templates", "chat_template.jinja", chat("{% for %}")),
    "a template that looks behind": Defect(
        "templates", "chat_template.jinja", chat("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    ),
    "a template that looks behind by index": Defect("templates", "chat_template", chat("{{ messages['__class__'] }}")),
    "a template that looks behind by filter": Defect(
        "templates", "chat_template.jinja", chat("{{ messages | attr('__class__') }}")
    ),
    "a template that fills the memory": Defect(
        "templates", "chat_template.jinja", chat("{{ 'a' * 1000000 * 1000000 }}")
    ),
    "a template that never ends": Defect("templates", "chat_template.jinja", chat("{{ 9 ** 9 ** 9 }}")),
    "a template that reads files": Defect("templates", "chat_template.jinja", chat("{% include '/etc/passwd' %}")),
    "a template among others": Defect(
        "templates",
        "tokenizer_config.json: tools",
        edit(
            "tokenizer_config.json",
            lambda content: content.update(chat_template=[{"name": "tools", "template": "{{ x.__init__ }}"}]),
        ),
    ),
    "where the model lay": Defect("private", "_name_or_path", config(_name_or_path="/home/alice/models/qwen")),
    "where it lay on Windows": Defect("private", "_name_or_path", config(_name_or_path="C:\\Users\\alice\\qwen")),
    "where it lay on a share": Defect("private", "_name_or_path", config(_name_or_path="\\\\nas\\team\\qwen")),
    "where it lay at home": Defect("private", "_name_or_path", config(_name_or_path="~/models/qwen")),
    "where it lay, as a URL": Defect("private", "_name_or_path", config(_name_or_path="file:///srv/qwen")),
    "where it lay, nearby": Defect("private", "_name_or_path", config(_name_or_path="./out/qwen"), "warning"),
    "a temporary folder": Defect(
        "private",
        "offload_to_disk_path",
        keys(meta={"quantizer": ["gptqmodel:7.6.0"], "offload_to_disk_path": "/tmp/tmpab12/offload"}),
    ),
    "a path inside a sentence": Defect("private", "note", config(note="made from /mnt/nfs/alice/base")),
    "a path that is a key": Defect("private", "config.json", config(sources={"/data/alice/x": 1})),
    "a path of the tokenizer": Defect(
        "private",
        "tokenizer_config.json",
        edit("tokenizer_config.json", lambda content: content.update(tokenizer_file="/root/.cache/t/tokenizer.json")),
    ),
    "a path in the metadata": Defect(
        "private",
        "safetensors metadata",
        header(lambda content: content["__metadata__"].update(source="/workspace/alice/qwen")),
    ),
    "a path in a log": Defect("private", "train.log", text("train.log", "ok\nread /scratch/alice/data.json\n")),
    "a path in the model card": Defect("private", "README.md", text("README.md", "See /home/alice/run.\n"), "warning"),
    "calibration text": Defect("private", "dataset", keys(dataset=[PROSE, PROSE])),
    "calibration text without spaces": Defect("private", "dataset", keys(dataset=[CHINESE])),
    "calibration text as ids": Defect(
        "private", "dataset", keys(dataset=[{"input_ids": list(range(100)), "attention_mask": [1] * 100}])
    ),
    "prose in the metadata": Defect(
        "private",
        "safetensors metadata",
        header(lambda content: content["__metadata__"].update(samples=json.dumps([PROSE]))),
    ),
    "an access token": Defect("private", "token", config(token_of_hub="hf_" + "aB3" * 12)),
    "a password in a URL": Defect("private", "uri", config(uri="https://alice:secret@example.org/x")),
    "a private key": Defect("private", "notes.txt", text("notes.txt", "-----BEGIN OPENSSH PRIVATE KEY-----\n")),
    "a file that changed": Defect(
        "manifest", "generation_config.json", text("generation_config.json", "{}"), needs="manifest"
    ),
    "a file that is missing": Defect(
        "manifest",
        "generation_config.json",
        lambda folder: (folder / "generation_config.json").unlink(),
        needs="manifest",
    ),
    "a file that nobody vouches for": Defect("manifest", "notes.txt", text("notes.txt", "x"), "warning", "manifest"),
    "a manifest of another time": Defect(
        "manifest", "manifest.json", hashed(lambda content: content.update(schema_version=9)), needs="manifest"
    ),
    "a manifest of another checkpoint": Defect(
        "manifest", "bits", hashed(lambda content: content["config"].update(bits=8)), needs="manifest"
    ),
    "a manifest without files": Defect(
        "manifest", "manifest.json", hashed(lambda content: content.pop("files")), needs="manifest"
    ),
    "a fallback": Defect(
        "manifest",
        LINEAR,
        hashed(lambda content: content.update(fallbacks={LINEAR: PROSE})),
        "warning",
        "manifest",
    ),
    "damping that was raised": Defect("manifest", "proj", logged(damp_escalations=2), "warning", "manifest"),
    "a layer that was lost": Defect("manifest", "proj", logged(relative_error=3.0), "warning", "manifest"),
    "a log without its manifest": Defect(
        "manifest", "manifest.json", lambda folder: (folder / "manifest.json").unlink(), "warning", "manifest"
    ),
}


def planted(folder: Path) -> Iterator[tuple[str, Defect]]:
    """The defects that suit a folder."""
    yield from ((name, defect) for name, defect in DEFECTS.items() if suits(folder, defect))
