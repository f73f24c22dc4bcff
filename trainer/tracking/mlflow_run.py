"""One run on an MLflow server: found or created by its run key, and its existing contents."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from trainer.tracking.errors import Fault, RunMissing, RunUnavailable
from trainer.tracking.spool.delivery_record import DeliveryRecord
from trainer.tracking.spool.spool import Entry, start_ms

RUN_KEY_TAG = "convoy.run_key"
_MAX_NAME = 250
_MAX_PARAM, _MAX_TAG = 6000, 5000
_CUT = "... (truncated; config.json has the full value)"
_SYSTEM_METRICS_MS = 10_000


@dataclass(frozen=True, slots=True)
class Item:
    """The smallest unit that the server accepts or rejects.

    ``content`` is stored if the item is rejected, ``value`` is the object for MLflow's client,
    ``digest`` identifies the spool entry.
    """

    kind: str
    digest: str
    content: dict[str, Any]
    value: Any


@contextmanager
def single_try() -> Iterator[None]:
    """Disables the retries of MLflow's client.

    They would repeat a request that is not idempotent after a lost response.
    """
    name = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class MlflowRun:
    """A run that exists on the server. Create it with `open`.

    Methods raise what MLflow's client raises.
    """

    def __init__(
        self, client: Any, key: str, run: Any, existed: bool, record: DeliveryRecord
    ) -> None:
        self.client = client
        self.key = key
        self.run_id = str(run.info.run_id)
        self.existed = existed
        self.status = str(run.info.status)
        self.live_attempt: int | None = None
        """The attempt of this process, from which the server has received nothing yet."""
        self._record = record
        self._last = {metric.key: int(metric.step) for metric in run.data.to_proto().metrics}
        self._history: dict[str, set[int]] = {}
        self._taken: dict[tuple[str, int], int] = {}

    @classmethod
    def open(
        cls, client: Any, key: str, entries: Mapping[int, Entry], record: DeliveryRecord
    ) -> "MlflowRun":
        """Finds the run by its ID or key, or creates it.

        Raises RunUnavailable if the run or its experiment was deleted, or if no entry describes how
        to create it.
        """
        found = find_run(client, key, entries, record)
        if found is not None:
            record.created(key, found.info.run_id, certain=False)
            return cls(client, key, found, True, record)
        if not entries:
            reason = f"no entry describes the run {key}, and MLflow has no run of that key"
            raise RunUnavailable(Fault("rejected", reason))
        first = entries[min(entries)].content
        experiment_id = ensure_experiment(client, first["experiment"])
        certain = key not in record.uncertain
        record.creating(key)
        with single_try():
            run = client.create_run(
                experiment_id,
                start_time=first["time_ms"],
                tags={RUN_KEY_TAG: key},
                run_name=first["name"][:_MAX_NAME],
            )
        record.created(key, run.info.run_id, certain)
        return cls(client, key, run, False, record)

    def check(self) -> None:
        """Raises RunMissing or RunUnavailable if the run accepts no more entries."""
        run = _get_run(self.client, self.run_id)
        if run is None:
            raise RunMissing
        _require_active(run)

    def mark_running(self) -> None:
        if self.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")

    # --- items to send ------------------------------------------------------------------------

    def metric_items(self, entry: Entry, several_attempts: bool) -> list[Item]:
        """Returns the metrics of an entry that the run does not have yet.

        A step that is repeated by a resumed run keeps its first value.
        """
        from mlflow.entities import Metric

        items = []
        for name, value in entry.content["values"].items():
            step = self._step(name, entry)
            if self._has(name, step, entry.attempt):
                continue
            if (
                several_attempts
                and self._taken.setdefault((name, step), entry.attempt) != entry.attempt
            ):
                continue
            metric = Metric(name, value, entry.content["time_ms"], step)
            content = {**_own_fields(entry), "step": step, "values": {name: value}}
            items.append(Item("metrics", entry.digest, content, metric))
        return items

    def _step(self, name: str, entry: Entry) -> int:
        """Returns the step of a metric.

        The first format counted the steps of system metrics from 0 in each attempt.
        """
        if "run" in entry.content or not name.startswith("system/") or not entry.attempt:
            return int(entry.content["step"])
        return int((entry.content["time_ms"] - start_ms(self.key)) // _SYSTEM_METRICS_MS)

    def _has(self, name: str, step: int, attempt: int) -> bool:
        if step > self._last.get(name, -1):
            return False
        if attempt == self.live_attempt:
            return True  # earlier attempts logged every step up to their last step
        if name not in self._history:
            history = self.client.get_metric_history(self.run_id, name)
            self._history[name] = {int(metric.step) for metric in history}
        return step in self._history[name]

    def description_items(self, entry: Entry) -> list[Item]:
        """Returns the parameters, tags and data sets of a run entry that the run does not have yet.

        MLflow's parameters are immutable. If the run has another value, for example because it was
        resumed on more ranks, the new value is stored as the tag ``convoy.changed.NAME``.
        """
        from mlflow.entities import Param, RunTag

        data = self.client.get_run(self.run_id).data
        tags = {name: str(value) for name, value in entry.content["tags"].items()}
        if RUN_KEY_TAG not in data.tags:
            tags[RUN_KEY_TAG] = self.key
        params = {}
        for name, value in entry.content["params"].items():
            text = _shortened(str(value), _MAX_PARAM)
            if name not in data.params:
                params[name] = text
            elif data.params[name] != text:
                tags[f"convoy.changed.{name}"] = text
        pairs: list[tuple[str, str, str, Any]] = [
            ("param", name, value, Param(name, value)) for name, value in params.items()
        ]
        for name, value in tags.items():
            text = _shortened(value, _MAX_TAG)
            if data.tags.get(name) != text:
                pairs.append(("tag", name, text, RunTag(name, text)))
        own = _own_fields(entry)
        items = [
            Item(kind, entry.digest, own | {"kind": kind, "key": name, "value": text}, value)
            for kind, name, text, value in pairs
        ]
        for dataset in entry.content["datasets"]:
            content = own | {"kind": "dataset", "dataset": dataset}
            items.append(Item("dataset", entry.digest, content, dataset))
        return items

    def send(self, kind: str, items: list[Item]) -> None:
        """Sends items of one kind in one request."""
        values = [item.value for item in items]
        if kind == "metrics":
            self.client.log_batch(self.run_id, metrics=values, synchronous=True)
        elif kind == "param":
            self.client.log_batch(self.run_id, params=values, synchronous=True)
        elif kind == "tag":
            self.client.log_batch(self.run_id, tags=values, synchronous=True)
        else:
            self.client.log_inputs(self.run_id, [_dataset_input(value) for value in values])

    def finish(self, content: Mapping[str, Any]) -> None:
        """Sets the final status, and deletes the empty runs left behind by lost responses."""
        self.client.set_terminated(self.run_id, content["status"], content.get("time_ms"))
        self.status = content["status"]
        if self.key in self._record.uncertain:
            experiment_id = self.client.get_run(self.run_id).info.experiment_id
            for run in _runs_with_key(self.client, [experiment_id], self.key):
                empty = not run.data.metrics and run.info.lifecycle_stage == "active"
                if run.info.run_id != self.run_id and empty:
                    self.client.delete_run(run.info.run_id)
            self._record.created(self.key, self.run_id, certain=True)


def find_run(
    client: Any, key: str, entries: Mapping[int, Entry], record: DeliveryRecord
) -> Any | None:
    """Returns the run named by the record or an entry, or else the run with ``key``.

    A named run is only used if it is this run. Raises RunUnavailable if the run was deleted.
    """
    recorded = record.run_ids.get(key)
    named = [entries[attempt].content.get("run_id") for attempt in sorted(entries)]
    for run_id in dict.fromkeys(filter(None, [recorded, *named])):
        run = _get_run(client, run_id)
        if run is None:
            continue
        if run_id == recorded or run.data.tags.get(RUN_KEY_TAG) in (None, key):
            _require_active(run)
            return run
    from mlflow.entities import ViewType

    if entries:
        name = entries[min(entries)].content["experiment"]
        experiment = client.get_experiment_by_name(name)
        ids = [experiment.experiment_id] if experiment else []
    else:
        found = client.search_experiments(view_type=ViewType.ALL)
        ids = [experiment.experiment_id for experiment in found]
    runs = _runs_with_key(client, ids, key) if ids else []
    active = [run for run in runs if run.info.lifecycle_stage == "active"]
    if runs and not active:
        _require_active(runs[0])
    return active[0] if active else None


def _runs_with_key(client: Any, experiment_ids: list[str], key: str) -> list[Any]:
    from mlflow.entities import ViewType

    query = f"tags.`{RUN_KEY_TAG}` = '{key}'"
    return list(client.search_runs(experiment_ids, query, ViewType.ALL, max_results=10))


def ensure_experiment(client: Any, name: str) -> str:
    """Returns the ID of the experiment, creating it if needed.

    Raises RunUnavailable if it was deleted.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            # Another run created it in the meantime.
            experiment = client.get_experiment_by_name(name)
    if experiment is None or not experiment.experiment_id:
        reason = f"the server says that the experiment {name!r} exists, but does not return it"
        raise RunUnavailable(Fault("rejected", reason))
    if experiment.lifecycle_stage != "active":
        raise RunUnavailable(Fault("rejected", deleted_experiment(name, experiment.experiment_id)))
    return str(experiment.experiment_id)


def deleted_experiment(name: str, experiment_id: str) -> str:
    return (
        f"the experiment {name!r} was deleted; restore it (mlflow experiments restore "
        f"--experiment-id {experiment_id}) or choose another tracking.experiment"
    )


def _get_run(client: Any, run_id: str) -> Any | None:
    """Returns the run, or None if the server does not know it."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def _require_active(run: Any) -> None:
    if run.info.lifecycle_stage != "active":
        run_id = run.info.run_id
        reason = f"the run {run_id} was deleted; restore it: mlflow runs restore --run-id {run_id}"
        raise RunUnavailable(Fault("rejected", reason))


def _own_fields(entry: Entry) -> dict[str, Any]:
    """Returns the fields of an entry that each rejected part of it keeps."""
    names = ("attempt", "seq", "kind", "time_ms")
    return {name: entry.content[name] for name in names if name in entry.content}


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - len(_CUT)] + _CUT


def _dataset_input(dataset: Mapping[str, str]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    scheme = dataset["url"].partition("://")[0] if "://" in dataset["url"] else "local"
    return DatasetInput(
        Dataset(
            name=dataset["name"],
            digest=dataset["digest"],
            source_type="local" if scheme == "file" else scheme,
            source=json.dumps({"uri": dataset["url"]}),
            profile=dataset["profile"],
        ),
        [InputTag("mlflow.data.context", dataset["context"])],
    )


def item_of_rejected(content: Mapping[str, Any]) -> Item:
    """Returns the item stored in an entry of the file of rejected entries."""
    from mlflow.entities import Metric, Param, RunTag

    kind = str(content["kind"])
    make: dict[str, Callable[[], Any]] = {
        "metrics": lambda: _single_metric(Metric, content),
        "param": lambda: Param(content["key"], content["value"]),
        "tag": lambda: RunTag(content["key"], content["value"]),
        "dataset": lambda: content["dataset"],
    }
    return Item(kind, "", dict(content), make[kind]())


def _single_metric(metric: Callable[..., Any], content: Mapping[str, Any]) -> Any:
    ((name, value),) = content["values"].items()
    return metric(name, value, content["time_ms"], content["step"])
