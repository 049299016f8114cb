"""Our half of the interop check: logits of the folders we and others wrote, and of the models they came from.

Runs in our environment and reads the same kind of JSON list of jobs as theirs.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import qquant


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
            logits(job)
        except Exception as error:
            traceback.print_exc()
            results[job["name"]] = f"{type(error).__name__}: {error}"
        else:
            results[job["name"]] = "ok"
    arguments.results.write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
