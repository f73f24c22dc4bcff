"""Delivers artifacts separately from metrics: their store may be down, slow or read-only."""

from pathlib import Path
from typing import Any

from trainer.tracking.errors import ServerUnavailable, classify
from trainer.tracking.mlflow_run import MlflowRun
from trainer.tracking.spool.delivery_record import DeliveryRecord, RejectedEntries
from trainer.tracking.spool.run_uploader import RunUploader
from trainer.tracking.spool.spool import Entry


class ArtifactUploader:
    """Sends the artifacts that a `RunUploader` has read. May run in a different thread."""

    def __init__(
        self, uploader: RunUploader, spool: Path, record: DeliveryRecord, rejected: RejectedEntries
    ) -> None:
        self._uploader = uploader
        self._spool = spool
        self._record = record
        self._rejected = rejected

    def step(self) -> bool:
        """Tries each waiting artifact once. Returns True if none is left.

        Raises DeliveryStopped.
        """
        run, queue = self._uploader.run, self._uploader.artifacts
        if run is None:
            return False
        for _ in range(len(queue)):
            entry = queue[0]
            if self._send(run, entry):
                queue.remove(entry)
                self._uploader.sent += 1
            else:
                queue.rotate(-1)
        return not queue

    def _send(self, run: MlflowRun, entry: Entry) -> bool:
        """Returns whether the entry is settled: accepted, or stored among the rejected entries."""
        reason = None
        try:
            send_artifact(run, entry.content, self._spool)
        except Exception as error:
            fault = classify(error)
            try:
                run.check()
            except Exception as cause:
                raise ServerUnavailable(classify(cause)) from cause
            if fault.may_succeed_later:
                return False
            reason = fault.reason
        if reason is not None:
            own = {"run": self._uploader.key, "run_id": run.run_id}
            self._rejected.add({**own, **entry.content}, reason)
            self._uploader.rejected += 1
        self._record.mark_sent(self._uploader.key, [entry.digest])
        return True


def send_artifact(run: MlflowRun, content: dict[str, Any], spool: Path) -> None:
    """Uploads a text from the spool, or the file that an entry of the first format names.

    Raises FileNotFoundError if that file is missing, or was modified after the spool.
    """
    folder = content["folder"]
    if "path" not in content:
        name = f"{folder}/{content['name']}" if folder else content["name"]
        run.client.log_text(run.run_id, content["text"], name)
        return
    path = Path(content["path"])
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if spool.exists() and path.stat().st_mtime > spool.stat().st_mtime + 1:
        raise FileNotFoundError(f"{path} has changed since the run logged it")
    run.client.log_artifact(run.run_id, str(path), folder or None)
