"""JSON objects of a model folder, read with an error that names the file and written so that people can read them.

What the keys mean is for the room that asks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qquant.errors import BadModelError


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; raises BadModelError if it is absent or something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadModelError(f"a model folder must hold {path.name}, {path.parent} does not") from error
    except (ValueError, RecursionError) as error:
        raise BadModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadModelError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Readable JSON with a newline at the end."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
