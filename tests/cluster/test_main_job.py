"""The full pipeline in pods, from the shipped manifests to registered models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kubectl import Kubectl
from overlay import applied, forwarded, mlflow_api, succeeded
from support.helpers import until

JOBS = ("fashion-data-parallel", "fashion-pipeline")
MINUTES = 15  # for images, services, packing and two trainings, on two cores


def loads(model: str, address: str) -> bool:
    """Return whether a client that has only MLflow's address can load ``model`` without pickle."""
    code = "import sys, mlflow; mlflow.pyfunc.load_model(sys.argv[1])"
    plain = {
        "PATH": os.environ["PATH"],
        "MLFLOW_TRACKING_URI": address,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    plain["MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD"] = (
        "false"  # else MLflow redirects to the object store, which is inside the cluster
    )
    return (
        subprocess.run(
            [sys.executable, "-c", code, model], env=plain, timeout=300, check=False
        ).returncode
        == 0
    )


@pytest.mark.timeout(60 * MINUTES + 300)
def test_local_overlay_trains_and_registers_models(cluster: Kubectl, tmp_path: Path) -> None:
    with applied(cluster, tmp_path) as overlay:
        _assert_trained_and_registered(overlay)


def _assert_trained_and_registered(overlay: Kubectl) -> None:
    def explain() -> str:
        return (
            overlay("get", "pods,jobs,pytorchjobs", "-o", "wide")
            + overlay("get", "events", "--sort-by=.lastTimestamp")[-4000:]
        )

    until(lambda: all(succeeded(overlay, job) for job in JOBS), 60 * MINUTES, explain)
    with forwarded(overlay, "convoy-mlflow", 5000) as address:
        found = mlflow_api(address, "experiments/get-by-name?experiment_name=convoy")
        experiment = found["experiment"]["experiment_id"]
        runs = mlflow_api(address, "runs/search", experiment_ids=[experiment])["runs"]
        assert len(runs) == len(JOBS)
        for run in runs:
            assert run["info"]["status"] == "FINISHED"
            history = mlflow_api(
                address, f"metrics/get-history?run_id={run['info']['run_id']}&metric_key=loss"
            )["metrics"]
            assert [metric["step"] for metric in history] == list(range(1, 101))
            assert history[-1]["value"] < history[0]["value"]
        for job in JOBS:
            version = mlflow_api(address, f"registered-models/alias?name={job}&alias=champion")[
                "model_version"
            ]["version"]
            assert version == "1"
            assert loads(f"models:/{job}@champion", address)
