"""Delivers the entries of one run: creates the run, describes it, sends metrics and its status."""

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

_CHUNK = 500  # entries that are read from the spool at once
_MOST_PARKED = 20_000  # items that may wait while others pass them
_MOST_CREATIONS = 3
_BATCH_SIZES = {"metrics": 1000, "param": 100, "tag": 100, "dataset": 1}

_T = TypeVar("_T")


@dataclass
class _Batch:
    """Items of one kind that go to the server in one request. ``failures``: so far."""

    kind: str
    items: list[Item]
    failures: int = 0

    def halves(self) -> list["_Batch"]:
        middle = len(self.items) // 2
        parts = (self.items[:middle], self.items[middle:])
        return [_Batch(self.kind, part, self.failures) for part in parts]


class RunUploader:
    """Sends what a spool holds of one run, in order, and passes by what fails on its own.

    A request that fails is followed by a look at the run itself. If that fails too, delivery stops
    (DeliveryStopped) and nothing is lost. If it succeeds, the fault is the entry's: a batch is
    halved until the entries at fault are alone; these are kept in ``rejected`` if the server will
    never take them, and tried again later if it may.
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
        """``connect`` makes the MLflow client; ``live_attempt``: the attempt of this process."""
        self.key = key
        self.sent = 0
        self.rejected = 0
        self.status_sent: str | None = None
        self.artifacts: deque[Entry] = deque()
        """Those read and not yet sent; `ArtifactUploader` takes them."""
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
        """Entries that were read and are not settled, without artifacts."""
        return len(self._unsettled) + len(self._chunk)

    def step(self) -> bool:
        """Send some entries; False if there were none. Raises DeliveryStopped."""
        try:
            if self.run is None:
                self._open()
            moved = bool(self._queue) or self._read()
            while self._queue:
                self._send(self._queue.popleft())
            return self._send_status() or moved
        except RunMissing:  # the server lost it, or is another one: create it again, in full
            self.run = None
            return True
        finally:
            self._save()

    def retry_parked(self) -> bool:
        """Try again what the server may take later; True if nothing is left."""
        parked, self._parked = self._parked, []
        for batch in parked:
            halve = batch.failures > 1 and len(batch.items) > 1
            self._queue.extend(batch.halves() if halve else [batch])
        self.step()
        return not self._parked and self._finish is None

    # --- the run ------------------------------------------------------------------------------

    def _open(self) -> None:
        """Find or create the run."""
        entries = self._reader.runs.get(self.key, {})
        known = self._record.run_ids.get(self.key)
        self.run = self._ask(
            lambda: MlflowRun.open(self._connect(), self.key, entries, self._record)
        )
        if not self.run.existed:
            self._creations += 1
            if self._creations > _MOST_CREATIONS:
                reason = f"the server has lost the run {_MOST_CREATIONS} times"
                raise RunUnavailable(Fault("rejected", reason))
        elif self._live_attempt is not None:
            self.run.live_attempt = self._live_attempt
            self._ask(self.run.mark_running)
        if known not in (None, self.run.run_id):
            self._restart()

    def _restart(self) -> None:
        """Deliver from the first entry: the run is not the one that accepted the earlier ones."""
        for entries in (self._chunk, self._queue, self._parked, self.artifacts):
            entries.clear()
        self._unsettled.clear()
        self._settled.clear()
        self._finish = None
        self._reader.rewind(self.key)

    def _ask(self, ask: Callable[[], _T]) -> _T:
        """The answer of a request that no entry is at fault for. Raises DeliveryStopped."""
        try:
            return ask()
        except (DeliveryStopped, RunMissing):
            raise
        except Exception as error:
            raise ServerUnavailable(classify(error)) from error

    # --- entries ------------------------------------------------------------------------------

    def _read(self) -> bool:
        """Queue the next entries; False if there are none."""
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
                self._settled.append(entry.digest)  # nothing of it is new, or it is superseded
            if entry.kind == "run":
                break  # what a later attempt changes shows only when this is sent
        self._enqueue("metrics", metrics)
        return found

    def _enqueue(self, kind: str, items: list[Item]) -> None:
        size = _BATCH_SIZES[kind]
        for first in range(0, len(items), size):
            self._queue.append(_Batch(kind, items[first : first + size]))

    def _send(self, batch: _Batch) -> None:
        """Send a batch, or halve it until the items at fault are alone."""
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
        """Why the server did not accept an entry, None if it did. Raises DeliveryStopped or
        RunMissing if the server or the run is at fault."""
        try:
            send()
        except Exception as error:
            fault = classify(error)
            self._ask(self._running.check)
            return fault
        return None

    def _park(self, batch: _Batch, fault: Fault) -> None:
        if sum(len(parked.items) for parked in self._parked) > _MOST_PARKED:
            raise ServerUnavailable(fault)
        batch.failures += 1
        self._parked.append(batch)

    def _reject(self, content: Mapping[str, Any], fault: Fault) -> None:
        run = {"run": self.key, "run_id": self._running.run_id}
        self._rejected.add({**run, **content}, fault.reason)
        self.rejected += 1

    def _send_status(self) -> bool:
        """Set the run's final status once all other entries have been tried."""
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
        """These are accepted or rejected; an entry is settled with the last of its items."""
        for item in items:
            self._unsettled[item.digest] -= 1
            if self._unsettled[item.digest] <= 0:
                del self._unsettled[item.digest]
                self._settled.append(item.digest)

    def _save(self) -> None:
        settled, self._settled = self._settled, []
        self._record.mark_sent(self.key, settled)
        self.sent += len(settled)
