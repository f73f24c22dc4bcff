"""The whole line in pods, as tests use it: `k8s/overlays/local` in a namespace of its own, and what
its MLflow says.
"""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kubectl import Kubectl, new_namespace_name
from support.helpers import copy_manifests


@contextmanager
def applied(cluster: Kubectl, folder: Path, without: str | None = None) -> Iterator[Kubectl]:
    """The overlay with the files that `convoy secrets` makes; ``without``: a kind that is left out."""
    kubectl = cluster.within(new_namespace_name())
    said = kubectl.apply_overlay(copy_manifests(folder), "local", without=without)
    try:
        assert said.returncode == 0, said.stderr
        assert not said.stderr, "no warning, of Pod Security or other"
        yield kubectl
    finally:
        cluster("delete", "namespace", kubectl.namespace, "--ignore-not-found", "--wait=false")


@contextmanager
def served(cluster: Kubectl, folder: Path) -> Iterator[tuple[Kubectl, str]]:
    """The overlay's services and packed data, without its trainings; and MLflow's address on this
    machine.
    """
    with applied(cluster, folder, without="PyTorchJob") as kubectl:
        kubectl(
            "wait",
            "--for=condition=Complete",
            "--timeout=540s",
            "job/pack-fashion-mnist",
            timeout=600,
        )
        kubectl("rollout", "status", "--timeout=300s", "deployment/convoy-mlflow", timeout=330)
        with forwarded(kubectl, "convoy-mlflow", 5000) as address:
            yield kubectl, address


def conditions(kubectl: Kubectl, job: str) -> set[str]:
    """Those that hold of a PyTorchJob."""
    return {
        c["type"]
        for c in kubectl.get("pytorchjob", job)["status"].get("conditions", [])
        if c["status"] == "True"
    }


def succeeded(kubectl: Kubectl, job: str) -> bool:
    """Fails the test where the job did."""
    found = conditions(kubectl, job)
    assert "Failed" not in found, kubectl("describe", "pytorchjob", job) + kubectl(
        "logs", f"{job}-worker-0", "--tail=40"
    )
    return "Succeeded" in found


@contextmanager
def forwarded(kubectl: Kubectl, service: str, port: int) -> Iterator[str]:
    """The address, on this machine, of a service's port."""
    command = kubectl.command(
        "port-forward", f"service/{service}", f":{port}", "--address", "127.0.0.1"
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            here = process.stdout.readline().split("->")[0].rpartition(":")[2].strip()
            yield f"http://127.0.0.1:{int(here)}"
        finally:
            process.terminate()


def asked(address: str, path: str, **parameters: Any) -> dict[str, Any]:
    """What MLflow's own REST interface answers."""
    body = json.dumps(parameters).encode() if parameters else None
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/{path}", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def history(address: str, job: str, metric: str = "loss") -> list[dict[str, Any]]:
    """What the run of a job logged of a metric, in its order: ``step``, ``value``, ``timestamp`` in
    ms; nothing before it began.
    """
    made = asked(address, "experiments/search", filter="name = 'convoy'", max_results=1).get(
        "experiments", []
    )
    experiments = [experiment["experiment_id"] for experiment in made]
    if not experiments:
        return []
    runs = asked(
        address, "runs/search", experiment_ids=experiments, filter=f"attributes.run_name = '{job}'"
    ).get("runs", [])
    assert len(runs) <= 1, "a job that goes on goes on in its run"
    if not runs:
        return []
    found = asked(
        address, f"metrics/get-history?run_id={runs[0]['info']['run_id']}&metric_key={metric}"
    )
    return found.get("metrics", [])
