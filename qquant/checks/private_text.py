"""Private text in a string: paths of a machine, secrets, names of this machine, somebody's prose.

Pure functions of strings, each linear in its length. Which files and keys are looked at is side_text.py's.
"""

from __future__ import annotations

import re
from collections.abc import Collection

# Folders at the root of machines that hold people's files. A path that is a whole value needs none of them.
_ROOTS = (
    "home", "Users", "root", "tmp", "temp", "private", "var", "mnt", "media", "data\\d*", "scratch", "workspaces?",
    "work", "srv", "opt", "usr", "etc", "dev", "proc", "run", "Volumes", "gpfs\\w*", "lustre", "nfs\\w*", "fsx", "efs",
    "ceph\\w*", "cpfs\\w*", "content", "kaggle", "dbfs", "storage", "shared?", "projects?", "nas", "ssd\\d*", "hdd\\d*",
    "disks?\\d*", "cache", "afs", "export", "autodl-\\w+", "models?", "ckpts?", "checkpoints?", "datasets?",
)  # fmt: skip
_WHOLE = re.compile(
    r"/[^/\s]+(?:/[^/\s]*)+|[A-Za-z]:[\\/]\S.*|\\\\[\w.$-]+\\.*|~(?:[A-Za-z][\w.-]*)?/.*|file://.*", re.DOTALL
)
_TOP = re.compile(rf"/(?:{'|'.join(_ROOTS)})/?")
_RELATIVE = re.compile(r"\.{1,2}[\\/]\S*")
_INSIDE = (
    # Not after a letter or a slash: there it is the path of a URL, or the tail of a longer path.
    re.compile(rf"(?<![\w./~\\-])/(?:{'|'.join(_ROOTS)})/[\w.@+-]+"),
    re.compile(
        r"(?<![A-Za-z])[A-Za-z]:[\\/]{1,2}(?:Users|Documents and Settings|Windows|Temp|Program ?Files|ProgramData)\b"
    ),
    re.compile(r"(?<![\w./~\\-])~(?:[A-Za-z][\w.-]*)?/[\w.-]+"),
    re.compile(r"\bfile://[\w./~-]+"),
    re.compile(r"\\\\[\w.-]+\\[\w$.-]+\\[\w.-]+"),
)
_SECRETS = {
    "an access token of a model hub": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "an access token of a code host": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|glpat-[\w-]{20})"),
    "an access key of a cloud": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{32,}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"),
    "a password in a URL": re.compile(r"\bhttps?://[^\s/:@]{1,64}:[^\s/@]{1,64}@"),
}
_PROSE_WORDS = 12
"""From here on a value is a text: names, ids and settings have fewer words."""
_PROSE_CHARACTERS = 24
"""The same in writing without spaces between words."""
_WITHOUT_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\u0e00-\u0e7f\uac00-\ud7af]")


def local_path(text: str) -> str | None:
    """The first path of a machine that a string is or holds; URLs, hub ids and relative paths are none."""
    whole = text.strip()
    if len(whole) < 4096 and (_WHOLE.fullmatch(whole) or _TOP.fullmatch(whole)):
        return whole
    found = (match for pattern in _INSIDE for match in pattern.finditer(text))
    first = min(found, key=lambda match: match.start(), default=None)
    return first[0] if first else None


def relative_path(text: str) -> bool:
    """Whether a string is a path that only makes sense where it was written, such as ``./out``."""
    return _RELATIVE.fullmatch(text.strip()) is not None


def secret(text: str) -> str | None:
    """What kind of secret a string holds, if it holds one; the secret itself is not given."""
    return next((kind for kind, pattern in _SECRETS.items() if pattern.search(text)), None)


def named(text: str, names: Collection[str]) -> str | None:
    """The first of these names that stands in a string as a word of its own."""
    return next((name for name in names if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text)), None)


def words_of_prose(text: str) -> int:
    """How many words a text has, 0 for what is no prose; characters count in writing without spaces."""
    words = len(text.split())
    if words >= _PROSE_WORDS:
        return words
    characters = len(_WITHOUT_SPACES.findall(text))
    return characters if characters >= _PROSE_CHARACTERS else 0
