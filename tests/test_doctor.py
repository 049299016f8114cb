"""The doctor tells the truth about this environment, and says how to repair a broken one."""

from __future__ import annotations

import json
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from qquant import _native, doctor, linear_kernels
from qquant.errors import UsageError
from tests.isa_runs import run_for_each

app = typer.Typer()
app.command()(doctor.doctor_command)


def findings(*options: str) -> tuple[int, dict[str, dict[str, Any]]]:
    result = CliRunner().invoke(app, ["--json", *options])
    record = json.loads(result.stdout)
    assert record["ok"] == (result.exit_code == 0)
    return result.exit_code, {row["name"]: row for row in record["findings"]}


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QQUANT_NATIVE", "0")
    monkeypatch.setattr(_native, "_load", _native._load.__wrapped__)


def test_this_environment_is_healthy() -> None:
    code, rows = findings()
    assert code == 0
    assert rows["torch"]["found"].startswith(torch.__version__)
    assert {row["state"] for row in rows.values() if row["area"] == "core"} == {"ok"}


def test_every_finding_is_complete_and_only_a_missing_piece_has_a_fix() -> None:
    for row in doctor.examine():
        assert set(row) == {"area", "name", "state", "found", "fix"}
        assert row["found"]
        assert not (row["fix"] and row["state"] == "ok")


def test_a_package_that_does_not_load_is_broken_and_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_safetensors(name: str) -> ModuleType:
        if name == "safetensors":
            raise RuntimeError("compiled against something else\nand more lines")
        return import_module(name)

    monkeypatch.setattr(doctor, "import_module", without_safetensors)
    code, rows = findings()
    assert code == 1
    assert rows["safetensors"]["state"] == "broken"
    assert rows["safetensors"]["found"] == "RuntimeError: compiled against something else"
    assert "pip install 'safetensors" in rows["safetensors"]["fix"]


def test_a_version_we_did_not_ask_for_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_required_versions", lambda: {"transformers": "<5"})
    code, rows = findings()
    assert code == 1
    assert rows["transformers"]["found"].endswith("qquant needs <5")


def test_auto_gptq_is_explained_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "0.7.1" if name == "auto-gptq" else genuine(name))
    code, rows = findings()
    assert code == 0
    assert rows["auto-gptq"]["found"].startswith("0.7.1 is installed and not used: archived")
    assert "qquant.compat.auto_gptq" in rows["auto-gptq"]["fix"]


@pytest.mark.parametrize("name", ["auto-gptq", "auto_gptq", "Auto-GPTQ"])
def test_auto_gptq_is_explained_in_one_line_where_a_user_names_it(name: str) -> None:
    code, rows = findings(name)
    assert code == 0
    assert list(rows) == ["auto-gptq"]
    assert "archived" in rows["auto-gptq"]["found"]
    assert "qquant.compat.auto_gptq stands in" in rows["auto-gptq"]["found"]
    assert "auto-gptq" not in findings()[1]  # nobody else is told


def test_what_doctor_says_of_auto_gptq_is_true() -> None:
    """It imports a name that transformers 5 no longer has there; and the module that stands in offers what it says."""
    assert not hasattr(import_module("transformers.modeling_utils"), "no_init_weights")
    statement, _, _ = doctor.RETIRED["auto-gptq"][1].partition("  #")
    exec(statement, {})


def test_findings_can_be_asked_for_by_name() -> None:
    code, rows = findings("torch", "cpu")
    assert code == 0
    assert list(rows) == ["torch", "cpu"]
    result = CliRunner().invoke(app, ["gptq-auto"])
    assert result.exit_code == 2
    assert "doctor has nothing named 'gptq-auto'; it knows accelerate" in result.stderr


@pytest.mark.usefixtures("without_native")
def test_missing_native_modules_leave_the_core_healthy_and_are_explained() -> None:
    code, rows = findings("--probe")
    assert code == 0
    for name in _native.MODULES:
        assert rows[name]["state"] == "absent"
        assert rows[name]["found"] == "switched off by QQUANT_NATIVE=0"
        assert rows[name]["fix"] == _native.REBUILD
    assert rows["read bandwidth"]["state"] == "absent"


def test_a_wrong_name_of_an_instruction_set_is_broken_and_every_question_is_answered_alike() -> None:
    """The compiled module reads the variable once per process, so this is one of its own."""
    if _native._load("qquant._C")[0] is None:
        pytest.skip("qquant._C is not built here")
    code = (
        "import torch\n"
        "from qquant import dense_linear, doctor, kv_attention, linear_kernels, linear_ops, plain_attention\n"
        "from qquant.errors import UsageError\n"
        "rows = {row['name']: row for row in doctor.examine()}\n"
        "print(rows['qquant._C']['state'], rows['qquant._C']['found'], rows['qquant._C']['fix'], sep='|')\n"
        "assert not [name for name in rows if name.endswith(' cpu')]\n"
        "here = torch.device('cpu')\n"
        "for ask in (plain_attention.kernel_is_live, dense_linear.kernel_is_live,\n"
        "            lambda: linear_kernels.place_of(here)):\n"
        "    try:\n"
        "        ask()\n"
        "    except UsageError as error:\n"
        "        print(error)\n"
    )
    outcome = run_for_each(["sse9"], code)["sse9"]
    assert outcome.returncode == 0, outcome.said
    row, *answers = outcome.said.splitlines()
    state, found, fix = row.split("|")
    assert (state, fix) == ("broken", "unset QQUANT_CPU_ISA")
    assert found.startswith("QQUANT_CPU_ISA must be one of portable, avx2, ")
    assert "got 'sse9'" in found
    assert answers == [found] * 3


def test_a_broken_kernel_module_ends_the_command_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(operator: str) -> None:
        raise UsageError("QQUANT_CPU_ISA must be one of portable, got 'foo'")

    if _native._load("qquant._C")[0] is None:
        pytest.skip("qquant._C is not built here")
    monkeypatch.setattr(_native, "answer", refuse)
    monkeypatch.setattr(linear_kernels, "_place_of", linear_kernels._place_of.__wrapped__)
    code, rows = findings("qquant._C")
    assert code == 1
    assert rows["qquant._C"]["state"] == "broken"


@pytest.mark.slow  # reads memory for seconds
def test_the_probe_measures_a_plausible_rate() -> None:
    if _native.host() is None:
        pytest.skip("qquant._host is not built here")
    _, rows = findings("--probe")
    rate = float(rows["read bandwidth"]["found"].split()[0])
    assert 0.5 < rate < 1000


def test_the_table_names_every_finding() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    for row in doctor.examine():
        assert row["name"] in result.stdout
    assert "The core works." in result.stdout


def test_a_module_that_was_never_built_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QQUANT_NATIVE", raising=False)
    module, why = _native._load.__wrapped__("qquant._no_such_module")
    assert module is None
    assert why == "not built"


def test_the_host_module_rejects_an_empty_buffer() -> None:
    host = _native.host()
    if host is None:
        pytest.skip("qquant._host is not built here")
    with pytest.raises(ValueError, match="at least 256"):
        host.read_bandwidth(8)
    assert {"compiler", "flags"} <= set(host.build_info())
