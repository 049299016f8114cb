"""Who takes part in bench_quality.py: our methods by name, and each peer with the settings that may be its best.

A contestant is a script, the interpreter that runs it and its options; nothing is run here.
"""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, field
from typing import Any

from benchmarks.child_process import ONE_THREAD, OUR_ENVIRONMENT, PEER_ENVIRONMENT

SIDES = ("ours", "gptqmodel", "llm-compressor", "auto-round")
IMPORTS = {
    "ours": "import torch, transformers, qquant.checkpoint, qquant.walk",
    "gptqmodel": "import torch, transformers, gptqmodel",
    "llm-compressor": "import torch, transformers, datasets, llmcompressor.modifiers.gptq",
    "auto-round": "import torch, transformers, auto_round",
}
SCRIPTS = {
    "ours": "ours_quality.py",
    "gptqmodel": "peer_quality_gptqmodel.py",
    "llm-compressor": "peer_quality_llmcompressor.py",
    "auto-round": "peer_quality_autoround.py",
}
PACKAGES = {"ours": "qquant", "gptqmodel": "gptqmodel", "llm-compressor": "llmcompressor", "auto-round": "auto-round"}
ENVIRONMENTS = {side: {**ONE_THREAD, **(OUR_ENVIRONMENT if side == "ours" else PEER_ENVIRONMENT)} for side in SIDES}


@dataclass(frozen=True)
class Contestant:
    """One side with one set of options; bits, group size and what is left alone are the benchmark's to add."""

    side: str
    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    """What the model computes in; "stored": what the tool takes by itself."""

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.side} {self.variant}"

    def answers_to(self, pattern: str) -> bool:
        """Whether a side, or a name with * and ?, means this contestant."""
        return pattern == self.side or fnmatch.fnmatchcase(self.name, pattern)


def _peer(side: str, variant: str, **options: Any) -> Contestant:
    return Contestant(side, variant, {"sym": True, **options})


PLAIN = {"desc_act": False, "act_group_aware": False}
GAR = {"desc_act": False, "act_group_aware": True}
ACT_ORDER = {"desc_act": True, "act_group_aware": False}
PEERS = (
    _peer("gptqmodel", "plain", **PLAIN),
    _peer("gptqmodel", "GAR (its default)", **GAR),
    _peer("gptqmodel", "desc_act", **ACT_ORDER),
    _peer("gptqmodel", "asym GAR", sym=False, **GAR),
    _peer("gptqmodel", "asym desc_act", sym=False, **ACT_ORDER),
    _peer("gptqmodel", "GAR mse 2.4", mse=2.4, **GAR),
    _peer("gptqmodel", "GAR gptaq 0.25", gptaq={"alpha": 0.25}, **GAR),
    _peer("gptqmodel", "asym desc_act gptaq 0.25", sym=False, gptaq={"alpha": 0.25}, **ACT_ORDER),
    _peer("gptqmodel", "GAR foem 0.2", foem={"alpha": 0.0, "beta": 0.2}, **GAR),
    _peer("llm-compressor", "no order", actorder=None),
    _peer("llm-compressor", "static (its default)"),
    _peer("llm-compressor", "asym static", sym=False),
    _peer("llm-compressor", "asym static, mse observer", sym=False, observer="memoryless_mse"),
    _peer("llm-compressor", "AWQ asym", sym=False, before=["awq"], method="rtn"),
    _peer("llm-compressor", "AWQ, asym static", sym=False, before=["awq"]),
    _peer("llm-compressor", "SpinQuant R1 R2, asym static", sym=False, before=["spinquant"]),
    _peer("auto-round", "sym 200", iters=200),
    _peer("auto-round", "asym 200", sym=False, iters=200),
    _peer("auto-round", "sym 200, alg_ext", iters=200, enable_alg_ext=True),
    _peer("auto-round", "asym 200, alg_ext", sym=False, iters=200, enable_alg_ext=True),
    _peer("auto-round", "asym 100", sym=False, iters=100),
    _peer("auto-round", "asym 1000", sym=False, iters=1000),
)


def ours(spec: str, dtype: str) -> Contestant:
    """A method of ours: ``best``, or with fields of QuantizeConfig behind commas, as in ``gptq,sym=false``."""
    method, *fields = spec.split(",")
    options: dict[str, Any] = {"method": method}
    for assignment in fields:
        name, _, value = assignment.partition("=")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return Contestant("ours", spec if dtype == "float32" else f"{spec} (dtype {dtype})", options, dtype)


def command_of(
    contestant: Contestant, python: str, folder: str, *, model: str, windows: str, out: str, options: dict[str, Any]
) -> list[str]:
    """The command that leaves the contestant's result in ``out``; ``folder`` holds the scripts."""
    command = [python, f"{folder}/{SCRIPTS[contestant.side]}"]
    command += ["quantize"] if contestant.side == "llm-compressor" else []
    command += [model, windows, out, json.dumps({**contestant.options, **options})]
    return [*command, "--dtype", "float32"] if contestant.side == "ours" and contestant.dtype == "float32" else command
