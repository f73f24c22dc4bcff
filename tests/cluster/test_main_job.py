"""The whole line in pods, from the shipped manifests: services, shards, two trainings, metrics, registered models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from helpers import copy_manifests, until
from kubectl import Kubectl

JOBS = ("fashion-data-parallel", "fashion-pipeline")
MINUTES = 15  # for images, services, packing and two trainings, on two cores


@pytest.fixture(scope="module")
def line(cluster: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubectl]:
    """`k8s/overlays/local` in a namespace of its own, with the files that `convoy secrets` makes."""
    kubectl = cluster.within(f"convoy-test-{uuid.uuid4().hex[:8]}")
    said = kubectl.apply_overlay(copy_manifests(tmp_path_factory.mktemp("line")), "local")
    assert said.returncode == 0, said.stderr
    try:
        assert not said.stderr, "no warning, of Pod Security or other"
        yield kubectl
    finally:
        cluster("delete", "namespace", kubectl.namespace, "--timeout=240s", timeout=300)


def succeeded(kubectl: Kubectl, job: str) -> bool:
    conditions = {c["type"]: c for c in kubectl.get("pytorchjob", job)["status"].get("conditions", []) if c["status"] == "True"}
    assert "Failed" not in conditions, kubectl("describe", "pytorchjob", job) + kubectl("logs", f"{job}-worker-0", "--tail=40")
    return "Succeeded" in conditions


@contextmanager
def forwarded(kubectl: Kubectl, service: str, port: int) -> Iterator[str]:
    """The address, on this machine, of a service's port."""
    command = kubectl.command("port-forward", f"service/{service}", f":{port}", "--address", "127.0.0.1")
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
    request = urllib.request.Request(f"{address}/api/2.0/mlflow/{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def loads(model: str, address: str) -> bool:
    """Whether a client that knows nothing but MLflow's address can load it, unpickling nothing."""
    code = "import sys, mlflow; mlflow.pyfunc.load_model(sys.argv[1])"
    plain = {"PATH": os.environ["PATH"], "MLFLOW_TRACKING_URI": address, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    plain["MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD"] = "false"  # else MLflow sends it to the object store, inside the cluster
    return subprocess.run([sys.executable, "-c", code, model], env=plain, timeout=300, check=False).returncode == 0


@pytest.mark.timeout(60 * MINUTES + 300)
def test_from_manifests_to_registered_models(line: Kubectl) -> None:
    def explain() -> str:
        return line("get", "pods,jobs,pytorchjobs", "-o", "wide") + line("get", "events", "--sort-by=.lastTimestamp")[-4000:]

    until(lambda: all(succeeded(line, job) for job in JOBS), 60 * MINUTES, explain)
    with forwarded(line, "convoy-mlflow", 5000) as address:
        experiment = asked(address, "experiments/get-by-name?experiment_name=convoy")["experiment"]["experiment_id"]
        runs = asked(address, "runs/search", experiment_ids=[experiment])["runs"]
        assert len(runs) == len(JOBS)
        for run in runs:
            assert run["info"]["status"] == "FINISHED"
            history = asked(address, f"metrics/get-history?run_id={run['info']['run_id']}&metric_key=loss")["metrics"]
            assert [metric["step"] for metric in history] == list(range(1, 101))
            assert history[-1]["value"] < history[0]["value"]
        for job in JOBS:
            version = asked(address, f"registered-models/alias?name={job}&alias=champion")["model_version"]["version"]
            assert version == "1"
            assert loads(f"models:/{job}@champion", address)
