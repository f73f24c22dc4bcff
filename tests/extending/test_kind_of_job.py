"""The guide's kind of job, against the schema of Kubernetes, and the launcher that it starts."""

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from guide import follow_guide, run_python

SUMMARIZE = """
import json, sys
from pipelines.cluster.job_kind import job_kind
from pipelines.cluster.status import summarize_job
kind = job_kind("Job")
for job, pods in json.loads(sys.argv[1]):
    print(summarize_job(job, pods, [], "", kind).line())
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("job") / "tree"
    follow_guide("add-a-kind-of-job", tree)
    return tree


def _render(tree: Path, *arguments: object) -> dict[str, Any]:
    text = run_python(tree, "-m", "pipelines.cli", "render", *arguments)
    (job,) = yaml.safe_load_all(text)
    return job  # type: ignore[no-any-return]


def test_the_manifest_is_a_valid_job(tree: Path) -> None:
    options = ("--nodes", 1, "--gpus-per-node", 8)
    job = _render(tree, "resnet50", "--kind", "Job", *options, "--suspend")
    kubernetes_validate.validate(job, "1.34", strict=True)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    # the API server requires it of a Job with a podFailurePolicy
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    final = job["spec"]["podFailurePolicy"]["rules"][0]
    assert (final["action"], final["onExitCodes"]["values"]) == ("FailJob", [1, 2])
    assert job["spec"]["suspend"] is True
    # the pod is the one of a PyTorchJob, except for what a Job needs
    other = _render(tree, "resnet50", *options)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"][:3] == ["--procs", "8", "--"]
    container["args"] = container["args"][2:]
    del job["spec"]["template"]["spec"]["restartPolicy"]
    assert job["spec"]["template"] == other


def test_its_status_is_read_from_the_conditions_of_a_job(tree: Path) -> None:
    def job(suspend: bool = False, **conditions: str) -> dict[str, Any]:
        found = [{"type": k, "status": "True", "message": v} for k, v in conditions.items()]
        spec = {"suspend": suspend, "template": {"metadata": {"labels": {}}}}
        return {"metadata": {"name": "r"}, "spec": spec, "status": {"conditions": found}}

    pod = {"metadata": {"name": "r-x7k2p"}, "status": {"phase": "Running"}}
    cases = [
        (job(Complete=""), []),
        (job(Failed="Pod r-x7k2p failed with exit code 3"), []),
        (job(suspend=True, Suspended="Job suspended"), []),
        (job(), []),
        (job(), [pod]),
    ]
    assert run_python(tree, "-c", SUMMARIZE, json.dumps(cases)).splitlines() == [
        "r: succeeded",
        "r: failed: Pod r-x7k2p failed with exit code 3",
        "r: suspended: it has no pods; start it with convoy resume r",
        "r: queued: the job controller did not create its pod yet",
        "r: starting: 1 pods running, no log output yet",
    ]


def test_its_container_trains(tree: Path, digits: Path, tmp_path: Path) -> None:
    data = [f"data.{split}=file://{digits / split}" for split in ("train", "val")]
    keys = [*data, f"checkpoint.url=file://{tmp_path / 'c'}", "train.max_steps=2"]
    keys += [f"train.output_dir={tmp_path / 'run'}", "schedule.warmup_epochs=0"]
    job = _render(
        tree, "digits-resnet8", *keys, "--kind", "Job", "--nodes", 1, "--gpus-per-node", 0,
        "--procs-per-node", 2,
    )  # fmt: skip
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][0] == "python"
    run_python(tree, *container["command"][1:], *container["args"])
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["steps"], result["ranks"]) == (2, 2)
    assert list((tmp_path / "c").glob("step-*2"))
