"""Results of every kind, made up and small, for the tests of the joined report."""

from __future__ import annotations

from functools import partial
from typing import Any

from qquant import answer_report, plan_report, profile_report, records, task_report
from qquant import results as record
from qquant.results import ModelRow, Result
from tests import test_result_files

GIB = 2**30
PARAMETERS_7B = 7_721_324_544
HOSTILE = "</td><script>alert('x')</script>\u202etxt.\"exe'"
"""Closes a tag, opens a script, turns the direction of writing, and ends an attribute of either quote."""


def make_environment(**changes: Any) -> records.Environment:
    fields: dict[str, Any] = {
        "python": "3.11.7",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "qquant": "0.1.0",
        "platform": "Linux x86_64",
        "cpu": "A CPU",
        "threads": 2,
        "device": "A CPU",
    }
    return records.Environment(**{**fields, **changes})


make_accuracy = partial(test_result_files.make_accuracy, top1=0.959)


def make_row(label: str, role: str = "candidate", **changes: Any) -> ModelRow:
    base = role == "baseline"
    fields: dict[str, Any] = {
        "label": label,
        "role": role,
        "model_type": "qwen",
        "parameters": PARAMETERS_7B,
        "sha256": ("b" if base else "c") * 64,
        "method": None if base else "gptq",
        "bits": None if base else 4,
        "group_size": None if base else 128,
        "checkpoint_dtype": "bfloat16",
        "weights_bytes": 15_442_649_088 if base else 5_862_000_000,
        "folder_bytes": None,
        "bits_per_weight": 16.0 if base else 6.07,
        "accuracy": make_accuracy(12.0, None) if base else make_accuracy(12.012, 0.002),
        "speed": None,
        "memory": None,
        "ratios": None,
        "layer_errors": ()
        if base
        else tuple(
            record.LayerError(name=f"transformer.h.{layer}.{name}", relative_error=1e-3 * (layer + 1))
            for layer in range(3)
            for name in ("attn.c_attn", "mlp.w1")
        ),
    }
    return ModelRow(**{**fields, **changes})


def make_result(*rows: ModelRow, **changes: Any) -> Result:
    """An evaluation on a text, unless its fields are changed; the first row is what the others are compared with."""
    rows = rows or (make_row("qwen", "baseline"), make_row("qwen-int4"))
    fields: dict[str, Any] = {
        "created": "2026-01-02T03:04:05+00:00",
        "command": "python -m qquant.eval --baseline qwen --candidate qwen-int4",
        "git_commit": "0123456789abcdef",
        "seed": 7,
        "compute_dtype": "bfloat16",
        "environment": make_environment(),
        "data": record.Data(name="eval.txt", sha256="ab" * 32, tokens=1000, window_tokens=512, stride_tokens=256),
        "rows": (
            rows[0],
            *(row.model_copy(update={"ratios": record.ratios_to_baseline(row, rows[0])}) for row in rows[1:]),
        ),
    }
    return Result(**{**fields, **changes})


def make_score(label: str, task: str, correct: int, **changes: Any) -> task_report.TaskScore:
    fields: dict[str, Any] = {
        "label": label,
        "task": task,
        "style": "chat",
        "shots": 0,
        "metric": "accuracy",
        "backend": "qquant",
        "prompt_format": "qwen",
        "items": 1000,
        "correct_items": correct,
        "unreadable_items": 0,
        "score": correct / 1000,
        "score_stderr": 0.0158,
        "group_mean": None,
        "groups": (),
        "truncated_items": 0,
        "seconds": 12.5,
    }
    return task_report.TaskScore(**{**fields, **changes})


def make_tasks(baseline: str = "qwen", candidate: str = "qwen-int4", **changes: Any) -> task_report.Tasks:
    return task_report.Tasks(
        data=tuple(
            task_report.TaskData(task=task, sha256=task[0] * 64, items=1000, limit=None) for task in ("mmlu", "gsm8k")
        ),
        scores=(
            make_score(baseline, "mmlu", 558, **changes),
            make_score(candidate, "mmlu", 551, **changes),
            make_score(baseline, "gsm8k", 503, **changes),
            make_score(candidate, "gsm8k", 497, **changes),
        ),
        comparisons=(
            task_report.TaskComparison(
                label=candidate,
                task="gsm8k",
                items=1000,
                difference=-0.006,
                ci95_low=-0.021,
                ci95_high=0.009,
                only_baseline_items=33,
                only_candidate_items=27,
                mcnemar_p=0.519,
                same_answer_items=871,
            ),
            task_report.TaskComparison(
                label=candidate,
                task="mmlu",
                items=1000,
                difference=-0.047,
                ci95_low=-0.061,
                ci95_high=-0.033,
                only_baseline_items=60,
                only_candidate_items=13,
                mcnemar_p=1e-8,
                same_answer_items=900,
            ),
        ),
    )


def make_footprint(peak: float) -> records.Footprint:
    size = int(peak * GIB)
    return records.Footprint(
        weights_bytes=size // 2, cache_bytes=size // 4, activations_bytes=size // 4, overhead_bytes=0, peak_bytes=size
    )


def make_cell(
    label: str, batch: int, new_tokens: int, peak: float | None, **changes: Any
) -> profile_report.ProfileCell:
    """A cell that ran with 1 token of prompt and used ``peak`` GiB; None: it ran out of memory."""
    key = {"precision": "bf16", "kv_cache": "bf16", "prompt_tokens": 1, **changes}
    speed = profile_report.CellSpeed(
        first_token_seconds=(0.5, 0.5, 0.6),
        decode_seconds=(9.5, 9.4, 9.9),
        prefill_tokens_per_second=2.0 * batch,
        decode_tokens_per_second=batch * (new_tokens - 1) / 9.5,
        token_p50_seconds=0.01,
        token_p95_seconds=0.012,
    )
    return profile_report.ProfileCell(
        key=profile_report.CellKey(label=label, batch=batch, new_tokens=new_tokens, **key),
        status="ok" if peak else "out-of-memory",
        reason=None if peak else "CUDA out of memory while decoding",
        memory=None,
        speed=speed if peak else None,
        predicted=make_footprint(1.02 * peak) if peak else make_footprint(90),
        measured_peak_bytes=int(peak * GIB) if peak else None,
    )


def make_profile_result(**changes: Any) -> Result:
    """Random weights at the shapes of Qwen-7B on a GPU, over the batches and lengths of Qwen's README."""
    label = "qwen-7b"
    cells = [make_cell(label, batch, 1024, 15 + batch / 2 if batch < 64 else None) for batch in (1, 4, 16, 32, 64)]
    cells += [make_cell(label, batch, 1024, 15 + batch / 4, kv_cache="int8") for batch in (1, 4, 16, 32, 64)]
    cells += [make_cell(label, 1, new, 14.6 + new / 1024) for new in (512, 2048, 4096)]
    row = make_row(
        label, "baseline", sha256=None, random_weights=True, accuracy=None, weights_bytes=None, bits_per_weight=None
    )
    env = make_environment(device="A GPU", device_memory_bytes=80 * GIB, driver="550.54", cuda="12.4")
    profile = profile_report.Profile(device_memory_bytes=80 * GIB, warmups=1, repeats=3, cells=tuple(cells))
    command = "python -m qquant.profile --random-weights qwen-7b"
    return make_result(row, **{"environment": env, "data": None, "profile": profile, "command": command, **changes})


def make_plan_result() -> Result:
    cells = tuple(
        plan_report.PlanCell(
            precision="bf16",
            kv_cache="bf16",
            batch=batch,
            prompt_tokens=1,
            new_tokens=1024,
            footprint=make_footprint(14.5 + batch / 2),
            loading_peak_bytes=15 * GIB,
            fits=batch < 16,
        )
        for batch in (1, 4, 16)
    )
    plan = plan_report.Plan(
        model="qwen-7b",
        parameters=PARAMETERS_7B,
        runtime="qquant",
        group_size=128,
        device_bytes=24 * GIB,
        cells=cells,
        limits=(
            plan_report.PlanLimit(
                precision="bf16", kv_cache="bf16", largest_batch=7, largest_tokens=17_000, beyond_model=True
            ),
        ),
        quantizing=(
            plan_report.PlanQuantizing(
                bits=4, group_size=128, samples=128, seq_len_tokens=2048, device_bytes=5 * GIB, ram_bytes=9 * GIB,
                disk_bytes=6 * GIB,
            ),
        ),
        tensor_parallel=(
            plan_report.PlanTensorParallel(ranks=2, precision="int4", fits=True, reason=None),
            plan_report.PlanTensorParallel(ranks=8, precision="int4", fits=False, reason="86 groups of mlp.c_proj"),
        ),
    )  # fmt: skip
    row = make_row("qwen-7b", "baseline", sha256=None, accuracy=None, weights_bytes=None, bits_per_weight=None)
    return make_result(row, data=None, plan=plan, command="python -m qquant.plan qwen-7b --gpu 24GiB")


def make_answers(prompt: str, *texts: list[str]) -> answer_report.Answers:
    """One sample; the first text is the baseline's, the others are candidates' in the order of make_result's rows."""
    labels = ("qwen", "qwen-int4", "qwen-int8")
    models = []
    for label, tokens in zip(labels, texts, strict=False):
        pairs = zip(tokens, texts[0], strict=False)
        same = next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), len(tokens))
        models.append(
            answer_report.ModelAnswer(
                label=label,
                tokens=tuple(
                    answer_report.AnswerToken(text=token, logprob_nats=-0.4 * (place % 6))
                    for place, token in enumerate(tokens)
                ),
                same_tokens=None if label == "qwen" else same,
            )
        )
    return answer_report.Answers(
        new_tokens=64, samples=(answer_report.Answer(prompt=prompt, prompt_tokens=32, models=tuple(models)),)
    )
