"""``python -m qquant.gptq``: turn a BF16 checkpoint into a verified GPTQ one.

The command line: options, samples, what is shown. The recipe is quantizing.py; torch is imported inside.
"""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qquant.code_keys import ignoring_code
from qquant.console import size_in_bytes, user_errors
from qquant.errors import UsageError
from qquant.quantizing import quantize_checkpoint, quantize_mixed

if TYPE_CHECKING:
    from qquant.calibrate import Mixture, Sample
    from qquant.config import QuantizeConfig, QuantizeLog
    from qquant.divergence import Divergence
    from qquant.mixed_precision import Choice, MixedPrecision

_log = logging.getLogger("qquant")
_NAMED = 8  # linears that the summary names of those that were not quantized as asked


def quantize_command(
    model: Annotated[str, typer.Option("--model", "--model_name_or_path", help="Model folder or hub id.")],
    out: Annotated[Path, typer.Option("--out", "--out_path", help="Folder to make.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "--data_path",
            help="Calibration data: text, JSONL, Qwen or OpenAI chats, parquet, hub id; repeatable, with a weight as "
            "zh.jsonl=2.",
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
    method: Annotated[
        str, typer.Option(help="best; gptq or fast: less time; rtn: nearest, no data; or parts, as qep+pivot+refine.")
    ] = "best",
    desc_act: Annotated[bool, typer.Option("--desc-act", help="Act-order; readers then need g_idx.")] = False,
    static_groups: Annotated[bool, typer.Option("--static-groups", help="Fit grids first; no g_idx.")] = False,
    group_aware: Annotated[
        bool | None, typer.Option("--group-aware/--left-to-right", help="Order of groups; on unless another order is.")
    ] = None,
    clip_search: Annotated[
        str | None, typer.Option(help="off, weight, hessian or loop; default: the method's.")
    ] = None,
    damp_percent: Annotated[float, typer.Option(help="Damping, share of the mean diagonal.")] = 0.01,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="An error where a linear needs more damping than asked, or rounding to nearest instead."
        ),
    ] = False,
    true_sequential: Annotated[bool, typer.Option("--true-sequential/--one-pass", help="Stage by stage.")] = True,
    packing: Annotated[str, typer.Option(help="auto, pack or truncate.")] = "auto",
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Put all data, plain text too, into the model's chat template, or nothing; default: only messages, "
            "and prompts with answers.",
        ),
    ] = None,
    select: Annotated[str, typer.Option(help="random, or spread: evenly, without copies.")] = "random",
    skip: Annotated[list[str] | None, typer.Option(help="Regex of modules to leave alone; repeatable.")] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="'REGEX=bits:8,group_size:64' for some modules; repeatable.")
    ] = None,
    target_size: Annotated[
        str | None, typer.Option("--target-size", help="Mix 4 and 8 bits so that weight files stay under 4.6GiB, say.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", help="The smallest mix of 4 and 8 bits that stays under this KL.")
    ] = None,
    sensitivity_tokens: Annotated[
        int, typer.Option("--sensitivity-tokens", min=256, help="Tokens that a mix is measured on.")
    ] = 2048,
    tensor_parallel: Annotated[
        int, typer.Option("--tp", "--tensor-parallel", help="Cards to serve it on; MLPs are padded to divide.")
    ] = 1,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory", help="Such as 5GB; what does not fit lies on the disk. Default: half of what is free."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Compute dtype: auto, float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    max_shard_size: Annotated[float, typer.Option(min=0.001, max=1e6, help="GB per output shard.")] = 4.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show samples, plan and sizes, then stop.")] = False,
    ignore_code: Annotated[
        bool, typer.Option("--ignore-code", help="Open a folder whose files name code, without it.")
    ] = False,
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
        "strict": strict,
        "true_sequential": true_sequential,
    }
    with user_errors(debug=debug), ignoring_code(ignore_code), ExitStack() as until_the_end:
        logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
        config = _config(options, skip or [], override or [])
        target = _target(target_size, max_kl)
        from qquant.adapter import Adapter
        from qquant.checkpoint import QUANTIZED_FOLDER
        from qquant.model_folder import read_config, resolve_folder
        from qquant.progress import module_progress, quiet_transformers, step_progress
        from qquant.ranks import joined
        from qquant.sources import pick_device, pick_dtype
        from qquant.unfinished import refuse_output

        refuse_output(out, QUANTIZED_FOLDER, overwrite=overwrite)
        memory = None if max_memory is None else size_in_bytes(max_memory, "--max-memory")
        ranks, own_device = until_the_end.enter_context(joined(device))
        until_the_end.callback(_log.setLevel, _log.level)
        _log.setLevel(logging.DEBUG if debug else logging.NOTSET if ranks.writer else logging.ERROR)
        if adapter is not None:
            adapter = adapter.expanduser()
            Adapter(adapter)  # whether it can be merged at all is said before any data is read
        folder = resolve_folder(model)
        with step_progress(shown=ranks.writer) as on_progress:
            on_progress("reading the calibration samples", 0, 1)
            chosen = {"n_samples": n_samples, "seq_len": seq_len, "seed": seed, "packing": packing}
            chosen |= {"chat_template": chat_template, "select": select}
            mixture = _read_samples(folder, adapter, data or [], config, chosen, needed=bool(target))
        samples = mixture.samples if mixture else None
        if ranks.writer:
            _tell_given(mixture, err=not dry_run)
        if dry_run and not target:
            if ranks.writer:
                _show_plan(folder, adapter, samples, config, tensor_parallel)
            return
        from qquant.heap import keep_heap_small

        quiet_transformers()
        keep_heap_small()
        began, cpu_began = time.perf_counter(), time.process_time()
        where: dict[str, Any] = {
            "device": pick_device(own_device),
            "max_shard_bytes": int(max_shard_size * 1e9),
            "adapter": adapter,
            "tensor_parallel": tensor_parallel,
        }
        if target:
            from qquant.mixed_precision import measure

            with step_progress(shown=ranks.writer) as on_progress:
                where |= {"sensitivity_tokens": sensitivity_tokens, "out": None if dry_run else out}
                where |= {"overwrite": overwrite, "ranks": ranks}
                mixed = measure(folder, samples, config, on_progress=on_progress, **where)
            if dry_run and not ranks.writer:
                return
            if dry_run:
                choice = mixed.choose(**target)
                _show_choice(mixed, choice)
                _show_plan(folder, adapter, samples, choice.config, tensor_parallel)
                return
        blocks = getattr(read_config(folder).get_text_config(), "num_hidden_layers", None)
        with module_progress(blocks, shown=ranks.writer) as listeners:
            run: dict[str, Any] = {"dtype": pick_dtype(dtype), "overwrite": overwrite, "max_memory": memory}
            run |= listeners._asdict()
            if target:
                run |= {"on_choice": partial(_show_choice, mixed)} if ranks.writer else {}
                log, measured = quantize_mixed(mixed, out, **target, **run)
            else:
                log = quantize_checkpoint(folder, samples, config, out, ranks=ranks, **where, **run)
        if not ranks.writer:
            return
        if target:
            _say_measured(measured)
        if any((one.bits, one.group_size) != (config.bits, config.group_size) for one in log.modules):
            from qquant.mixed_settings import READERS

            typer.echo(READERS, err=True)
        _summarize(log, out, time.perf_counter() - began, time.process_time() - cpu_began)
        typer.echo(out)


def _config(options: dict[str, Any], skips: list[str], overrides: list[str]) -> QuantizeConfig:
    """The command line's options as a config; rules are tried in the order skips, then overrides."""
    from qquant.config import ModuleOverride, QuantizeConfig

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


def _target(size: str | None, max_kl: float | None) -> dict[str, Any]:
    """What a mix of 4 and 8 bits has to meet, as arguments of ``MixedPrecision.choose``; nothing if none is wanted."""
    if size is not None and max_kl is not None:
        raise UsageError("--target-size and --max-kl are two targets, and one is met at a time; leave one out")
    if max_kl is not None and not 0 < max_kl < 100:
        raise UsageError(f"--max-kl must be above 0 nats per token, such as 0.01, got {max_kl:g}")
    if size is not None:
        return {"target_bytes": size_in_bytes(size, "--target-size")}
    return {} if max_kl is None else {"max_kl": max_kl}


def _show_choice(mixed: MixedPrecision, choice: Choice, before: float | None = None) -> None:
    """The frontier on stderr, with the choice in its place; ``before``: KL measured of an earlier choice."""
    if before is not None:
        typer.echo(f"measured KL {before:.2e} of that, so another is chosen", err=True)
    points = [other.point for other in mixed.frontier()]
    points = sorted({point.size_bytes: point for point in (*points, choice.point)}.values(), key=lambda p: p.size_bytes)
    if mixed.predicted_with != mixed.config.method:
        typer.echo(mixed.prediction, err=True)
    typer.echo("     weight files  predicted KL  on the line  stages", err=True)
    for point in points:
        mark = "->" if point.size_bytes == choice.point.size_bytes else ""
        mix = ", ".join(f"{count} {label}" for label, count in point.stages.items())
        line = mixed.line_kl(point.size_bytes)
        typer.echo(f"{mark:2} {point.size_bytes:14,d}  {point.predicted_kl:12.2e}  {line:11.2e}  {mix}", err=True)


def _say_measured(found: Divergence) -> None:
    """What the result costs, and how sure that is."""
    sure = "not known" if found.stderr is None else f"{found.stderr:.1e}"
    typer.echo(
        f"measured KL {found.kl:.2e} (standard error {sure}) on {found.tokens} tokens that were used for nothing else",
        err=True,
    )


def _read_samples(
    folder: Path,
    adapter: Path | None,
    data: list[str],
    config: QuantizeConfig,
    options: dict[str, Any],
    *,
    needed: bool,
) -> Mixture | None:
    """The samples, with the options that ``load_mixture`` takes and checks; None where nothing needs any."""
    from qquant.calibrate import check_tokenizer, load_mixture
    from qquant.model_folder import load_tokenizer
    from qquant.side_files import tokenizer_folder
    from qquant.source_weights import parse_sources

    if not config.needs_data and not needed:
        return None
    if not data and needed:
        raise UsageError("a size or KL target is met by measuring, which needs calibration data; give --data")
    if not data:
        raise UsageError(
            f'method "{config.method}" needs calibration data, got no --data; give a text or JSON file, or choose '
            "--method rtn"
        )
    sources = parse_sources(data)
    with tokenizer_folder(folder, adapter) as place:
        tokenizer = load_tokenizer(place)
        warning = check_tokenizer(tokenizer, place)
    if warning:
        _log.warning("%s", warning)
    return load_mixture(sources, tokenizer, **options)


def _tell_given(mixture: Mixture | None, *, err: bool) -> None:
    """A line for each source, with its share of the tokens where there are several; one on the chat template."""
    given = mixture.given if mixture else ()
    tokens = sum(one.tokens for one in given)
    for one in given:
        share = f" ({one.tokens / tokens:.0%})" if len(given) > 1 else ""
        typer.echo(f"source    {one.source}: {one.samples} samples, {one.tokens} tokens{share}, {one.read_as}", err=err)
    if mixture and mixture.hint:
        typer.echo(f"template  {mixture.hint}", err=err)


def _show_plan(
    folder: Path, adapter: Path | None, samples: list[Sample] | None, config: QuantizeConfig, tensor_parallel: int
) -> None:
    from qquant.checkpoint import plan_tensors
    from qquant.padding import fit_to_ranks
    from qquant.side_files import collect
    from qquant.sources import StreamedModel

    source = StreamedModel(folder, adapter=adapter)
    before = sum(entry.spec.nbytes for entry in source.reader.entries.values())
    fit_to_ranks(source, config, tensor_parallel)
    collect(folder, adapter=adapter, changes=source.config_changes).check_tokenizer()
    plan, quantized, skipped = plan_tensors(source, config)
    after = sum(spec.nbytes for spec in plan.values())
    tokens = sum(int(sample.mask.sum()) for sample in samples or [])
    typer.echo(f"samples   {len(samples or [])}, {tokens} tokens that count")
    bits = sorted(chosen.bits for name in quantized if (chosen := config.for_module(name)))
    counts = ", ".join(f"{bits.count(width)} to {width} bits" for width in dict.fromkeys(bits))
    typer.echo(f"linears   {counts}, {len(skipped)} left alone")
    typer.echo(f"weights   {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB ({after / before:.3f})")


def _summarize(log: QuantizeLog, out: Path, seconds: float, cpu_seconds: float) -> None:
    """A few lines on stderr: time, the worst module, whatever was not as planned."""
    worst = max(log.modules, key=lambda record: record.relative_error)
    solving = sum(record.seconds for record in log.modules)
    lines = [
        f"{len(log.modules)} linears in {seconds:.1f} s, {cpu_seconds:.1f} CPU s ({solving:.1f} s of it solving)",
        f"worst relative error {worst.relative_error:.2e} in {worst.name}",
    ]
    fallbacks = [f"{record.name}: {record.fallback}" for record in log.modules if record.fallback is not None]
    dead = sum(record.dead_columns for record in log.modules)
    if fallbacks:
        lines.append(f"{len(fallbacks)} linears not as asked, all of them in manifest.json; --strict forbids it:")
        lines += [f"  {fallback}" for fallback in fallbacks[:_NAMED]]
    if dead:
        lines.append(f"{dead} input columns saw only zeros in calibration and were rounded to nearest")
    if log.skipped:
        lines.append(f"{len(log.skipped)} linears left alone by rule, first {log.skipped[0]}")
    lines.append(f"written, reopened and compared: {out}")
    typer.echo("\n".join(lines), err=True)


if __name__ == "__main__":
    typer.run(quantize_command)
