"""Rows of data files and hub data sets: cells by the lower-case name of their column, each with where it stands.

CSV, JSON and JSON lines, packed by gzip or not, by the standard library; parquet and the hub by the package datasets,
where that is installed. A cell is what the file says: "None", "NA" and "1.0" stay text. What a row means is files.py's.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qquant.errors import BadDataError

SUFFIXES = (".csv", ".json", ".jsonl", ".ndjson", ".parquet")
"""Of files that can be read; each but the last may be followed by ``.gz``."""


class Row(NamedTuple):
    """One row."""

    where: str
    """File and line, for messages."""
    cells: Mapping[str, Any]
    """By the column's name in lower case; text in a CSV file, any JSON value elsewhere."""


def kind_of(path: Path) -> str:
    """A file's suffix in lower case, the one before ``.gz`` where it is packed."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def file_rows(path: Path, content: bytes, *, columns: Sequence[str] = ()) -> list[Row]:
    """All rows of a file, blank ones left out.

    Args:
        path: says by its name what the file is.
        content: its bytes.
        columns: names, lower case, of a CSV file's columns where its first row is not a header.

    Raises:
        BadDataError: not what its name says, or a row of another width than the header; names file and line.
    """
    if kind_of(path) == ".parquet":
        return _dataset_rows(str(path), "parquet", split="train", data_files=str(path))
    text = _text(path, content)
    if kind_of(path) == ".csv":
        return _csv_rows(path, text, columns)
    if kind_of(path) == ".json" and text.lstrip().startswith("["):
        found = [(f"{path}, item {number}", item) for number, item in enumerate(_parsed(path, text, 1), 1)]
    else:
        # Not splitlines(): a JSON string may hold U+2028 and its like, which are no line ends here.
        lines = enumerate(text.split("\n"), 1)
        found = [(f"{path}, line {number}", _parsed(path, line, number)) for number, line in lines if line.strip()]
    return [_row(where, item) for where, item in found]


def hub_rows(dataset: str, config: str | None, split: str) -> list[Row]:
    """All rows of one split of a hub data set; raises BadDataError if it cannot be had."""
    shown = f"{':'.join(filter(None, (dataset, config, split)))} (no file or folder of that name, so a hub id)"
    return _dataset_rows(shown, dataset, *([config] if config else []), split=split)


def hub_configs(dataset: str) -> list[str]:
    """Names of a hub data set's configurations; raises BadDataError if they cannot be had."""
    datasets = _datasets(f"{dataset} (no file or folder of that name, so a hub id)")
    try:
        return list(datasets.get_dataset_config_names(dataset))
    except Exception as error:  # network, permission, format: each backend has its own kinds
        raise _unreadable(dataset, error) from error


def _text(path: Path, content: bytes) -> str:
    try:
        return (gzip.decompress(content) if path.suffix.lower() == ".gz" else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise BadDataError(f"{path}, line {line}: text must be UTF-8 ({error.reason}); convert the file") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadDataError(f"{path}: .gz must be a whole gzip file ({error}); get it again") from error


def _csv_rows(path: Path, text: str, columns: Sequence[str]) -> list[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    names: list[str] = []
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not cells:
                continue
            if not names:
                header = [cell.strip().lower() for cell in cells]
                if {"question", "answer"} <= set(header):
                    names = header
                    twice = sorted({name for name in names if name and names.count(name) > 1})
                    if twice:
                        raise BadDataError(f"{where}: a column's name must come once, got {twice}; rename one")
                    continue
                if not columns:
                    raise BadDataError(f"{where}: the first row must name the columns, got {cells[:8]}; add a header")
                names = list(columns)
            if len(cells) != len(names):
                raise BadDataError(f"{where}: a row needs {len(names)} cells, got {len(cells)}: {cells[:8]}; mend it")
            rows.append(Row(where, dict(zip(names, cells, strict=True))))
    except csv.Error as error:
        raise BadDataError(f"{path}, line {reader.line_num}: not CSV ({error}); mend the quotes") from error
    return rows


def _parsed(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{path}, line {line + error.lineno - 1}, column {error.colno}"
        raise BadDataError(f"{at}: not JSON ({error.msg}); write one object per line, or one list of them") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists a thousand deep
        raise BadDataError(f"{path}, line {line}: JSON that cannot be read ({error}); mend it") from error


def _row(where: str, item: Any) -> Row:
    if not isinstance(item, Mapping):
        raise BadDataError(f"{where}: an item must be an object, got {type(item).__name__}; mend it")
    return Row(where, {str(name).strip().lower(): value for name, value in item.items()})


def _dataset_rows(shown: str, *arguments: str, **options: Any) -> list[Row]:
    datasets = _datasets(shown)
    try:
        found = list(datasets.load_dataset(*arguments, **options))
    except Exception as error:  # network, permission, format: each backend has its own kinds
        raise _unreadable(shown, error) from error
    return [_row(f"{shown}, row {number}", item) for number, item in enumerate(found, 1)]


def _datasets(shown: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise BadDataError(
            f"{shown}: reading it needs the package datasets; run pip install 'qquant[data]', or give the published "
            "CSV or JSON files"
        ) from error
    return datasets


def _unreadable(shown: str, error: Exception) -> BadDataError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return BadDataError(f"{shown}: datasets cannot read it ({reason}); check the name, or give the published files")
