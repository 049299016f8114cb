"""``qquant verify`` finds every planted defect by the check meant to, and passes sound checkpoints of any tool."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import qquant
from qquant.calibrate import samples_from_ids
from qquant.checks.findings import Verification
from qquant.cli import app
from qquant.config import QuantizeConfig
from qquant.mixed_precision import measure
from qquant.quantizing import quantize_checkpoint, quantize_mixed
from qquant.verification import verify_checkpoint
from tests.conftest import Factory
from tests.make_qwen_v1 import make_qwen_v1
from tests.packed import edit_keys, pack_by_hand
from tests.planted import DEFECTS, LINEAR, Defect, keys, planted, tensors
from tests.qwen_folders import make_qwen, publish
from tests.weight_files import write_shards

GOLDEN = Path(__file__).parent / "golden" / "gptqmodel-tiny"


def run(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["verify", str(folder), *options])


def problems(found: Verification) -> list[str]:
    return [f"{finding.check}: {finding.subject}: {finding.text}" for finding in found.problems]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, checkpoint: Factory) -> Callable[..., Path]:
    """Sound folders of ours by their options, each made once. Never write to them."""
    known: dict[str, Path] = {}

    def get(family: str = "qwen2", tie: bool = False, **options: Any) -> Path:
        key = repr((family, tie, sorted(options.items(), key=lambda item: item[0])))
        if key not in known:
            out = tmp_path_factory.mktemp("verify") / "out"
            size = options.pop("max_shard_bytes", 10**9)
            config = QuantizeConfig(**{"method": "rtn", "group_size": 32, **options})
            samples = samples_from_ids([list(range(40))])
            quantize_checkpoint(checkpoint(family, tie=tie), samples, config, out, max_shard_bytes=size)
            known[key] = out
        return known[key]

    return get


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    def copied(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copied


def check_found(folder: Path, defect: Defect) -> None:
    defect.plant(folder)
    found = verify_checkpoint(folder)
    named = [
        finding
        for finding in found.findings
        if finding.check == defect.check and defect.subject in finding.subject and finding.level == defect.level
    ]
    assert named, "\n".join(f"{f.level} {f.check}: {f.subject}: {f.text}" for f in found.findings) or "nothing found"
    assert defect.level == "warning" or not found.sound


BY_ANYBODY = ("keys", "shards", "tensors", "groups", "zeros", "scales", "codes", "values")
"""Checks of what the writer of a checkpoint has made; the others look at files that nobody quantized."""
CASES = [
    *((name, "ours") for name, defect in DEFECTS.items() if defect.needs in ("", "sym", "in order", "manifest")),
    *((name, "ours, asymmetric") for name, defect in DEFECTS.items() if defect.needs == "asym"),
    *(
        (name, "theirs")  # `make interop` plants all of them, in checkpoints made on the spot
        for name, defect in DEFECTS.items()
        if defect.needs in ("", "asym", "shuffled") and defect.check in BY_ANYBODY
    ),
]


@pytest.mark.parametrize(("name", "folder"), CASES)
def test_a_planted_defect_is_found(name: str, folder: str, made: Callable[..., Path], copy_of: Any) -> None:
    check_found(copy_of(GOLDEN if folder == "theirs" else made(sym=folder == "ours")), DEFECTS[name])


def test_the_table_is_long_and_every_defect_suits_a_folder(made: Callable[..., Path]) -> None:
    folders = [made(), made(sym=False), GOLDEN]
    assert {name for folder in folders for name, _ in planted(folder)} == set(DEFECTS)
    assert len(DEFECTS) >= 60
    checks = {defect.check for defect in DEFECTS.values()}
    assert checks | {"tensor parallel"} == {check.name for check in verify_checkpoint(GOLDEN).checks}


OURS: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"bits": bits} for bits in (2, 3, 4, 8)},
    **{f"{bits} bits, asymmetric": {"bits": bits, "sym": False} for bits in (2, 3, 4, 8)},
    "act-order": {"method": "fast", "desc_act": True},
    "whole rows": {"group_size": -1},
    "sharded": {"max_shard_bytes": 100_000},
    "tied": {"tie": True},
    "best": {"method": "best"},
    "a rule and a module left alone": {"dynamic": {r"-:.*\.0\.mlp\.up_proj": {}, r"+:.*o_proj": {"bits": 8}}},
    **{family: {"family": family} for family in ("qwen3", "llama", "mistral")},
}


@pytest.mark.parametrize("options", list(OURS.values()), ids=list(OURS))
def test_what_we_write_is_sound_and_no_reader_stumbles(options: dict[str, Any], made: Callable[..., Path]) -> None:
    found = verify_checkpoint(made(**options))
    assert problems(found) == []
    rules = ["dynamic"] if "dynamic" in options else []
    assert [finding.subject for finding in found.findings] == rules
    assert {check.outcome for check in found.checks} <= {"ok", "warning"}


def test_a_mix_of_bits_and_its_record_are_sound(tiny_qwen2: Path, tmp_path: Path) -> None:
    samples = samples_from_ids([list(range(40))] * 4)
    mixed = measure(tiny_qwen2, samples, QuantizeConfig(method="fast", group_size=32), sensitivity_tokens=64)
    least, most = (point.size_bytes for point in map(mixed.pure, (4, 8)) if point)
    quantize_mixed(mixed, tmp_path / "q", target_bytes=(least + most) // 2)
    assert {finding.subject for finding in verify_checkpoint(tmp_path / "q").findings} <= {"dynamic"}


def test_an_mlp_that_was_padded_is_sound_and_can_be_cut(checkpoint: Factory, tmp_path: Path) -> None:
    source = checkpoint("qwen2", intermediate_size=96)
    config = QuantizeConfig(method="rtn", group_size=32)
    quantize_checkpoint(source, None, config, tmp_path / "plain")
    quantize_checkpoint(source, None, config, tmp_path / "padded", tensor_parallel=2)
    asked = {name: verify_checkpoint(tmp_path / name, tp=(2,)) for name in ("plain", "padded")}
    assert [finding.check for finding in asked["plain"].findings] == ["tensor parallel"]
    assert asked["padded"].findings == ()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("sym", "desc_act"), [(True, False), (False, True)])
def test_random_codes_of_any_layout_are_sound(
    bits: int, version: int, sym: bool, desc_act: bool, tiny_qwen2: Path, tmp_path: Path
) -> None:
    pack_by_hand(tiny_qwen2, tmp_path / "m", bits=bits, sym=sym, desc_act=desc_act, version=version, signed=True)
    assert problems(verify_checkpoint(tmp_path / "m")) == []


@pytest.mark.parametrize(
    "options",
    [{"zero_bias": True}, {"head": True}, {"group_size": 48}, {"scales_dtype": torch.bfloat16}],
    ids=["biases of zeros", "a packed head", "a short last group", "scales in bfloat16"],
)
def test_what_other_tools_wrote_in_other_years_is_sound(
    options: dict[str, Any], tiny_qwen2: Path, tmp_path: Path
) -> None:
    pack_by_hand(tiny_qwen2, tmp_path / "m", **options)
    assert problems(verify_checkpoint(tmp_path / "m")) == []


def test_a_checkpoint_by_gptqmodel_is_sound_without_a_warning() -> None:
    assert verify_checkpoint(GOLDEN).findings == ()


def test_a_folder_of_autogptq_is_sound(made: Callable[..., Path], copy_of: Any) -> None:
    folder = copy_of(made())
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    for name in ("manifest.json", "quant_log.json"):
        (folder / name).unlink()
    found = verify_checkpoint(folder)
    assert problems(found) == []
    assert [(finding.check, finding.subject) for finding in found.findings] == [("keys", "quantization_config")]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("keys_in", ["config", "beside", "both"])
def test_folders_of_the_original_qwen_are_sound(bits: int, keys_in: str, tmp_path: Path) -> None:
    publish(tmp_path / "packed", make_qwen(tmp_path / "plain"), bits, keys_in=keys_in, shards=2)
    assert problems(verify_checkpoint(tmp_path / "packed")) == []


def test_the_original_qwens_own_code_is_a_warning_and_other_code_a_problem(tmp_path: Path) -> None:
    source = make_qwen_v1(tmp_path / "source", hidden_size=64, kv_channels=32, intermediate_size=256)
    for name in ("configuration_qwen.py", "modeling_qwen.py"):
        (source / name).write_text("raise SystemExit")
    out = tmp_path / "out"
    quantize_checkpoint(source, None, QuantizeConfig(method="rtn", group_size=32), out)
    config = json.loads((out / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
    (out / "config.json").write_text(json.dumps(config))
    found = verify_checkpoint(out)
    assert {finding.subject for finding in found.findings if finding.check == "code"} >= {"config.json: auto_map"}
    assert [finding for finding in found.problems if finding.check == "code"] == []
    config["auto_map"] = {"AutoModelForCausalLM": "someone/else--modeling_qwen.QWenLMHeadModel"}
    (out / "config.json").write_text(json.dumps(config))
    (out / "helper.py").write_text("")
    subjects = {finding.subject for finding in verify_checkpoint(out).problems if finding.check == "code"}
    assert subjects == {"config.json: auto_map", "helper.py"}


def test_what_our_manifest_says_of_fallbacks_is_no_private_text(made: Callable[..., Path], copy_of: Any) -> None:
    folder = copy_of(made())
    DEFECTS["a fallback"].plant(folder)
    found = verify_checkpoint(folder)
    assert [(finding.level, finding.subject) for finding in found.findings] == [("warning", LINEAR)]


def test_a_model_that_is_not_quantized_is_looked_at_all_the_same(tiny_qwen2: Path, copy_of: Any) -> None:
    found = verify_checkpoint(tiny_qwen2)
    assert [(finding.level, finding.subject) for finding in found.findings] == [("warning", "quantization_config")]
    folder = copy_of(tiny_qwen2)
    tensors(lambda stored: stored.pop("model.norm.weight"))(folder)
    assert [finding.subject for finding in verify_checkpoint(folder).problems] == ["model.norm.weight"]


def test_every_damaged_tensor_is_named_not_only_the_first(made: Callable[..., Path], copy_of: Any) -> None:
    folder = copy_of(made())
    gone = [f"{LINEAR}.scales", "model.layers.1.mlp.down_proj.qzeros", "model.norm.weight"]
    tensors(lambda stored: [stored.pop(name) for name in gone])(folder)
    found = verify_checkpoint(folder)
    assert sorted(finding.subject for finding in found.problems if finding.check == "tensors") == sorted(gone)
    assert "2 linears do not fit" in next(check for check in found.checks if check.name == "codes").left_out


def test_a_thousand_faults_of_a_kind_make_a_short_report(made: Callable[..., Path], copy_of: Any) -> None:
    folder = copy_of(made())
    tensors(lambda stored: stored.update({f"more.{i}": torch.ones(1) for i in range(1000)}))(folder)
    check = next(check for check in verify_checkpoint(folder).checks if check.name == "tensors")
    assert len(check.findings) == 9
    assert check.findings[-1].text.startswith("992 more")


def test_each_tensor_of_a_checkpoint_is_missed(made: Callable[..., Path], copy_of: Any) -> None:
    source = made()
    for name in sorted(load_file(source / "model.safetensors"))[::7]:
        folder = copy_of(source)
        tensors(lambda stored, name=name: stored.pop(name))(folder)  # type: ignore[misc]
        found = [f.subject for f in verify_checkpoint(folder).findings if f.check == "tensors"]
        assert any(name.rpartition(".")[0] in subject for subject in found), name
        shutil.rmtree(folder)


def test_zeros_and_groups_are_read_in_shards_too(made: Callable[..., Path], copy_of: Any) -> None:
    folder = copy_of(made())
    stored = load_file(folder / "model.safetensors")
    stored[f"{LINEAR}.scales"][0, 0] = float("nan")
    (folder / "model.safetensors").unlink()
    write_shards(folder, stored, 3)
    assert f"{LINEAR}.scales" in [finding.subject for finding in verify_checkpoint(folder).problems]


def test_cards_are_told_of_and_are_a_problem_where_they_are_asked_for(made: Callable[..., Path]) -> None:
    found = verify_checkpoint(made())  # 4 query heads, 2 of keys and values
    assert found.sound
    assert found.tensor_parallel[2] is None
    assert "query heads by 8" in str(found.tensor_parallel[8])
    assert verify_checkpoint(made(), tp=(1, 2)).sound
    asked = verify_checkpoint(made(), tp=(2, 8))
    assert [(finding.check, finding.subject) for finding in asked.problems] == [("tensor parallel", "8 cards")]
    with pytest.raises(qquant.QquantError, match="tp must be"):
        verify_checkpoint(made(), tp=(0,))


def test_the_command_says_ok_and_ends_with_0(made: Callable[..., Path]) -> None:
    result = run(made())
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines() if line[0] != " "] == ["ok"] * 16
    assert str(made().parent) not in result.stdout
    assert result.stderr == ""


def test_the_command_names_the_problem_and_ends_with_4(made: Callable[..., Path], copy_of: Any) -> None:
    folder = copy_of(made())
    DEFECTS["a scale that is no number"].plant(folder)
    result = run(folder)
    assert result.exit_code == 4
    assert "PROBLEM     scales" in result.stdout
    assert f"problem: {LINEAR}.scales: scales must be finite" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("error: copy has ")
    shown = json.loads(run(folder, "--json").stdout)
    assert shown["sound"] is False
    assert shown["schema_version"] == 1
    outcomes = {check["name"]: check["outcome"] for check in shown["checks"]}
    assert outcomes["scales"] == "problem"
    assert outcomes["codes"] == "ok"


def test_a_warning_ends_with_0(made: Callable[..., Path], copy_of: Any) -> None:
    folder = copy_of(made())
    (folder / "notes.txt").write_text("x")
    result = run(folder, "--tp", "1,2")
    assert result.exit_code == 0
    assert "WARNING     manifest" in result.stdout


def test_a_folder_that_is_no_model_ends_in_one_line(tmp_path: Path) -> None:
    for result in (run(tmp_path), run(tmp_path / "nosuch"), run(tmp_path, "--tp", "x")):
        assert result.exit_code in (2, 4)
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1


def test_what_a_hostile_name_would_do_to_a_terminal_is_written_out(made: Callable[..., Path], copy_of: Any) -> None:
    folder = copy_of(made())
    (folder / "evil\x1b[2J.py").write_text("")
    result = run(folder)
    assert "\x1b" not in result.stdout + result.stderr
    assert "evil\\x1b[2J.py" in result.stdout


def test_nothing_of_the_folder_is_run_and_nothing_is_fetched(
    made: Callable[..., Path], copy_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    folder, canary = copy_of(made()), tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').close()"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "setup.py"):
        (folder / name).write_text(code)
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        classes = {
            "AutoConfig": "configuration_x.C",
            "AutoModelForCausalLM": "modeling_x.M",
            "AutoTokenizer": ["t.T", None],
        }
        content |= {"auto_map": classes, "trust_remote_code": True, "_attn_implementation": "someone/kernel"}
        (folder / name).write_text(json.dumps(content))
    assert {finding.check for finding in verify_checkpoint(folder).problems} >= {"code"}
    assert not canary.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "manifest.json", "quant_log.json"])
def test_settings_of_any_kind_end_in_findings_never_in_an_error(
    name: str, made: Callable[..., Path], copy_of: Any
) -> None:
    folder = copy_of(made())
    content = json.loads((folder / name).read_text())
    odd: list[Any] = [None, [], {}, "x", -1, 10**30, True, [[None]], {"a": {}}, 0.5]
    for number, key in enumerate(sorted(content)):
        (folder / name).write_text(json.dumps({**content, key: odd[number % len(odd)]}))
        assert verify_checkpoint(folder).checks
    for data in (b"", b"[1]", b"\xff\xfe", b'"x"', b"{" * 10_000):
        (folder / name).write_bytes(data)
        assert not verify_checkpoint(folder).sound


def test_code_keys_do_not_hide_what_else_is_wrong(made: Callable[..., Path], copy_of: Any) -> None:
    folder = copy_of(made())
    DEFECTS["auto_map"].plant(folder)
    DEFECTS["a scale that is no number"].plant(folder)
    assert {"code", "scales"} <= {finding.check for finding in verify_checkpoint(folder).problems}


def test_the_same_folder_gives_the_same_report(made: Callable[..., Path], copy_of: Any) -> None:
    folder = copy_of(made())
    keys(group_size=16)(folder)
    assert verify_checkpoint(folder) == verify_checkpoint(folder)


def test_names_of_this_machine_are_found(
    made: Callable[..., Path], copy_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.node", lambda: "gpu-node-17.cluster")
    monkeypatch.setattr("getpass.getuser", lambda: "alice.m")
    folder = copy_of(made())
    edit_keys(folder, meta={"quantizer": ["x:1.0"], "made_on": "gpu-node-17", "by": "alice.m"})
    subjects = [finding.subject for finding in verify_checkpoint(folder).findings if finding.check == "private"]
    assert subjects == [
        "config.json: quantization_config.meta.made_on",
        "config.json: quantization_config.meta.by",
    ]
