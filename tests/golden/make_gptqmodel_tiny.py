"""Write gptqmodel-tiny/: a complete small checkpoint by gptqmodel, and the logits it has there in float32.

Runs in the environment of gptqmodel (README.md beside this file), never in ours, and imports nothing of qquant. The
logits come from plain transformers with gptqmodel's float32 kernel.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "interop"))

import models  # noqa: E402
import theirs  # noqa: E402  (sets the environment that gptqmodel needs, so it comes before torch)
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def main() -> None:
    """Make the model, quantize it with act-order and real zeros, keep the files and the logits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "gptqmodel-tiny")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = work / "source"
        models.make_model(
            source, hidden=64, intermediate=128, layers=2, vocab=288, tied=True, dtype=torch.bfloat16, seed=3
        )
        rows = models.windows(source, work / "source-calibration.txt", count=24, length=128)
        (work / "windows.json").write_text(json.dumps(rows[:16]), encoding="utf-8")
        written = work / "written"
        theirs.quantize(
            {
                "model": str(source),
                "out": str(written),
                "windows": str(work / "windows.json"),
                "dtype": "bfloat16",
                "options": {"bits": 4, "group_size": 32, "sym": False, "desc_act": True, "act_group_aware": False},
            }
        )
        ids = [row[:16] for row in rows[-2:]]
        theirs.logits(
            {"model": str(written), "ids": ids, "kernel": "gptq_torch", "out": str(work / "logits.safetensors")}
        )
        logits = load_file(work / "logits.safetensors")["logits"]
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(written, out, ignore=shutil.ignore_patterns("quant_log.csv"))
        # Beside the folder: a stray safetensors file inside would not be part of a checkpoint.
        expected = out.with_name(f"{out.name}-expected_logits.safetensors")
        save_file({"input_ids": torch.tensor(ids), "logits": logits}, expected)
    for file in (expected, *out.iterdir()):
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out.name}: {sorted(file.name for file in out.iterdir())}, {size} bytes")


if __name__ == "__main__":
    main()
