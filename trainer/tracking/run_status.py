"""Sets the status of an MLflow run whose rank 0 exited without doing so.

Rank 0 was killed, ran out of memory or hung. It stores the ID of its run in a file of the launcher
until it has ended the run itself.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from trainer.locks.run_lock import LockHeld, exclusive
from trainer.process.launch_environment import RUN_ID_FILE
from trainer.secrets.redaction import redact_credentials
from trainer.tracking import configure_mlflow
from trainer.tracking.spool.spool import append_finish


class UnfinishedRun:
    """The ID of a run that has not ended, stored in the launcher's file; only by rank 0.

    Call ``set_run_id`` with the run's ID as soon as the server has returned it, and ``clear`` when
    the run has ended.
    """

    def __init__(self, is_rank_zero: bool) -> None:
        name = os.environ.get(RUN_ID_FILE)
        self._path = Path(name) if name and is_rank_zero else None
        self._is_set = False

    def set_run_id(self, run_id: str | None) -> None:
        if run_id is not None and not self._is_set and self._path is not None:
            self._is_set = True
            with suppress(OSError):  # the launcher that would read it has exited
                self._path.write_text(run_id, encoding="utf-8")

    def clear(self) -> None:
        self._is_set = True
        if self._path is not None:
            with suppress(OSError):  # the launcher will see that the run has ended
                self._path.unlink(missing_ok=True)


def end_unfinished_run(run_id_file: Path, uri: str | None, spool: Path, status: str) -> None:
    """Sets the status of a run that rank 0 left RUNNING, if any, and appends it to the spool.

    ``status``: FAILED or KILLED. If the server is unreachable, the status is sent with the spool:
    when the run resumes or by ``convoy sync``. Does nothing if another process has taken over the
    output folder, because the run then belongs to that process.
    """
    try:
        run_id = run_id_file.read_text(encoding="utf-8")
    except OSError:
        return
    with (
        suppress(LockHeld),
        exclusive(str(spool.parent), "convoy train", "the run continues there"),
    ):
        _end_run(run_id, uri, spool, status)


def _end_run(run_id: str, uri: str | None, spool: Path, status: str) -> None:
    if spool.exists():
        append_finish(spool, status)
    if uri is None:
        return
    configure_mlflow(retries=1)
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(tracking_uri=uri).set_terminated(run_id, status)
        outcome = f"MLflow run {run_id} is now {status}"
    except Exception as error:  # any error: the run's exit code matters more
        reason = redact_credentials(" ".join(str(error).split())[:200])
        outcome = f"MLflow run {run_id} could not be set to {status} ({reason})"
    rest = f"; send the remaining entries with: convoy sync {spool}" if spool.exists() else ""
    print(f"convoy: {outcome}{rest}", file=sys.stderr, flush=True)
