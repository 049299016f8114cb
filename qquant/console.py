"""How a command ends: an expected error becomes one line on stderr and its documented exit code.

Here too: text from files and models made harmless for a terminal, and sizes and lists as people type them. What a
command prints when it succeeds is the command's own business.
"""

from __future__ import annotations

import re
import sys
import traceback
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

from qquant.errors import DiskError, DoesNotFitError, QquantError, UsageError, out_of_memory

INTERRUPTED = 130
"""What a shell reports for a process that Ctrl-C ended: 128 + SIGINT."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_MOST_BYTES = 2.0**63
_SHOWN = "\n\t"
# Marks that turn the direction of what follows: text that reads otherwise than it is.
_TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """The text with everything that a terminal would obey written out in hex digits; line feeds and tabs stay."""
    return "".join(character if _harmless(character) else _written_out(character) for character in text)


@contextmanager
def user_errors(*, debug: bool = False) -> Iterator[None]:
    """Run a command's body; end the process as the exit-code table says when an expected error comes out of it.

    A ``QquantError`` ends with its own code, any other ``OSError`` (disk full, permission, missing file) with 7, no
    memory with 3, Ctrl-C with 130. Anything else is a bug of ours and keeps its traceback.

    Args:
        debug: print the traceback before the line. The exit code stays the same.

    Raises:
        SystemExit: with the code above.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # the reader of our stdout left; the command line framework ends such a process quietly
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED, debug=debug)
    except QquantError as error:
        _end(error, error.exit_code, debug=debug)
    except OSError as error:
        _end(error, DiskError.exit_code, debug=debug)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        said = f": {error}" if str(error) else ""
        remedy = "free some, or ask for less at a time"
        _end(f"out of memory{said}; {remedy}", DoesNotFitError.exit_code, debug=debug)


def size_in_bytes(text: str, option: str) -> int:
    """A size as people type it, ``24GiB``, ``24GB``, ``800 mb``, or a plain number of bytes from a MiB on.

    Args:
        text: what was typed.
        option: where, for the message.

    Raises:
        UsageError: it is none, or nothing.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    size = float(found[1]) * unit if found and unit else 0.0
    forgotten = found is not None and not found[2] and size < _UNITS["MIB"]  # nobody means 24 bytes
    if forgotten or not 1 <= size < _MOST_BYTES:
        raise UsageError(f"{option} must be a size such as 24GiB or 800MB, got {printable(text[:40])!r}")
    return int(size)


def words(text: str) -> tuple[str, ...]:
    """Words with commas between them, in their order."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def counts(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between them, in their order.

    Args:
        text: what was typed.
        option: where, for the message.

    Raises:
        UsageError: a word that is no whole number.
    """
    try:
        found = tuple(int(word) for word in words(text))
    except ValueError:
        found = ()
    if not found:
        raise UsageError(
            f"{option} must be whole numbers with commas between them, as 1,4, got {printable(text[:40])!r}"
        )
    return found


def _end(message: object, code: int, *, debug: bool) -> None:
    """Print one ``error:`` line and leave with ``code``."""
    if debug:
        print(printable(traceback.format_exc()), end="", file=sys.stderr)
    line = "; ".join(part.strip() for part in str(message).splitlines() if part.strip())
    print(f"error: {printable(line) or type(message).__name__}", file=sys.stderr)
    raise SystemExit(code)


def _harmless(character: str) -> bool:
    if character in _SHOWN:
        return True
    # Cc: control characters; Cs: halves of surrogate pairs, which no encoding takes.
    return unicodedata.category(character) not in ("Cc", "Cs") and character not in _TURNS


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
