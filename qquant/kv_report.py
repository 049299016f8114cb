"""The record of what a KV cache in 8 bits costs, and the part of a report's Markdown and pictures drawn from it.

Pydantic models only, as in results.py, which holds one of these. How the numbers come about is kv_accuracy.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from qquant.records import NOT_MEASURED, PERCENT, Accuracy, Strict, field, renamed, shown, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE = "kv-outliers.png"

SchemeName = Literal["published", "none", "hadamard", "fold"]
"""``published``: as the first Qwen models did it. The others: per token, by what is done about outliers of the keys."""

_SCHEMES = (
    ("bytes per token", "bytes_per_token", ".1f"),
    ("of bfloat16", "share_of_bfloat16", ".3f"),
    ("perplexity", "accuracy.perplexity", ".4f"),
    ("mean KL (nats)", "accuracy.kl_mean_nats", ".3g"),
    ("p99 KL (nats)", "accuracy.kl_p99_nats", ".3g"),
    ("max KL (nats)", "accuracy.kl_max_nats", ".3g"),
    ("same top-1", "accuracy.top1_agreement", PERCENT),
)
_RANGES = (
    ("predictions", "tokens", "d"),
    ("perplexity, exact cache", "exact.perplexity", ".4f"),
    ("chosen", "chosen.perplexity", ".4f"),
    ("published", "published.perplexity", ".4f"),
    ("mean KL, chosen (nats)", "chosen.kl_mean_nats", ".3g"),
    ("published", "published.kl_mean_nats", ".3g"),
)
_LAYERS = (
    ("key error", "keys.relative_error", ".5f"),
    ("folded", "folded_keys.relative_error", ".5f"),
    ("key error by channel", "keys.channel_error", ".5f"),
    ("folded", "folded_keys.channel_error", ".5f"),
    ("value error", "values.relative_error", ".5f"),
    ("key outlier", "computed_keys.outlier_ratio", ".2f"),
    ("as stored", "keys.peaks.outlier_ratio", ".2f"),
    ("folded", "folded_keys.peaks.outlier_ratio", ".2f"),
    ("value outlier", "values.peaks.outlier_ratio", ".2f"),
)
_NEEDLES = (
    ("no needle: log-prob. (nats)", "absent.logprob_mean_nats", ".3f"),
    ("hits", "absent.hit_rate", PERCENT),
    ("exact cache: log-prob.", "exact.logprob_mean_nats", ".3f"),
    ("hits", "exact.hit_rate", PERCENT),
    ("int8: log-prob.", "int8.logprob_mean_nats", ".3f"),
    ("hits", "int8.hit_rate", PERCENT),
    ("same top-1", "agreement", PERCENT),
)


class KVScheme(Strict):
    """One way to store keys and values in 8 bits, against the same model with an exact cache."""

    name: SchemeName
    bytes_per_token: float
    """All layers' codes, scales and zeros after one window, by its tokens; exact."""
    share_of_bfloat16: float
    """The same bytes by those of as many keys and values in bfloat16."""
    accuracy: Accuracy | None
    """None: it gave numbers that are not finite."""


class KVModel(Strict):
    """All schemes on one model."""

    label: str
    exact: Accuracy
    """With keys and values as the model computes them."""
    schemes: tuple[KVScheme, ...]
    chosen: SchemeName
    """Smallest mean KL of those that take the same bytes: all but the published."""
    automatic: SchemeName
    """What ``key_transform="auto"`` takes for this model."""
    rival: SchemeName
    """The automatic one if another was chosen, else the second best."""
    lead_nats: float
    """Mean over tokens of KL(rival) - KL(chosen)."""
    lead_stderr_nats: float
    """Standard error of that mean, from the per-token differences."""


class KVDecoded(Strict):
    """The chosen scheme decoding one token at a time, as a generation does, against scoring the same tokens at once."""

    tokens: int
    kl_mean_nats: float
    """To an exact cache, decoded token by token after the prompt: the attention of decoding rounds, too."""
    at_once_kl_mean_nats: float
    """To the same, by one call over these tokens, as everything else is measured."""


class KVPoint(Strict):
    """One cache over the predictions from some range of context lengths."""

    perplexity: float
    kl_mean_nats: float | None
    """None: this is the exact cache."""


class KVRange(Strict):
    """Predictions made from ``first_tokens`` to ``last_tokens`` tokens of context, both included, over all windows."""

    first_tokens: Annotated[int, renamed("first_tokens", "first")]
    last_tokens: Annotated[int, renamed("last_tokens", "last")]
    tokens: int
    """Predictions, one for each token that was predicted."""
    exact: KVPoint
    chosen: KVPoint
    published: KVPoint | None


class KVPeaks(Strict):
    """Which channels of one layer's keys or values are large."""

    outlier_ratio: float
    """Largest magnitude by that of the median channel, in the head where this is largest."""
    heads: int
    largest: tuple[float, ...]
    """Largest magnitude of each channel, head after head; of as many neighbours as ``channels_per_peak`` says.

    Magnitudes of keys and values have no unit.
    """
    channels_per_peak: int


class KVStates(Strict):
    """Keys or values of one layer as the cache stores them: keys less their mean over the prompt."""

    relative_error: float
    """Norm of the error by the norm of the keys or values themselves."""
    channel_error: float
    """For each channel alone, the norm of its error by that of what is stored of it; root mean square over channels."""
    peaks: KVPeaks


class KVLayer(Strict):
    """One attention layer, by its place in the cache."""

    layer: int
    computed_keys: KVPeaks
    """As the model computes them."""
    keys: KVStates
    folded_keys: KVStates | None
    """None: the model's family is not known to allow folding."""
    values: KVStates


class KVRecall(Strict):
    """How well one cache completed needles."""

    logprob_mean_nats: float
    """Mean log-probability of the answer's tokens, each after the true ones before it."""
    hit_rate: float
    """Share of the answer's tokens that the model ranks first."""


class KVNeedle(Strict):
    """Needles at one depth of contexts of one length."""

    length_tokens: Annotated[int, renamed("length_tokens", "length")]
    """Tokens fed, the needle and the question included."""
    depth_percent: int
    """Share of the text that stands before the needle."""
    trials: int
    absent: KVRecall
    """Exact cache and no needle: what the answer gets by chance."""
    exact: KVRecall
    int8: KVRecall
    """The chosen scheme."""
    agreement: float
    """Share of the answer's tokens where the exact cache and int8 rank the same token first, right or wrong."""


class KVCacheCost(Strict):
    """What ``--kv-cache`` measured. All that follows ``models`` is the first model's."""

    kind: Literal["int8"]
    seed: int
    """Of the needles; nothing else is drawn at random."""
    window_tokens: Annotated[int, renamed("window_tokens", "window")]
    """Tokens of context per window; every window starts afresh."""
    windows: int
    prompt_tokens: Annotated[int, renamed("prompt_tokens", "prompt")]
    """Tokens at the beginning of a window that its cache got in a call of their own, but for the published scheme."""
    models: tuple[KVModel, ...]
    decoded: KVDecoded
    ranges: tuple[KVRange, ...]
    layer_tokens: int
    """Tokens behind the errors and peaks of the layers."""
    layers: tuple[KVLayer, ...]
    cue_tokens: int
    """Length of the beginning of a needle, which the question repeats."""
    answer_tokens: int
    """Length of the rest, which is asked for. A needle is cut out of another place of the text."""
    needles: tuple[KVNeedle, ...]


def kv_sections(cost: KVCacheCost, *, compute_dtype: str, picture: bool) -> list[str]:
    """The section of a report's Markdown, paragraph by paragraph; every number is a rounded field of the record."""
    first = cost.models[0]
    return [
        "## KV cache",
        f"Keys and values in 8 bits on {cost.windows} windows of {cost.window_tokens} tokens that each start afresh, "
        f"measured as if every token had been decoded through the cache after a prompt of {cost.prompt_tokens}; the "
        "published scheme, whose ranges depend on the call, sees each window as one prompt. KL is to the same model "
        "with an exact cache.",
        _schemes(cost.models),
        *_noise(compute_dtype),
        *[_choice(model) for model in cost.models],
        f"{first.label}, {first.chosen}: {cost.decoded.tokens} tokens really decoded one by one had a mean KL of "
        f"{cost.decoded.kl_mean_nats:.3g} nats, measured at once {cost.decoded.at_once_kl_mean_nats:.3g}.",
        f"### By context length ({first.label}, chosen: {first.chosen})",
        table(
            ["tokens of context", *[heading for heading, _, _ in _RANGES]],
            [[f"{row.first_tokens}-{row.last_tokens}", *_cells(row, _RANGES)] for row in cost.ranges],
        ),
        f"### By layer ({first.label})",
        f"Errors are relative, over {cost.layer_tokens} tokens; an outlier is the largest magnitude by that of the "
        "median channel, in the worst head. Keys are stored less their mean.",
        table(
            ["layer", *[heading for heading, _, _ in _LAYERS]],
            [[str(row.layer), *_cells(row, _LAYERS)] for row in cost.layers],
        ),
        *([f"![{PICTURE.removesuffix('.png')}]({PICTURE})"] if picture else []),
        *_needle_section(cost, first),
    ]


def _schemes(models: Sequence[KVModel]) -> str:
    body = []
    for model in models:
        body.append([model.label, "exact", "-", "-", shown(model.exact.perplexity, ".4f"), "-", "-", "-", "-"])
        for scheme in model.schemes:
            body.append([model.label, f"int8 {scheme.name}", *_cells(scheme, _SCHEMES)])
    return table(["model", "cache", *[heading for heading, _, _ in _SCHEMES]], body)


def _noise(compute_dtype: str) -> list[str]:
    """A warning where the arithmetic alone moves the numbers as far as a good cache does."""
    if compute_dtype == "float32":
        return []
    return [f"Rounding in {compute_dtype} is part of every KL above and may be most of it; --dtype float32 shows less."]


def _choice(model: KVModel) -> str:
    clear = model.lead_nats > 2 * model.lead_stderr_nats
    return (
        f"{model.label}: **{model.chosen}** has the smallest mean KL of those that take the same bytes, "
        f"{model.lead_nats:.2g} nats (standard error {model.lead_stderr_nats:.2g}) less than {model.rival}"
        + ("" if clear else ", which may be chance")
        + f'. `key_transform="auto"` takes {model.automatic}'
        + (", the same." if model.automatic == model.chosen else ".")
    )


def _needle_section(cost: KVCacheCost, first: KVModel) -> list[str]:
    title = f"### Needles at depth ({first.label}, chosen: {first.chosen})"
    if not cost.needles:
        return [title, f"Needles were {NOT_MEASURED}: windows of {cost.window_tokens} tokens have no room for them."]
    trials = sorted({row.trials for row in cost.needles})
    tokens = cost.answer_tokens
    return [
        title,
        f"A needle is {cost.cue_tokens + tokens} tokens from another place of the text; the context ends with its "
        f"first {cost.cue_tokens}, and the model is asked for the other {tokens}. A row is "
        f"{', '.join(map(str, trials))} needles; same top-1 compares int8 with the exact cache, right or wrong.",
        table(
            ["tokens", "depth (%)", *[heading for heading, _, _ in _NEEDLES]],
            [[str(row.length_tokens), str(row.depth_percent), *_cells(row, _NEEDLES)] for row in cost.needles],
        ),
    ]


def _cells(record: Strict, columns: Sequence[tuple[str, str, str]]) -> list[str]:
    return [shown(field(record, path), spec) for _, path, spec in columns]


def draw_kv_outliers(figure: Figure, cost: KVCacheCost) -> str | None:
    """Heat maps of the largest key of each channel: as computed, as stored, folded; layer by layer on one colour scale.

    Returns why it cannot be drawn.
    """
    from matplotlib.ticker import LogLocator

    maps = {
        "as the model computes them": [layer.computed_keys for layer in cost.layers],
        "as stored, less their mean": [layer.keys.peaks for layer in cost.layers],
    }
    if all(layer.folded_keys for layer in cost.layers):
        maps["folded, as stored"] = [layer.folded_keys.peaks for layer in cost.layers if layer.folded_keys]
    found = [peak for layers in maps.values() for layer in layers for peak in layer.largest if peak > 0]
    if not found:
        return "no layer has keys above zero"
    first = cost.layers[0].computed_keys
    columns = max(len(layer.computed_keys.largest) for layer in cost.layers)
    # A dead channel would stretch the scale over decades in which nothing is.
    low, high = max(min(found), max(found) / 1000), max(found)
    figure.set_size_inches(9, 0.9 + len(maps) * (0.6 + min(3, 0.22 * len(cost.layers))))
    axes = figure.subplots(len(maps), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (title, layers) in zip(axes, maps.items(), strict=True):
        cells = [[max(peak, low) for peak in one.largest] + [low] * (columns - len(one.largest)) for one in layers]
        image = axis.imshow(cells, cmap="viridis", norm="log", vmin=low, vmax=high, aspect="auto", interpolation="none")
        for edge in range(1, first.heads):
            axis.axvline(edge * columns / first.heads - 0.5, color="white", linewidth=1)
        axis.set_title(f"{cost.models[0].label}: keys {title}", fontsize=10)
        axis.set(ylabel="layer", yticks=range(0, len(layers), 1 + len(layers) // 12))
        axis.set_yticklabels([str(cost.layers[int(place)].layer) for place in axis.get_yticks()])
    pooled = f", {first.channels_per_peak} to a column" if first.channels_per_peak > 1 else ""
    axes[-1].set_xlabel(f"key channel of the {first.heads} heads, one after another{pooled}")
    # Plain numbers: a logarithmic axis of less than a decade would otherwise say 2 x 10^0.
    ticks = LogLocator(subs=(1, 2, 3, 5))
    bar = figure.colorbar(image, ax=list(axes), ticks=ticks, format="{x:g}", label="largest |key| of the channel")
    bar.ax.minorticks_off()
    return None
