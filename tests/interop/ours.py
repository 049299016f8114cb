"""Our half of the interop check: logits of the folders we and others wrote, and what ``verify`` says of them.

Runs in our environment and reads the same kind of JSON list of jobs as theirs.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import qquant
from tests.planted import planted


def logits(job: dict[str, Any]) -> None:
    """Load a folder in float32, quantized by anybody or not at all, and save the logits of the job's token ids."""
    folder = Path(job["model"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model: Any
    if "quantization_config" in config:
        model = qquant.load_quantized(folder, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    with torch.no_grad():
        result = model(input_ids=torch.tensor(job["ids"])).logits
    save_file({"logits": result.float().contiguous()}, job["out"])


def verify(job: dict[str, Any]) -> None:
    """A sound checkpoint has no problem."""
    problems = qquant.verify_checkpoint(job["model"]).problems
    if problems:
        raise AssertionError("; ".join(f"{found.check}: {found.subject}: {found.text}" for found in problems))


def plant(job: dict[str, Any]) -> None:
    """Every defect that suits the folder is found by its check, in a copy; their names go to the job's ``out``."""
    folder = Path(job["model"])
    found, missed = [], []
    for name, defect in planted(folder):
        with tempfile.TemporaryDirectory() as place:
            copy = Path(shutil.copytree(folder, Path(place) / "copy"))
            defect.plant(copy)
            findings = qquant.verify_checkpoint(copy).findings
        fits = [
            defect.check == one.check and defect.subject in one.subject for one in findings if one.level == defect.level
        ]
        (found if any(fits) else missed).append(name)
    Path(job["out"]).write_text(json.dumps(found), encoding="utf-8")
    if missed:
        raise AssertionError(f"not found: {', '.join(missed)}")


def main() -> int:
    """Do every job; a job that fails is reported in the results and does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    qquant.register()
    results = {}
    for job in json.loads(arguments.jobs.read_text(encoding="utf-8")):
        try:
            {"logits": logits, "verify": verify, "plant": plant}[job["do"]](job)
        except Exception as error:
            traceback.print_exc()
            results[job["name"]] = f"{type(error).__name__}: {error}"
        else:
            results[job["name"]] = "ok"
    arguments.results.write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
