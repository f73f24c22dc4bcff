"""Publishes the progress of a run: in its output folder and, in pods, in the log."""

import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.errors import Diverged, Preempted, RetryableError, UserError
from trainer.faults.disk_space import write_file
from trainer.locks.run_lock import LockHeld, LockLost, exclusive
from trainer.process.stop_signals import STOP_SIGNALS
from trainer.progress.progress_record import (
    LINE_PREFIX,
    PROGRESS_FILE,
    PROGRESS_LOG_VARIABLE,
    Phase,
    ProgressRecord,
    read_progress,
)

_FILE_SECONDS = 1.0
_LOG_SECONDS = 10.0  # as often as the lines for people


class ProgressPublisher:
    """Publishes the progress record of one run.

    Records go to the log if the environment requests it, and to a file after ``open_file``. If
    ``quiet``, nothing is published. A file that cannot be written does not end the run.
    """

    def __init__(self, run_name: str, total_steps: int | None = None, quiet: bool = False) -> None:
        self._values: dict[str, Any] = {"run_name": run_name, "total_steps": total_steps}
        self._quiet = quiet
        self._logs = os.environ.get(PROGRESS_LOG_VARIABLE) == "1"
        self._path: Path | None = None
        self._check_lock: Callable[[], None] = lambda: None
        self._file_due = self._log_due = 0.0
        self._is_reported = False

    def open_file(self, folder: Path, check_lock: Callable[[], None] = lambda: None) -> None:
        """Publish to a file in ``folder`` as well, from the next call on.

        ``check_lock`` raises LockLost once another process owns the folder; nothing is written
        there after that.
        """
        self._path, self._check_lock = folder / PROGRESS_FILE, check_lock

    def update(self, **values: Any) -> None:
        """Set fields of the record; a float that is NaN or Inf becomes None.

        A new phase is published at once. Otherwise the record is published if the last one is at
        least 1 s old in the file, and 10 s in the log.
        """
        is_new_phase = values.get("phase", self._values.get("phase")) != self._values.get("phase")
        self._values |= {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._publish(is_new_phase)

    def waiting(self, message: str) -> None:
        """Publish that the run waits, and for what."""
        self.update(phase="waiting", message=message)

    def end(self, exit_code: int, error: BaseException | None = None) -> None:
        """Publish how the run ended. ``error`` is the exception that ended it."""
        self._values |= {
            "phase": "diverged" if isinstance(error, Diverged) else _ending(exit_code),
            "exit_code": exit_code,
            "message": _describe(error),
            "eta_seconds": None,
        }
        self._publish(at_once=True)

    def end_for_ranks(
        self, folder: Path, since: float, exit_code: int, error: BaseException | None
    ) -> None:
        """Publish the exit code of the run in the launcher, after all ranks have ended.

        Corrects the record in ``folder`` if rank 0 wrote it after ``since`` (Unix time, seconds)
        and it does not have that exit code: rank 0 was killed, or another rank's code matters more.
        ``error`` is the launcher's own exception, if any.
        """
        if self._quiet:
            return
        found = read_progress(folder)
        if found is None or found.updated_at < since:
            if error is not None:
                self.end(exit_code, error)
        elif found.exit_code != exit_code:
            self._values = asdict(found)
            self.open_file(folder)
            with (
                suppress(LockHeld, OSError, RetryableError, UserError),
                exclusive(str(folder), "convoy train", "the run continues there"),
            ):
                self.end(exit_code, error)

    def _publish(self, at_once: bool) -> None:
        now = time.monotonic()
        in_file = self._path is not None and (at_once or now >= self._file_due)
        in_log = self._logs and (at_once or now >= self._log_due)
        if self._quiet or not (in_file or in_log):
            return
        record = ProgressRecord(**self._values | {"updated_at": time.time()})
        if in_log:
            self._log_due = now + _LOG_SECONDS
            print(LINE_PREFIX + record.to_json(), flush=True)
        if in_file:
            self._file_due = now + _FILE_SECONDS
            self._write(record)

    def _write(self, record: ProgressRecord) -> None:
        assert self._path is not None
        try:
            self._check_lock()
            write_file(self._path, record.to_json() + "\n")
        except LockLost:
            pass  # the training loop ends with the same error
        except (UserError, OSError) as error:
            if not self._is_reported:
                print(f"convoy: {error}; training continues", file=sys.stderr, flush=True)
            self._is_reported = True


def _ending(exit_code: int) -> Phase:
    if exit_code == 0:
        return "finished"
    return "preempted" if exit_code - 128 in STOP_SIGNALS else "failed"


def _describe(error: BaseException | None) -> str | None:
    if error is None or isinstance(error, Preempted):
        return None
    if isinstance(error, UserError | RetryableError):
        return str(error)
    return traceback.format_exception_only(error)[-1].strip()
