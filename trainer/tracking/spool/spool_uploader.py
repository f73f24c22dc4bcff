"""Delivers an entire spool, with the entries of any number of runs: ``convoy sync``."""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trainer.errors import UserError
from trainer.tracking.errors import DeliveryStopped, Fault, RunMissing, classify
from trainer.tracking.mlflow_run import MlflowRun, find_run, item_of_rejected
from trainer.tracking.server import connect
from trainer.tracking.spool.artifact_uploader import ArtifactUploader, send_artifact
from trainer.tracking.spool.delivery_record import DeliveryRecord, RejectedEntries
from trainer.tracking.spool.run_uploader import RunUploader
from trainer.tracking.spool.spool import (
    first_format_record_path,
    lock_spool,
    record_path,
    rejected_path,
)
from trainer.tracking.spool.spool_reader import SpoolReader

_WAITS = (1.0, 2.0, 4.0)  # seconds between tries

_T = TypeVar("_T")


@dataclass
class RunReport:
    """The outcome for one run's entries. ``fault``: the reason why the rest was not sent."""

    key: str
    run_id: str | None = None
    sent: int = 0
    fault: Fault | None = None


class SpoolUploader:
    """Delivers the spool ``path`` to the MLflow server ``uri``.

    Accepted entries are recorded, so that delivery resumes after a failure without repeating any.
    The spool is removed when every entry was accepted or stored in the file of rejected entries.
    Raises UserError if the spool is in use.
    """

    def __init__(self, path: Path, uri: str) -> None:
        self.path = path
        self.uri = uri
        self.rejected = RejectedEntries(rejected_path(path))
        self.kept = False
        """Whether entries remain in the spool."""
        self._client: Any = None
        self._lock: int | None = lock_spool(path)

    def upload(self) -> list[RunReport]:
        """Delivers as much as possible; returns a report for each run."""
        try:
            if self.path == self.rejected.path:
                return self._retry_rejected()
            return self._upload_spool()
        finally:
            if self._lock is not None:
                os.close(self._lock)

    def _connect(self) -> Any:
        self._client = self._client or connect(self.uri)
        return self._client

    def _upload_spool(self) -> list[RunReport]:
        record = DeliveryRecord(record_path(self.path))
        old = first_format_record_path(self.path)
        old_record = _first_format_record(old)
        reader = SpoolReader(self.path, record.sent, old_record.get("offset", 0))
        if reader.first_format_key and old_record.get("run_id"):
            record.run_ids.setdefault(reader.first_format_key, old_record["run_id"])
        try:
            reports = [self._upload_run(key, reader, record) for key in reader.keys]
            self.kept = any(report.fault for report in reports)
            if not self.kept:
                for line in reader.corrupt:
                    content = {"kind": "corrupt", "line": line.number, "text": line.text}
                    self.rejected.add(content, f"line {line.number} of the spool {line.reason}")
                self.path.unlink()
                record.remove()
                old.unlink(missing_ok=True)
        finally:
            reader.close()
        return reports

    def _upload_run(self, key: str, reader: SpoolReader, record: DeliveryRecord) -> RunReport:
        uploader = RunUploader(key, reader, record, self.rejected, self._connect)
        artifacts = ArtifactUploader(uploader, self.path, record, self.rejected)
        report = RunReport(key)
        try:
            done = _patiently(lambda: _all_sent(uploader))
            done = _patiently(artifacts.step) and done
            if not done:
                raise DeliveryStopped(Fault("unreachable", "the server fails for some entries"))
            if uploader.status_sent is None and not reader.corrupt and uploader.run is not None:
                _end_killed(uploader.run)
        except DeliveryStopped as stop:
            report.fault = stop.fault
        report.run_id, report.sent = uploader.run_id, uploader.sent
        return report

    # --- rejected entries ---------------------------------------------------------------------

    def _retry_rejected(self) -> list[RunReport]:
        """Retries each rejected entry once, and keeps those that are rejected again."""
        entries = [
            _parse_rejected(number, raw)
            for number, raw in enumerate(self.path.read_bytes().splitlines(), 1)
        ]
        reports: dict[str, RunReport] = {}
        runs: dict[str, MlflowRun | Fault] = {}
        kept = []
        for entry in entries:
            key = str(entry.get("run"))
            if entry.get("kind") == "corrupt" or "run" not in entry:
                kept.append(entry)
                continue
            report = reports.setdefault(key, RunReport(key))
            if key not in runs:
                runs[key] = self._existing_run(key, entry.get("run_id"))
            fault = self._send_rejected(runs[key], entry)
            if fault is None:
                report.sent += 1
            else:
                kept.append({**entry, "reason": fault.reason})
                report.fault = None if fault.kind == "rejected" else fault
            run = runs[key]
            report.run_id = run.run_id if isinstance(run, MlflowRun) else entry.get("run_id")
        self._replace(kept)
        return list(reports.values())

    def _existing_run(self, key: str, run_id: str | None) -> MlflowRun | Fault:
        record = DeliveryRecord(record_path(self.path.with_suffix(".none")))
        if run_id:
            record.run_ids[key] = run_id
        try:
            run = find_run(self._connect(), key, {}, record)
        except DeliveryStopped as stop:
            return stop.fault
        except Exception as error:
            return classify(error)
        if run is None:
            return Fault("rejected", "MLflow does not have the run")
        return MlflowRun(self._connect(), key, run, True, record)

    def _send_rejected(self, run: MlflowRun | Fault, entry: dict[str, Any]) -> Fault | None:
        if isinstance(run, Fault):
            return run
        content = {name: value for name, value in entry.items() if name != "reason"}
        try:
            if content["kind"] == "artifact":
                send_artifact(run, content, self.path)
            elif content["kind"] == "finish":
                run.finish(content)
            else:
                item = item_of_rejected(content)
                run.send(item.kind, [item])
        except Exception as error:
            return classify(error)
        return None

    def _replace(self, kept: list[dict[str, Any]]) -> None:
        self.rejected.added = kept
        if not kept:
            self.path.unlink()
            return
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        part.replace(self.path)


def _parse_rejected(number: int, raw: bytes) -> dict[str, Any]:
    """Parses a line of the file of rejected entries.

    A line that is not an entry is kept unchanged.
    """
    with suppress(ValueError, RecursionError):
        content = json.loads(raw)
        if isinstance(content, dict) and isinstance(content.get("kind"), str):
            return content
    text = raw.decode("utf-8", "surrogateescape")
    return {
        "kind": "corrupt",
        "line": number,
        "text": text,
        "reason": f"line {number} is not an entry",
    }


def _first_format_record(path: Path) -> dict[str, Any]:
    """Returns the record of the first format.

    If it is missing or corrupt, entries are sent again.
    """
    with suppress(FileNotFoundError, ValueError):
        record = json.loads(path.read_bytes())
        if isinstance(record, dict) and isinstance(record.get("offset"), int):
            return record
    return {}


def _all_sent(uploader: RunUploader) -> bool:
    while uploader.step():
        pass
    return uploader.retry_parked()


def _patiently(deliver: Callable[[], bool]) -> bool:
    """Tries a few times; returns whether delivery was completed.

    Raises DeliveryStopped of the last try.
    """
    for wait in (*_WAITS, None):
        try:
            if deliver():
                return True
            if wait is None:
                return False
        except DeliveryStopped as stop:
            if wait is None or not stop.fault.may_succeed_later:
                raise
        time.sleep(wait)
    raise AssertionError("unreachable")


def _end_killed(run: MlflowRun) -> None:
    """Sets a run to KILLED whose last attempt left no status.

    The attempt is not running, because no process writes to the spool.
    """
    if run.status == "RUNNING":
        try:
            run.finish({"status": "KILLED"})
        except (Exception, RunMissing) as error:
            raise DeliveryStopped(classify(error)) from error


def spool_files(path: Path) -> list[Path]:
    """Returns the spool ``path`` and the file of its rejected entries, if they exist.

    Raises UserError if neither does.
    """
    paths = [p for p in dict.fromkeys((path, rejected_path(path))) if p.is_file()]
    if not paths:
        missing = "there is no such file; a run whose entries MLflow has all accepted leaves none"
        reason = "is a folder; name the tracking.jsonl in it" if path.is_dir() else missing
        raise UserError(f"{path}: {reason}")
    return paths


def sync_spool(path: Path, uri: str) -> tuple[SpoolUploader, list[RunReport]]:
    """Delivers the spool at ``path`` and the entries of it that MLflow rejected earlier.

    Raises UserError if neither file exists.
    """
    paths = spool_files(path)
    reports: list[RunReport] = []
    for one in reversed(paths):  # rejected entries first, because delivering the spool may add some
        uploader = SpoolUploader(one, uri)
        reports += uploader.upload()
    return uploader, reports
