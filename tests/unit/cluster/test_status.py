"""The line of ``convoy status`` for each state of a job, from objects of the API server."""

from typing import Any

import pytest

from pipelines.cluster.status import Status, summarize_job
from trainer.progress.progress_publisher import ProgressPublisher
from trainer.progress.progress_record import LINE_PREFIX, PROGRESS_LOG_VARIABLE, ProgressRecord

Object = dict[str, Any]


def _job(*conditions: str, **spec: Any) -> Object:
    reported = [
        {"type": kind, "status": "True", "message": f"PyTorchJob r50 is {kind.lower()}."}
        for kind in conditions
    ]
    worker = {"Worker": {"replicas": 2}}
    return {
        "metadata": {"name": "r50", "labels": {}},
        "spec": {"runPolicy": {}, "pytorchReplicaSpecs": worker, **spec},
        "status": {"conditions": reported},
    }


def _pod(
    number: int,
    phase: str = "Running",
    state: Object | None = None,
    scheduled: str = "True",
    **condition: str,
) -> Object:
    containers = [{"name": "pytorch", "image": "convoy:1", "state": state}] if state else []
    conditions = [{"type": "PodScheduled", "status": scheduled, **condition}]
    return {
        "metadata": {"name": f"r50-worker-{number}"},
        "status": {"phase": phase, "conditions": conditions, "containerStatuses": containers},
    }


def _waiting(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason, "message": message}}


def _ended(code: int, message: str = "") -> Object:
    return {"terminated": {"exitCode": code, "message": message}}


GANG = {"Worker": {"replicas": 2, "template": {"metadata": {"labels": {"convoy/gang": "true"}}}}}
RUNNING = [_pod(0), _pod(1)]


def _line(phase: str, **values: Any) -> str:
    record = ProgressRecord(run_name="r50", phase=phase, updated_at=1.8e9, **values)  # type: ignore[arg-type]
    return f"{LINE_PREFIX}{record.to_json()}\n"


TRAINS = {
    "total_steps": 1000,
    "mlflow_run_id": "0a1b",
    "mlflow_tracking_uri": "http://convoy-mlflow:5000",
}
WAITS = "waiting: text\n" + _line("waiting", message="s3://convoy/x: no index.json yet")
MEETS = f"{WAITS}rendezvous of 2 pods at r50-worker-0:23456\n" + _line("rendezvous")
FIRST_STEPS = (
    MEETS
    + _line("starting", step=0, **TRAINS)
    + "step 20/1000 epoch 0.00 loss 6.9 lr 0.1 1,234 images/s, waiting for data 1.0%\n"
    + _line("training", step=20, images_per_second=1234.4, loss=6.9, **TRAINS)
)
LOG = (
    FIRST_STEPS
    + _line("training", step=400, images_per_second=2345.2, eta_seconds=123.4, loss=5.1, **TRAINS)
    + "convoy: MLflow cannot be reached\n"
)
OLD_LOG = (  # of a version that printed no records
    "MLflow run 0a1b at http://convoy-mlflow:5000\n"
    "step 400/1000 epoch 0.08 loss 5.1 lr 0.1 2,345 images/s, waiting for data 0.0%, 0:02:03 left\n"
)
CONNECTING = "r50: rendezvous: 2 pods are connecting; the first step follows"
TRACEBACK = 'Traceback (most recent call last):\n  File "x"\nKeyError: 5\n'


@pytest.mark.parametrize(
    ("job", "pods", "log", "line"),
    [
        (_job("Created"), [], "", "r50: queued: its pods are being created"),
        (
            _job(), [], "",
            "r50: queued: the training operator has not processed it yet; check that it runs: "
            "kubectl get pods -A | grep training-operator",
        ),
        (
            _job("Created", runPolicy={"suspend": True}), [], "",
            "r50: suspended: it has no pods; start it with convoy resume r50",
        ),
        (
            _job("Created"),
            [_pod(0, "Pending", _waiting("ContainerCreating")), _pod(1, "Pending", scheduled="")],
            "",
            "r50: starting: 0 of 2 pods running, 1 getting their image and volumes, 1 waiting for "
            "a node",
        ),
        (
            _job("Created"),
            [_pod(n, "Pending", scheduled="False", reason="Unschedulable",
                  message="0/3 nodes: Insufficient nvidia.com/gpu.")
             for n in (0, 1)], "",
            "r50: unschedulable: 2 of 2 pods: 0/3 nodes: Insufficient nvidia.com/gpu.; request "
            "less, or wait until other jobs end",
        ),
        (
            _job("Created", pytorchReplicaSpecs=GANG),
            [_pod(n, "Pending", scheduled="False", reason="Unschedulable",
                  message="minCount (2) cannot be satisfied")
             for n in (0, 1)], "",
            "r50: unschedulable: 2 of 2 pods, a gang that starts together: minCount (2) cannot be "
            "satisfied; request less, or wait until other jobs end",
        ),
        (
            _job("Created"),
            [_pod(0, "Pending", _waiting("ImagePullBackOff", "Back-off")), _pod(1)], "",
            "r50: no image: 1 of 2 pods: convoy:1 cannot be pulled (ImagePullBackOff); check "
            "its name and the nodes' access to its registry",
        ),
        (
            _job("Created"),
            [_pod(0, "Pending",
                  _waiting("CreateContainerConfigError", 'secret "convoy-mlflow" not found')),
             _pod(1)], "",
            'r50: not started: 1 of 2 pods: secret "convoy-mlflow" not found; create it in this '
            "namespace, see convoy secrets --help",
        ),
        (_job("Running"), RUNNING, "", "r50: starting: 2 pods running, no log output yet"),
        (_job("Running"), RUNNING, None, "r50: running: 2 pods"),
        (_job("Running"), RUNNING, WAITS, "r50: waiting: s3://convoy/x: no index.json yet"),
        (_job("Running"), RUNNING, MEETS, CONNECTING),
        (_job("Running"), RUNNING, MEETS + _line("starting", step=0), CONNECTING),
        (_job("Running"), RUNNING, OLD_LOG, "r50: running: 2 pods"),
        (_job("Succeeded"), [_pod(0, "Succeeded", _ended(0))], OLD_LOG, "r50: succeeded"),
        (
            _job("Running"), RUNNING, FIRST_STEPS,
            "r50: training: step 20 of 1,000, 1,234 images/s, http://convoy-mlflow:5000/#/runs/0a1b",
        ),
        (
            _job("Running"), RUNNING,
            LOG + LINE_PREFIX + '{"run_name": "r50", "phase": "training", "step": 6',
            "r50: training: step 400 of 1,000, 2,345 images/s, 0:02:03 left, "
            "http://convoy-mlflow:5000/#/runs/0a1b",
        ),
        (
            _job("Running"), RUNNING,
            LOG + _line("evaluating", step=1000, images_per_second=2345.2, **TRAINS),
            "r50: training: step 1,000 of 1,000, 2,345 images/s, "
            "http://convoy-mlflow:5000/#/runs/0a1b",
        ),
        (
            _job("Running"), RUNNING, LOG,
            "r50: training: step 400 of 1,000, 2,345 images/s, 0:02:03 left, "
            "http://convoy-mlflow:5000/#/runs/0a1b",
        ),
        (
            _job("Running"), [_pod(0), _pod(1, "Pending", scheduled="")], LOG,
            "r50: starting: 1 of 2 pods running, 1 waiting for a node",
        ),
        (
            _job("Running", "Succeeded"), [_pod(0, "Succeeded", _ended(0))], LOG,
            "r50: succeeded: step 400 of 1,000, 2,345 images/s, 0:02:03 left, "
            "http://convoy-mlflow:5000/#/runs/0a1b",
        ),
        (
            _job("Failed"),
            [_pod(0, "Failed", _ended(144)),
             _pod(1, "Failed", _ended(2, "s3://convoy/x: permission denied"))], "",
            "r50: failed: s3://convoy/x: permission denied",
        ),
        (
            _job("Failed"), [_pod(0, "Failed", _ended(1, TRACEBACK))], "",
            'r50: failed: bug: ...(most recent call last): File "x" KeyError: 5; convoy logs r50 '
            "prints the full log",
        ),
        (
            _job("Failed"),
            [_pod(0, "Failed", _ended(1, "KeyError: 5\n" + _line("failed", exit_code=1)))], "",
            "r50: failed: bug: ...KeyError: 5; convoy logs r50 prints the full log",
        ),
        (
            _job("Failed"), [_pod(0, "Failed", _ended(1))],
            LOG + _line("failed", exit_code=1, message="KeyError: 5"),
            "r50: failed: bug: ...KeyError: 5; convoy logs r50 prints the full log",
        ),
        (_job("Failed"), [_pod(0, "Failed", _ended(2))], "",
         "r50: failed: user error; see convoy logs r50"),
        (_job("Failed"), [], "", "r50: failed: PyTorchJob r50 is failed."),
    ],
)  # fmt: skip
def test_each_state_is_reported_in_one_line(
    job: Object, pods: list[Object], log: str, line: str
) -> None:
    assert summarize_job(job, pods, [], log).line() == line


def test_events_of_the_job_explain_rejected_pods() -> None:
    message = 'Error creating: pods "r50-worker-0" is forbidden: exceeded quota: convoy'
    status = summarize_job(
        _job("Created"), [], [{"reason": "FailedCreatePod", "message": message}], ""
    )
    assert status.line() == f"r50: queued: its pods are rejected: {message}"


def test_suspended_job_in_a_kueue_queue_is_queued() -> None:
    job = _job("Created", runPolicy={"suspend": True})
    job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "team"
    assert (
        summarize_job(job, [], [], "").line()
        == "r50: queued: Kueue's queue team admits it when its quota allows"
    )


def test_status_has_progress_and_exit_code_fields() -> None:
    status = summarize_job(_job("Running"), RUNNING, [], LOG)
    assert (status.step, status.total, status.images_per_second, status.left) == (
        400,
        1000,
        2345.2,
        "0:02:03",
    )
    assert not status.finished
    assert summarize_job(_job("Succeeded"), [], [], "").exit_code == 0
    assert summarize_job(_job("Failed"), [_pod(0, "Failed", _ended(2))], [], "").exit_code == 2
    assert summarize_job(_job("Failed"), [], [], "").exit_code == 1
    assert Status("a", "queued").line() == "a: queued"


def test_the_trainers_own_records_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROGRESS_LOG_VARIABLE, "1")
    publisher = ProgressPublisher("r50", 1000)
    for phase, step in (("starting", 0), ("training", 20), ("evaluating", 1000)):
        publisher.update(phase=phase, step=step, images_per_second=1100.0)
    status = summarize_job(_job("Running"), RUNNING, [], capsys.readouterr().out)
    assert (status.step, status.total, status.images_per_second) == (1000, 1000, 1100.0)
