"""The floors of docs/house.md, held against the code: who may import whom, how big a file is, how light an import."""

from __future__ import annotations

import ast
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qquant

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "qquant"

DOORS = 12
GROUND = 1
FLOORS = {
    14: {"compat.auto_gptq"},
    13: {"compat.saving"},
    12: {"cli", "__main__", "gptq", "eval", "doctor", "inspect", "chat", "plan", "profile", "report", "verify"},
    11: {"quantizing", "evaluation", "task_evaluation", "planning", "profile_grid", "verification"},
    10: {
        "making",
        "eval_models",
        "seen_text",
        "profile_cell",
        "mixed_precision",
        "checks.keys",
        "checks.manifest",
    },
    9: {"checkpoint", "padding", "kv_accuracy", "memory_room", "mixed_settings", "sensitivity"},
    8: {
        "walk",
        "gradients",
        "divergence",
        "hf_plugin",
        "kv_schemes",
        "kv_errors",
        "eval_inputs",
        "side_files",
        "shapes",
        "random_models",
        "baselines",
        "compat.script_inputs",
        "checks.files",
        "checks.names",
        "checks.tokenizer",
    },
    7: {"sources", "capture"},
    6: {"model_folder"},
    5: {"model_kernels", "models.qwen.modeling"},
    4: {
        "activations",
        "stage_records",
        "stage_solver",
        "tuning",
        "decoder_step",
        "rounded_head",
        "kv_cache_quant",
        "merging",
        "calibrate",
        "conversation",
        "tasks.asking",
        "charts.of_results",
        "page.html",
        "page.grids",
        "page.models",
        "page.plans",
        "page.scores",
    },
    3: {
        "unfinished",
        "run_identity",
        "snapshots",
        "mixed_samples",
        "solver",
        "linear",
        "folding",
        "layer_ops",
        "kv_layer",
        "token_coding",
        "long_context",
        "adapter",
        "eval_record",
        "result_files",
        "charts.accuracy",
        "charts.contexts",
        "charts.layers",
        "charts.memory",
        "charts.predictions",
        "charts.speed",
        "page.joined",
        "tasks.lm_eval_backend",
        "tasks.runner",
        "models.key_fold",
        "models.qwen.chat",
        "models.qwen.layers",
    },
    2: {
        "run",
        "columns",
        "refinement",
        "shard_writer",
        "stage_moments",
        "stage_costs",
        "packed_weight",
        "shared_input",
        "dense_linear",
        "rms_norm",
        "layer_trial",
        "gptq_keys",
        "kv_store",
        "kv_attention",
        "kv_needle",
        "accuracy",
        "progress",
        "results",
        "answers",
        "cell_process",
        "samples",
        "sample_choice",
        "source_weights",
        "tokenizer_check",
        "footprint",
        "needs",
        "tensor_parallel",
        "charts.grid_cells",
        "charts.plot",
        "page.tables",
        "tasks.choices",
        "tasks.files",
        "tasks.gsm8k",
        "tasks.humaneval",
        "tasks.lm_eval_prompts",
        "tasks.prompts",
        "tasks.scores",
        "adapter_settings",
        "token_stream",
        "checks.packed",
        "checks.plain",
        "checks.side_text",
        "models.layouts",
        "models.qwen.configuration",
        "models.qwen.context",
        "models.qwen.positions",
        "models.qwen.tokenization",
    },
    1: {
        "linear_kernels",
        "linear_ops",
        "linear_torch",
        "panels",
        "plain_attention",
        "layer_turns",
        "device_map",
        "heap",
        "hooks",
        "overlap",
        "cache_room",
        "affine",
        "factor",
        "descent_numpy",
        "moments",
        "allocation",
        "packing",
        "config",
        "measure",
        "kv_report",
        "long_report",
        "answer_report",
        "task_report",
        "profile_report",
        "plan_report",
        "identity",
        "journal",
        "layer_names",
        "paired",
        "published",
        "stored_bytes",
        "charts.label_places",
        "charts.scales",
        "charts.svg",
        "models.sizes",
        "tasks.items",
        "tasks.rows",
        "tasks.sandbox",
        "shards",
        "text_sources",
        "publish",
        "console",
        "kv_ops",
        "code_keys",
        "rule_patterns",
        "checks.private_text",
        "chat_templates",
        "chat_terminal",
        "models.qwen.vocabulary",
    },
    0: {
        "errors",
        "finite",
        "_native",
        "records",
        "telling",
        "methods",
        "ranks",
        "json_files",
        "checks.findings",
        "tasks.confined",
    },
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
SAME_FLOOR = {
    "cli": {"gptq", "eval", "doctor", "inspect", "chat", "plan", "profile", "report", "verify"},
    "__main__": {"cli"},
    "_native": {"errors"},
    "methods": {"errors"},
    "ranks": {"errors"},
    "json_files": {"errors"},
}
"""The only imports between rooms of one floor."""

DRAWS = {"progress"}
"""Below the doors, the only room that may write to a terminal: it is handed to whoever reports progress."""

MAX_LINES = 400
MAX_MEDIAN_LINES = 300
HELP_CPU_SECONDS = 0.5


def rooms() -> dict[str, Path]:
    """Every module of the package but the faces (``__init__``): dotted name inside qquant -> file."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "__init__.py"
    }


ROOMS = rooms()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.AST, *, top_level_only: bool = False) -> Iterator[str]:
    """Absolute names of all imports, inside functions too; for ``from a import b`` both ``a`` and ``a.b``."""
    nodes = list(_top_level(tree)) if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import absolutely"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _top_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when the module is imported; ``if TYPE_CHECKING`` does not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        yield from _top_level(node)


def imported_rooms(name: str) -> set[str]:
    """Rooms that a room imports anywhere, function bodies and annotations included."""
    found = set()
    for module in imported_modules(parse(ROOMS[name])):
        inside = module.removeprefix("qquant.")
        if module.startswith("qquant.") and inside in ROOMS:
            found.add(inside)
    return found


def outside_packages(name: str, *, top_level_only: bool = False) -> set[str]:
    modules = imported_modules(parse(ROOMS[name]), top_level_only=top_level_only)
    return {module.partition(".")[0] for module in modules} - {"qquant", "__future__"}


def test_the_table_here_is_the_table_in_the_docs() -> None:
    documented: dict[int, set[str]] = {}
    for line in (ROOT / "docs" / "house.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 3 and (floor := re.match(r"\d+", cells[1])):
            files = re.findall(r"`([\w/]+)\.py`", cells[2])
            documented[int(floor[0])] = {file.replace("/", ".") for file in files}
    assert documented == FLOORS


def test_every_module_has_a_room_and_every_room_a_module() -> None:
    assert set(ROOMS) == set(FLOOR_OF)


@pytest.mark.parametrize("name", list(ROOMS))
def test_imports_go_strictly_downwards(name: str) -> None:
    unplaced = ({name} | imported_rooms(name)) - FLOOR_OF.keys()
    assert not unplaced, f"{sorted(unplaced)} have no floor in docs/house.md yet"
    floor = FLOOR_OF[name]
    for other in imported_rooms(name):
        allowed = FLOOR_OF[other] < floor or other in SAME_FLOOR.get(name, set())
        assert allowed, f"{name} (floor {floor}) imports {other} (floor {FLOOR_OF[other]})"


def test_no_imports_go_in_a_circle() -> None:
    edges = {name: imported_rooms(name) for name in ROOMS}
    while edges:
        leaves = {name for name, others in edges.items() if not others & edges.keys()}
        assert leaves, f"a circle among {sorted(edges)}"
        edges = {name: others for name, others in edges.items() if name not in leaves}


@pytest.mark.parametrize("name", sorted(FLOORS[DOORS] & ROOMS.keys()))
def test_a_door_is_light_and_defines_no_class(name: str) -> None:
    assert not outside_packages(name, top_level_only=True) & {"torch", "transformers", "pydantic", "accelerate"}
    assert not [node.name for node in ast.walk(parse(ROOMS[name])) if isinstance(node, ast.ClassDef)]


@pytest.mark.parametrize("name", sorted(FLOORS[GROUND] & ROOMS.keys()))
def test_ground_does_not_know_transformers(name: str) -> None:
    assert "transformers" not in outside_packages(name)


def test_errors_need_nothing() -> None:
    assert outside_packages("errors") == set()


@pytest.mark.parametrize(
    "name", sorted(set().union(*(FLOORS[floor] for floor in range(2, DOORS))) & ROOMS.keys() - DRAWS)
)
def test_only_doors_print_and_parse_arguments(name: str) -> None:
    assert not outside_packages(name) & {"typer", "click", "argparse", "rich"}
    calls = [node.func for node in ast.walk(parse(ROOMS[name])) if isinstance(node, ast.Call)]
    assert not [call.id for call in calls if isinstance(call, ast.Name) and call.id == "print"]


@pytest.mark.parametrize("name", list(ROOMS))
def test_a_file_fits_in_one_head(name: str) -> None:
    lines = ROOMS[name].read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{lines} lines; look for the second idea"


def test_the_median_file_is_short() -> None:
    lines = [path.read_text(encoding="utf-8").count("\n") for path in ROOMS.values()]
    assert statistics.median(lines) < MAX_MEDIAN_LINES


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_opens_by_explaining_itself(path: Path) -> None:
    assert ast.get_docstring(parse(path))


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, qquant; print(*sorted({'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == ""


@pytest.mark.parametrize(
    "module", ["qquant", "qquant.gptq", "qquant.eval", "qquant.chat", "qquant.plan", "qquant.profile", "qquant.report"]
)
def test_help_is_fast(module: str) -> None:
    """Best of three in CPU seconds of the child, so that a busy machine does not count."""
    best = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, check=True, cwd=ROOT)
        best = min(best, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert best <= HELP_CPU_SECONDS


@pytest.mark.parametrize("name", [name for name in qquant.__all__ if name != "__version__"])
def test_every_public_name_is_documented(name: str) -> None:
    assert getattr(qquant, name).__doc__


def test_an_unknown_name_is_refused_with_what_there_is() -> None:
    with pytest.raises(AttributeError, match="quantize_model"):
        _ = qquant.quantise_model
