"""A quantized checkpoint as a folder: what goes into it, how it appears all at once, how it is loaded and proven.

The tensors' layout is packing.py, reading and writing shards is shards.py, the walk that makes the tensors is walk.py.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import qquant
from qquant.columns import group_columns
from qquant.config import QuantizeConfig, QuantizeLog
from qquant.device_map import check_places, computes_on_cpu
from qquant.errors import BadModelError, NumericError, QquantError, UnprovenError, UsageError
from qquant.finite import all_finite
from qquant.gptq_keys import METHOD, GptqFileConfig, check_keys
from qquant.hf_plugin import GptqLoader, say_kernels, swap_linears
from qquant.identity import sha256
from qquant.json_files import read_json, write_json
from qquant.kv_cache_quant import enable_as_configured
from qquant.linear_kernels import Kernel, check_activation_bits, wished
from qquant.model_folder import BUILD_ERRORS, check_plain, name_weights, read_config, resolve_folder
from qquant.models.layouts import block_list, linears
from qquant.packing import packable, period
from qquant.publish import Kind
from qquant.rounded_head import check_head_bits, round_head
from qquant.run_identity import versions
from qquant.shards import CheckpointReader, TensorSpec
from qquant.sources import LoadedModel, StreamedModel, compute_dtype
from qquant.text_sources import one_line

_log = logging.getLogger("qquant")

MANIFEST_NAME = "manifest.json"
LOG_NAME = "quant_log.json"
_NOTHING_LEFT = "the rules leave every linear layer alone, so there is nothing to quantize; remove some"
_TOKENS = 16  # whose logits are compared at a time: with all at once come four times the logits in float32
_ZEROS_AS = "gptqmodel:0.9.0"
"""GPTQModel refuses asymmetric v1 zeros unless a writer is named that stores them by its rule, as we do."""


def plan_tensors(source: StreamedModel, config: QuantizeConfig) -> tuple[dict[str, TensorSpec], list[str], list[str]]:
    """What the quantized checkpoint will hold, known before anything is computed.

    Args:
        source: the original model.
        config: what will be done.

    Returns:
        Every tensor's spec in model order, the full names of the linears to be packed, and of those left alone.

    Raises:
        UsageError: a group size that does not divide a row, a shape that the format cannot hold, or rules that leave
            nothing to quantize.
    """
    packed: dict[str, QuantizeConfig] = {}
    skipped: list[str] = []
    for index, block in enumerate(block_list(source.model, source.layout)):
        for inner, layer in linears(block).items():
            name = f"{source.layout.blocks}.{index}.{inner}"
            chosen = config.for_module(name)
            if chosen is None:
                skipped.append(name)
                continue
            _refuse_unpackable(name, layer.in_features, layer.out_features, chosen)
            packed[name] = chosen
    if not packed:
        raise UsageError(_NOTHING_LEFT)
    plan: dict[str, TensorSpec] = {}
    for tensor in source.stored_names():
        name, _, leaf = tensor.rpartition(".")
        spec = source.reader.spec(tensor)
        if leaf == "weight" and name in packed:
            plan.update(_packed_specs(name, spec.shape, packed[name]))
        else:
            plan[tensor] = spec
    return plan, list(packed), skipped


def refuse_unpackable_model(source: LoadedModel, config: QuantizeConfig) -> None:
    """The same checks for a model in memory, before anything is changed."""
    chosen_any = False
    for index, block in enumerate(block_list(source.model, source.layout)):
        for inner, layer in linears(block).items():
            name = f"{source.layout.blocks}.{index}.{inner}"
            chosen = config.for_module(name)
            if chosen is not None:
                chosen_any = True
                _refuse_unpackable(name, layer.in_features, layer.out_features, chosen)
    if not chosen_any:
        raise UsageError(_NOTHING_LEFT)


def attach_quantization(model: Any, config: QuantizeConfig, quantized: list[str], skipped: list[str]) -> None:
    """Mark a model in memory as quantized, so that ``save_pretrained`` writes the keys of a GPTQ checkpoint."""
    file_config = GptqFileConfig.from_dict(quantization_keys(config, quantized, skipped))
    model.hf_quantizer = GptqLoader(file_config, pre_quantized=True)
    model.config.quantization_config = file_config
    model.is_quantized = True
    model.quantization_method = METHOD


def _refuse_unpackable(name: str, rows: int, columns: int, config: QuantizeConfig) -> None:
    try:
        group_columns(rows, config.group_size)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from error
    if not packable(rows, columns, config.bits):
        raise UsageError(
            f"{name}: a {config.bits}-bit GPTQ tensor needs both sides to be multiples of {period(config.bits)[0]}, "
            f"got [{columns}, {rows}]; leave it alone with --skip '.*{name.rpartition('.')[2]}'"
        )


def _packed_specs(name: str, shape: tuple[int, ...], config: QuantizeConfig) -> dict[str, TensorSpec]:
    columns, rows = shape
    groups = rows // group_columns(rows, config.group_size)
    return {
        f"{name}.qweight": TensorSpec("I32", (rows * config.bits // 32, columns)),
        f"{name}.qzeros": TensorSpec("I32", (groups, columns * config.bits // 32)),
        f"{name}.scales": TensorSpec("F16", (groups, columns)),
        f"{name}.g_idx": TensorSpec("I32", (rows,)),
    }


def quantization_keys(config: QuantizeConfig, quantized: list[str], skipped: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` that every GPTQ reader understands.

    Modules left alone are named twice, because GPTQModel reads ``dynamic`` and transformers only
    ``modules_in_block_to_quantize``.
    """
    keys: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.needs_g_idx,
        "sym": config.sym,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "static_groups": config.static_groups,
        "true_sequential": config.true_sequential,
        "damp_percent": config.damp_percent,
        "model_file_base_name": "model",
        "meta": {
            "quantizer": [f"qquant:{qquant.__version__}", _ZEROS_AS],
            "method": config.method,
            "act_group_aware": config.group_aware,
            "clip_search": config.clip,
        },
    }
    if config.dynamic:
        keys["dynamic"] = {rule: change.model_dump(exclude_none=True) for rule, change in config.dynamic.items()}
    if skipped:
        keys["modules_in_block_to_quantize"] = [quantized]
    return keys


def _is_quantized(folder: Path) -> bool:
    """An original is never replaced: it may be the only copy, or the very source of the run."""
    with suppress(BadModelError, OSError):
        if not any(path.is_dir() for path in folder.iterdir()):
            return "quantization_config" in read_json(folder / "config.json")
    return False


QUANTIZED_FOLDER = Kind("a quantized model's folder", _is_quantized)
"""What ``published`` makes here, and may replace."""


def write_manifest(
    target: Path,
    *,
    source: Path,
    source_files: Mapping[str, str],
    config: QuantizeConfig,
    data: Mapping[str, Any],
    log: QuantizeLog,
    computed_in: str,
    adapter: Path | None = None,
    adapter_files: Mapping[str, str] | None = None,
    config_changes: Mapping[str, Any] | None = None,
    files: Collection[str] | None = None,
) -> None:
    """The quantization log and a manifest of everything: inputs, options, versions and the sha256 of every file.

    ``source_files`` and ``adapter_files`` are names and sha256 of what was read in these folders, ``config_changes``
    what config.json says otherwise than the source's: of a padded MLP its width.
    ``fallbacks`` in it says of each linear that was not quantized as asked what was done instead; empty: all were.
    Of the folder's files the manifest vouches for those whose names are in ``files``; None: for all of them.
    Neither holds times, paths or text, so the same inputs give the same bytes.
    """
    write_json(target / LOG_NAME, log.model_dump(mode="json", exclude={"modules": {"__all__": {"seconds"}}}))
    write_json(
        target / MANIFEST_NAME,
        {
            "schema_version": 1,
            "source": {"name": source.resolve().name, "files": dict(source_files)},
            **({"adapter": {"name": adapter.resolve().name, "files": dict(adapter_files or {})}} if adapter else {}),
            **({"config_changes": dict(config_changes)} if config_changes else {}),
            "config": config.model_dump(mode="json"),
            "compute_dtype": computed_in,
            "data": dict(data),
            "fallbacks": {record.name: record.fallback for record in log.modules if record.fallback is not None},
            "versions": versions(),
            "files": {
                path.name: sha256(path)
                for path in sorted(target.iterdir())
                if path.name != MANIFEST_NAME and (files is None or path.name in files)
            },
        },
    )


def reopen(folder: Path, *, dtype: torch.dtype, device: torch.device | str) -> StreamedModel:
    """A quantized folder as a block source, with every key and shape checked and its linears packed."""
    config = GptqFileConfig.from_dict({**quantization_config(folder), "kernel": "reference"})

    def prepare(model: Any, reader: CheckpointReader) -> None:
        swap_linears(model, reader, config)

    return StreamedModel(folder, dtype=dtype, device=device, prepare=prepare)


def check_logits(written: Tensor, walked: Tensor) -> None:
    """The reopened checkpoint must compute what the walk computed.

    Both run the same operations on the same values, so on a CPU they are usually equal; where a matmul splits its
    sums another way they differ by a few roundings of the compute dtype, in the norm. A layer that was written wrongly
    changes the norm by a large share.

    Raises:
        UnprovenError: they differ by more, or are not finite.
    """
    if not all_finite(written):
        raise NumericError("the written checkpoint gives logits that are not finite; it was not published")
    if torch.equal(written, walked):
        return
    apart = whole = 0.0
    for ours, theirs in zip(written.split(_TOKENS, dim=1), walked.split(_TOKENS, dim=1), strict=True):
        apart += float((ours.float() - theirs.float()).norm()) ** 2
        whole += float(theirs.float().norm()) ** 2
    difference = (apart / max(whole, 1e-60)) ** 0.5
    # Sums of thousands of float32 products in another order differ by some 1e-5, whatever the dtype of the result, and
    # may round to a neighbour in a part of the elements.
    if difference > max(torch.finfo(written.dtype).eps / 2, 1e-4):
        raise UnprovenError(
            f"the written checkpoint must give the logits of the walk, they differ by {difference:g} of their norm; "
            "it was not published. The same command compares again; if that fails too, delete its unfinished work"
        )
    _log.info("the written checkpoint's logits differ from the walk's by %g of their norm", difference)


def quantization_config(folder: Path) -> dict[str, Any]:
    """The quantization keys of a checkpoint, from config.json, or quantize_config.json of AutoGPTQ's time.

    Raises:
        BadModelError: none, or two that disagree on what the tensors mean.
    """
    beside = folder / "quantize_config.json"
    main = read_json(folder / "config.json").get("quantization_config")
    side = read_json(beside) if beside.is_file() else None
    keys = side if main is None else main
    if not isinstance(keys, dict):
        raise BadModelError(f"a GPTQ checkpoint must have quantization_config in config.json, {folder} has none")
    if side is not None and main is not None:
        for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "dynamic"):
            if key in main and key in side and main[key] != side[key]:
                raise BadModelError(
                    f"config.json and quantize_config.json of {folder} disagree on {key}: {main[key]} "
                    f"and {side[key]}; remove the one that does not belong"
                )
    check_keys(keys)
    return keys


def is_quantized(folder: Path) -> bool:
    """Whether a model folder says anywhere that its weights are quantized."""
    stored = read_json(folder / "config.json").get("quantization_config")
    return stored is not None or (folder / "quantize_config.json").is_file()


def load_quantized(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: str | int | torch.device | dict[str, Any] | None = None,
    kernel: Kernel | str = Kernel.AUTO,
    activation_bits: Literal[8] | None = None,
    head_bits: Literal[8] | None = None,
    use_cache_quantization: bool | None = None,
    use_cache_kernel: bool | None = None,
    **model_options: Any,
) -> PreTrainedModel:
    """Load a GPTQ checkpoint, ours or another tool's, as a transformers model with packed linears.

    A checkpoint that is not quantized is loaded too where the int8 cache is asked for or declined.

    Args:
        path: folder, or a hub id.
        dtype: compute dtype; "auto": the one config.json names, but float32 for float16 on a CPU.
        device_map: as in transformers' ``from_pretrained``; None: the CPU. Packed layers that it offloads are fetched
            at every use and run the reference.
        kernel: what multiplies packed linears, see ``Kernel``; "reference" is plain torch for the whole model.
        activation_bits: 8 rounds the activations of packed linears, one step for each token and 128 columns, which is
            faster for many tokens and changes results; CPU only. None: they are used as they are.
        head_bits: 8 rounds the output projection to 8 bits in groups of 128: fewer bytes to read for every token, other
            results, and a model that cannot be saved. Its activations stay exact. None: it is used as it is stored.
        use_cache_quantization: whether ``generate`` keeps keys and values in 8 bits, see ``enable_kv_quant``; None:
            as config.json says, else no.
        use_cache_kernel: whether it runs the compiled kernels; None: as config.json says, else yes.
        **model_options: passed on to ``from_pretrained``.

    Returns:
        The model in eval mode. Which kernel serves which layers, and why, is logged by ``qquant.kernels``.

    Raises:
        BadModelError: incomplete, inconsistent, or with keys that are not understood.
        UsageError: no such kernel, or one that cannot serve these layers here; an output projection that cannot be
            rounded; a device_map with places that are not here or names that the model does not have.
    """
    check_head_bits(head_bits)
    check_places(device_map)
    chosen = {"kernel": wished(kernel), "activation_bits": check_activation_bits(activation_bits)}
    folder = resolve_folder(str(path))
    config = read_config(folder)
    for flag, value in (("use_cache_quantization", use_cache_quantization), ("use_cache_kernel", use_cache_kernel)):
        if value is not None:
            setattr(config, flag, value)
    # Whoever names the cache wants the model with or without it, be its weights quantized or not.
    named = use_cache_quantization is not None or getattr(config, "use_cache_quantization", None)
    plain = named and not is_quantized(folder)
    wishes = {"kernel": chosen["kernel"] is not Kernel.AUTO, "activation_bits": activation_bits, "head_bits": head_bits}
    for option in [name for name, wish in wishes.items() if wish] if plain else []:
        raise UsageError(f"{option} is about quantized models, and {folder} is none; leave it out")
    if not plain:
        model_options.setdefault("offload_buffers", True)  # packed tensors are buffers
        config.quantization_config = {**quantization_config(folder), "quant_method": METHOD, **chosen}
    name_weights(config, folder)
    if dtype == "auto":
        declared = getattr(config, "dtype", None) or torch.float32
        dtype = compute_dtype(declared, torch.device("cpu")) if computes_on_cpu(device_map) else declared
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=dtype, device_map=device_map, trust_remote_code=False, **model_options
    )
    if plain:  # otherwise the plug-in has done so
        enable_as_configured(model)
    if head_bits is not None:
        say_kernels([round_head(model, bits=head_bits, kernel=kernel)])
    return model


def load_model(
    folder: Path, *, dtype: torch.dtype | str = "auto", device: torch.device, int8_cache: bool | None = False
) -> PreTrainedModel:
    """A local folder's model, quantized or not, on one device, with every file and tensor accounted for.

    Args:
        folder: the model.
        dtype: compute dtype, see ``load_quantized``.
        device: where all of it goes.
        int8_cache: whether ``generate`` keeps keys and values in 8 bits, by the compiled kernels; None: both as
            config.json says.

    Raises:
        BadModelError: damaged or incomplete files, or a model that cannot be built.
    """
    stored = CheckpointReader(folder)  # refuses damaged files, and names that lead outside, before they are opened
    wanted = bool(getattr(read_config(folder), "use_cache_quantization", False)) if int8_cache is None else int8_cache
    if not is_quantized(folder):
        check_plain(stored)
    try:
        model = load_quantized(
            folder,
            dtype=dtype,
            device_map=None if device.type == "cpu" else {"": str(device)},
            use_cache_quantization=wanted,
            use_cache_kernel=True if int8_cache else None,
        )
    except (QquantError, torch.OutOfMemoryError):
        raise
    except (*BUILD_ERRORS, SafetensorError) as error:
        raise BadModelError(f"the model in {folder} cannot be loaded: {one_line(error)}") from error
    if not is_quantized(folder):  # transformers fills what is missing with random numbers
        known = {*stored.entries, *(getattr(model, "all_tied_weights_keys", None) or ())}
        if missing := sorted(model.state_dict().keys() - known):
            count = f"{len(missing)} missing in all"
            raise BadModelError(f"tensor {missing[0]} is missing from {folder} ({count}); get the model again")
    return model
