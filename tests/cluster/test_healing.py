"""A training job that loses something goes on by itself from its newest checkpoint, and ends as one
that lost nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
from kubectl import Kubectl, Refused
from overlay import conditions, history, served, succeeded
from support.helpers import run_convoy, until

STEPS, EVERY, STRIKE = 400, 40, 120  # of a run; between checkpoints; at which it is disturbed
SETTINGS = [
    "model.width=4", "data.val=null", f"train.max_steps={STEPS}", "train.log_every_steps=20", f"checkpoint.every_steps={EVERY}",
]  # fmt: skip
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
    with served(cluster, tmp_path_factory.mktemp("line")) as found:
        yield found


@pytest.fixture(scope="module")
def line(services: tuple[Kubectl, str]) -> Kubectl:
    return services[0]


@pytest.fixture(scope="module")
def mlflow(services: tuple[Kubectl, str]) -> str:
    return services[1]


def submit(line: Kubectl, name: str, *more: str) -> None:
    place = ["--name", name, "--namespace", line.namespace, "--service-account", "convoy-trainer"]
    size = ["--nodes", "2", "--gpus-per-node", "0", *POD]
    done = run_convoy("submit", "fashion-resnet8", *place, *size, *SETTINGS, f"name={name}", *more)
    assert done.returncode == 0, done.stderr


def train(line: Kubectl, name: str, strike: Callable[[], object] = lambda: None) -> str:
    """A job from `convoy submit` to Succeeded, disturbed by ``strike`` once it trains; what `convoy
    logs --follow` printed.
    """
    submit(line, name)
    follow = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "logs",
        name,
        "--namespace",
        line.namespace,
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
            strike()
            lines.extend(process.stdout)
        finally:
            process.terminate()
    until(lambda: succeeded(line, name), 60)
    return "".join(lines)


def losses(mlflow: str, name: str) -> list[tuple[int, float]]:
    """Step and loss of all that the job logged."""
    return [(metric["step"], metric["value"]) for metric in history(mlflow, name)]


@pytest.fixture(scope="module")
def undisturbed(line: Kubectl, mlflow: str) -> list[tuple[int, float]]:
    assert "resuming from" not in train(line, "undisturbed")
    found = losses(mlflow, "undisturbed")
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    return found


def _delete(line: Kubectl, job: str, number: int) -> None:
    line("delete", "pod", f"{job}-worker-{number}", "--force", "--grace-period=0")


def _kill_rank(line: Kubectl, job: str) -> None:
    line("exec", f"{job}-worker-1", "--", "python", "-c", KILL_RANK)


def _terminate(line: Kubectl, job: str) -> None:
    line("delete", "pod", f"{job}-worker-1", "--wait=false")


def _out_of_memory(line: Kubectl, job: str) -> None:
    """What lies in /dev/shm counts as the container's memory; so the kernel ends its largest
    process.
    """
    fill = "dd if=/dev/zero of=/dev/shm/fill bs=1M count=2048 2>/dev/null || true"
    with suppress(Refused):  # the whole container may end with it
        line("exec", f"{job}-worker-1", "--", "sh", "-c", fill)


def _drain(line: Kubectl, job: str) -> None:
    node = line.get("pod", f"{job}-worker-1")["spec"]["nodeName"]
    selected = f"--pod-selector=training.kubeflow.org/job-name={job}"
    try:
        line("drain", node, selected, "--delete-emptydir-data", "--timeout=120s", timeout=150)
    finally:
        line("uncordon", node)


def _suspend(line: Kubectl, job: str) -> None:
    for command in ("suspend", "resume"):
        done = run_convoy(command, job, "--namespace", line.namespace)
        assert done.returncode == 0, done.stderr
        if command == "suspend":
            until(lambda: not line.phases(f"training.kubeflow.org/job-name={job}"), 120)


STRIKES: dict[str, Callable[[Kubectl, str], None]] = {
    "lost-worker": lambda line, job: _delete(line, job, 1),
    "lost-host": lambda line, job: _delete(line, job, 0),
    "killed-rank": _kill_rank,
    "terminated": _terminate,
    "out-of-memory": _out_of_memory,
    "drained": _drain,
    "suspended": _suspend,
}


@pytest.mark.parametrize("name", STRIKES)
def test_a_job_goes_on_from_its_newest_checkpoint(
    line: Kubectl, mlflow: str, undisturbed: list[tuple[int, float]], name: str
) -> None:
    first = ""

    def strike() -> None:
        nonlocal first
        until(lambda: len(losses(mlflow, name)) >= STRIKE, 120)
        first = line.get("pod", f"{name}-worker-0")["metadata"]["uid"]
        STRIKES[name](line, name)

    log = train(line, name, strike)
    assert line.get("pod", f"{name}-worker-0")["metadata"]["uid"] != first
    resumed = re.findall(r"resuming from \S+/step-(\d+)", log)
    assert len(resumed) == 1, log
    assert int(resumed[0]) >= STRIKE - EVERY
    if name in ("terminated", "drained", "suspended"):
        stopped = re.search(r"stop signal received: checkpoint of step (\d+)", log)
        assert stopped, log
        assert int(stopped[1]) == int(resumed[0])
    assert losses(mlflow, name) == undisturbed


def test_a_job_that_cannot_come_up_is_given_up(line: Kubectl) -> None:
    """Each start runs out of memory, which the operator would repeat without end."""
    submit(line, "hopeless", "checkpoint.max_starts=2", "--memory", "320Mi", "--shm", "16Mi")
    until(
        lambda: "Failed" in conditions(line, "hopeless"),
        240,
        lambda: line("describe", "pods", "-l", "app.kubernetes.io/instance=hopeless"),
    )
    said = run_convoy("status", "hopeless", "--namespace", line.namespace)
    told = (
        "hopeless: failed: checkpoint.max_starts: the job was started 2 times since its beginning "
        "without writing a newer checkpoint"
    )
    assert said.stdout.startswith(told)
