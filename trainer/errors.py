"""The kinds of failure that are not bugs, and the exit codes that a launcher or an operator acts
on.
"""

import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from trainer.faults.disk_errors import disk_fault
from trainer.secrets.redaction import redact

EXIT_BUG = 1
EXIT_USER = 2
EXIT_PREEMPTED = 143
EXIT_RETRY = 144  # >= 128: the training-operator's ``ExitCode`` policy recreates the pod


class UserError(ValueError):
    """The user's mistake: shown as its message alone, exit code 2, never retried.

    Several errors that were found at once are printed one per line. ``reported_elsewhere``: another
    rank prints it.
    """

    reported_elsewhere = False

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class ServiceUnreachable(UserError):
    """A service's address that was never reached: a mistake, or the service is not up yet."""


class CollectiveUserError(UserError):
    """What every rank finds at the same step, so that one tells it."""


class Diverged(CollectiveUserError):
    """A loss that is no number."""


class RetryableError(RuntimeError):
    """A peer, the object store or the network was lost after bounded retries: exit code 144, a
    retry may succeed.
    """

    reported_elsewhere = False


class Preempted(BaseException):
    """A stop signal came: end in order, exit code 128 + ``number``, that is 143 for SIGTERM."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def shortened(lines: list[str], rest: str = "") -> list[str]:
    """The first ten lines, and the number of the others, which are called ``rest``."""
    return (
        lines
        if len(lines) <= 10
        else [*lines[:10], f"... and {len(lines) - 10} more {rest}".rstrip()]
    )


def report(error: BaseException, program: str, quiet: bool = False) -> int:
    """Print ``error`` to stderr as its kind asks (``quiet`` ranks print bugs only); returns the
    exit code.

    In a pod, `kubectl describe` shows what is no bug too; of a bug it shows the log's end.
    Credentials are redacted.
    """
    if isinstance(error, Preempted):
        return 128 + error.number
    if isinstance(error, OSError) and (why := disk_fault(error)):
        error = UserError(f"{error.filename}: {why}" if error.filename else f"a file: {why}")
    if isinstance(error, UserError | RetryableError):
        if not quiet and not error.reported_elsewhere:
            text = redact(str(error))
            for line in text.splitlines():
                print(f"{program}: {line}", file=sys.stderr, flush=True)
            _leave_message(text, first=isinstance(error, UserError))
        return EXIT_USER if isinstance(error, UserError) else EXIT_RETRY
    print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)
    return EXIT_BUG


def _leave_message(text: str, first: bool) -> None:
    """In the file that the pod's manifest names, whose content becomes the termination message.
    What another process of the pod left before stays, unless this comes ``first``: a lost peer is
    what follows from somebody's mistake.
    """
    name = os.environ.get("CONVOY_TERMINATION_LOG")
    if name:
        with suppress(OSError):
            path = Path(name)
            if first or not path.exists() or not path.stat().st_size:
                path.write_text(text[:4000] + "\n", encoding="utf-8")
