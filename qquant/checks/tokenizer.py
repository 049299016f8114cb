"""The tokenizer beside a checkpoint: whether it loads and every id has a row, and what its chat templates do.

Templates are never run. Compiling one already computes its constants, so it is looked at before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, nodes
from transformers.utils import chat_template_utils

from qquant.chat_templates import bounded
from qquant.checks.findings import Finding, problem, warning
from qquant.checks.side_text import content_of
from qquant.errors import BadModelError
from qquant.model_folder import VOCABULARIES, load_tokenizer
from qquant.text_sources import one_line
from qquant.tokenizer_check import check_tokenizer as compare_ids

_SPECIAL_IDS = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "unk_token_id",
    "sep_token_id",
    "decoder_start_token_id",
)
_LARGEST_FACTOR = 10_000
"""Of a product in a template: a template pads by a few spaces, a hostile one makes text that fills the memory."""
_ELSEWHERE = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)


def check_tokenizer(folder: Path, rows: int | None) -> Iterator[Finding]:
    """Whether it loads and its ids are rows of the embedding.

    Args:
        folder: the checkpoint's.
        rows: of the embedding; None if there is no model to know them from.
    """
    if not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):
        yield warning(
            "tokenizer", folder.name, f"holds no tokenizer ({', '.join(VOCABULARIES)}); copy it from the original"
        )
    else:
        try:
            tokenizer = load_tokenizer(folder)
            highest = max(tokenizer.get_vocab().values(), default=-1)
            other = compare_ids(tokenizer, folder)
        except BadModelError as error:
            yield problem("tokenizer", "tokenizer", str(error))
        else:
            if rows is not None and highest >= rows:
                text = f"has ids up to {highest}, and the embedding has {rows} rows; copy the tokenizer of the original"
                yield problem("tokenizer", "tokenizer", text)
            if other:
                yield warning("tokenizer", "tokenizer.json", other)
    for name in ("config.json", "generation_config.json") if rows is not None else ():
        content = content_of(folder / name)
        for key in _SPECIAL_IDS:
            value = content.get(key)
            for number in value if isinstance(value, list) else [value]:
                if rows is not None and isinstance(number, int) and number >= rows:
                    text = f"is {number}, and the embedding has {rows} rows; correct it, or generation never ends"
                    yield problem("tokenizer", f"{name}: {key}", text)


def check_templates(folder: Path) -> Iterator[Finding]:
    """Whether every chat template is Jinja that stays inside a sandbox."""
    environment: Environment = chat_template_utils._compile_jinja_template("").environment
    for subject, template in _templates(folder):
        try:
            fault = _fault(environment.parse(template))
            if not fault:
                with bounded():
                    chat_template_utils._compile_jinja_template(template)
        except BadModelError as error:
            fault = str(error)
        except (TemplateSyntaxError, RecursionError) as error:
            fault = f"must be Jinja, got: {one_line(error)}; correct it"
        if fault:
            yield problem("templates", subject, f"{fault}; a template that is not understood is better removed")


def _templates(folder: Path) -> Iterator[tuple[str, str]]:
    """Every template by the place where it stands."""
    for path in sorted((*folder.glob("*.jinja"), *folder.glob("additional_chat_templates/*.jinja"))):
        yield path.name, path.read_text(encoding="utf-8", errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        yield from _named(name, content_of(folder / name).get("chat_template"))


def _named(place: str, content: Any) -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield place, content
    elif isinstance(content, dict):
        for name, template in content.items():
            yield from _named(f"{place}: {name}", template)
    elif isinstance(content, list):
        for item in content:
            if isinstance(item, dict):
                yield from _named(f"{place}: {item.get('name')}", item.get("template"))


def _fault(tree: nodes.Template) -> str:
    """The first thing in a template that does more than write text; empty if there is none."""
    for node in tree.find_all((nodes.Getattr, nodes.Getitem, nodes.Filter, nodes.Pow, nodes.Mul, *_ELSEWHERE)):
        if isinstance(node, _ELSEWHERE):
            return "reads another template, and a tokenizer has none"
        if isinstance(node, nodes.Pow):
            return "raises to a power, which may take for ever"
        if isinstance(node, nodes.Mul) and _factor(node) > _LARGEST_FACTOR:
            return f"multiplies by {_factor(node)}, which may fill the memory"
        name = node.attr if isinstance(node, nodes.Getattr) else _constant(node)
        if isinstance(name, str) and name.startswith("_"):
            return f"asks for the attribute {name[:40]}, as is done to get out of a sandbox"
    return ""


def _factor(node: nodes.Node) -> int:
    """The product of the whole numbers in a product."""
    if isinstance(node, nodes.Mul):
        return _factor(node.left) * _factor(node.right)
    return abs(node.value) if isinstance(node, nodes.Const) and isinstance(node.value, int) else 1


def _constant(node: nodes.Node) -> object:
    """What ``x["name"]`` or ``x | attr("name")`` asks for."""
    if isinstance(node, nodes.Getitem):
        return node.arg.value if isinstance(node.arg, nodes.Const) else None
    if isinstance(node, nodes.Filter) and node.name in ("attr", "map", "selectattr", "rejectattr", "groupby", "sort"):
        given = [*node.args, *(pair.value for pair in node.kwargs)]
        values = (value.value for value in given if isinstance(value, nodes.Const))
        return next((value for value in values if isinstance(value, str) and value.startswith("_")), None)
    return None
