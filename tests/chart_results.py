"""Results to draw charts of: the kept reports, and synthetic ones for sections that no kept report has.

The numbers are those of a made-up model of 7 billion parameters; nothing was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qquant.plan_report import Plan, PlanCell
from qquant.profile_report import CellKey, CellMemory, CellSpeed, Profile, ProfileCell
from qquant.records import Accuracy, Environment, Footprint, KVKind, Precision, Speed
from qquant.results import LayerError, ModelRow, Result, result_from_json
from qquant.task_report import TaskComparison, TaskData, TaskName, Tasks, TaskScore

ROOT = Path(__file__).parent.parent
GIB = 2**30
WEIGHTS_GIB: dict[Precision, float] = {"bf16": 14.4, "int8": 8.5, "int4": 5.5}
CACHE_SHARE: dict[KVKind, float] = {"bf16": 1.0, "int8": 0.516}
ENVIRONMENT = Environment(
    python="3.11", torch="2.13", transformers="5.23", qquant="0.1", platform="Linux", cpu="a CPU", threads=1,
    device="cpu",
)  # fmt: skip


def model_row(
    label: str,
    *,
    bits: int | None = None,
    kl: float | None = None,
    method: str = "gptq",
    layers: int = 0,
    gib: float = 14.4,
) -> ModelRow:
    accuracy = Accuracy(
        tokens=1000, nll_mean_nats=2.0, perplexity=7.389, nll_difference_nats=kl, nll_difference_stderr_nats=kl,
        kl_mean_nats=kl, kl_p99_nats=kl, kl_max_nats=kl, top1_agreement=None if kl is None else 0.99,
    )  # fmt: skip
    speed = Speed(
        prompt_tokens=512, decode_tokens=8, prefill_tokens_per_second=9000.0, decode_tokens_per_second=40.0,
        prefill_seconds=(0.055, 0.057, 0.06), decode_seconds=(0.19, 0.2, 0.22),
    )  # fmt: skip
    linears = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
    errors = tuple(
        LayerError(name=f"model.layers.{layer}.{name}", relative_error=(kl or 0.01) * (1 + layer) * (1 + place))
        for layer in range(layers)
        for place, name in enumerate(linears)
    )
    return ModelRow(
        label=label, role="baseline" if bits is None else "candidate", method=method if bits else None, bits=bits,
        group_size=128 if bits else None, checkpoint_dtype="bfloat16", weights_bytes=int(gib * GIB), folder_bytes=None,
        bits_per_weight=None, accuracy=accuracy, speed=speed, memory=None, ratios=None, layer_errors=errors,
    )  # fmt: skip


ROWS = (
    model_row("qwen-7b"),
    model_row("qwen-7b-int8", bits=8, kl=0.0004, gib=8.5, layers=32),
    model_row("qwen-7b-int4", bits=4, kl=0.009, gib=5.5, layers=32),
    model_row("qwen-7b-int4-rtn", bits=4, kl=0.04, gib=5.5, method="rtn", layers=32),
)


def result(rows: Sequence[ModelRow] = ROWS, **sections: object) -> Result:
    return Result.model_validate(
        {
            "created": "2026-11-21T00:00:00+00:00", "command": "python -m qquant.eval", "seed": 0,
            "compute_dtype": "bfloat16", "environment": ENVIRONMENT, "rows": tuple(rows), **sections,
        }
    )  # fmt: skip


def footprint(precision: Precision, cache: KVKind, batch: int, tokens: int) -> Footprint:
    """A model of 7 billion parameters: half a GiB of cache per thousand tokens."""
    weights = int(WEIGHTS_GIB[precision] * GIB)
    kv = int(0.5 * GIB * batch * tokens / 1024 * CACHE_SHARE[cache])
    return Footprint(
        weights_bytes=weights, cache_bytes=kv, activations_bytes=GIB // 2, overhead_bytes=GIB // 4,
        peak_bytes=weights + kv + 3 * GIB // 4,
    )  # fmt: skip


def profile(device_gib: float = 24, off: float = 0.02) -> Profile:
    """Measured ``off`` below the prediction, every fifth cell three times as much; what does not fit is labelled."""
    cells: list[ProfileCell] = []
    for precision in WEIGHTS_GIB:
        for cache in CACHE_SHARE:
            for batch in (1, 2, 4, 8, 16):
                for prompt in (512, 1024, 2048, 4096) if batch == 1 else (1024,):
                    said = footprint(precision, cache, batch, prompt + 128)
                    fits = said.peak_bytes < device_gib * GIB
                    measured = int(said.peak_bytes * (1 - (3 * off if len(cells) % 5 == 0 else off)))
                    rate = {"bf16": 40.0, "int8": 38.0, "int4": 60.0}[precision] * batch**0.8
                    seconds = tuple(batch * 127 / rate * factor for factor in (0.96, 1.0, 1.05))
                    cells.append(
                        ProfileCell(
                            key=CellKey(
                                label="qwen-7b", precision=precision, kv_cache=cache, batch=batch, prompt_tokens=prompt,
                                new_tokens=128,
                            ),
                            status="ok" if fits else "out-of-memory",
                            reason=None if fits else "CUDA out of memory",
                            memory=CellMemory(
                                tensor_bytes=said.weights_bytes, cache_bytes=said.cache_bytes, rss_before_bytes=None,
                                rss_loaded_bytes=None, rss_peak_loading_bytes=None, rss_peak_bytes=None,
                                allocator_peak_bytes=measured, allocator_reserved_bytes=None, device_peak_bytes=None,
                            ) if fits else None,
                            speed=CellSpeed(
                                first_token_seconds=(0.1, 0.11, 0.12), decode_seconds=seconds,
                                prefill_tokens_per_second=batch * prompt / 0.11, decode_tokens_per_second=rate,
                                token_p50_seconds=seconds[1] / 127, token_p95_seconds=seconds[2] / 127,
                            ) if fits else None,
                            predicted=said,
                            measured_peak_bytes=measured if fits else None,
                        )
                    )  # fmt: skip
    return Profile(device_memory_bytes=int(device_gib * GIB), warmups=1, repeats=3, cells=tuple(cells))


def plan() -> Plan:
    cells = tuple(
        PlanCell(
            precision=precision, kv_cache=cache, batch=batch, prompt_tokens=tokens, new_tokens=0,
            footprint=(said := footprint(precision, cache, batch, tokens)), loading_peak_bytes=said.weights_bytes,
            fits=said.peak_bytes <= 24 * GIB,
        )
        for precision in WEIGHTS_GIB for cache in CACHE_SHARE for batch in (1, 4, 16, 64) for tokens in (2048, 8192)
    )  # fmt: skip
    return Plan(
        model="qwen-7b", parameters=7_700_000_000, runtime="qquant", group_size=128, device_bytes=24 * GIB, cells=cells,
        limits=(), quantizing=(), tensor_parallel=(),
    )  # fmt: skip


def tasks() -> Tasks:
    names: tuple[TaskName, ...] = ("mmlu", "ceval", "gsm8k", "humaneval")
    loss = {"qwen-7b": 0.0, "qwen-7b-int8": 0.002, "qwen-7b-int4": 0.009, "qwen-7b-int4-rtn": 0.031}
    right = {"mmlu": 0.56, "ceval": 0.59, "cmmlu": 0.6, "gsm8k": 0.5, "humaneval": 0.35}
    return Tasks(
        data=tuple(TaskData(task=name, sha256="0" * 64, items=1000, limit=None) for name in names),
        scores=tuple(
            TaskScore(
                label=label, task=name, style="base", shots=5, metric="accuracy", backend="qquant",
                prompt_format="qwen", items=1000, correct_items=int(1000 * (right[name] - lost)), unreadable_items=0,
                score=right[name] - lost, score_stderr=0.015, group_mean=None, groups=(), truncated_items=0,
                seconds=None,
            )
            for name in names for label, lost in loss.items()
        ),
        comparisons=tuple(
            TaskComparison(
                label=label, task=name, items=1000, difference=-lost, ci95_low=-lost - 0.012, ci95_high=-lost + 0.012,
                only_baseline_items=20, only_candidate_items=10, mcnemar_p=0.1, same_answer_items=900,
            )
            for name in names for label, lost in loss.items() if lost
        ),
    )  # fmt: skip


def kept(name: str) -> Result:
    return result_from_json((ROOT / "reports" / name / "report.json").read_bytes())


REPORTS = [
    "reference-model", "qwen-tiny-lm", "reference-model-kv-cache", "outlier-model-kv-cache",
    "reference-model-long-context",
]  # fmt: skip


def every_result() -> list[Result]:
    synthetic = [result(tasks=tasks()), result((), profile=profile()), result((), plan=plan())]
    return [*map(kept, REPORTS), *synthetic]
