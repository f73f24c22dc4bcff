"""What a run tells MLflow. Everything is written to a spool file first and sent from a thread: a server that is slow, or
not there, never holds up training, and nothing is lost: what it did not take stays in the spool for ``convoy sync``."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from trainer.disk import AppendLog
from trainer.run_lock import LockLost

Event = dict[str, Any]

_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0  # seconds between two tries
_START_WAIT, _CLOSE_WAIT = 20.0, 30.0  # seconds that a run's start and end wait for the server


def configure_mlflow(retries: int = 2) -> None:
    """Short tries, no pickle, no chatter on the terminal. Before MLflow is imported; what the environment says stays."""
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(retries)),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "15"),
        ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_LOGGING_LEVEL", "ERROR"),
    ):
        os.environ.setdefault(name, value)


class Tracker(Protocol):
    """Where metrics go."""

    @property
    def run_id(self) -> str | None: ...

    def log_metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def log_artifact(self, path: Path, folder: str = "") -> None: ...
    def close(self, status: str) -> bool: ...


class NullTracker:
    """For ranks other than the first, and for runs without a server."""

    @property
    def run_id(self) -> str | None:
        return None

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def log_artifact(self, path: Path, folder: str = "") -> None:
        pass

    def close(self, status: str) -> bool:
        return True


class Delivery:
    """Sends a spool's events to MLflow in their order. What was sent is noted beside the spool, so that it can go on later."""

    def __init__(self, spool: Path, uri: str) -> None:
        configure_mlflow(retries=1)  # this code does the waiting
        from mlflow.tracking import MlflowClient

        self.spool = spool
        self.uri = uri
        self.client = MlflowClient(tracking_uri=uri)
        self._note = spool.with_suffix(".sent.json")
        note = json.loads(self._note.read_text()) if self._note.exists() else {}
        self.run_id: str | None = note.get("run_id")
        self.offset: int = note.get("offset", 0)
        self._logged: dict[str, int] = note.get("logged", {})
        """By metric, the last step that a run had when it was taken up again."""
        self.rejected = 0

    def pending(self) -> tuple[list[Event], int]:
        """Up to 500 events not sent yet, and the offset behind them."""
        events: list[Event] = []
        with self.spool.open("rb") as file:
            file.seek(self.offset)
            end = self.offset
            for line in file:
                if len(events) == 500 or not line.endswith(b"\n"):
                    break
                events.append(json.loads(line))
                end += len(line)
        return events, end

    def deliver(self) -> int:
        """Send what is pending, at most 500 events; returns how many. Raises what MLflow raises where it cannot be reached."""
        events, end = self.pending()
        metrics: list[Event] = []
        for event in events:
            if event["kind"] == "metrics":
                metrics.append(event)
                continue
            self._send_metrics(metrics)
            metrics = []
            self._try(lambda event=event: self._send(event))  # type: ignore[misc]
        self._send_metrics(metrics)
        if events:
            self.offset = end
            self._save()
        return len(events)

    def _save(self) -> None:
        part = self._note.with_suffix(".part")
        part.write_text(json.dumps({"run_id": self.run_id, "offset": self.offset, "logged": self._logged}))
        part.replace(self._note)

    def _try(self, send: Any) -> None:
        from mlflow.exceptions import RestException

        try:
            send()
        except RestException as error:
            status = error.get_http_status_code()
            if not 400 <= status < 500 or status in (401, 403, 408, 429):
                raise
            self.rejected += 1  # trying again would not help, and would block all that follows
            print(f"convoy: MLflow refused an entry: {str(error)[:200]}", file=sys.stderr, flush=True)

    def _send_metrics(self, events: list[Event]) -> None:
        from mlflow.entities import Metric

        metrics = []
        for event in events:
            for name, value in event["values"].items():
                step, last = event["step"], self._logged.get(name, -1)
                if name.startswith("system/"):  # counted anew by each process
                    step += last + 1
                if step > last:  # else a step made again after a resume
                    metrics.append(Metric(name, value, event["time_ms"], step))
        for first in range(0, len(metrics), 1000):  # the server's limit
            self._try(lambda first=first: self.client.log_batch(self._run(), metrics=metrics[first : first + 1000]))  # type: ignore[misc]

    def _run(self) -> str:
        assert self.run_id is not None, "the spool's first event makes the run"
        return self.run_id

    def _send(self, event: Event) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        kind = event["kind"]
        if kind == "run":
            if not self._start_run(event):
                return
            params = [Param(key, str(value)) for key, value in event["params"].items()]
            for first in range(0, len(params), 100):
                self.client.log_batch(self._run(), params=params[first : first + 100])
            inputs = [
                DatasetInput(
                    Dataset(
                        name=d["name"],
                        digest=d["digest"],
                        source_type="s3",
                        source=json.dumps({"uri": d["url"]}),
                        profile=d["profile"],
                    ),
                    [InputTag("mlflow.data.context", d["context"])],
                )
                for d in event["datasets"]
            ]
            self.client.log_inputs(self._run(), inputs)
        elif kind == "artifact":
            path = Path(event["path"])
            if path.is_file():
                self.client.log_artifact(self._run(), str(path), event["folder"] or None)
            else:
                self.rejected += 1
                print(f"convoy: {path} is gone and could not be sent to MLflow", file=sys.stderr, flush=True)
        elif kind == "finish":
            self.client.set_terminated(self._run(), event["status"])

    def _start_run(self, event: Event) -> bool:
        """Make the run, or take up the one that goes on. Whether it is new."""
        if self._take_up(self.run_id or event.get("run_id"), event["tags"]):
            return False
        experiment = self.client.get_experiment_by_name(event["experiment"])
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(event["experiment"])
        run = self.client.create_run(experiment_id, start_time=event["time_ms"], tags=event["tags"], run_name=event["name"])
        self.run_id = run.info.run_id
        self._save()
        return True

    def _take_up(self, run_id: str | None, tags: Mapping[str, str]) -> bool:
        """False where the server has no such run."""
        from mlflow.exceptions import RestException

        if run_id is None:
            return False
        try:
            run = self.client.get_run(run_id)
        except RestException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        self.client.update_run(run_id, status="RUNNING")
        for key, value in tags.items():
            self.client.set_tag(run_id, key, value)
        self.run_id = run_id
        self._logged = {metric.key: metric.step for metric in run.data._metric_objs}
        self._save()
        return True

    def finish(self) -> None:
        """Remove a spool that was sent whole."""
        self.spool.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)


class MlflowTracker:
    """A run on an MLflow server. ``first``: the run's name, tags, parameters and data sets, and where it goes on, its id.

    ``goes_on``: a spool that stands there is of this run's earlier process, and is sent first. ``check_lock`` raises LockLost
    if the spool belongs to another run by now: nothing is written or sent then.
    """

    def __init__(
        self, uri: str, spool: Path, first: Event, goes_on: bool = False, check_lock: Callable[[], None] = lambda: None
    ) -> None:
        self._check_lock = check_lock
        spool.parent.mkdir(parents=True, exist_ok=True)
        if goes_on:
            _cut_torn_line(spool)
        else:
            for old in (spool, spool.with_suffix(".sent.json")):
                if old.exists():  # of an earlier run of this name whose server was away
                    old.rename(old.with_name(f"{int(time.time())}-{old.name}"))
        self._delivery = Delivery(spool, uri)
        self._file = AppendLog(spool)
        self._more = threading.Event()
        self._closing = threading.Event()
        self._reached = threading.Event()
        self._told = False
        self._put({"kind": "run", "time_ms": _now_ms(), **first})
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()
        started = time.monotonic()
        while not (self._reached.wait(0.05) or self._told or time.monotonic() - started > _START_WAIT):
            pass

    @property
    def run_id(self) -> str | None:
        return self._delivery.run_id

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        self._put({"kind": "metrics", "step": step, "time_ms": _now_ms(), "values": dict(values)})

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self._put({"kind": "artifact", "path": str(path.absolute()), "folder": folder})

    def close(self, status: str) -> bool:
        """End the run; waits a bounded time for the server. False where entries stay in the spool."""
        self._put({"kind": "finish", "status": status})
        self._closing.set()
        self._more.set()
        self._thread.join(_CLOSE_WAIT)
        lost = self._file.close()
        if not self._is_writer():
            return False
        entries = len(self._delivery.pending()[0])
        if lost == entries == 0 and not self._thread.is_alive():
            self._delivery.finish()
            return True
        print(
            f"convoy: {self._delivery.spool} keeps what MLflow at {self._delivery.uri} did not take; "
            f"send it with: convoy sync {self._delivery.spool}",
            file=sys.stderr,
            flush=True,
        )
        return False

    def _is_writer(self) -> bool:
        try:
            self._check_lock()
        except LockLost:  # the training loop ends by the same error
            return False
        return True

    def _put(self, event: Event) -> None:
        if not self._is_writer():
            return
        self._file.write(json.dumps(event))
        self._more.set()

    def _work(self) -> None:
        wait = _FIRST_WAIT
        while self._is_writer():
            try:
                while self._delivery.deliver():
                    pass
                self._reached.set()
                wait = _FIRST_WAIT
                if self._closing.is_set() and not self._delivery.pending()[0]:
                    return
                self._more.wait()
                self._more.clear()
                self._closing.wait(1.0)  # gather a second's metrics into one request
            except Exception as error:  # whatever it is, training goes on
                if not self._told:
                    reason = " ".join(str(error).split())[:200]
                    print(
                        f"convoy: MLflow at {self._delivery.uri} cannot be reached, training goes on and metrics are kept in "
                        f"{self._delivery.spool} ({reason})",
                        file=sys.stderr,
                        flush=True,
                    )
                    self._told = True
                if self._closing.is_set():
                    return
                self._closing.wait(wait)
                wait = min(wait * 2, _LONGEST_WAIT)


class SystemMetrics:
    """CPU, memory, disk, network and GPU of rank 0's machine, every ten seconds, under the names of MLflow's own view."""

    def __init__(self, tracker: Tracker, interval: float = 10.0) -> None:
        self._tracker = tracker
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def _work(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with suppress(ImportError, RuntimeError):  # no GPU, or none that NVML knows
            monitors.append(GPUMonitor())
        step = 0
        while True:
            values: dict[str, float] = {}
            for monitor in monitors:
                monitor.collect_metrics()
                values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
            self._tracker.log_metrics(values, step)
            step += 1
            if self._stop.wait(self._interval):
                return


def _cut_torn_line(spool: Path) -> None:
    """A killed process may have left half a line."""
    if spool.exists():
        content = spool.read_bytes()
        with spool.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _now_ms() -> int:
    return int(time.time() * 1000)
