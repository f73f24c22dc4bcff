"""A disturbed training job resumes from its latest checkpoint without intervention.

Its losses equal those of an undisturbed job.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from kubectl import Kubectl, KubectlError
from overlay import conditions, history, served, succeeded
from support.helpers import run_convoy, until

from trainer.progress.progress_record import is_record

STEPS, EVERY = 400, 40  # steps of a run, and between checkpoints
FAULT_STEP = 120  # the job is disturbed after this step
SETTINGS = [
    "model.width=4",
    "data.val=null",
    f"train.max_steps={STEPS}",
    "train.log_every_steps=20",
    f"checkpoint.every_steps={EVERY}",
]
POD = ["--cpu", "300m", "--memory", "2Gi", "--shm", "2Gi", "--scratch", "1Gi"]
KILL_RANK = r"""
import os, signal
for number in filter(str.isdigit, os.listdir("/proc")):
    with open(f"/proc/{number}/environ", "rb") as file:
        if number != str(os.getpid()) and b"\0RANK=" in b"\0" + file.read():
            os.kill(int(number), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def services(
    cluster: Kubectl, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Kubectl, str]]:
    with served(cluster, tmp_path_factory.mktemp("overlay")) as found:
        yield found


@pytest.fixture(scope="module")
def overlay(services: tuple[Kubectl, str]) -> Kubectl:
    return services[0]


@pytest.fixture(scope="module")
def mlflow(services: tuple[Kubectl, str]) -> str:
    return services[1]


def submit(overlay: Kubectl, name: str, *more: str) -> None:
    place = [
        "--name",
        name,
        "--namespace",
        overlay.namespace,
        "--service-account",
        "convoy-trainer",
    ]
    size = ["--nodes", "2", "--gpus-per-node", "0", *POD]
    done = run_convoy("submit", "fashion-resnet8", *place, *size, *SETTINGS, f"name={name}", *more)
    assert done.returncode == 0, done.stderr


def train(overlay: Kubectl, name: str, inject_fault: Callable[[], object] = lambda: None) -> str:
    """Run a job from `convoy submit` to Succeeded; return the output of `convoy logs --follow`.

    ``inject_fault`` is called after the first progress line.
    """
    submit(overlay, name)
    follow = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "logs",
        name,
        "--namespace",
        overlay.namespace,
        "--follow",
    ]
    lines = []
    with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for text in process.stdout:
                lines.append(text)
                if text.startswith("step "):
                    break
            training = run_convoy("status", name, "--namespace", overlay.namespace).stdout
            assert re.match(rf"{name}: training: step \d+ of {STEPS}, ", training), training
            inject_fault()
            lines.extend(process.stdout)
        finally:
            process.terminate()
    until(lambda: succeeded(overlay, name), 60)
    assert not any(map(is_record, lines)), "records are not for people"
    return "".join(lines)


def losses(mlflow: str, name: str) -> list[tuple[int, float]]:
    """Return step and loss of each logged step of the job."""
    return [(metric["step"], metric["value"]) for metric in history(mlflow, name)]


@pytest.fixture(scope="module")
def undisturbed(overlay: Kubectl, mlflow: str) -> list[tuple[int, float]]:
    assert "resuming from" not in train(overlay, "undisturbed")
    found = losses(mlflow, "undisturbed")
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    return found


def _delete(overlay: Kubectl, job: str, number: int) -> None:
    overlay("delete", "pod", f"{job}-worker-{number}", "--force", "--grace-period=0")


def _kill_rank(overlay: Kubectl, job: str) -> None:
    overlay("exec", f"{job}-worker-1", "--", "python", "-c", KILL_RANK)


def _terminate(overlay: Kubectl, job: str) -> None:
    overlay("delete", "pod", f"{job}-worker-1", "--wait=false")


def _out_of_memory(overlay: Kubectl, job: str) -> None:
    """Fill /dev/shm, which is memory of the container; the kernel kills its largest process."""
    fill = "dd if=/dev/zero of=/dev/shm/fill bs=1M count=2048 2>/dev/null || true"
    with suppress(KubectlError):  # the kernel may kill the container
        overlay("exec", f"{job}-worker-1", "--", "sh", "-c", fill)


def _drain(overlay: Kubectl, job: str) -> None:
    node = overlay.get("pod", f"{job}-worker-1")["spec"]["nodeName"]
    selected = f"--pod-selector=training.kubeflow.org/job-name={job}"
    try:
        overlay("drain", node, selected, "--delete-emptydir-data", "--timeout=120s", timeout=150)
    finally:
        overlay("uncordon", node)


def _suspend(overlay: Kubectl, job: str) -> None:
    for command in ("suspend", "resume"):
        done = run_convoy(command, job, "--namespace", overlay.namespace)
        assert done.returncode == 0, done.stderr
        if command == "suspend":
            until(lambda: not overlay.phases(f"training.kubeflow.org/job-name={job}"), 120)


FAULTS: dict[str, Callable[[Kubectl, str], None]] = {
    "lost-worker": lambda overlay, job: _delete(overlay, job, 1),
    "lost-host": lambda overlay, job: _delete(overlay, job, 0),
    "killed-rank": _kill_rank,
    "terminated": _terminate,
    "out-of-memory": _out_of_memory,
    "drained": _drain,
    "suspended": _suspend,
}


@pytest.mark.parametrize("name", FAULTS)
def test_disturbed_job_resumes_and_has_the_losses_of_an_undisturbed_job(
    overlay: Kubectl, mlflow: str, undisturbed: list[tuple[int, float]], name: str
) -> None:
    first = ""

    def inject_fault() -> None:
        nonlocal first
        until(lambda: len(losses(mlflow, name)) >= FAULT_STEP, 120)
        first = overlay.get("pod", f"{name}-worker-0")["metadata"]["uid"]
        FAULTS[name](overlay, name)

    log = train(overlay, name, inject_fault)
    assert overlay.get("pod", f"{name}-worker-0")["metadata"]["uid"] != first
    resumed = re.findall(r"resuming from \S+/step-(\d+)", log)
    assert len(resumed) == 1, log
    assert int(resumed[0]) >= FAULT_STEP - EVERY
    if name in ("terminated", "drained", "suspended"):
        stopped = re.search(r"stop signal received: checkpoint of step (\d+)", log)
        assert stopped, log
        assert int(stopped[1]) == int(resumed[0])
    assert losses(mlflow, name) == undisturbed


def test_job_that_never_starts_fails_after_max_starts(overlay: Kubectl) -> None:
    """Each start runs out of memory; the operator would restart it without end."""
    submit(overlay, "hopeless", "checkpoint.max_starts=2", "--memory", "320Mi", "--shm", "16Mi")
    until(
        lambda: "Failed" in conditions(overlay, "hopeless"),
        240,
        lambda: overlay("describe", "pods", "-l", "app.kubernetes.io/instance=hopeless"),
    )
    done = run_convoy("status", "hopeless", "--namespace", overlay.namespace)
    assert done.stdout.startswith(
        "hopeless: failed: checkpoint.max_starts: the job was started 2 times since its beginning "
        "without writing a newer checkpoint"
    )
