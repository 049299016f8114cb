"""What lies beside a model's weights and goes with them: config, tokenizer, generation config, licence, Qwen's code.

Nothing that is carried is run, and nothing from outside the folder is. Weights are checkpoint.py.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from qquant.chat_templates import bounded
from qquant.code_keys import QWEN, is_code_key
from qquant.errors import BadModelError
from qquant.json_files import read_json, write_json
from qquant.model_folder import QWEN_CODE, VOCABULARIES, load_tokenizer
from qquant.text_sources import one_line

_log = logging.getLogger("qquant")

_TOKENIZER = (
    *VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.*",
)  # fmt: skip
_OTHERS = ("generation_config.json", "LICENSE*", "NOTICE*")
# Keys that name places on the machine that saved them, or files that are not there any more.
_DROPPED_KEYS = frozenset((
    "_name_or_path", "name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file",
    "cache_dir", "transformers_weights", "configuration_files", "fast_tokenizer_files",
))  # fmt: skip


@dataclass(frozen=True)
class SideFiles:
    """What will lie beside the weights, known and read before anything is computed."""

    config: dict[str, Any]
    """config.json without the quantization keys."""
    copied: dict[str, Path] = field(default_factory=dict)
    """Name -> file whose bytes are taken as they are."""
    rewritten: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> JSON object."""
    rows: int | None = None
    """Rows of the embeddings, where there are fewer than the original had; None: as many, or more."""

    def check_tokenizer(self) -> None:
        """Load the tokenizer that goes along, if there is one, so that nobody gets a folder whose own does not load.

        Raises:
            BadModelError: its files or a chat template make no sense, or it has ids past the end of embeddings that
                an adapter made shorter. Those of the original may lack rows: the model came so.
        """
        if not any(fnmatch(name, pattern) for name in (*self.copied, *self.rewritten) for pattern in VOCABULARIES):
            return
        with TemporaryDirectory(prefix="qquant-tokenizer-") as name:
            place = Path(name)
            self.write(place, {})
            write_json(place / "config.json", self.config)
            try:
                tokenizer = load_tokenizer(place)
            except BadModelError as error:
                raise BadModelError(
                    f"{one_line(error).replace(name, 'the model and its adapter')}; every file of the tokenizer must "
                    "be whole, get them again or remove what does not belong"
                ) from error
            _check_templates(getattr(tokenizer, "chat_template", None))
            highest = max(tokenizer.get_vocab().values(), default=-1)
        if self.rows is not None and highest >= self.rows:
            raise BadModelError(
                f"an adapter that shortens the embeddings must leave a row for every id, it has {self.rows} rows and "
                f"the tokenizer ids up to {highest}; save the tokenizer it was trained with beside it"
            )

    def write(self, target: Path, keys: Mapping[str, Any]) -> None:
        """Write everything into a folder, with ``keys`` as the quantization config; quantize_config.json too."""
        write_json(target / "config.json", {**self.config, "quantization_config": dict(keys)})
        write_json(target / "quantize_config.json", dict(keys))
        for name, path in sorted(self.copied.items()):
            shutil.copyfile(path, target / name)
        for name, content in sorted(self.rewritten.items()):
            write_json(target / name, content)


def collect(source: Path, *, adapter: Path | None = None, changes: Mapping[str, Any] | None = None) -> SideFiles:
    """Find what goes beside the weights of a model made from ``source``.

    Args:
        source: the original model's folder.
        adapter: folder of the adapter merged into it. Its tokenizer files win: training tools save them there. If it
            holds a whole vocabulary, none of the original's tokenizer files is taken.
        changes: keys of config.json with other values.

    Returns:
        The files; of an original Qwen (v1) also its code, and ``auto_map`` where every file that it names is here.

    Raises:
        BadModelError: a JSON file that is none, or a file that is a link out of its folder.
    """
    original = read_json(source / "config.json")
    # vLLM's tokenizer and AutoGPTQ ask for the code beside an original Qwen, and for the auto_map that names it.
    qwen = original.get("model_type") == QWEN
    files = _matching(source, _OTHERS) | _tokenizer_files(source, adapter)
    code: set[str] = set()

    def cleaned(content: Mapping[str, Any]) -> dict[str, Any]:
        clean = _without_local_keys(content)
        named = _code_named(content.get("auto_map")) if qwen else set()
        if not named or not all((source / name).is_file() for name in named):
            return clean
        code.update(named)
        return {
            key: content[key] if key == "auto_map" else clean[key] for key in content if key in {*clean, "auto_map"}
        }

    for path in (source / "config.json", *files.values()):
        _refuse_outside(path)
    config = _with_changes(cleaned(original), changes or {})
    rewritten: dict[str, dict[str, Any]] = {}
    for name, path in files.items():
        content = read_json(path) if name.endswith("_config.json") else {}
        clean = cleaned(content)
        if clean != content:
            rewritten[name] = clean
    if code:  # the modeling code asks for the others by name
        code.update(name for name in QWEN_CODE if (source / name).is_file())
    copied = {name: path for name, path in files.items() if name not in rewritten}
    for name in code:
        _refuse_outside(source / name)
        copied[name] = source / name
    if qwen and "generation_config.json" not in files:
        rewritten |= _made_up_generation_config(source, copied)
    rows = (changes or {}).get("vocab_size")
    return SideFiles(config, copied, rewritten, rows if rows is not None and rows < _rows(original, rows + 1) else None)


@contextmanager
def tokenizer_folder(source: Path, adapter: Path | None) -> Iterator[Path]:
    """A folder with the tokenizer that ``collect`` would carry: ``source``, or a temporary one with an adapter's."""
    if adapter is None or not _matching(adapter, _TOKENIZER):
        yield source
        return
    with TemporaryDirectory(prefix="qquant-tokenizer-") as name:
        for path in (source / "config.json", *_tokenizer_files(source, adapter).values()):
            _refuse_outside(path)
            shutil.copyfile(path, Path(name) / path.name)
        yield Path(name)


def _tokenizer_files(source: Path, adapter: Path | None) -> dict[str, Path]:
    ours = _matching(source, _TOKENIZER)
    if adapter is None:
        return ours
    theirs = _matching(adapter, _TOKENIZER)
    # Two vocabularies in one folder would leave it to chance which of them a reader takes.
    return theirs if _matching(adapter, VOCABULARIES) else ours | theirs


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    found = {path.name: path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return dict(sorted(found.items()))


def _refuse_outside(path: Path) -> None:
    """What a link shows elsewhere must not end up in a folder that may be published."""
    home, target = path.parent.resolve(), path.resolve()
    # A hub cache keeps a model's files as links to a neighbouring folder of blobs; those are the one exception.
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not target.is_relative_to(home) and not target.is_relative_to(blobs):
        raise BadModelError(
            f"files beside a model must lie in its folder, {path} is a link out of it; "
            "put the file itself there, or remove the link"
        )


def _code_named(auto_map: Any) -> set[str]:
    """The files that ``auto_map`` names; nothing if one of its entries is not simply ``module.Class``."""
    if not isinstance(auto_map, dict):
        return set()
    entries = [entry for value in auto_map.values() for entry in (value if isinstance(value, list) else [value])]
    named: set[str] = set()
    for entry in entries:
        if entry is None:  # a tokenizer without its fast form
            continue
        match = re.fullmatch(r"([A-Za-z_]\w*)\.[A-Za-z_]\w*", entry, re.ASCII) if isinstance(entry, str) else None
        if match is None:
            return set()
        named.add(f"{match[1]}.py")
    return named


def _made_up_generation_config(source: Path, copied: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What is certain of a Qwen (v1) model without a generation config: where a text ends.

    The end-of-text token has the first id after the ranks. Whether the model chats, and how it is sampled, is not in
    its weights; the files that were published say it.
    """
    ranks = copied.get("qwen.tiktoken")
    if ranks is None:
        _log.warning("%s has no generation_config.json, and none was written: its qwen.tiktoken is missing too", source)
        return {}
    with ranks.open("rb") as lines:
        end = sum(1 for line in lines if line.strip())
    _log.warning(
        "%s has no generation_config.json; one that says only that a text ends with token %d goes along. For a chat "
        'model add "chat_format": "chatml" to it, for a base model "raw"',
        source,
        end,
    )
    return {"generation_config.json": {"eos_token_id": end, "pad_token_id": end}}


def _rows(config: Mapping[str, Any], otherwise: int) -> int:
    """``vocab_size`` by config.json; it may lie one level down, or be left to the default."""
    inner = config.get("text_config")
    return int(config.get("vocab_size", inner.get("vocab_size", otherwise) if isinstance(inner, dict) else otherwise))


def _check_templates(templates: Any) -> None:
    """Compile chat templates as transformers will; none is run."""
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        try:
            if isinstance(template, str):
                with bounded():  # Jinja computes constant parts as it compiles
                    chat_template_utils._compile_jinja_template(template)
        except (TemplateError, RecursionError, SyntaxError) as error:
            raise BadModelError(
                f"the tokenizer's chat template must be Jinja, got: {one_line(error)}; correct it or remove it"
            ) from error


def _with_changes(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys with other values, each where the file has it: a text model's may lie one level down."""
    result = dict(config)
    for key, value in changes.items():
        inner = result.get("text_config")
        if key not in result and isinstance(inner, dict) and key in inner:
            result["text_config"] = {**inner, key: value}
        else:
            result[key] = value
    if "vocab_size" in changes:  # the first release of Qwen named the rows twice
        result.pop("padded_vocab_size", None)
    if "intermediate_size" in changes:  # and had another name for the width of its MLP
        result.pop("ffn_hidden_size", None)
    return result


def _without_local_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys but for those that name places or code, at any depth."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return _without_local_keys(value)
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in content.items() if key not in _DROPPED_KEYS and not is_code_key(key)}
