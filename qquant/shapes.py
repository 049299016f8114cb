"""The shapes of a model, read off a skeleton without weights that transformers builds from its configuration.

The configuration is a folder's or a hub's. Only this reads shapes; what they cost in memory is footprint.py's.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from torch import nn
from transformers import PretrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from qquant.errors import BadModelError
from qquant.footprint import CacheShape, LinearShape, ModelShapes
from qquant.model_folder import BUILD_ERRORS, read_config, skeleton
from qquant.models.layouts import Layout, block_list, find_layout, linears
from qquant.models.sizes import SIZES
from qquant.text_sources import one_line

_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
_TAILS = {"o_proj", "down_proj", "c_proj", "out_proj", "fc2", "dense", "dense_4h_to_h", "wo"}
"""What families that are only known by their structure call the linears that add to the residual stream."""


def model_shapes(config: PretrainedConfig) -> ModelShapes:
    """Build the skeleton and read its shapes.

    Args:
        config: of a causal language model; that it may be quantized is passed over. Read, never written.

    Raises:
        BadModelError: no model can be built from it, or it has layers that are not described by linears and a cache of
            keys and values.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = skeleton(config, Path(config.name_or_path or config.model_type))
    model.tie_weights()  # each tensor got a place of its own on the meta device
    layout = find_layout(model, config.model_type)
    text = config.get_text_config(decoder=True)
    heads = int(text.num_attention_heads)
    head = int(_first(text, "head_dim", "kv_channels") or text.hidden_size // heads)
    embeddings = {id(end.weight): end.weight.numel() for end in _ends(model)}
    return ModelShapes(
        model_type=config.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linears=_linears(model, layout),
        caches=_caches(text, config.model_type, head),
        stages=_stages(model, layout),
        largest_tensor=max(parameter.numel() for parameter in model.parameters()),
        hidden=text.hidden_size,
        query_heads=heads,
        query_width=heads * head,
        query_norms=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        vocabulary=model.get_output_embeddings().weight.shape[0],
        tied=len(embeddings) == 1,
        embedding_parameters=sum(embeddings.values()),
        positions=_first(text, "max_position_embeddings"),
    )


def find_config(model: str) -> tuple[str, PretrainedConfig]:
    """A short name and the configuration of a folder or of a hub's model; no weights are looked at.

    Raises:
        BadModelError: none, or one that cannot be had without a network.
    """
    path = Path(model).expanduser()
    if model and path.exists():
        folder = path.parent if path.name == "config.json" else path
        return folder.resolve().name, read_config(folder)
    if model.count("/") != 1 or model.startswith(("/", ".", "~")):
        raise BadModelError(
            f"a model must be a folder, a hub id owner/name or a size, and {model!r} is none; sizes: {', '.join(SIZES)}"
        )
    try:
        file = Path(hf_hub_download(model, "config.json"))
    except BUILD_ERRORS as error:
        raise BadModelError(
            f"{model} is no local folder, and the hub did not give its config.json: {one_line(error).split('. ')[0]}; "
            "give a folder that holds one, or a size such as qwen-7b"
        ) from error
    return model, read_config(file.parent)


def _first(config: Any, *names: str) -> int | None:
    """The first of these fields that says something."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _ends(model: Any) -> list[Any]:
    return [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]


def _linears(model: nn.Module, layout: Layout) -> tuple[LinearShape, ...]:
    tails = None if layout.units is None else {unit.tail for unit in layout.units}
    return tuple(
        LinearShape(
            name=f"{layout.blocks}.{index}.{name}",
            inputs=layer.in_features,
            outputs=layer.out_features,
            bias=layer.bias is not None,
            tail=name.rpartition(".")[2] in _TAILS if tails is None else name in tails,
        )
        for index, block in enumerate(block_list(model, layout))
        for name, layer in linears(block).items()
    )


def _stages(model: nn.Module, layout: Layout) -> tuple[tuple[int, int], ...]:
    """Of the first block; each linear by itself where only the data can tell which share an input."""
    found = linears(block_list(model, layout)[0])
    if layout.units is None:
        return tuple((layer.in_features, layer.out_features) for layer in found.values())
    stages = [[found[name] for name in stage] for unit in layout.units for stage in unit.stages]
    return tuple((stage[0].in_features, sum(layer.out_features for layer in stage)) for stage in stages)


def _caches(text: Any, model_type: str, head: int) -> tuple[CacheShape, ...]:
    kv_heads = int(_first(text, "num_key_value_heads", "num_attention_heads") or 1)
    shapes = []
    for kind, options in zip(*get_layer_types_and_kwargs(text), strict=True):
        if kind not in _ATTENTION:
            raise BadModelError(
                f"memory is predicted for layers with keys and values, this {model_type} model has layers of type "
                f"{kind!r}; measure it with python -m qquant.profile"
            )
        shapes.append(CacheShape(heads=kv_heads, key_dim=head, value_dim=head, window=options.get("sliding_window")))
    return tuple(shapes)
