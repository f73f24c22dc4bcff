"""Fixtures: a real MLflow server behind a proxy, and spools in the format of a run."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.entities import Run, ViewType
from mlflow.tracking import MlflowClient
from support.mlflow_proxy import MlflowProxy
from support.spools import write_run

from pipelines.local import servers
from trainer.tracking import tracker
from trainer.tracking.spool import spool_uploader

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_uploader, "_WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(tracker, "_FIRST_WAIT", 0.05)


@pytest.fixture
def proxy(services: servers.Services) -> Iterator[MlflowProxy]:
    proxy = MlflowProxy(services.mlflow_url)
    yield proxy
    proxy.close()


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name}-{next(_numbers)}"


@pytest.fixture
def only_run(client: MlflowClient, experiment: str) -> Callable[[], Run]:
    def find() -> Run:
        found = client.get_experiment_by_name(experiment)
        (run,) = client.search_runs([found.experiment_id], run_view_type=ViewType.ACTIVE_ONLY)
        return client.get_run(run.info.run_id)

    return find


@pytest.fixture
def write_spool(tmp_path: Path, experiment: str) -> Callable[..., Path]:
    """Return a function that writes the spool of one finished run of the test's experiment."""

    def write(name: str = "run", **options: object) -> Path:
        path = tmp_path / name / "tracking.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_run(path, experiment, name, **options)
        return path

    return write


@pytest.fixture
def losses(client: MlflowClient) -> Callable[[Run], list[tuple[int, float]]]:
    def read(run: Run, name: str = "loss") -> list[tuple[int, float]]:
        history = client.get_metric_history(run.info.run_id, name)
        return sorted((metric.step, metric.value) for metric in history)

    return read
