"""The errors a user can meet, each with the exit code the command line ends with.

Every message states the rule, what came, and the remedy. Nothing else lives here; every floor may import it.
"""

from __future__ import annotations


class QquantError(Exception):
    """Base of every error that is the input's fault and not ours; the command line prints it as one line."""

    exit_code = 1


class UsageError(QquantError, ValueError):
    """An option or argument that cannot be followed."""

    exit_code = 2


class DoesNotFitError(QquantError):
    """Memory or disk that is known beforehand not to suffice."""

    exit_code = 3


class BadModelError(QquantError, ValueError):
    """A source model or checkpoint that is incomplete, inconsistent, unsafe or of an unknown kind."""

    exit_code = 4


class BadDataError(QquantError, ValueError):
    """Calibration or evaluation data that is missing, empty, too short or unreadable."""

    exit_code = 5


class DamagedWorkError(BadDataError):
    """A file that an unfinished run wrote is not as it left it, so that it cannot go on."""


class NumericError(QquantError, ArithmeticError):
    """Numbers that are not finite, or a Hessian that no damping makes positive definite."""

    exit_code = 6


class UnprovenError(NumericError):
    """What was written does not compute what was computed, although every number is sound."""


class DiskError(QquantError, OSError):
    """Reading or writing failed underneath us."""

    exit_code = 7


class StoppedError(QquantError):
    """Ctrl-C or SIGTERM ended a run that can go on: what was finished is saved."""

    exit_code = 75


class RankLostError(StoppedError):
    """Another of several processes that shared the work ended, and so must this one."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the machine or of a device."""
    # torch's errors by name and text, since torch is not imported for a door's --help: a GPU's has a class of its own,
    # a CPU's is any RuntimeError.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
