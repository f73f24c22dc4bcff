"""Measures how long a training job waits in a cluster.

    make cluster-up; export PATH=... KUBECONFIG=...       (as it prints)
    python benchmarks/cluster.py [--rounds 5] [--rounds-large 3] [--only TEXT] [--json FILE]

Submission to Running: `convoy submit` of ResNet-50 to simulated nodes of 8 GPUs (kwok), from the
job's first appearance in a watch of the API server to the phase Running of the last pod in another
watch. API server, scheduler and training-operator are real and share this machine's processors. The
startup of the command, from the shell to the job in the API server, is reported in a separate row.

Training: two pods of a small network, with the services of `k8s/overlays/local`. The second pod is
force-deleted after a checkpoint. Time to the first step is measured from the job's first appearance
in the API server. Time to the next new step is measured from the delete command to the end of the
longest interval without a step. Steps have the trainer's timestamps, as stored in MLflow.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import count, pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests/cluster")]
from kubectl import Kubectl, temporary_namespace  # noqa: E402
from overlay import history, served, succeeded  # noqa: E402
from simulated_nodes import GPUS, pool  # noqa: E402
from support.helpers import run_convoy, until  # noqa: E402


@dataclass(frozen=True)
class Measure:
    """A measurement.

    ``rounds``: a context in which each call runs one round and returns seconds by row name.
    ``targets``: maximum seconds, by row name.
    """

    name: str
    targets: dict[str, float]
    rounds: Callable[[Kubectl], AbstractContextManager[Callable[[], dict[str, float]]]]
    large: bool = False


@contextmanager
def watched(kubectl: Kubectl, kind: str, template: str) -> Iterator[dict[str, float]]:
    """Watch objects; yields the time at which each line of ``template`` was first seen."""
    seen: dict[str, float] = {}
    command = kubectl.command("get", kind, "--watch", "-o", f"jsonpath={template}{{'\\n'}}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:

        def read() -> None:
            for line in process.stdout or []:
                seen.setdefault(line.strip(), time.monotonic())

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield seen
        finally:
            process.terminate()
            reader.join()


def submitted(cluster: Kubectl, nodes: int) -> dict[str, float]:
    """Submit one job with a pod on each of ``nodes`` simulated nodes."""
    with pool(cluster) as simulated, temporary_namespace(cluster, wait=True) as kubectl:
        simulated.add(nodes)
        pods = watched(kubectl, "pods", "{.status.phase} {.metadata.name}")
        with watched(kubectl, "pytorchjobs", "{.metadata.name}") as jobs, pods as phases:
            started = time.monotonic()
            done = run_convoy(*simulated.job(nodes, "r50", kubectl=kubectl))
            assert done.returncode == 0, done.stderr

            def running() -> list[float]:
                return [when for line, when in list(phases.items()) if line.startswith("Running")]

            until(lambda: len(running()) == nodes, 300)
            return {
                "convoy submit": jobs["r50"] - started,
                f"{nodes * GPUS:,} GPUs": max(running()) - jobs["r50"],
            }


TRAINING = [
    "model.width=4",
    "data.val=null",
    "train.max_steps=600",
    "train.log_every_steps=1",
    "checkpoint.every_steps=20",
]
POD = [
    "--nodes",
    "2",
    "--gpus-per-node",
    "0",
    "--cpu",
    "300m",
    "--memory",
    "2Gi",
    "--service-account",
    "convoy-trainer",
]


@contextmanager
def trained(cluster: Kubectl) -> Iterator[Callable[[], dict[str, float]]]:
    """Yield a function that trains one more job."""
    names = (f"job-{number}" for number in count())
    with (
        tempfile.TemporaryDirectory() as folder,
        served(cluster, Path(folder)) as (kubectl, mlflow),
    ):
        yield lambda: one_training(kubectl, mlflow, next(names))


def one_training(kubectl: Kubectl, mlflow: str, name: str) -> dict[str, float]:
    with watched(kubectl, "pytorchjobs", "{.metadata.name}") as jobs:
        done = run_convoy(
            "submit",
            "fashion-resnet8",
            *POD,
            "--name",
            name,
            "--namespace",
            kubectl.namespace,
            *TRAINING,
            f"name={name}",
        )
        assert done.returncode == 0, done.stderr
        applied_at = jobs[name] + time.time() - time.monotonic()
    until(lambda: len(history(mlflow, name)) > 30, 300)
    killed_at = time.time()
    kubectl("delete", "pod", f"{name}-worker-1", "--force", "--grace-period=0")
    until(lambda: succeeded(kubectl, name), 300)
    times = [metric["timestamp"] / 1e3 for metric in history(mlflow, name)]
    _, next_step = max(
        (after - before, after) for before, after in pairwise(times) if after > killed_at
    )
    return {
        "to the first step": times[0] - applied_at,
        "lost pod to the next step": next_step - killed_at,
    }


@contextmanager
def on_simulated_nodes(cluster: Kubectl, nodes: int) -> Iterator[Callable[[], dict[str, float]]]:
    yield lambda: submitted(cluster, nodes)


MEASURES = [
    Measure("training", {"to the first step": 25, "lost pod to the next step": 30}, trained),
    Measure("512 GPUs", {"512 GPUs": 4}, lambda cluster: on_simulated_nodes(cluster, 64)),
    Measure(
        "4,096 GPUs",
        {"4,096 GPUs": 60},
        lambda cluster: on_simulated_nodes(cluster, 512),
        large=True,
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--rounds-large",
        type=int,
        default=3,
        help="rounds of measurements that take a minute or more",
    )
    parser.add_argument(
        "--only", default="", help="only measurements whose names contain this text"
    )
    options = parser.parse_args()
    program = shutil.which("kubectl")
    if program is None or "KUBECONFIG" not in os.environ:
        parser.error("needs a cluster: make cluster-up, then set PATH and KUBECONFIG as it prints")
    figures: dict[str, list[float]] = {}
    targets: dict[str, float] = {}
    for measure in MEASURES:
        if options.only not in measure.name:
            continue
        targets |= measure.targets
        with measure.rounds(Kubectl(program)) as once:
            for _ in range(options.rounds_large if measure.large else options.rounds):
                for name, seconds in once().items():
                    figures.setdefault(name, []).append(round(seconds, 2))
    machine = (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.1f}, {date.today()}"
    )
    table = Table("", "rounds", "median, s", "min", "max", "target", title=machine, box=None)
    for name, rounds in figures.items():
        spread = [f"{value:.1f}" for value in (statistics.median(rounds), min(rounds), max(rounds))]
        table.add_row(
            name, str(len(rounds)), *spread, f"{targets[name]:g}" if name in targets else ""
        )
    Console().print(table)
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "targets": targets, "seconds": figures}, indent=1)
            + "\n"
        )


if __name__ == "__main__":
    main()
