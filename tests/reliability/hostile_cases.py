"""The hostile checkpoints by name, those that are refused and those that are harmless, and hostile chat templates.

How each is made is hostile.py, what is expected of whoever opens it test_hostile_folders.py.
"""

from __future__ import annotations

import json
import shutil

from tests.reliability.hostile import (
    CONFIGS,
    FIRST,
    INDEX_NAME,
    SINGLE_NAME,
    Maker,
    after_shards,
    both,
    code,
    ended,
    entry,
    header,
    index,
    keys,
    link,
    pickled,
    pipe,
    put,
    sparse,
    subfolder,
    text_of,
    zipped,
)

SECOND = "model-00002-of-00003.safetensors"
SHOUTED = "MODEL-00001-of-00003.safetensors"
NESTED = '{"a":' * 50_000
AUTO_MAP = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}

OUTSIDE = (
    "../outside/x.safetensors", "{out}/x.safetensors", "sub/../../outside/x.safetensors", "./../outside/x.safetensors",
    "..", ".", "", " ", "..\\outside\\x.safetensors", "C:\\x.safetensors", "\\\\host\\x.safetensors",
    "x\0.safetensors", "file:///etc/passwd", "http://127.0.0.1:9/x.safetensors", "~/x.safetensors",
    "$HOME/x.safetensors", "%2e%2e/outside/x.safetensors", "a" * 5000, "\u202ex.safetensors", "pytorch_model.bin",
    "x.pt", "x.pkl", "/dev/zero", "/proc/self/mem",
)  # fmt: skip
INDEXES: dict[str, Maker] = {
    **{f"index names {name[:40]!r}": index(name) for name in OUTSIDE},
    "index names a folder that is a link out": both(index("sub/x.safetensors"), link("sub", "{out}")),
    "index names a link out": both(index("x.safetensors"), link("x.safetensors", "{out}/x.safetensors")),
    "index names names that differ in case": both(
        index(change=lambda found: found["weight_map"].update({"model.norm.weight": SHOUTED})),
        lambda folder, _: shutil.copy(folder / FIRST, folder / SHOUTED),
    ),
    "index names a pipe": both(index("x.safetensors"), pipe("x.safetensors")),
    "index names a device": both(index("x.safetensors"), link("x.safetensors", "/dev/zero")),
    "index names a tensor that is not there": index(change=lambda i: i["weight_map"].update(ghost=FIRST)),
    "index maps to objects": index(change=lambda i: i.update(weight_map={"a": {"file": FIRST}})),
    "index has a key twice": after_shards(text_of(INDEX_NAME, lambda text: text[:-1] + ', "weight_map": {}}')),
    "index is a pipe": after_shards(pipe(INDEX_NAME)),
    "index is a folder": after_shards(subfolder(INDEX_NAME)),
    "index is deep": after_shards(put(INDEX_NAME, NESTED)),
    "index and whole model": after_shards(put("model.safetensors", b"")),
    "a tensor in two files": after_shards(lambda folder, _: shutil.copy(folder / FIRST, folder / SECOND)),
}  # fmt: skip
HEADERS: dict[str, Maker] = {
    "header of 2**64 - 1 bytes": header(b"{}", length=2**64 - 1),
    "header of 2**63 bytes": header(b"{}", length=2**63),
    "header longer than the file": header(b"{}", length=3),
    "nothing": put(SINGLE_NAME, b""),
    "seven bytes": put(SINGLE_NAME, bytes(7)),
    "zeros": put(SINGLE_NAME, bytes(1 << 20)),
    "overlapping tensors": header({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
    "one place for two tensors": header({"a": entry(), "b": entry()}, bytes(8)),
    "a hole": header({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
    "shape of 2**63": header({"a": entry([2**63])}, bytes(8)),
    "shape that wraps around": header({"a": entry([2**32, 2**32, 2])}, bytes(8)),
    "shape hidden by a zero": header({"a": entry([2**62, 2**62, 0], (0, 0))}),
    "negative shape": header({"a": entry([-2, -1])}, bytes(8)),
    "a thousand dimensions": header({"a": entry([1] * 999 + [2])}, bytes(8)),
    "offsets backwards": header({"a": entry(offsets=(8, 0))}, bytes(8)),
    "offsets past the end": header({"a": entry([2**40], (0, 2**42))}, bytes(8)),
    "a name twice": header(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    "a dtype twice": header(b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "a dtype that is code": header({"a": entry(dtype="__import__('os')")}, bytes(8)),
    "metadata that is no text": header({"__metadata__": {"a": [1]}, "a": entry()}, bytes(8)),
    "metadata that is a list": header({"__metadata__": [["format", "pt"]], "a": entry()}, bytes(8)),
    "giant metadata": header({"__metadata__": {"x" * 40_000_000: ""}}),
    "a deep header": header(b"[" * 1_000_000),
    "a header of lists": header(b'{"a":[' + b",".join([b"[]"] * 1_500_000) + b"]}"),
    "a header of another encoding": header('{"a":1}'.encode("utf-16")),
    "a header with half a character": header(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", bytes(8)),
    "bytes left over": header({"a": entry()}, bytes(9)),
    "a terabyte of holes": both(header({"a": entry()}, bytes(8)), sparse(SINGLE_NAME, 1 << 40)),
    "a zip archive": zipped,
    "a pickle called safetensors": lambda folder, canary: (
        pickled("p")(folder, canary), (folder / "p").rename(folder / SINGLE_NAME),
    ),
    "a GGUF file called safetensors": put(SINGLE_NAME, b"GGUF\3\0\0\0" + b"\xff" * 64),
    "a web page": put(SINGLE_NAME, b"<!DOCTYPE html><html></html>"),
    "a pointer of git": put(SINGLE_NAME, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "weights are a pipe": pipe(SINGLE_NAME),
    "weights are a device": link(SINGLE_NAME, "/dev/zero"),
    "weights are a folder": subfolder(SINGLE_NAME),
    "weights are a link out": link(SINGLE_NAME, "{out}/x.safetensors"),
    "weights of an older name are a pipe": both(pickled(alone=True), pipe("gptq_model-4bit-128g.safetensors")),
}  # fmt: skip
PICKLES: dict[str, Maker] = {
    **{
        f"only {name}": pickled(name)
        for name in (
            "pytorch_model.bin",
            "model.pt",
            "consolidated.00.pth",
            "model.ckpt",
            "model.pkl",
            "weights.pickle",
        )
    },
    "pickles with an index": both(
        pickled("pytorch_model-00001-of-00001.bin"),
        put("pytorch_model.bin.index.json", '{"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}'),
    ),
    **{
        f"only {name}": both(pickled(), put(name, b"x"))
        for name in ("model.gguf", "tf_model.h5", "flax_model.msgpack", "model.onnx", "weights.zip")
    },
    "an adapter with pickles": both(pickled("adapter_model.bin", alone=False), put("adapter_config.json", "{}")),
}
CODE: dict[str, Maker] = {
    f"{key} in {name}{f', {way}' if way else ''}": keys(name, way, **{key: value})
    for key, value in {
        "auto_map": AUTO_MAP,
        "trust_remote_code": True,
        "_attn_implementation": "owner/kernel",
        "_attn_implementation_internal": "owner/kernel",
        "attn_implementation": "kernels-community/flash-attn",
        "_experts_implementation_internal": "owner/kernel",
        "custom_generate": "owner/name",
        "custom_pipelines": {"x": {"impl": "code.P"}},
        "use_kernels": True,
        "kernel_config": {"RMSNorm": "owner/kernel:RMSNorm"},
    }.items()
    for name, way in (
        *((name, "") for name in CONFIGS), ("config.json", "text_config"), ("config.json", "sub"),
    )
}  # fmt: skip
CODE |= {
    "auto_map of another repository": keys("config.json", auto_map={"AutoConfig": "owner/name--code.Config"}),
    "auto_map that is a list": keys("tokenizer_config.json", auto_map=["code.T", None]),
    "auto_map of an unknown type": keys("config.json", auto_map=AUTO_MAP, model_type="theirs"),
    "code in a list": keys("config.json", parts=[{"auto_map": AUTO_MAP}]),
    "code in quantization_config": keys("config.json", "quantization_config", auto_map=AUTO_MAP, quant_method="gptq"),
    "code in quantize_config.json": both(
        put("quantize_config.json", "{}"), keys("quantize_config.json", auto_map=AUTO_MAP)
    ),
    "another config.json": both(keys("config.json", configuration_files=["config.4.0.0.json"]),
                                put("config.4.0.0.json", json.dumps({"model_type": "qwen2", "auto_map": AUTO_MAP}))),
    "another tokenizer.json": keys("tokenizer_config.json", fast_tokenizer_files=["../outside/tokenizer.4.0.0.json"]),
}  # fmt: skip
FILES: dict[str, Maker] = {
    **{f"{name} is a pipe": pipe(name) for name in (*CONFIGS, "tokenizer.json", "chat_template.jinja")},
    "a template beside is a pipe": pipe("additional_chat_templates/x.jinja"),
    **{f"{name} is a folder": subfolder(name) for name in CONFIGS},
    **{f"{name} is endless": link(name, "/dev/zero") for name in (*CONFIGS, "tokenizer.json")},
    **{f"{name} is deep": put(name, NESTED) for name in (*CONFIGS, "tokenizer.json")},
    **{f"{name} has a key twice": ended(name, ', "a": 1, "a": 2}') for name in CONFIGS},
    **{f"{name} has NaN": ended(name, ', "a": NaN}') for name in CONFIGS},
    **{f"{name} has 1e999": ended(name, ', "a": 1e999}') for name in CONFIGS},
    **{f"{name} has half a character": keys(name, a="\ud800") for name in CONFIGS},
    **{f"{name} begins with a mark": text_of(name, lambda text: "\ufeff" + text) for name in CONFIGS},
    **{f"{name} is of another encoding": text_of(name, lambda text: text.encode("utf-16")) for name in CONFIGS},
    **{f"{name} is empty": put(name, b"") for name in CONFIGS},
    **{f"{name} has 40 MB": text_of(name, lambda text: text + " " * 40_000_000) for name in CONFIGS},
    "tokenizer.json has a gigabyte": sparse("tokenizer.json", 1 << 30),
    "a number of 5000 digits": ended("config.json", ', "a": ' + "9" * 5000 + "}"),
    "a billion blocks": keys("config.json", num_hidden_layers=10**9),
    "a matrix of petabytes": keys("config.json", hidden_size=2**24, num_attention_heads=2**14),
    "sizes of 2**63": keys("config.json", vocab_size=2**63),
    "negative sizes": keys("config.json", intermediate_size=-64),
    "a dtype that is a function": keys("config.json", dtype="load"),
    "a model type that is a path": keys("config.json", model_type="../../code"),
    "a model type that is a module": keys("config.json", model_type="os"),
    "a key that hides a method": keys("config.json", to_dict=1, get_text_config="x"),
    "a chat template that computes": put("chat_template.jinja", "{{ 'a' * 10 ** 11 }}" * 3 + "{% bad"),
    "a chat template that is deep": put("chat_template.jinja", "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}"),
}  # fmt: skip
REFUSED = INDEXES | HEADERS | PICKLES | CODE | FILES
HARMLESS: dict[str, Maker] = {
    "pickles beside the weights": pickled(
        "training_args.bin", "optimizer.pt", "rng_state.pth", "pytorch_model.bin", alone=False
    ),
    "code that nothing names": code("modeling_qwen2.py", "__init__.py", "setup.py", "conftest.py", "sitecustomize.py"),
    "a generate of its own": code("custom_generate/generate.py"),
    "architectures of its own": both(keys("config.json", architectures=["code.Model"])),
    "a tokenizer class of its own": keys("tokenizer_config.json", tokenizer_class="code.T"),
    "weights of another name": keys("config.json", transformers_weights="../outside/x.safetensors"),
    "a name that is a path": keys("config.json", _name_or_path="/etc", name_or_path="owner/name"),
    "a vocabulary of somebody else's": keys(
        "tokenizer_config.json", tokenizer_file="/etc/passwd", vocab_file="/etc/passwd"
    ),
    "a kernel that was chosen for itself": keys("config.json", _attn_implementation_autoset=True),
}  # fmt: skip

_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "classes of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "the template itself": "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.environment }}",
    "an attribute by a filter": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "attributes by map": "{{ ['']|map(attribute='__class__')|list }}",
    "an attribute by a format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "a frame of a generator": "{{ (messages|map(attribute='role')).gi_frame.f_back.f_globals }}",
    "a message that is changed": "{% set _ = messages.append(1) %}",
    "a namespace's class": "{{ namespace().__class__ }}{{ joiner.__init__.__globals__ }}",
    "a file that is included": "{% include '/etc/passwd' %}",
    "a file that is imported": "{% import '/etc/passwd' as x %}{{ x }}",
    "a base that is a file": "{% extends '/etc/passwd' %}",
    "endless loops": _LOOP,
    "a text of 100 GB": "{% set n = 10 ** 11 %}{{ 'a' * n }}",
    "a text that doubles": "{% set t = namespace(x='ab') %}{% for i in range(70) %}"
    "{% set t.x = t.x ~ t.x %}{% endfor %}",
    "a list of 100 GB": "{% set n = 10 ** 10 %}{{ [1] * n }}",
    "a wide format": "{{ '%099999999999d' % 1 }}{{ 'a'.center(99999999999) }}",
    "a range of 10**12": "{% for i in range(10 ** 12) %}{% endfor %}",
    "much text": "{% for i in range(90000) %}{{ 'x' * 500 }}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}  # fmt: skip
