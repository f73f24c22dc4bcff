"""The whole line in pods, from the shipped manifests: services, shards, two trainings, metrics,
registered models.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kubectl import Kubectl
from overlay import applied, asked, forwarded, succeeded
from support.helpers import until

JOBS = ("fashion-data-parallel", "fashion-pipeline")
MINUTES = 15  # for images, services, packing and two trainings, on two cores


def loads(model: str, address: str) -> bool:
    """Whether a client that knows nothing but MLflow's address can load it, unpickling nothing."""
    code = "import sys, mlflow; mlflow.pyfunc.load_model(sys.argv[1])"
    plain = {
        "PATH": os.environ["PATH"],
        "MLFLOW_TRACKING_URI": address,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    }
    plain["MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD"] = (
        "false"  # else MLflow sends it to the object store, inside the cluster
    )
    return (
        subprocess.run(
            [sys.executable, "-c", code, model], env=plain, timeout=300, check=False
        ).returncode
        == 0
    )


@pytest.mark.timeout(60 * MINUTES + 300)
def test_from_manifests_to_registered_models(cluster: Kubectl, tmp_path: Path) -> None:
    with applied(cluster, tmp_path) as line:
        _trains_and_registers(line)


def _trains_and_registers(line: Kubectl) -> None:
    def explain() -> str:
        return (
            line("get", "pods,jobs,pytorchjobs", "-o", "wide")
            + line("get", "events", "--sort-by=.lastTimestamp")[-4000:]
        )

    until(lambda: all(succeeded(line, job) for job in JOBS), 60 * MINUTES, explain)
    with forwarded(line, "convoy-mlflow", 5000) as address:
        experiment = asked(address, "experiments/get-by-name?experiment_name=convoy")["experiment"][
            "experiment_id"
        ]
        runs = asked(address, "runs/search", experiment_ids=[experiment])["runs"]
        assert len(runs) == len(JOBS)
        for run in runs:
            assert run["info"]["status"] == "FINISHED"
            history = asked(
                address, f"metrics/get-history?run_id={run['info']['run_id']}&metric_key=loss"
            )["metrics"]
            assert [metric["step"] for metric in history] == list(range(1, 101))
            assert history[-1]["value"] < history[0]["value"]
        for job in JOBS:
            version = asked(address, f"registered-models/alias?name={job}&alias=champion")[
                "model_version"
            ]["version"]
            assert version == "1"
            assert loads(f"models:/{job}@champion", address)
