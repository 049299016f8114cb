"""Do our checkpoints load in plain transformers with optimum and gptqmodel, and theirs in ours, with the same logits?

Both sides compute in float32 from the same stored numbers, so only the order of sums may differ. Started by run.sh;
prints one table and exits with 1 if anything differs. Everything is made on the spot from seeds, without a network.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import make_model, windows
from safetensors import safe_open
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TIMEOUT_SECONDS = 1200

SAME = 64 * torch.finfo(torch.float32).eps
"""Largest difference, as a share of the range of the logits, that float32 sums in another order may make. Measured:
2 to 3 eps between gptqmodel's float32 kernel and plain matrices. Rounding the weights to float16 makes 1600 eps."""
NEAR = 2**-5
"""The same for the kernel that transformers picks by itself, which computes in bfloat16 (eps 2**-7) at 4 bits.
Measured: 0.0026. Wrong zeros or groups make 0.3 and more."""
SANE = 0.5
"""A quantized model's logits stay this near to the original's; with garbage for weights they do not."""

SKIPPED = "model.layers.0.mlp.down_proj"
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class Variant:
    """One way to quantize."""

    bits: int
    sym: bool = True
    desc_act: bool = False

    def __str__(self) -> str:
        return f"Int{self.bits} {'sym' if self.sym else 'asym'}{' desc_act' if self.desc_act else ''}"

    @property
    def slug(self) -> str:
        return str(self).lower().replace(" ", "-")


MATRIX = [Variant(bits, sym, desc_act) for bits in (4, 8) for sym in (True, False) for desc_act in (False, True)]
SKIP_RULE = f"{SKIPPED}$".replace(".", r"\.")
MORE_OF_OURS: list[tuple[str, list[str]]] = [
    ("Int2 asym", ["--bits", "2", "--asym"]),
    ("Int3 sym", ["--bits", "3"]),
    ("Int3 asym", ["--bits", "3", "--asym"]),
    ("Int4 whole-row groups", ["--group-size", "-1"]),
    ("Int4 group 32", ["--asym", "--group-size", "32"]),
    ("Int4 static act-order", ["--desc-act", "--static-groups"]),
    ("Int4 sharded", ["--max-shard-size", "0.002"]),
    ("Int4 gptq", ["--method", "gptq"]),
    ("Int8 fast", ["--bits", "8", "--method", "fast"]),
    ("Int4 one module skipped", ["--skip", SKIP_RULE]),
]
MORE_OF_THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("Int2 asym", {"bits": 2, "sym": False}),
    ("Int3 sym", {"bits": 3, "sym": True}),
    ("Int3 asym", {"bits": 3, "sym": False}),
    ("Int4 asym v2 zeros", {"bits": 4, "sym": False, "format": "gptq_v2"}),
    ("Int4 whole-row groups", {"bits": 4, "group_size": -1, "act_group_aware": False}),
    ("Int4 group 32", {"bits": 4, "sym": False, "group_size": 32}),
]


@dataclass
class Row:
    """One checkpoint, loaded by both sides."""

    model: str
    writer: str
    what: str
    folder: Path
    their_folder: Path
    """The same, unless the other side cannot read what it wrote itself (the notation of skipped modules)."""
    auto: bool = True
    """Whether the kernel that transformers picks by itself can run it."""
    stock: bool = True
    """Whether transformers can load it with optimum and gptqmodel, which know one setting for all linears."""
    loader: bool = True
    """Whether GPTQModel can build the model by itself; the original Qwen it could only by code that no longer runs."""


class Check:
    """The working folder of one run, and the jobs gathered for each side."""

    def __init__(self, work: Path, their_python: str) -> None:
        self.work = work
        self.their_python = their_python
        self.failures: list[str] = []

    def run_jobs(self, side: str, jobs: list[dict[str, Any]]) -> None:
        """Let one side do its jobs in one process; what failed is remembered."""
        file, results = self.work / f"{side}-jobs.json", self.work / f"{side}-results.json"
        file.write_text(json.dumps(jobs), encoding="utf-8")
        results.unlink(missing_ok=True)
        python = self.their_python if side == "theirs" else sys.executable
        self.run([python, str(HERE / f"{side}.py"), str(file), str(results)], f"{side}: {len(jobs)} jobs")
        found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
        for job in jobs:
            if found.get(job["name"]) != "ok":
                self.failures.append(f"{side}, {job['name']}: {found.get(job['name'], 'was not done')}")

    def run(self, command: list[str], what: str) -> bool:
        """Run a command in the working folder with its output in a log; show the log's end if it fails."""
        start = time.perf_counter()
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=self.work, env=env, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS
        )
        print(f"  {what}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        if done.returncode:
            self.failures.append(f"{what}: exit code {done.returncode}")
            print((done.stdout + done.stderr)[-4000:], file=sys.stderr)
        return done.returncode == 0

    def quantize_ours(self, model: Path, text: Path, out: Path, *options: str) -> bool:
        """Run our command line."""
        command = [sys.executable, "-m", "qquant.gptq", "--model", str(model), "--data", str(text), "--out", str(out)]
        command += ["--seq-len", "128", "--n-samples", "24", *options]
        return self.run(command, f"ours: {out.name}")


def copy_with(folder: Path, out: Path, **changes: Any) -> Path:
    """Copy a checkpoint, changing keys of its quantization_config; None removes a key."""
    shutil.copytree(folder, out)
    for name in ("config.json", "quantize_config.json"):
        if not (out / name).exists():
            continue
        data = json.loads((out / name).read_text(encoding="utf-8"))
        part = data["quantization_config"] if name == "config.json" else data
        part.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del part[key]
        (out / name).write_text(json.dumps(data), encoding="utf-8")
    return out


def module_names(layers: int) -> list[str]:
    """Every linear of the blocks but the skipped one."""
    names = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in LINEARS]
    return [name for name in names if name != SKIPPED]


def weight_bytes(folder: Path) -> int:
    """Of a checkpoint's safetensors files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def rows_of(check: Check, model: Path, text: Path, *, more: bool) -> tuple[list[Row], list[dict[str, Any]]]:
    """Quantize on our side, and list the rows of one model with what their side has to quantize first."""
    name = model.name
    calibration = check.work / f"{name}-windows.json"
    calibration.write_text(json.dumps(windows(model, text, count=24, length=128)), encoding="utf-8")
    rows, jobs = [], []

    def theirs(what: str, out: Path, options: dict[str, Any], **save: Any) -> None:
        defaults = {"group_size": 128, "act_group_aware": not options.get("desc_act", False)}
        common = {"do": "quantize", "model": str(model), "windows": str(calibration), "save": save}
        jobs.append({**common, "name": f"{name} {what}", "out": str(out), "options": {**defaults, **options}})

    for variant in MATRIX:
        out = check.work / f"{name}-ours-{variant.slug}"
        options = ["--bits", str(variant.bits), "--sym" if variant.sym else "--asym"]
        if check.quantize_ours(model, text, out, *options, *["--desc-act"] * variant.desc_act):
            rows.append(Row(name, "ours", str(variant), out, out))
        out = check.work / f"{name}-theirs-{variant.slug}"
        theirs(str(variant), out, {"bits": variant.bits, "sym": variant.sym, "desc_act": variant.desc_act})
        rows.append(Row(name, "theirs", str(variant), out, out))
    if not more:
        return rows, jobs

    for what, options in MORE_OF_OURS:
        out = check.work / f"{name}-ours-{what.lower().replace(' ', '-')}"
        if check.quantize_ours(model, text, out, *options):
            rows.append(Row(name, "ours", what, out, out, auto="whole-row" not in what))
    size = sum(weight_bytes(check.work / f"{name}-ours-int{bits}-sym") for bits in (4, 8)) // 2
    out = check.work / f"{name}-ours-mixed"
    if check.quantize_ours(model, text, out, "--target-size", f"{size / 2**20:.4f}MiB"):
        rows.append(Row(name, "ours", "Int4 and Int8 mixed", out, out, auto=False, stock=False))
    for what, settings in MORE_OF_THEIRS:
        out = check.work / f"{name}-theirs-{what.lower().replace(' ', '-')}"
        theirs(what, out, settings)
        rows.append(Row(name, "theirs", what, out, out, auto="whole-row" not in what))
    out = check.work / f"{name}-theirs-sharded"
    theirs("sharded", out, {"bits": 4}, max_shard_size="1MB")
    rows.append(Row(name, "theirs", "Int4 sym, sharded", out, out))
    out = check.work / f"{name}-theirs-skip"
    theirs("skip", out, {"bits": 4, "dynamic": {f"-:^{SKIP_RULE}": {}}})
    return rows, jobs


def qwen_v1_rows(check: Check, model: Path, text: Path) -> list[Row]:
    """Ours of the original Qwen; the other side reads the files with its own packed layers in our model class."""
    sizes = "hidden_size=128, intermediate_size=512, kv_channels=32, num_attention_heads=4, seq_length=48"
    code = f"make_qwen_v1(pathlib.Path({str(model)!r}), dtype=torch.bfloat16, {sizes})"
    check.run([sys.executable, "-c", f"import pathlib, torch; from tests.make_qwen_v1 import *; {code}"], "qwen v1")
    rows = []
    for bits in (4, 8):
        out = check.work / f"{model.name}-ours-int{bits}"
        if check.quantize_ours(model, text, out, "--bits", str(bits), "--group-size", "32"):
            rows.append(Row(model.name, "ours", f"Int{bits} sym", out, out, loader=False))
    return rows


def skip_rows(check: Check, model: Path, layers: int) -> list[Row]:
    """Their checkpoint with a skipped module, in both notations; their own transformers path reads only the second."""
    written = check.work / f"{model.name}-theirs-skip"
    if not written.exists():
        return []
    listed = [module_names(layers)]
    modules = check.work / f"{model.name}-theirs-skip-modules"
    copy_with(written, modules, dynamic=None, modules_in_block_to_quantize=listed)
    return [
        Row(model.name, "theirs", "Int4 sym, skipped by `dynamic`", written, modules),
        Row(model.name, "theirs", "Int4 sym, skipped by `modules_in_block_to_quantize`", modules, modules),
    ]


def compare(check: Check, rows: list[Row], models: dict[str, Path], ids: dict[str, list[list[int]]]) -> None:
    """Let both sides compute every row's logits, and print the table."""

    def job(name: str, folder: Path, model: str, out: Path, kernel: str | None = None) -> dict[str, Any]:
        made = {"do": "logits", "name": name, "model": str(folder), "ids": ids[model], "out": str(out)}
        return {**made, "kernel": kernel} if kernel else made

    def file(kind: str, index: int | str) -> Path:
        return check.work / f"logits-{kind}-{index}.safetensors"

    mine = [job(f"{name} original", folder, name, file("original", name)) for name, folder in models.items()]
    their_jobs = []
    for index, row in enumerate(rows):
        title = f"{row.model} {row.writer} {row.what}"
        mine.append(job(title, row.folder, row.model, file("ours", index)))
        if row.stock:
            their_jobs.append(job(title, row.their_folder, row.model, file("exact", index), "gptq_torch"))
        if row.writer == "ours" and row.loader:
            their_jobs.append(
                job(f"{title}, GPTQModel.load", row.folder, row.model, file("GPTQModel.load", index), "gptqmodel")
            )
        if row.auto:
            their_jobs.append(job(f"{title}, kernel auto", row.their_folder, row.model, file("auto", index)))
    check.run_jobs("theirs", their_jobs)
    check.run_jobs("ours", mine)

    print("Differences of logits, largest, as a share of their range. same: both in float32; auto: theirs with the")
    print("kernel that transformers picks; GPTQModel.load: gptqmodel's own loader, with float16 for what is not")
    print("quantized; original: ours against the model before quantization.\n")
    print(f"| model | written by | checkpoint | same (<= {SAME:.1e}) | auto (<= {NEAR:.1e}) | kernel |", end="")
    print(f" GPTQModel.load (<= {NEAR:.1e}) | original | |\n|---|---|---|---|---|---|---|---|---|")
    for index, row in enumerate(rows):
        files = {kind: file(kind, index) for kind in ("ours", "exact", "auto", "GPTQModel.load")}
        print(line(check, row, file("original", row.model), files))


def verify(check: Check, rows: list[Row]) -> None:
    """Every checkpoint is sound by ``qquant verify``, and what is planted in some of them is found."""
    jobs: list[dict[str, Any]] = [
        {"do": "verify", "name": f"verify {folder.name}", "model": str(folder)}
        for folder in dict.fromkeys(row.folder for row in rows)
        if folder.exists()
    ]
    sound = len(jobs)
    for writer in ("ours", "theirs"):
        for slug in ("int4-sym", "int4-asym-desc_act"):
            folder = check.work / f"random-{writer}-{slug}"
            out = check.work / f"planted-{folder.name}.json"
            if folder.exists():
                jobs.append({"do": "plant", "name": f"planted in {folder.name}", "model": str(folder), "out": str(out)})
    before = len(check.failures)
    check.run_jobs("ours", jobs)
    failed = sum(failure.startswith("ours, verify ") for failure in check.failures[before:])
    print(f"\nqquant verify: {sound - failed} of {sound} checkpoints are sound; of the defects of tests/planted.py")
    for job in jobs[sound:]:
        found = json.loads(Path(job["out"]).read_text(encoding="utf-8")) if Path(job["out"]).exists() else []
        print(f"- {job['name']}: {len(found)} found")


def line(check: Check, row: Row, original: Path, files: dict[str, Path]) -> str:
    """One row of the table; what is out of bounds or missing is remembered as a failure."""
    found = {kind: load_file(file)["logits"] for kind, file in files.items() if file.exists()}
    head = f"| {row.model} | {row.writer} | {row.what} |"
    title = f"{row.model}, written by {row.writer}, {row.what}"
    if not original.exists() or "ours" not in found:
        check.failures.append(f"{title}: no logits of ours")
        return f"{head} - | - | - | - | - | FAIL |"
    base, mine = load_file(original)["logits"], found["ours"]
    span = float(base.max() - base.min())
    apart = {kind: float((logits - mine).abs().max()) / span for kind, logits in {**found, "original": base}.items()}
    limits = {"original": SANE} | ({"exact": SAME} if row.stock else {})
    limits |= {"auto": NEAR} if row.auto else {}
    limits |= {"GPTQModel.load": NEAR} if row.writer == "ours" and row.loader else {}
    # "not (a <= b)": a NaN must fail, and so must what is missing
    bad = [kind for kind, limit in limits.items() if not (apart.get(kind, float("nan")) <= limit)]
    if bad:
        shown = [f"{kind} {apart[kind]:.1e}" if kind in apart else f"{kind} missing" for kind in bad]
        check.failures.append(f"{title}: {', '.join(shown)}")
    kernel = "-"
    if "auto" in found:
        with safe_open(files["auto"], "pt") as opened:
            kernel = opened.metadata()["kernels"]
    exact, auto, loader, change = (
        f"{apart[kind]:.1e}" if kind in apart else ("missing" if kind in limits else "-")
        for kind in ("exact", "auto", "GPTQModel.load", "original")
    )
    return f"{head} {exact} | {auto} | {kernel} | {loader} | {change} | {'FAIL' if bad else 'ok'} |"


def main() -> int:
    """Make the models, quantize them on both sides, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--their-python", required=True, help="interpreter of the environment that run.sh makes")
    parser.add_argument("--model", type=Path, help="a real model folder, checked besides the random one")
    parser.add_argument("--data", type=Path, help="its calibration text")
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it")
    arguments = parser.parse_args()
    if bool(arguments.model) != bool(arguments.data):
        parser.error("--model and --data come together")
    if arguments.keep:
        arguments.keep.mkdir(parents=True)
        return run_in(arguments.keep.resolve(), arguments)
    with tempfile.TemporaryDirectory() as name:
        return run_in(Path(name), arguments)


def run_in(work: Path, arguments: argparse.Namespace) -> int:
    """Do the whole check in one folder."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    check = Check(work, os.path.abspath(arguments.their_python))
    random = work / "random"
    make_model(random, hidden=256, intermediate=768, layers=2, vocab=512, tied=False)
    text = work / "random-calibration.txt"
    models = {"random": random}
    rows, jobs = rows_of(check, random, text, more=True)
    ids = {"random": [row[:64] for row in windows(random, text, count=30, length=128)[-4:]]}
    qwen = work / "qwen-v1"
    models[qwen.name] = qwen
    rows += qwen_v1_rows(check, qwen, text)
    ids[qwen.name] = [list(range(97, 161)), list(range(32, 96))]  # letters, beyond seq_length
    if arguments.model:
        model, data = arguments.model.resolve(), arguments.data.resolve()
        models[model.name] = model
        found, extra = rows_of(check, model, data, more=False)
        rows, jobs = rows + found, jobs + extra
        ids[model.name] = [row[:64] for row in windows(model, data, count=30, length=128)[-4:]]
    check.run_jobs("theirs", jobs)
    rows += skip_rows(check, random, 2)
    compare(check, rows, models, ids)
    verify(check, rows)

    print(f"\n{len(rows)} checkpoints, {time.perf_counter() - start:.0f} s")
    for failure in check.failures:
        print(f"FAIL {failure}")
    return 1 if check.failures else 0


if __name__ == "__main__":
    sys.exit(main())
