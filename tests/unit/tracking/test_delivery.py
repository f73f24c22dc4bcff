"""Delivery of spools to a real MLflow server behind a proxy that injects faults."""

import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.entities import Metric, Run, ViewType
from mlflow.tracking import MlflowClient
from support.mlflow_proxy import JSON, LOST, Answer, MlflowProxy, Request
from support.spools import LOSSES, describe_run, write_run

from trainer.errors import UserError
from trainer.tracking.spool.spool import SpoolWriter, now_ms
from trainer.tracking.spool.spool_uploader import RunReport, SpoolUploader, sync_spool

Losses = Callable[..., list[tuple[int, float]]]
Spool = Callable[..., Path]


def _sync(spool: Path, proxy: MlflowProxy) -> list[RunReport]:
    _, reports = sync_spool(spool, proxy.url)
    return reports


def _rejected(spool: Path) -> list[dict[str, object]]:
    path = spool.with_name("tracking.rejected.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _assert_complete(run: Run, losses: Losses) -> None:
    assert losses(run) == LOSSES
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optimizer.base_lr": "0.1", "batch.ranks": "2"}
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {"digits/train", "digits/val"}
    assert run.data.tags["convoy.version"] == "1"


def _once(call: str, answer: Answer | None) -> Callable[[Request], Answer]:
    """Return a hook that answers the first ``call`` itself.

    If ``answer`` is LOST, the server receives the request and its response is lost.
    """
    left = [1]

    def hook(request: Request) -> Answer:
        if request.is_call(call) and left[0]:
            left[0] -= 1
            if answer is LOST:
                request.forward()
            return answer
        return None

    return hook


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("experiments/create", LOST),
        ("runs/create", LOST),
        ("runs/log-batch", LOST),
        ("runs/log-batch", (503, b"busy", "text/html")),
        ("runs/log-inputs", (503, b"busy", "text/html")),
    ],
)
def test_request_that_fails_once_is_repeated_without_duplicates(
    call: str,
    answer: Answer,
    proxy: MlflowProxy,
    write_spool: Spool,
    only_run: Callable[[], Run],
    losses: Losses,
) -> None:
    spool = write_spool()
    proxy.hook = _once(call, answer)
    (report,) = _sync(spool, proxy)
    assert report.fault is None
    _assert_complete(only_run(), losses)
    assert list(spool.parent.iterdir()) == []


def test_delayed_create_run_leaves_one_active_run(
    proxy: MlflowProxy, write_spool: Spool, only_run: Callable[[], Run], losses: Losses
) -> None:
    """A gateway delays the first request, so that it reaches the server after the second."""
    held: list[Request] = []

    def hook(request: Request) -> Answer:
        if not request.is_call("runs/create"):
            return None
        if not held:
            held.append(request)
            return 504, b"gateway timeout", "text/html"
        held[0].forward()
        return None

    proxy.hook = hook
    _sync(write_spool(), proxy)
    _assert_complete(only_run(), losses)


def test_invalid_metrics_are_rejected_individually(
    proxy: MlflowProxy, write_spool: Spool, only_run: Callable[[], Run], losses: Losses
) -> None:
    bad = {"a//b": 1.0, "x" * 251: 1.0}
    spool = write_spool(metrics=bad)
    with spool.open("a") as file:
        line = json.loads(spool.read_text().splitlines()[2])
        file.write(json.dumps(line | {"step": 2**70, "values": {"loss": 0.5}}) + "\n")
        file.write(json.dumps(line | {"step": 6, "values": {"loss": "low", "kept": 1.0}}) + "\n")
    _sync(spool, proxy)
    run = only_run()
    _assert_complete(run, losses)
    assert losses(run, "kept") == [(6, 1.0)]
    names = [next(iter(entry["values"])) for entry in _rejected(spool)]
    assert sorted(names) == sorted([*bad, *bad, *bad, *bad, *bad, "loss", "loss"])
    assert not spool.exists()
    # a second attempt is rejected in the same way, sends nothing twice and keeps the entries
    _sync(spool, proxy)
    assert len(_rejected(spool)) == len(names)
    _assert_complete(only_run(), losses)


@pytest.mark.parametrize("status", [403, 500])
def test_metric_rejected_by_a_gateway_does_not_block_others(
    status: int, proxy: MlflowProxy, write_spool: Spool, only_run: Callable[[], Run], losses: Losses
) -> None:
    spool = write_spool(metrics={"forbidden": 1.0})
    blocked = True

    def hook(request: Request) -> Answer:
        block = request.is_call("runs/log-batch") and b"forbidden" in request.body and blocked
        return (status, b"<html>no</html>", "text/html") if block else None

    proxy.hook = hook
    _sync(spool, proxy)
    run = only_run()
    assert run.info.status == "FINISHED"
    assert losses(run, "forbidden") == []
    if status != 500:
        assert losses(run) == LOSSES
        assert [entry["values"] for entry in _rejected(spool)] == [{"forbidden": 1.0}] * 5
    blocked = False
    _sync(spool, proxy)
    _assert_complete(only_run(), losses)
    assert losses(run, "forbidden") == [(step, 1.0) for step in range(1, 6)]
    assert list(spool.parent.iterdir()) == []


def test_nan_and_infinite_metrics_are_delivered(
    proxy: MlflowProxy, write_spool: Spool, only_run: Callable[[], Run], losses: Losses
) -> None:
    spool = write_spool(metrics={"nan": math.nan, "inf": math.inf})
    (report,) = _sync(spool, proxy)
    assert report.fault is None
    assert [math.isnan(value) for _, value in losses(only_run(), "nan")] == [True] * 5
    assert len(losses(only_run(), "inf")) == 5
    assert not spool.exists()


def test_long_invalid_and_changed_parameters_do_not_block_others(
    proxy: MlflowProxy, write_spool: Spool, only_run: Callable[[], Run], losses: Losses
) -> None:
    params = {f"p{n}": n for n in range(150)} | {"long": "x" * 9000, "bad\nkey": 1, "k" * 300: 2}
    spool = write_spool(params=params)
    _sync(spool, proxy)
    run = only_run()
    assert {f"p{n}": str(n) for n in range(150)}.items() <= run.data.params.items()
    assert run.data.params["long"].startswith("xxxx")
    assert "truncated" in run.data.params["long"]
    assert {entry["key"] for entry in _rejected(spool)} == {"bad\nkey", "k" * 300}
    assert len(run.inputs.dataset_inputs) == 2
    key = run.data.tags["convoy.run_key"]
    again = spool.with_name("again.jsonl")
    write_run(
        again, run.info.experiment_id, run_key=key, steps=7, params={"p1": 5, "p2": 2, "new": 3}
    )
    again.write_text(
        again.read_text().replace(
            f'"experiment": "{run.info.experiment_id}"', _experiment(spool, proxy, run)
        )
    )
    _sync(again, proxy)
    run = only_run()
    assert (run.data.params["p1"], run.data.params["new"]) == ("1", "3")
    assert run.data.tags["convoy.changed.p1"] == "5"
    assert losses(run) == [*LOSSES, (6, 1 / 6), (7, 1 / 7)]
    assert not again.exists()


def _experiment(spool: Path, proxy: MlflowProxy, run: Run) -> str:
    name = MlflowClient(proxy.url).get_experiment(run.info.experiment_id).name
    return f'"experiment": "{name}"'


@pytest.mark.parametrize("status", [403, 500])
def test_failing_artifact_does_not_block_metrics_and_status(
    status: int,
    proxy: MlflowProxy,
    write_spool: Spool,
    only_run: Callable[[], Run],
    losses: Losses,
    client: MlflowClient,
) -> None:
    spool = write_spool()
    proxy.hook = lambda request: (status, b"no", "text/html") if request.method == "PUT" else None
    (report,) = _sync(spool, proxy)
    _assert_complete(only_run(), losses)
    assert (report.fault is None) == (status != 500)
    proxy.hook = lambda request: None
    _sync(spool, proxy)
    (artifact,) = client.list_artifacts(only_run().info.run_id)
    assert artifact.path == "config.json"
    assert list(spool.parent.iterdir()) == []


def test_spool_is_kept_until_a_deleted_experiment_is_restored(
    proxy: MlflowProxy,
    write_spool: Spool,
    only_run: Callable[[], Run],
    losses: Losses,
    client: MlflowClient,
    experiment: str,
) -> None:
    deleted = client.create_experiment(experiment)
    client.delete_experiment(deleted)
    spool = write_spool()
    before = spool.read_bytes()
    (report,) = _sync(spool, proxy)
    assert report.fault is not None
    assert "restore" in report.fault.reason
    assert spool.read_bytes() == before
    client.restore_experiment(deleted)
    _sync(spool, proxy)
    _assert_complete(only_run(), losses)


def test_deleted_run_keeps_its_entries_and_other_runs_are_delivered(
    proxy: MlflowProxy, tmp_path: Path, losses: Losses, client: MlflowClient, experiment: str
) -> None:
    spool = tmp_path / "tracking.jsonl"
    for name in ("deleted", "other"):
        write_run(spool, experiment, name)
    done = [False]

    def hook(request: Request) -> Answer:
        if request.is_call("runs/log-batch") and b'"loss"' in request.body and not done[0]:
            done[0] = True
            client.delete_run(json.loads(request.body)["run_id"])
        return None

    proxy.hook = hook
    first, second = _sync(spool, proxy)
    assert first.fault is not None
    assert "was deleted" in first.fault.reason
    assert second.fault is None
    assert losses(client.get_run(str(second.run_id))) == LOSSES
    client.restore_run(str(first.run_id))
    _sync(spool, proxy)
    for report in (first, second):
        _assert_complete(client.get_run(str(report.run_id)), losses)
    assert not spool.exists()


def test_run_lost_by_the_server_is_delivered_again_completely(
    proxy: MlflowProxy,
    write_spool: Spool,
    only_run: Callable[[], Run],
    losses: Losses,
    client: MlflowClient,
) -> None:
    """The same applies to another server, for which the record of the first is invalid."""
    spool = write_spool()
    proxy.hook = lambda request: (503, b"", JSON) if request.is_call("runs/update") else None
    (report,) = _sync(spool, proxy)
    assert report.fault is not None
    lost = str(report.run_id)
    record = spool.with_name("tracking.sent")
    assert "sent" in record.read_text()
    record.write_text(record.read_text().replace(lost, "f" * 32))
    client.set_tag(lost, "convoy.run_key", "none")
    client.delete_run(lost)
    proxy.hook = lambda request: None
    _sync(spool, proxy)
    _assert_complete(only_run(), losses)


@pytest.mark.parametrize("after", [5, 8])
def test_interrupted_delivery_resumes_without_duplicates(
    after: int, proxy: MlflowProxy, write_spool: Spool, only_run: Callable[[], Run], losses: Losses
) -> None:
    """The connection ends after some requests; the last one reached the server."""
    spool = write_spool()
    copy = spool.with_name("copy.jsonl")
    shutil.copy(spool, copy)

    def hook(request: Request) -> Answer:
        if len(proxy.requests) == after:
            request.forward()
        return LOST if len(proxy.requests) >= after else None

    proxy.hook = hook
    with_fault = _sync(spool, proxy)
    assert with_fault[0].fault is not None
    assert spool.exists()
    proxy.hook = lambda request: None
    _sync(spool, proxy)
    _assert_complete(only_run(), losses)
    _sync(copy, proxy)  # a copy without the record of what was sent
    _assert_complete(only_run(), losses)


def test_corrupt_lines_are_kept_and_do_not_block_others(
    write_spool: Spool, proxy: MlflowProxy, only_run: Callable[[], Run]
) -> None:
    spool = write_spool()
    good = spool.read_bytes()
    spool.write_bytes(good.replace(b'"run": "', b'"run": "1-a\'b', 1) + good)
    spool.with_suffix(".sent.json").write_bytes(b"{bad")
    lines = [
        b"5",
        b"[]",
        b"no entry",
        b"\xff\xfe",
        b'{"run": "r"}',
        b'{"kind": "finish", "run": "1-x"}',
    ]
    spool.with_name("tracking.rejected.jsonl").write_bytes(b"\n".join(lines))
    _sync(spool, proxy)
    assert only_run().info.status == "FINISHED"
    assert not spool.exists()
    kept = _rejected(spool)
    assert [entry["text"] for entry in kept[:5]] == [
        "5",
        "[]",
        "no entry",
        "\udcff\udcfe",
        '{"run": "r"}',
    ]
    assert [entry["kind"] for entry in kept[5:]] == ["finish", "corrupt"]
    assert "is not a run key" in str(kept[-1]["reason"])


def test_spool_in_use_is_rejected(write_spool: Spool, proxy: MlflowProxy) -> None:
    spool = write_spool()
    writer = SpoolWriter(spool, f"{1:013d}-a", 1)
    with pytest.raises(UserError, match="in use by another process"):
        SpoolUploader(spool, proxy.url)
    writer.close()


def test_resumed_run_keeps_the_first_value_of_repeated_steps(
    proxy: MlflowProxy, tmp_path: Path, experiment: str, only_run: Callable[[], Run], losses: Losses
) -> None:
    spool = tmp_path / "tracking.jsonl"
    key = write_run(spool, experiment, steps=5)
    lines = spool.read_text().splitlines()[:-1]
    spool.write_text("\n".join(lines) + "\n" + lines[-1][:40])  # killed while it wrote
    writer = SpoolWriter(spool, key, now_ms() + 1)
    writer.append("run", time_ms=now_ms(), **describe_run(experiment, params={"batch.ranks": 4}))
    for step in range(4, 8):
        writer.append("metrics", step=step, time_ms=now_ms(), values={"loss": 9.0})
    writer.append("finish", status="FAILED", time_ms=now_ms())
    writer.close()
    _sync(spool, proxy)
    run = only_run()
    assert losses(run) == [*LOSSES, (6, 9.0), (7, 9.0)]
    assert (run.info.status, run.data.tags["convoy.changed.batch.ranks"]) == ("FAILED", "4")
    (corrupt,) = _rejected(spool)
    assert corrupt["kind"] == "corrupt"
    assert not spool.exists()


def test_run_without_final_status_becomes_killed(
    proxy: MlflowProxy, write_spool: Spool, only_run: Callable[[], Run], losses: Losses
) -> None:
    spool = write_spool()
    spool.write_text("".join(spool.read_text().splitlines(keepends=True)[:-1]))
    _sync(spool, proxy)
    run = only_run()
    assert (run.info.status, losses(run)) == ("KILLED", LOSSES)


# --- the first format -------------------------------------------------------------------------


def _first_format(spool: Path) -> None:
    """Convert a spool to the format of earlier versions."""
    lines = []
    for line in spool.read_text().splitlines():
        entry = json.loads(line)
        for name in ("run", "attempt", "seq"):
            del entry[name]
        if entry["kind"] == "artifact":
            path = spool.with_name(entry["name"])
            path.write_text(entry["text"])
            entry = {"kind": "artifact", "path": str(path), "folder": ""}
        if entry["kind"] == "run":
            entry = {**entry, "run_id": None}
        lines.append(json.dumps(entry) + "\n")
    spool.write_text("".join(lines))


def test_spool_of_the_first_format_is_delivered(
    proxy: MlflowProxy,
    write_spool: Spool,
    only_run: Callable[[], Run],
    losses: Losses,
    client: MlflowClient,
    experiment: str,
) -> None:
    """An earlier version has created the run without parameters and sent three losses."""
    spool = write_spool()
    _first_format(spool)
    lines = spool.read_bytes().splitlines(keepends=True)
    run = client.create_run(client.create_experiment(experiment))
    for step in range(1, 4):
        client.log_batch(run.info.run_id, metrics=[Metric("loss", 1 / step, now_ms(), step)])
    record = {"run_id": run.info.run_id, "offset": len(b"".join(lines[:5])), "logged": {}}
    spool.with_name("tracking.sent.json").write_text(json.dumps(record))
    _sync(spool, proxy)
    _assert_complete(only_run(), losses)
    assert [p.name for p in spool.parent.iterdir()] == ["config.json"]


def test_two_runs_in_a_spool_of_the_first_format_are_delivered_separately(
    proxy: MlflowProxy, write_spool: Spool, losses: Losses, client: MlflowClient
) -> None:
    one, two = write_spool("one"), write_spool("two", steps=3)
    for spool in (one, two):
        _first_format(spool)
    one.write_text(one.read_text() + two.read_text())
    reports = _sync(one, proxy)
    runs = {client.get_run(str(r.run_id)).info.run_name: str(r.run_id) for r in reports}
    assert losses(client.get_run(runs["one"])) == LOSSES
    assert losses(client.get_run(runs["two"])) == LOSSES[:3]


def test_modified_file_is_not_sent_as_an_artifact(
    proxy: MlflowProxy, write_spool: Spool, only_run: Callable[[], Run], client: MlflowClient
) -> None:
    spool = write_spool()
    _first_format(spool)
    os.utime(spool, (1e9, 1e9))
    _sync(spool, proxy)
    assert client.list_artifacts(only_run().info.run_id) == []
    assert "has changed" in str(_rejected(spool)[0]["reason"])


# --- any order --------------------------------------------------------------------------------


@settings(
    max_examples=20 if "CONVOY_EXPLORE" in os.environ else 2,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32), truncate=st.booleans(), truncate_run=st.booleans())
def test_shuffled_entries_of_several_runs_reach_the_right_runs(
    seed: int,
    truncate: bool,
    truncate_run: bool,
    proxy: MlflowProxy,
    client: MlflowClient,
    tmp_path: Path,
    experiment: str,
) -> None:
    """Lines of three runs are shuffled, repeated and truncated; complete lines are delivered."""
    chance = random.Random(seed)
    folder = Path(tempfile.mkdtemp(dir=tmp_path))  # two examples can have the same seed
    lines: list[bytes] = []
    for number in range(3):
        path = folder / f"{number}.jsonl"
        write_run(
            path,
            experiment,
            f"{seed}-{number}",
            steps=chance.randrange(1, 6),
            metrics={"m": number},
        )
        lines += path.read_bytes().splitlines()
        path.unlink()
    lines += chance.sample(lines, 5)
    chance.shuffle(lines)
    if truncate:
        for i in chance.sample(range(len(lines)), 3):
            if truncate_run or b'"kind": "run"' not in lines[i]:
                lines[i] = lines[i][: chance.randrange(1, len(lines[i]) - 1)]
    spool = folder / "tracking.jsonl"
    spool.write_bytes(b"\n".join(lines) + chance.choice([b"\n", b""]))
    expected: dict[str, dict[int, float]] = {}
    named: dict[str, str] = {}
    for line in lines:
        if line.endswith(b"}") and (entry := _parse(line)):
            if entry["kind"] == "metrics":
                expected.setdefault(entry["run"], {})[entry["step"]] = entry["values"]["loss"]
            elif entry["kind"] == "run":
                named[entry["run"]] = entry["name"]
    reports = {report.key: report for report in _sync(spool, proxy)}
    for key, steps in expected.items():
        if key not in named:
            assert reports[key].fault is not None
            continue
        run = client.get_run(str(reports[key].run_id))
        assert run.info.run_name == named[key]
        history = client.get_metric_history(run.info.run_id, "loss")
        assert sorted((m.step, m.value) for m in history) == sorted(steps.items())
        number = float(named[key].rpartition("-")[2])
        assert {m.value for m in client.get_metric_history(run.info.run_id, "m")} == {number}
    corrupt = {line.strip() for line in lines if not _parse(line)}
    if expected.keys() <= named.keys() and corrupt:
        kept = {
            str(entry["text"]).encode() for entry in _rejected(spool) if entry["kind"] == "corrupt"
        }
        assert kept == corrupt
    assert spool.exists() == any(report.fault for report in reports.values())
    for run in client.search_runs(
        [client.get_experiment_by_name(experiment).experiment_id], run_view_type=ViewType.ALL
    ):
        client.delete_run(run.info.run_id)


def _parse(line: bytes) -> dict | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
