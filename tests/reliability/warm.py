"""What a quantizing process imports, imported once: children are forked from here and begin at once.

Nothing is computed here, since threads and autograd's engine do not survive a fork.
"""

from __future__ import annotations

import gc
import importlib
import os

os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import qquant

for name in (
    "qquant.checkpoint",
    "qquant.gptq",
    "qquant.gradients",
    "qquant.heap",
    "qquant.mixed_precision",
    "qquant.progress",
    "qquant.quantizing",
    "qquant.refinement",
    "qquant.side_files",
    "qquant.tokenizer_check",
    "qquant.walk",
    "pytest",
    "tests.reliability.runs",
    "transformers.generation.utils",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2",
):
    importlib.import_module(name)

tasks = os.listdir("/proc/self/task")
assert len(tasks) == 1, f"{len(tasks)} threads, and only one of them would be forked"
gc.collect()
gc.freeze()
assert qquant.__version__
