"""Applies `k8s/overlays/local` in a namespace of its own, and queries its jobs and its MLflow."""

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
    """Apply the overlay with the credential files of `convoy secrets`; delete it at the end.

    ``without``: a kind whose objects are omitted.
    """
    kubectl = cluster.within(new_namespace_name())
    done = kubectl.apply_overlay(copy_manifests(folder), "local", without=without)
    try:
        assert done.returncode == 0, done.stderr
        assert not done.stderr, "kubectl prints warnings, of Pod Security for example"
        yield kubectl
    finally:
        cluster("delete", "namespace", kubectl.namespace, "--ignore-not-found", "--wait=false")


@contextmanager
def served(cluster: Kubectl, folder: Path) -> Iterator[tuple[Kubectl, str]]:
    """Yield the overlay's services and packed data, without its trainings, and MLflow's address.

    The address is reachable from this machine.
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
    """Return the types of a PyTorchJob's conditions that are true."""
    return {
        c["type"]
        for c in kubectl.get("pytorchjob", job)["status"].get("conditions", [])
        if c["status"] == "True"
    }


def succeeded(kubectl: Kubectl, job: str) -> bool:
    """Return whether the job has succeeded; fail the test if the job failed."""
    found = conditions(kubectl, job)
    assert "Failed" not in found, kubectl("describe", "pytorchjob", job) + kubectl(
        "logs", f"{job}-worker-0", "--tail=40"
    )
    return "Succeeded" in found


@contextmanager
def forwarded(kubectl: Kubectl, service: str, port: int) -> Iterator[str]:
    """Forward a port of a service to this machine; yield its address."""
    command = kubectl.command(
        "port-forward", f"service/{service}", f":{port}", "--address", "127.0.0.1"
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            local_port = process.stdout.readline().split("->")[0].rpartition(":")[2].strip()
            yield f"http://127.0.0.1:{int(local_port)}"
        finally:
            process.terminate()


def mlflow_api(address: str, path: str, **parameters: Any) -> dict[str, Any]:
    """Call MLflow's REST API: POST with ``parameters``, else GET; return the response."""
    body = json.dumps(parameters).encode() if parameters else None
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/{path}", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def history(address: str, job: str, metric: str = "loss") -> list[dict[str, Any]]:
    """Return the logged values of a metric of a job's run, in order; empty before the run starts.

    Each has ``step``, ``value`` and ``timestamp`` (ms).
    """
    found = mlflow_api(address, "experiments/search", filter="name = 'convoy'", max_results=1)
    experiments = [experiment["experiment_id"] for experiment in found.get("experiments", [])]
    if not experiments:
        return []
    runs = mlflow_api(
        address, "runs/search", experiment_ids=experiments, filter=f"attributes.run_name = '{job}'"
    ).get("runs", [])
    assert len(runs) <= 1, "a resumed job must continue its run"
    if not runs:
        return []
    found = mlflow_api(
        address, f"metrics/get-history?run_id={runs[0]['info']['run_id']}&metric_key={metric}"
    )
    return found.get("metrics", [])
