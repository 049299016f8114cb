"""Adapters for tests: trained at random by peft itself, saved, merged by peft, edited. No test is in this file."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qquant.adapter_settings import CONFIG_NAME, WEIGHTS_NAME
from qquant.cli import app
from qquant.sources import StreamedModel

RANK = 4

Change = Callable[[dict[str, Tensor]], object]
"""Edits an adapter's tensors in place, or returns others."""


def trained(base: Path, *, resize: int = 0, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A peft model on ``base`` whose trainable numbers are all random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of tied embeddings; what becomes of them is tested here
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto")
        if resize:
            model.resize_token_embeddings(resize, mean_resizing=False)
        options = {"r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((0.05 * noise).to(parameter.dtype))
    return tuned


def saved(tuned: Any, folder: Path) -> Path:
    """The adapter as peft saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that embeddings are saved as well
        tuned.save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path, *, resize: int = 0) -> Any:
    """peft's merge of an adapter on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        if resize:
            model.resize_token_embeddings(resize, mean_resizing=False)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def streamed(base: Path, adapter: Path) -> tuple[StreamedModel, dict[str, Tensor]]:
    """Every tensor as the walk and the writer get it."""
    source = StreamedModel(base, adapter=adapter)
    tensors = {}
    for name in source.stored_names():
        pieces = torch.cat(list(source.finite_chunks(name)))
        tensors[name] = pieces.reshape(source.reader.spec(name).shape)
    return source, tensors


def edited(folder: Path, target: Path, change: Change = dict, **keys: Any) -> Path:
    """A copy of an adapter with other tensors and other keys of its configuration."""
    shutil.copytree(folder, target)
    tensors = load_file(target / WEIGHTS_NAME)
    changed = change(tensors)
    save_file(changed if isinstance(changed, dict) else tensors, target / WEIGHTS_NAME)
    content = json.loads((target / CONFIG_NAME).read_text())
    (target / CONFIG_NAME).write_text(json.dumps(content | keys))
    return target


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``qquant quantize``."""
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr
