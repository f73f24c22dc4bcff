"""Delivers the entries of one run: creates and describes it, and sends metrics and its status."""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from trainer.tracking.errors import (
    DeliveryStopped,
    Fault,
    RunMissing,
    RunUnavailable,
    ServerUnavailable,
    classify,
)
from trainer.tracking.mlflow_run import Item, MlflowRun
from trainer.tracking.spool.delivery_record import DeliveryRecord, RejectedEntries
from trainer.tracking.spool.spool import Entry
from trainer.tracking.spool.spool_reader import SpoolReader

_CHUNK = 500  # entries read from the spool at a time
_MAX_PARKED = 20_000  # items that may be set aside for a later retry while others are sent
_MAX_CREATIONS = 3
_BATCH_SIZES = {"metrics": 1000, "param": 100, "tag": 100, "dataset": 1}

_T = TypeVar("_T")


@dataclass
class _Batch:
    """Items of one kind that are sent in one request. ``failures``: number of failures so far."""

    kind: str
    items: list[Item]
    failures: int = 0

    def halves(self) -> list["_Batch"]:
        middle = len(self.items) // 2
        parts = (self.items[:middle], self.items[middle:])
        return [_Batch(self.kind, part, self.failures) for part in parts]


class RunUploader:
    """Sends the spool entries of one run, in order, and skips entries that fail individually.

    If a request fails, the run itself is checked. If that fails as well, delivery stops
    (DeliveryStopped) and nothing is lost. If it succeeds, the fault lies with the entry: a batch is
    halved until the faulty entries are isolated. These are stored in ``rejected`` if the server
    will never accept them, and retried later if it may.
    """

    def __init__(
        self,
        key: str,
        reader: SpoolReader,
        record: DeliveryRecord,
        rejected: RejectedEntries,
        connect: Callable[[], Any],
        live_attempt: int | None = None,
    ) -> None:
        """``connect`` creates the MLflow client; ``live_attempt``: the attempt of this process."""
        self.key = key
        self.sent = 0
        self.rejected = 0
        self.status_sent: str | None = None
        self.artifacts: deque[Entry] = deque()
        """Artifacts that were read and not yet sent; consumed by `ArtifactUploader`."""
        self.run: MlflowRun | None = None
        self._reader = reader
        self._record = record
        self._rejected = rejected
        self._connect = connect
        self._live_attempt = live_attempt
        self._chunk: deque[Entry] = deque()
        self._queue: deque[_Batch] = deque()
        self._parked: list[_Batch] = []
        self._finish: Entry | None = None
        self._unsettled: Counter[str] = Counter()
        self._settled: list[str] = []
        self._creations = 0

    @property
    def run_id(self) -> str | None:
        return self.run.run_id if self.run else self._record.run_ids.get(self.key)

    @property
    def waiting(self) -> int:
        """Number of entries that were read and are not settled, excluding artifacts."""
        return len(self._unsettled) + len(self._chunk)

    def step(self) -> bool:
        """Sends some entries; returns False if there were none. Raises DeliveryStopped."""
        try:
            if self.run is None:
                self._open()
            moved = bool(self._queue) or self._read()
            while self._queue:
                self._send(self._queue.popleft())
            return self._send_status() or moved
        except RunMissing:
            # The server lost the run or is a different one: recreate it with all entries.
            self.run = None
            return True
        finally:
            self._save()

    def retry_parked(self) -> bool:
        """Retries items that the server may accept later; returns True if none are left."""
        parked, self._parked = self._parked, []
        for batch in parked:
            halve = batch.failures > 1 and len(batch.items) > 1
            self._queue.extend(batch.halves() if halve else [batch])
        self.step()
        return not self._parked and self._finish is None

    # --- the run ------------------------------------------------------------------------------

    def _open(self) -> None:
        """Finds or creates the run."""
        entries = self._reader.runs.get(self.key, {})
        known = self._record.run_ids.get(self.key)
        self.run = self._ask(
            lambda: MlflowRun.open(self._connect(), self.key, entries, self._record)
        )
        if not self.run.existed:
            self._creations += 1
            if self._creations > _MAX_CREATIONS:
                reason = f"the server has lost the run {_MAX_CREATIONS} times"
                raise RunUnavailable(Fault("rejected", reason))
        elif self._live_attempt is not None:
            self.run.live_attempt = self._live_attempt
            self._ask(self.run.mark_running)
        if known not in (None, self.run.run_id):
            self._restart()

    def _restart(self) -> None:
        """Restarts delivery at the first entry: a different run accepted the earlier ones."""
        for entries in (self._chunk, self._queue, self._parked, self.artifacts):
            entries.clear()
        self._unsettled.clear()
        self._settled.clear()
        self._finish = None
        self._reader.rewind(self.key)

    def _ask(self, ask: Callable[[], _T]) -> _T:
        """Returns the response of a request that cannot fail because of an entry.

        Raises DeliveryStopped.
        """
        try:
            return ask()
        except (DeliveryStopped, RunMissing):
            raise
        except Exception as error:
            raise ServerUnavailable(classify(error)) from error

    # --- entries ------------------------------------------------------------------------------

    def _read(self) -> bool:
        """Queues the next entries; returns False if there are none."""
        assert self.run is not None
        run, attempts = self.run, self._reader.attempts.get(self.key, set())
        if not self._chunk:
            self._chunk.extend(self._reader.read(self.key, _CHUNK))
        found = bool(self._chunk)
        metrics: list[Item] = []
        while self._chunk:
            entry = self._chunk[0]
            items: list[Item] = []
            if entry.kind == "metrics":
                items = self._ask(partial(run.metric_items, entry, len(attempts) > 1))
                metrics += items
            elif entry.kind == "run":
                items = self._ask(partial(run.description_items, entry))
                for kind in ("param", "tag", "dataset"):
                    self._enqueue(kind, [item for item in items if item.kind == kind])
            elif entry.kind == "artifact":
                self.artifacts.append(entry)
            elif entry.attempt == max(attempts):
                self._finish = entry
            self._chunk.popleft()
            if items or entry is self._finish:
                self._unsettled[entry.digest] += len(items) or 1
            elif entry.kind != "artifact":
                self._settled.append(entry.digest)  # contains nothing new, or is superseded
            if entry.kind == "run":
                break  # the changes of a later attempt are known only after this entry is sent
        self._enqueue("metrics", metrics)
        return found

    def _enqueue(self, kind: str, items: list[Item]) -> None:
        size = _BATCH_SIZES[kind]
        for first in range(0, len(items), size):
            self._queue.append(_Batch(kind, items[first : first + size]))

    def _send(self, batch: _Batch) -> None:
        """Sends a batch, halving it until the faulty items are isolated."""
        stack = [batch]
        try:
            while stack:
                part = stack[-1]
                fault = self._try(partial(self._running.send, part.kind, part.items))
                if fault is None:
                    self._release(part.items)
                elif fault.may_succeed_later:
                    self._park(part, fault)
                elif len(part.items) > 1:
                    stack[-1:] = reversed(part.halves())
                    continue
                else:
                    self._reject(part.items[0].content, fault)
                    self._release(part.items)
                stack.pop()
        finally:
            self._queue.extendleft(stack)

    @property
    def _running(self) -> MlflowRun:
        assert self.run is not None
        return self.run

    def _try(self, send: Callable[[], None]) -> Fault | None:
        """Returns why the server did not accept an entry, or None if it did.

        Raises DeliveryStopped or RunMissing if the server or the run is at fault.
        """
        try:
            send()
        except Exception as error:
            fault = classify(error)
            self._ask(self._running.check)
            return fault
        return None

    def _park(self, batch: _Batch, fault: Fault) -> None:
        if sum(len(parked.items) for parked in self._parked) > _MAX_PARKED:
            raise ServerUnavailable(fault)
        batch.failures += 1
        self._parked.append(batch)

    def _reject(self, content: Mapping[str, Any], fault: Fault) -> None:
        run = {"run": self.key, "run_id": self._running.run_id}
        self._rejected.add({**run, **content}, fault.reason)
        self.rejected += 1

    def _send_status(self) -> bool:
        """Sets the run's final status once all other entries have been tried."""
        entry = self._finish
        if entry is None:
            return False
        fault = self._try(lambda: self._running.finish(entry.content))
        if fault is not None and fault.may_succeed_later:
            return False
        if fault is None:
            self.status_sent = str(entry.content["status"])
        else:
            self._reject(entry.content, fault)
        self._finish = None
        del self._unsettled[entry.digest]
        self._settled.append(entry.digest)
        return True

    def _release(self, items: list[Item]) -> None:
        """Marks items as accepted or rejected; an entry is settled when all of its items are."""
        for item in items:
            self._unsettled[item.digest] -= 1
            if self._unsettled[item.digest] <= 0:
                del self._unsettled[item.digest]
                self._settled.append(item.digest)

    def _save(self) -> None:
        settled, self._settled = self._settled, []
        self._record.mark_sent(self.key, settled)
        self.sent += len(settled)
