"""Logs a run to MLflow while it trains.

Entries are first written to a spool and then sent from threads: a slow or unreachable server never
delays training, and entries that it did not accept stay in the spool for ``convoy sync``.
"""

import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from trainer.locks.run_lock import LockLost
from trainer.secrets.redaction import redact_credentials
from trainer.tracking.errors import DeliveryStopped, Fault, classify
from trainer.tracking.server import connect, refusal
from trainer.tracking.spool.artifact_uploader import ArtifactUploader
from trainer.tracking.spool.delivery_record import DeliveryRecord, RejectedEntries
from trainer.tracking.spool.run_uploader import RunUploader
from trainer.tracking.spool.spool import (
    SpoolWriter,
    new_run_key,
    now_ms,
    record_path,
    rejected_path,
    set_aside,
)
from trainer.tracking.spool.spool_reader import SpoolReader, find_attempts

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0  # seconds between two tries
_START_WAIT, _CLOSE_WAIT = 20.0, 30.0  # seconds to wait for the server at the run's start and end
_LAST_TRIES = 3  # tries for failing entries at the end of a run


class Tracker(Protocol):
    """Interface of a destination for metrics."""

    @property
    def run_id(self) -> str | None: ...
    @property
    def run_key(self) -> str | None: ...

    def log_metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def log_text(self, name: str, text: str, folder: str = "") -> None: ...
    def close(self, status: str) -> bool: ...


class NullTracker:
    """Tracker of other ranks than rank 0 and of runs without a server; keeps the run's identity."""

    def __init__(self, run_id: str | None = None, run_key: str | None = None) -> None:
        self.run_id = run_id
        self.run_key = run_key

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def log_text(self, name: str, text: str, folder: str = "") -> None:
        pass

    def close(self, status: str) -> bool:
        return True


class MlflowTracker:
    """Logs a run to the MLflow server at ``uri`` through ``spool``.

    ``description``: the run's name, experiment, tags, parameters and data sets, and its MLflow ID
    if it is resumed. ``run_key``: key of the resumed run; a new run gets a new key. A spool of
    another run is renamed. Raises UserError if another process uses the spool.
    """

    def __init__(
        self,
        uri: str,
        spool: Path,
        description: Mapping[str, Any],
        run_key: str | None = None,
        wait: bool = True,
        check_lock: Callable[[], None] = lambda: None,
    ) -> None:
        """Opens the spool and starts the sender threads.

        ``wait``: wait a limited time for the first contact with the server. ``check_lock`` raises
        LockLost once another process owns the output folder; nothing is written or sent after that.
        """
        self._check_lock = check_lock
        self.run_key: str = run_key or new_run_key()
        self.refused: Fault | None = None
        """Reason why the server did not accept the run at startup."""
        self._uri = uri
        self._spool = spool
        spool.parent.mkdir(parents=True, exist_ok=True)
        attempts = find_attempts(spool, run_key)
        if attempts is None:
            kept = set_aside(spool)
            _print(
                f"{spool} belongs to another run and was renamed to {kept}; send it with: "
                f"convoy sync {kept}"
            )
        # a node's clock may be behind that of the node which wrote the earlier attempts
        attempt = max([now_ms(), *(earlier + 1 for earlier in attempts or ())])
        self._writer = SpoolWriter(spool, self.run_key, attempt)
        self._record = DeliveryRecord(record_path(spool))
        self._rejected = RejectedEntries(rejected_path(spool))
        self._put("run", time_ms=attempt, **description)
        self._reader = SpoolReader(spool, self._record.sent, growing=True)
        self._runs = RunUploader(
            self.run_key, self._reader, self._record, self._rejected, lambda: connect(uri), attempt
        )
        self._artifacts = ArtifactUploader(self._runs, spool, self._record, self._rejected)
        self._more = threading.Event()
        self._closing = threading.Event()
        self._contact = threading.Event()
        self._reached = False
        self._printed: set[str] = set()
        self._threads = [
            threading.Thread(target=self._send_entries, name="tracking", daemon=True),
            threading.Thread(target=self._send_artifacts, name="tracking-artifacts", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        if wait:
            self._contact.wait(_START_WAIT)

    @property
    def run_id(self) -> str | None:
        return self._runs.run_id

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        self._put("metrics", step=step, time_ms=now_ms(), values=dict(values))
        self._more.set()

    def log_text(self, name: str, text: str, folder: str = "") -> None:
        self._put("artifact", name=name, folder=folder, text=text)
        self._more.set()

    def _put(self, kind: str, **content: Any) -> None:
        if self._is_writer():
            self._writer.append(kind, **content)

    def _is_writer(self) -> bool:
        try:
            self._check_lock()
        except LockLost:  # the training loop ends with the same error
            return False
        return True

    def close(self, status: str) -> bool:
        """Ends the run and waits a limited time for the server.

        Returns whether the server has its status.
        """
        self._put("finish", status=status, time_ms=now_ms())
        self._closing.set()
        self._more.set()
        deadline = time.monotonic() + _CLOSE_WAIT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not self._is_writer():
            self._writer.close()
            return False
        ended = not any(thread.is_alive() for thread in self._threads)
        empty = not (self._runs.waiting or self._runs.artifacts or self._writer.unwritten)
        if ended and empty and not self._reader.unread(self.run_key):
            for line in self._reader.corrupt:
                content = {"kind": "corrupt", "line": line.number, "text": line.text}
                self._rejected.add(content, f"line {line.number} of the spool {line.reason}")
            self._spool.unlink(missing_ok=True)
            self._record.remove()
        else:
            _print(
                f"{self._spool} contains entries that MLflow at {self._server} has not accepted; "
                f"send them with: convoy sync {self._spool}"
            )
        self._report_losses()
        self._writer.close()
        return self._runs.status_sent is not None

    def abandon(self) -> None:
        """Stops, and removes all traces of a run that the server refused at startup."""
        self._closing.set()
        self._more.set()
        self._spool.unlink(missing_ok=True)
        self._record.remove()
        self._writer.close()

    @property
    def _server(self) -> str:
        return redact_credentials(self._uri)

    def _report_losses(self) -> None:
        if rejected := self._rejected.added:
            path = self._rejected.path
            _print(
                f"MLflow rejected {len(rejected)} entries: {self._rejected.summary()}; they are in "
                f"{path}; after fixing the cause, send them with: convoy sync {path}"
            )
        if lost := self._writer.lost + self._writer.unwritten:
            _print(f"{lost} entries for MLflow are lost: {self._spool}: {self._writer.error}")

    # --- threads ------------------------------------------------------------------------------

    def _send_entries(self) -> None:
        """Sends entries until the run is closed and none are left.

        Gives up when the last tries fail.
        """
        wait, tries = _FIRST_WAIT, 0
        while self._is_writer():
            closing = self._closing.is_set()
            done = self._try(self._deliver)
            if closing:
                tries += 1
                if done or tries == _LAST_TRIES or not self._reached:
                    return
                time.sleep(wait)
            elif done:
                self._more.wait()
                self._more.clear()
                self._closing.wait(1.0)  # batch one second of metrics into one request
            else:
                self._closing.wait(wait)
            wait = _FIRST_WAIT if done else min(wait * 2, _LONGEST_WAIT)

    def _send_artifacts(self) -> None:
        """Sends artifacts until the other thread has ended and none are left.

        Gives up when the last tries fail.
        """
        wait, tries = _FIRST_WAIT, 0
        while self._is_writer():
            closing = self._closing.is_set() and not self._threads[0].is_alive()
            done = self._try(self._artifacts.step)
            if closing:
                tries += 1
                if done or tries == _LAST_TRIES or not self._reached:
                    return
                time.sleep(wait)
            elif self._closing.is_set():
                self._threads[0].join(_FIRST_WAIT)
            else:
                self._closing.wait(wait)
            wait = _FIRST_WAIT if done else min(wait * 2, _LONGEST_WAIT)

    def _deliver(self) -> bool:
        while self._runs.step():
            pass
        self._reached = True
        self._contact.set()
        return self._runs.retry_parked()

    def _try(self, deliver: Callable[[], bool]) -> bool:
        try:
            return deliver()
        except DeliveryStopped as stop:
            self._failed(stop.fault)
        except Exception as error:  # any error: training continues
            if isinstance(error, OSError) and error.filename:  # local, not from the server
                self._print_once(
                    str(error.filename), f"{error.filename}: {error.strerror}; training continues"
                )
            else:
                self._failed(classify(error))
        return False

    def _failed(self, fault: Fault) -> None:
        if not self._reached and fault.kind != "unreachable":
            self.refused = fault
        if fault.kind == "unreachable":
            text = f"MLflow at {self._server} cannot be reached ({fault.reason})"
        else:
            text = refusal(self._uri, fault)
        self._print_once(
            fault.kind, f"{text}; training continues and metrics are kept in {self._spool}"
        )
        self._contact.set()

    def _print_once(self, kind: str, text: str) -> None:
        if kind not in self._printed:
            self._printed.add(kind)
            _print(text)


def _print(text: str) -> None:
    print(f"convoy: {text}", file=sys.stderr, flush=True)
