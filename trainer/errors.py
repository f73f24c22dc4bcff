"""Failures that are not bugs, and the exit codes for a launcher or an operator."""

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
    """A mistake by the user: only its message is printed, exit code 2, never retried.

    Several errors found together are printed one per line. If ``reported_elsewhere`` is set,
    another rank prints the error.
    """

    reported_elsewhere = False

    def __init__(self, *faults: str) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class ServiceUnreachable(UserError):
    """The address of a service was never reachable: it is wrong, or the service is not up yet."""


class CollectiveUserError(UserError):
    """An error that every rank finds at the same step, so that only one rank reports it."""


class Diverged(CollectiveUserError):
    """The loss or the gradients are NaN or Inf."""


class RetryableError(RuntimeError):
    """A peer, the object store or the network was lost after bounded retries.

    Exit code 144: a retry may succeed.
    """

    reported_elsewhere = False


class Preempted(BaseException):
    """A stop signal was received: shut down in order.

    The exit code is 128 + ``number``, which is 143 for SIGTERM.
    """

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def shortened(lines: list[str], rest: str = "") -> list[str]:
    """Return the first ten lines, and a last line with the number of other lines.

    ``rest`` names the other lines.
    """
    return (
        lines
        if len(lines) <= 10
        else [*lines[:10], f"... and {len(lines) - 10} more {rest}".rstrip()]
    )


def report(error: BaseException, program: str, quiet: bool = False) -> int:
    """Print ``error`` to stderr in the form for its type and return the exit code.

    ``quiet`` ranks print bugs only. In a pod, errors that are not bugs also become the termination
    message that `kubectl describe` shows; for a bug it shows the end of the log. Credentials are
    redacted.
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
            _write_termination_message(text, overwrite=isinstance(error, UserError))
        return EXIT_USER if isinstance(error, UserError) else EXIT_RETRY
    print(redact("".join(traceback.format_exception(error))), end="", file=sys.stderr, flush=True)
    return EXIT_BUG


def _write_termination_message(text: str, overwrite: bool) -> None:
    """Write the termination message to the file that the pod's manifest names.

    A message from another process of the pod is kept, unless ``overwrite`` is true: a lost peer is
    only the consequence of an error elsewhere.
    """
    name = os.environ.get("CONVOY_TERMINATION_LOG")
    if name:
        with suppress(OSError):
            path = Path(name)
            if overwrite or not path.exists() or not path.stat().st_size:
                path.write_text(text[:4000] + "\n", encoding="utf-8")
