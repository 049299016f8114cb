"""``python -m qquant.gptq``: turn a BF16 checkpoint into a verified GPTQ one.

The recipe, top to bottom: read samples, plan the output, walk the blocks and write each as it is done, add the side
files, reopen what was written and compare, publish. Every step's own room does the work; torch is imported inside.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qquant.console import user_errors

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from qquant.calibrate import Sample
    from qquant.config import ModuleRecord, QuantizeConfig, QuantizeLog
    from qquant.solver import Solution

_PROBE_TOKENS = 32  # length of the made-up sample that proves a checkpoint made without data
_log = logging.getLogger("qquant")


def quantize_checkpoint(
    model: str | Path,
    samples: Sequence[Sample] | None,
    config: QuantizeConfig,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = 4_000_000_000,
    overwrite: bool = False,
    on_module: Callable[[ModuleRecord], None] | None = None,
    adapter: str | Path | None = None,
) -> QuantizeLog:
    """Quantize a model folder into a new one, one decoder block in memory at a time.

    The result is written beside ``out``, reopened, compared with what the walk computed, and only then renamed.

    Args:
        model: folder or hub id of the original, safetensors weights.
        samples: calibration samples; None for ``config.method == "rtn"``.
        config: what to do.
        out: folder to make.
        dtype: compute dtype; None: the stored one (float32 for float16 weights on a CPU).
        device: where blocks are computed.
        max_shard_bytes: size at which a new output shard begins.
        overwrite: replace an existing model folder, in the moment the new one is complete.
        on_module: called after each linear, for progress.
        adapter: folder of a peft LoRA adapter to merge into the model as its blocks are read; None: none.

    Returns:
        What was done to each module; the same is in the folder's quant_log.json.

    Raises:
        QquantError: bad options (UsageError), model, data, numbers, or disk; nothing is left at ``out``.
    """
    from qquant.calibrate import check_samples, fingerprint
    from qquant.capture import capture, head
    from qquant.checkpoint import (
        QUANTIZED_FOLDER,
        check_logits,
        plan_tensors,
        quantization_keys,
        reopen,
        write_manifest,
    )
    from qquant.config import QuantizeLog
    from qquant.linear import QuantLinear
    from qquant.publish import published
    from qquant.shards import ShardWriter
    from qquant.side_files import collect
    from qquant.sources import StreamedModel, resolve_folder
    from qquant.walk import Walk

    folder, target = resolve_folder(str(model)), Path(out)
    tuned = None if adapter is None else Path(adapter).expanduser()
    source = StreamedModel(folder, dtype=dtype, device=device, adapter=tuned)
    beside = collect(folder, adapter=tuned, changes=source.config_changes)
    beside.check_tokenizer()
    vocabulary = int(source.config.get_text_config().vocab_size)
    chosen = _samples_or_probe(samples, config, vocabulary)
    check_samples(chosen, vocabulary)
    data: dict[str, Any] = (
        {"sha256": fingerprint(samples), "samples": len(samples)} if samples and config.method == "gptq" else {}
    )
    plan, quantized, skipped = plan_tensors(source, config)
    with published(target, QUANTIZED_FOLDER, overwrite=overwrite) as staging:
        writer = ShardWriter(staging, plan, max_shard_bytes=max_shard_bytes)
        for name in plan:
            if name in source.reader.entries:
                writer.write_chunks(name, source.finite_chunks(name))

        def write(name: str, layer: nn.Linear, solution: Solution, settings: QuantizeConfig) -> None:
            packed = QuantLinear.from_codes(*solution.packable(), bits=settings.bits, group_size=settings.group_size)
            for part, tensor in packed.state_dict().items():
                writer.write(f"{name}.{part}", tensor)

        source.load_outside(with_head=False)
        stream = capture(source, chosen, device)
        source.release_outside()
        walk = Walk(source, config, write, on_module or (lambda record: None))
        walk.run(stream)
        writer.close()
        beside.write(staging, quantization_keys(config, quantized, skipped))

        source.load_outside(with_head=True)
        walked = head(source, stream.hidden[0], device)
        source.release_outside()
        del stream
        check_logits(_logits_of(reopen(staging, dtype=source.dtype, device=device), chosen[0], device), walked)
        log = QuantizeLog(modules=tuple(walk.records), skipped=tuple(walk.skipped))
        computed_in = str(source.dtype).removeprefix("torch.")
        write_manifest(
            staging, source=folder, adapter=tuned, config=config, data=data, log=log, computed_in=computed_in
        )
    return log


def quantize_model(
    model: PreTrainedModel,
    samples: Sequence[Sample] | None,
    config: QuantizeConfig,
    *,
    on_module: Callable[[ModuleRecord], None] | None = None,
) -> QuantizeLog:
    """Quantize a model in memory; its linears become ``QuantLinear`` and ``save_pretrained`` writes a GPTQ checkpoint.

    Args:
        model: causal language model on one device. Modified in place.
        samples: calibration samples; None for ``config.method == "rtn"``.
        config: what to do.
        on_module: called after each linear, for progress.

    Returns:
        What was done to each module.

    Raises:
        QquantError: bad options, data or numbers. The model may then be partly quantized; load it again.
    """
    from qquant.calibrate import check_samples
    from qquant.capture import capture
    from qquant.checkpoint import attach_quantization, refuse_unpackable_model
    from qquant.config import QuantizeLog
    from qquant.linear import QuantLinear
    from qquant.model_kernels import attach_kernels
    from qquant.sources import LoadedModel
    from qquant.walk import Walk

    source = LoadedModel(model)
    vocabulary = int(model.config.get_text_config().vocab_size)
    chosen = _samples_or_probe(samples, config, vocabulary)
    check_samples(chosen, vocabulary)
    refuse_unpackable_model(source, config)
    replacements: dict[str, QuantLinear] = {}

    def keep(name: str, layer: nn.Linear, solution: Solution, settings: QuantizeConfig) -> None:
        replacements[name] = QuantLinear.from_codes(
            *solution.packable(), bias=layer.bias, bits=settings.bits, group_size=settings.group_size
        )

    walk = Walk(source, config, keep, on_module or (lambda record: None))
    walk.run(capture(source, chosen, model.device))
    for name, layer in replacements.items():
        model.set_submodule(name, layer)
    attach_quantization(model, config, list(replacements), walk.skipped)
    attach_kernels(model)
    return QuantizeLog(modules=tuple(walk.records), skipped=tuple(walk.skipped))


def _samples_or_probe(samples: Sequence[Sample] | None, config: QuantizeConfig, vocabulary: int) -> list[Sample]:
    """The calibration samples, or for round-to-nearest one made-up sample that only serves to compare logits."""
    from qquant.calibrate import samples_from_ids
    from qquant.errors import BadModelError, UsageError

    if vocabulary < 1:
        raise BadModelError(
            f"a model must have one row per token, vocab_size is {vocabulary}; get its config.json again"
        )
    if config.method == "rtn":
        return samples_from_ids([[i % vocabulary for i in range(_PROBE_TOKENS)]])
    if samples is None:
        raise UsageError('method "gptq" needs calibration data, got none; give --data, or choose --method rtn')
    return list(samples)


def _logits_of(source: Any, sample: Sample, device: torch.device | str) -> torch.Tensor:
    """Logits [1, T, vocab] of one sample through a folder that is read block by block."""
    import torch

    from qquant.capture import capture, first_output, head
    from qquant.models.layouts import block_list

    source.load_outside(with_head=True)
    stream = capture(source, [sample], device)
    hidden = stream.hidden[0]
    with torch.inference_mode():
        for index in range(len(block_list(source.model, source.layout))):
            hidden = first_output(source.load(index)(hidden, **stream.calls[0][index]))
            source.release(index)
    return head(source, hidden, device)


def quantize_command(
    model: Annotated[str, typer.Option("--model", "--model_name_or_path", help="Model folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", "--out_path", help="Folder to make.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data", "--data_path", help="Calibration data: text, JSONL, Qwen or OpenAI chats, parquet, hub id."
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a peft LoRA adapter that is merged into the model on the way.")
    ] = None,
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[
        int, typer.Option("--group-size", "--group_size", help="Columns per scale; -1: a row.")
    ] = 128,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Fix zeros at mid-range, or fit them.")] = True,
    seq_len: Annotated[int, typer.Option("--seq-len", "--max_len", help="Tokens per sample, at most.")] = 2048,
    n_samples: Annotated[int, typer.Option("--n-samples", help="Calibration samples.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the draw of samples.")] = 0,
    method: Annotated[str, typer.Option(help="gptq, or rtn: round to nearest, no data.")] = "gptq",
    desc_act: Annotated[bool, typer.Option("--desc-act", help="Act-order; readers then need g_idx.")] = False,
    static_groups: Annotated[bool, typer.Option("--static-groups", help="Fit grids first; no g_idx.")] = False,
    group_aware: Annotated[
        bool | None, typer.Option("--group-aware/--left-to-right", help="Order of groups; on unless another order is.")
    ] = None,
    clip_search: Annotated[str, typer.Option(help="off, weight or hessian.")] = "weight",
    damp_percent: Annotated[float, typer.Option(help="Damping, share of the mean diagonal.")] = 0.01,
    true_sequential: Annotated[bool, typer.Option("--true-sequential/--one-pass", help="Stage by stage.")] = True,
    packing: Annotated[str, typer.Option(help="auto, pack or truncate.")] = "auto",
    skip: Annotated[list[str] | None, typer.Option(help="Regex of modules to leave alone; repeatable.")] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="'REGEX=bits:8,group_size:64' for some modules; repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Compute dtype: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    max_shard_size: Annotated[float, typer.Option(min=0.001, max=1e6, help="GB per output shard.")] = 4.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show samples, plan and sizes, then stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Quantize a model to a GPTQ checkpoint. The new folder's path goes to stdout, all else to stderr."""
    options = {
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "method": method,
        "desc_act": desc_act,
        "static_groups": static_groups,
        "act_group_aware": group_aware,
        "clip_search": clip_search,
        "damp_percent": damp_percent,
        "true_sequential": true_sequential,
    }
    with user_errors(debug=debug):
        logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
        config = _config(options, skip or [], override or [])
        from qquant.adapter import Adapter
        from qquant.checkpoint import QUANTIZED_FOLDER
        from qquant.progress import module_progress, quiet_transformers, step_progress
        from qquant.publish import refuse_existing
        from qquant.sources import pick_device, pick_dtype, read_config, resolve_folder

        refuse_existing(out, QUANTIZED_FOLDER, overwrite=overwrite)
        if adapter is not None:
            adapter = adapter.expanduser()
            Adapter(adapter)  # whether it can be merged at all is said before any data is read
        folder = resolve_folder(model)
        with step_progress() as on_progress:
            on_progress("reading the calibration samples", 0, 1)
            samples = _read_samples(folder, adapter, data, config, n_samples, seq_len, seed, packing)
        if dry_run:
            _show_plan(folder, adapter, samples, config)
            return
        from qquant.heap import keep_heap_small

        quiet_transformers()
        keep_heap_small()
        began, cpu_began = time.perf_counter(), time.process_time()
        blocks = getattr(read_config(folder).get_text_config(), "num_hidden_layers", None)
        with module_progress(blocks) as on_module:
            log = quantize_checkpoint(
                folder,
                samples,
                config,
                out,
                dtype=pick_dtype(dtype),
                device=pick_device(device),
                max_shard_bytes=int(max_shard_size * 1e9),
                overwrite=overwrite,
                on_module=on_module,
                adapter=adapter,
            )
        _summarize(log, out, time.perf_counter() - began, time.process_time() - cpu_began)
        typer.echo(out)


def _config(options: dict[str, Any], skips: list[str], overrides: list[str]) -> QuantizeConfig:
    """The command line's options as a config; rules are tried in the order skips, then overrides."""
    from qquant.config import ModuleOverride, QuantizeConfig
    from qquant.errors import UsageError

    rules = {f"-:{pattern}": ModuleOverride() for pattern in skips}
    for text in overrides:
        pattern, equals, changes = text.rpartition("=")
        pairs = [change.partition(":")[::2] for change in changes.split(",")]
        if not equals or not pattern or not all(key and value for key, value in pairs):
            raise UsageError(f"an override is 'REGEX=bits:8,group_size:64', got {text!r}")
        try:
            rules[f"+:{pattern}"] = ModuleOverride.model_validate(
                {
                    key.strip(): value.strip() if value.strip() in ("true", "false") else int(value)
                    for key, value in pairs
                }
            )
        except ValueError as error:
            raise UsageError(
                f"override {text!r}: {str(error).splitlines()[0]}; known: {', '.join(ModuleOverride.model_fields)}"
            ) from error
    return QuantizeConfig.from_dict({**options, "dynamic": rules})


def _read_samples(
    folder: Path,
    adapter: Path | None,
    data: str | None,
    config: QuantizeConfig,
    n_samples: int,
    seq_len: int,
    seed: int,
    packing: Any,  # checked by load_samples
) -> list[Sample] | None:
    from qquant.calibrate import check_tokenizer, load_samples
    from qquant.errors import UsageError
    from qquant.side_files import tokenizer_folder
    from qquant.sources import load_tokenizer

    if config.method == "rtn":
        return None
    if data is None:
        raise UsageError("gptq needs calibration data, got no --data; give a text or JSON file, or choose --method rtn")
    with tokenizer_folder(folder, adapter) as place:
        tokenizer = load_tokenizer(place)
        warning = check_tokenizer(tokenizer, place)
    if warning:
        _log.warning("%s", warning)
    return load_samples(data, tokenizer, n_samples=n_samples, seq_len=seq_len, seed=seed, packing=packing)


def _show_plan(folder: Path, adapter: Path | None, samples: list[Sample] | None, config: QuantizeConfig) -> None:
    from qquant.checkpoint import plan_tensors
    from qquant.side_files import collect
    from qquant.sources import StreamedModel

    source = StreamedModel(folder, adapter=adapter)
    collect(folder, adapter=adapter, changes=source.config_changes).check_tokenizer()
    plan, quantized, skipped = plan_tensors(source, config)
    before = sum(entry.spec.nbytes for entry in source.reader.entries.values())
    after = sum(spec.nbytes for spec in plan.values())
    tokens = sum(int(sample.mask.sum()) for sample in samples or [])
    typer.echo(f"samples   {len(samples or [])}, {tokens} tokens that count")
    typer.echo(f"linears   {len(quantized)} to {config.bits} bits, {len(skipped)} left alone")
    typer.echo(f"weights   {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({after / before:.3f})")


def _summarize(log: QuantizeLog, out: Path, seconds: float, cpu_seconds: float) -> None:
    """A few lines on stderr: time, the worst module, whatever was not as planned."""
    worst = max(log.modules, key=lambda record: record.relative_error)
    solving = sum(record.seconds for record in log.modules)
    lines = [
        f"{len(log.modules)} linears in {seconds:.1f} s, {cpu_seconds:.1f} CPU s ({solving:.1f} s of it solving)",
        f"worst relative error {worst.relative_error:.2e} in {worst.name}",
    ]
    escalated = [record.name for record in log.modules if record.damp_escalations]
    dead = sum(record.dead_columns for record in log.modules)
    if escalated:
        lines.append(f"damping was raised for {len(escalated)} linears, first {escalated[0]} (see quant_log.json)")
    if dead:
        lines.append(f"{dead} input columns saw only zeros in calibration and were rounded to nearest")
    if log.skipped:
        lines.append(f"{len(log.skipped)} linears left alone by rule, first {log.skipped[0]}")
    lines.append(f"written, reopened and compared: {out}")
    typer.echo("\n".join(lines), err=True)


if __name__ == "__main__":
    typer.run(quantize_command)
