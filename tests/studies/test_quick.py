"""`convoy study all --quick`, stopped once and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from support.helpers import RunText

from pipelines.studies.framework.catalog import NAMES, load

VERDICTS = {"borne out", "not borne out", "undecided"}


@pytest.mark.timeout(3600)
def test_stopped_studies_resume_without_repeating_trainings(
    convoy_ok: RunText, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "study",
        "all",
        "--quick",
        "--dir",
        str(tmp_path),
    ]
    with (tmp_path / "first.log").open("wb") as log:
        first = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    give_up = time.monotonic() + 600
    while not (finished := list((tmp_path / "trainings").glob("*/outcome.json"))):
        assert first.poll() is None, (tmp_path / "first.log").read_text()
        assert time.monotonic() < give_up
        time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 143
    times = {path: os.stat(path).st_mtime_ns for path in finished}
    convoy_ok("study", "all", "--quick", "--dir", tmp_path, timeout=3000)
    assert {path: os.stat(path).st_mtime_ns for path in finished} == times
    for name in NAMES:
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["verdict"] in VERDICTS
        assert result["statements"] == list(load(name).statements)
        assert all(claim["verdict"] in VERDICTS and claim["why"] for claim in result["claims"])
        assert (tmp_path / name / "plot.png").stat().st_size > 10_000

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs(
        [client.get_experiment_by_name("studies").experiment_id], max_results=1000
    )
    logged = {run.info.run_id: run.info.status for run in runs}
    result = json.loads((tmp_path / "accumulation/result.json").read_text())
    assert len(result["mlflow_runs"]) == 2
    assert {logged[run_id] for run_id in result["mlflow_runs"]} == {"FINISHED"}
