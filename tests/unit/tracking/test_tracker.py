"""The tracker of a run in progress, its server and its spool."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from support.mlflow_proxy import JSON, LOST, Answer, MlflowProxy, Request
from support.spools import LOSSES, describe_run, write_run

from trainer.tracking.spool.spool import now_ms
from trainer.tracking.spool.spool_uploader import sync_spool
from trainer.tracking.tracker import MlflowTracker

Losses = Callable[..., list[tuple[int, float]]]


def _train(tracker: MlflowTracker, first: int = 1, last: int = 5, status: str = "FINISHED") -> bool:
    tracker.log_text("config.json", "{}")
    for step in range(first, last + 1):
        tracker.log_metrics({"loss": 1 / step}, step)
    return tracker.close(status)


def test_delivered_run_leaves_no_spool(
    proxy: MlflowProxy,
    tmp_path: Path,
    experiment: str,
    only_run: Callable[[], Run],
    losses: Losses,
    client: MlflowClient,
) -> None:
    tracker = MlflowTracker(proxy.url, tmp_path / "tracking.jsonl", describe_run(experiment))
    assert _train(tracker)
    run = only_run()
    assert run.info.run_id == tracker.run_id
    assert (losses(run), run.info.status, len(run.data.params)) == (LOSSES, "FINISHED", 2)
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["config.json"]
    assert list(tmp_path.iterdir()) == []


def test_logging_never_waits_for_the_server(
    proxy: MlflowProxy,
    tmp_path: Path,
    experiment: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    released = threading.Event()
    monkeypatch.setattr("trainer.tracking.tracker._CLOSE_WAIT", 0.3)
    proxy.hook = lambda request: (released.wait(30), LOST)[1]
    spool = tmp_path / "tracking.jsonl"
    tracker = MlflowTracker(proxy.url, spool, describe_run(experiment), wait=False)
    started = time.monotonic()
    for step in range(1000):
        tracker.log_metrics({"loss": 1.0}, step)
    assert time.monotonic() - started < 5
    assert not tracker.close("FINISHED")
    released.set()
    assert len(spool.read_text().splitlines()) == 1002
    assert f"convoy sync {spool}" in capsys.readouterr().err


@pytest.mark.parametrize("reachable", [True, False], ids=["reachable", "unreachable"])
def test_resumed_run_remains_one_mlflow_run(
    reachable: bool,
    proxy: MlflowProxy,
    tmp_path: Path,
    experiment: str,
    only_run: Callable[[], Run],
    losses: Losses,
) -> None:
    """Also on another machine, and if the first process never reached the server."""
    proxy.hook = (lambda request: None) if reachable else (lambda request: LOST)
    first = MlflowTracker(proxy.url, tmp_path / "a" / "tracking.jsonl", describe_run(experiment))
    _train(first, 1, 4, "KILLED")
    proxy.hook = lambda request: None
    description = {**describe_run(experiment), "run_id": first.run_id}
    second = MlflowTracker(proxy.url, tmp_path / "b" / "tracking.jsonl", description, first.run_key)
    assert _train(second, 3, 5)
    assert list((tmp_path / "b").iterdir()) == []
    if not reachable:
        sync_spool(tmp_path / "a" / "tracking.jsonl", proxy.url)
    run = only_run()
    assert losses(run) == LOSSES
    assert run.info.status == ("FINISHED" if reachable else "KILLED")


def test_resumed_run_sends_the_entries_of_its_earlier_process(
    proxy: MlflowProxy, tmp_path: Path, experiment: str, only_run: Callable[[], Run], losses: Losses
) -> None:
    spool = tmp_path / "tracking.jsonl"
    key = write_run(spool, experiment, steps=4)
    spool.write_bytes(spool.read_bytes()[:-30])
    tracker = MlflowTracker(proxy.url, spool, describe_run(experiment), key)
    assert _train(tracker, 4, 5)
    assert (losses(only_run()), only_run().info.status) == (LOSSES, "FINISHED")
    assert [p.name for p in tmp_path.iterdir()] == ["tracking.rejected.jsonl"]  # the partial line


@pytest.mark.parametrize("ahead_ms", [5, 3_600_000])
def test_resumed_run_is_the_later_attempt_if_its_clock_is_behind(
    proxy: MlflowProxy,
    tmp_path: Path,
    experiment: str,
    only_run: Callable[[], Run],
    losses: Losses,
    ahead_ms: int,
) -> None:
    spool = tmp_path / "tracking.jsonl"
    key = write_run(spool, experiment, steps=4, attempt=now_ms() + ahead_ms)
    assert _train(MlflowTracker(proxy.url, spool, describe_run(experiment), key), 4, 5, "KILLED")
    assert (losses(only_run()), only_run().info.status) == (LOSSES, "KILLED")


def test_deleted_output_folder_is_not_reported_as_an_mlflow_error(
    proxy: MlflowProxy, tmp_path: Path, experiment: str, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "out"
    tracker = MlflowTracker(proxy.url, folder / "tracking.jsonl", describe_run(experiment))
    shutil.rmtree(folder)
    _train(tracker, 1, 5)
    stderr = capsys.readouterr().err
    assert "tracking.sent: No such file or directory; training continues" in stderr
    assert "rejected the run" not in stderr


def test_spool_of_another_run_is_renamed_and_kept(
    proxy: MlflowProxy,
    tmp_path: Path,
    experiment: str,
    losses: Losses,
    client: MlflowClient,
    capsys: pytest.CaptureFixture,
) -> None:
    spool = tmp_path / "tracking.jsonl"
    foreign = [write_run(spool, experiment, f"foreign-{n}", metrics={"m": 1.0}) for n in range(2)]
    content = spool.read_bytes()
    tracker = MlflowTracker(proxy.url, spool, describe_run(experiment, "new"))
    assert _train(tracker)
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == content
    assert f"convoy sync {kept}" in capsys.readouterr().err
    assert losses(client.get_run(str(tracker.run_id)), "m") == []
    _, reports = sync_spool(kept, proxy.url)
    assert [report.key for report in reports] == foreign
    for number, report in enumerate(reports):
        run = client.get_run(str(report.run_id))
        assert (run.info.run_name, losses(run)) == (f"foreign-{number}", LOSSES)


def test_expired_credentials_are_reported_and_metrics_are_kept(
    proxy: MlflowProxy,
    tmp_path: Path,
    experiment: str,
    only_run: Callable[[], Run],
    losses: Losses,
    capsys: pytest.CaptureFixture,
) -> None:
    spool = tmp_path / "tracking.jsonl"
    tracker = MlflowTracker(proxy.url, spool, describe_run(experiment))
    proxy.hook = lambda request: (401, b"expired", "text/html")
    assert not _train(tracker)
    stderr = capsys.readouterr().err
    assert stderr.count("refuses the credentials (HTTP 401)") == 1
    proxy.hook = lambda request: None
    sync_spool(spool, proxy.url)
    assert losses(only_run()) == LOSSES


def test_slow_artifact_store_does_not_delay_metrics(
    proxy: MlflowProxy,
    tmp_path: Path,
    experiment: str,
    only_run: Callable[[], Run],
    losses: Losses,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = threading.Event()
    monkeypatch.setattr("trainer.tracking.tracker._CLOSE_WAIT", 3.0)

    def hook(request: Request) -> Answer:
        if request.method == "PUT":
            released.wait(60)
            return 503, b"", JSON
        return None

    proxy.hook = hook
    spool = tmp_path / "tracking.jsonl"
    tracker = MlflowTracker(proxy.url, spool, describe_run(experiment))
    assert _train(tracker), "the server has the status"
    run = only_run()
    assert (losses(run), run.info.status) == (LOSSES, "FINISHED")
    assert spool.exists()
    released.set()


def test_rejection_of_the_run_is_known_after_construction(
    proxy: MlflowProxy, tmp_path: Path, experiment: str
) -> None:
    body = json.dumps({"error_code": "PERMISSION_DENIED", "message": "read only"}).encode()
    proxy.hook = lambda request: (403, body, JSON) if request.is_call("runs/create") else None
    tracker = MlflowTracker(proxy.url, tmp_path / "tracking.jsonl", describe_run(experiment))
    assert tracker.refused is not None
    assert tracker.refused.status == 403
    tracker.abandon()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_does_not_end_training(
    proxy: MlflowProxy,
    tmp_path: Path,
    experiment: str,
    only_run: Callable[[], Run],
    losses: Losses,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device of the spool is full for a while."""
    tracker = MlflowTracker(proxy.url, tmp_path / "tracking.jsonl", describe_run(experiment))
    spool_file = tracker._writer._file
    with open("/dev/full", "wb") as full:
        tracker._writer._file = full.fileno()
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.log_metrics({"loss": 0.5}, 2)
        assert tracker._writer.unwritten == 2
        tracker._writer._file = spool_file
    assert _train(tracker, 3, 5)
    assert losses(only_run()) == LOSSES
