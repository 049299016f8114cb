"""How a command ends: an expected error becomes one line on stderr and its documented exit code.

Only the way out lives here. What a command prints when it succeeds is the command's own business.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from qquant.errors import DiskError, DoesNotFitError, QquantError

INTERRUPTED = 130
"""What a shell reports for a process that Ctrl-C ended: 128 + SIGINT."""


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
    except MemoryError as error:
        _end(f"out of memory {error}", DoesNotFitError.exit_code, debug=debug)
    except RuntimeError as error:
        # torch's own out-of-memory error, by name: torch is not imported for a door's --help.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _end(f"out of memory: {error}", DoesNotFitError.exit_code, debug=debug)


def _end(message: object, code: int, *, debug: bool) -> None:
    """Print one ``error:`` line and leave with ``code``."""
    if debug:
        traceback.print_exc()
    line = "; ".join(part.strip() for part in str(message).splitlines() if part.strip())
    print(f"error: {line or type(message).__name__}", file=sys.stderr)
    raise SystemExit(code)
