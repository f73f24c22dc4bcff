"""The status of an MLflow run whose rank 0 ended without setting it: killed, out of memory, hung.

Rank 0 keeps the id of its run in a file of the launcher until it has ended the run itself.
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
    """``note`` the run's id as soon as the server has given it, ``clear`` it when the run has
    ended; only rank 0 does.
    """

    def __init__(self, is_first: bool) -> None:
        name = os.environ.get(RUN_ID_FILE)
        self._path = Path(name) if name and is_first else None
        self._noted = False

    def note(self, run_id: str | None) -> None:
        if run_id is not None and not self._noted and self._path is not None:
            self._noted = True
            with suppress(OSError):  # the launcher that would read it is gone
                self._path.write_text(run_id, encoding="utf-8")

    def clear(self) -> None:
        self._noted = True
        if self._path is not None:
            with suppress(OSError):  # the launcher finds that the run has ended
                self._path.unlink(missing_ok=True)


def end_unfinished_run(run_id_file: Path, uri: str | None, spool: Path, status: str) -> None:
    """Set ``status`` (FAILED or KILLED) of the run that rank 0 left RUNNING, if any; also at the
    end of its spool.

    If the server cannot be reached, the status is sent with the spool: when the run resumes or by
    ``convoy sync``. Nothing is done if another process has taken over the output folder: the run is
    that one's.
    """
    try:
        run_id = run_id_file.read_text(encoding="utf-8")
    except OSError:
        return
    with suppress(LockHeld), exclusive(str(spool.parent), "convoy train", "the run goes on there"):
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
    except Exception as error:  # whatever it is, the run's exit code matters more
        reason = redact_credentials(" ".join(str(error).split())[:200])
        outcome = f"MLflow run {run_id} could not be set to {status} ({reason})"
    rest = f"; send what it did not receive with: convoy sync {spool}" if spool.exists() else ""
    print(f"convoy: {outcome}{rest}", file=sys.stderr, flush=True)
