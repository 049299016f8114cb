"""The other tools' half of the interop check: quantize with gptqmodel, load with plain transformers, give logits.

Runs in the environment that run.sh makes (optimum + gptqmodel), never in ours, and imports nothing of qquant but the
model class of the original Qwen, because no other runs today; mypy does not see those packages, so this file is outside
its reach. It reads a JSON list of jobs, so that one process pays
their import time once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one or two CPUs it asks for more workers than it has
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its float32 kernel compiles itself on first use, a minute a time
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")  # its packer would build a C++ extension; same bytes without
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file


def quantize(job: dict[str, Any]) -> None:
    """Quantize ``job["model"]`` with gptqmodel's defaults but for the options of the job."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT

    out = Path(job["out"])
    shutil.rmtree(out, ignore_errors=True)
    options = {**job["options"]}
    if "format" in options:
        options["format"] = FORMAT(options["format"])
    config = QuantizeConfig(offload_to_disk=False, **options)
    dtype = getattr(torch, job.get("dtype", "float32"))
    model = GPTQModel.load(job["model"], config, dtype=dtype, device="cpu")
    windows = json.loads(Path(job["windows"]).read_text(encoding="utf-8"))
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows], batch_size=1)
    model.save(str(out), **job.get("save", {}))


def load_with_transformers(folder: str, kernel: str | None) -> torch.nn.Module:
    """Plain ``from_pretrained`` in float32; only the choice of kernel, if any, comes from here."""
    from transformers import AutoModelForCausalLM, GPTQConfig

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] == "qwen":
        from qquant.models.qwen.modeling import register_qwen

        register_qwen()  # the model only: quantized layers are read by their own code
    options = {}
    if kernel:  # transformers takes just the backend from this, the folder's own config decides the rest
        options["quantization_config"] = GPTQConfig(bits=config["quantization_config"]["bits"], backend=kernel)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def load_with_gptqmodel(folder: str) -> torch.nn.Module:
    """gptqmodel's own loader, which reads other keys than transformers; its plain kernel takes no float32."""
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model.float()


def logits(job: dict[str, Any]) -> None:
    """Load a folder and save the float32 logits of the job's token ids."""
    kernel = job.get("kernel")
    own = kernel == "gptqmodel"
    model = load_with_gptqmodel(job["model"]) if own else load_with_transformers(job["model"], kernel)
    model.eval()
    kernels = set()
    for module in model.modules():
        if hasattr(module, "qweight"):
            kernels.add(type(module).__name__)
            if kernel:
                # Stored float16 scales stay float16 in memory and would round each product to float16.
                module.scales = module.scales.float()
    with torch.no_grad():
        result = model(input_ids=torch.tensor(job["ids"])).logits
    save_file({"logits": result.contiguous()}, job["out"], metadata={"kernels": ",".join(sorted(kernels))})


def main() -> int:
    """Do every job; a job that fails is reported in the results and does not stop the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for job in json.loads(arguments.jobs.read_text(encoding="utf-8")):
        start = time.perf_counter()
        try:
            {"quantize": quantize, "logits": logits}[job["do"]](job)
        except Exception as error:
            traceback.print_exc()
            results[job["name"]] = f"{type(error).__name__}: {error}"
        else:
            results[job["name"]] = "ok"
        print(f"[theirs] {job['name']}: {results[job['name']]} ({time.perf_counter() - start:.1f} s)", file=sys.stderr)
        arguments.results.write_text(json.dumps(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
