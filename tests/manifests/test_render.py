"""``convoy render``: valid PyTorchJobs, and the errors for invalid options.

The jobs are checked against Kubeflow's model of a PyTorchJob and the Kubernetes schema of pods.
"""

import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow.training import ApiClient
from kubeflow.training.utils.utils import FakeResponse
from restricted import ROOT, faults, templates
from support.helpers import RunText

from pipelines.cli.main import app
from pipelines.cluster.job_spec import JobOptions, render, to_yaml
from trainer.config.load import RECIPES
from trainer.errors import UserError

GPU = JobOptions(nodes=2, gpus_per_node=8)
DIGEST = "a/b@sha256:" + "0" * 64
CPU = JobOptions(nodes=2, gpus_per_node=0)


def _job(recipe: str = "resnet50", *overrides: str, options: JobOptions = GPU) -> dict[str, Any]:
    return render(recipe, list(overrides), options)[-1]


def _pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]


@pytest.mark.parametrize(
    "options",
    [
        GPU,
        CPU,
        JobOptions(
            3, 0, procs_per_node=4, name="other", namespace="team", cpu="500m", memory="1.5Gi",
            image=DIGEST,
        ),
        JobOptions(
            64, 8, service_account="a", priority_class="b", spread="kubernetes.io/hostname",
            suspend=True, gang=True,
        ),
        JobOptions(1, 8, object_store_secret="", mlflow_secret="", shm="1Gi", scratch="1Ti"),
        JobOptions(2, 8, node_selector=["a.b/c=D"], toleration=["e", "f=g:NoExecute"]),
    ],
    ids=["gpu", "cpu", "sizes", "gang", "no secrets", "node selector"],
)  # fmt: skip
def test_kubeflow_model_keeps_all_fields_of_the_job(options: JobOptions) -> None:
    """The SDK's classes drop fields that they do not define."""
    text = to_yaml(render("resnet50", ["batch.global_size=1536"], options))
    job = list(yaml.safe_load_all(text))[-1]
    client = ApiClient()
    model = client.deserialize(FakeResponse(job), "KubeflowOrgV1PyTorchJob")
    assert client.sanitize_for_serialization(model) == job
    (template,) = templates(job)
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x", **template["metadata"]},
        "spec": template["spec"],
    }
    kubernetes_validate.validate(pod, "1.34", strict=True)
    assert list(faults(template)) == []


def test_job_meets_the_requirements_of_the_training_operator() -> None:
    """Training operator 1.9.3: only workers, an elastic policy without restarts, the restart
    policy ExitCode, and the name of the container.
    """
    job = _job("resnet50", "batch.global_size=8192", options=JobOptions(64, 8))
    spec = job["spec"]
    assert list(spec["pytorchReplicaSpecs"]) == ["Worker"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    assert (worker["replicas"], worker["restartPolicy"], spec["nprocPerNode"]) == (
        64,
        "ExitCode",
        "8",
    )
    assert spec["elasticPolicy"] == {
        "rdzvBackend": "c10d", "rdzvId": "resnet50", "minReplicas": 64, "maxReplicas": 64,
        "maxRestarts": 0,
    }  # fmt: skip
    (container,) = _pod(job)["containers"]
    assert (container["name"], container["command"]) == (
        "pytorch",
        ["python", "-m", "trainer.launch"],
    )
    assert (
        container["resources"]["limits"]["nvidia.com/gpu"]
        == container["resources"]["requests"]["nvidia.com/gpu"]
        == "8"
    )
    assert _pod(job)["terminationGracePeriodSeconds"] > 100


def test_job_without_gpus_requests_none_and_has_no_cpu_limit() -> None:
    (container,) = _pod(_job("fashion-resnet8", options=JobOptions(2, 0, procs_per_node=2)))[
        "containers"
    ]
    assert container["resources"] == {
        "requests": {"cpu": "2", "memory": "8Gi"},
        "limits": {"memory": "8Gi"},
    }


def test_pods_with_gpus_tolerate_the_taint_of_gpu_nodes() -> None:
    assert _pod(_job())["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    ]
    assert not {"tolerations", "nodeSelector"} & set(_pod(_job("fashion-resnet8", options=CPU)))


def test_node_selectors_and_tolerations_reach_the_pods(convoy_ok: RunText) -> None:
    nodes = ("--node-selector", "cloud.example/pool=big", "--node-selector", "disk=")
    taints = ("team", "a.b/c:NoExecute", "d=e", "f=:NoSchedule")
    given = [word for taint in taints for word in ("--toleration", taint)]
    printed = convoy_ok(
        "render", "fashion-resnet8", "--nodes", 2, "--gpus-per-node", 0, *nodes, *given
    )
    (job,) = yaml.safe_load_all(printed)
    assert _pod(job)["nodeSelector"] == {"cloud.example/pool": "big", "disk": ""}
    assert _pod(job)["tolerations"] == [
        {"key": "team", "operator": "Exists"},
        {"key": "a.b/c", "operator": "Exists", "effect": "NoExecute"},
        {"key": "d", "operator": "Equal", "value": "e"},
        {"key": "f", "operator": "Equal", "value": "", "effect": "NoSchedule"},
    ]


def test_job_references_secrets_and_copies_no_environment_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2hunter2")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2hunter2@mlflow")
    documents = render("resnet50", [], GPU)
    assert "hunter2" not in to_yaml(documents)
    (container,) = _pod(documents[-1])["containers"]
    assert [source["secretRef"]["name"] for source in container["envFrom"]] == [
        "convoy-object-store",
        "convoy-mlflow",
    ]


def test_recipe_file_of_the_user_becomes_a_config_map(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "# é\n"
        + (RECIPES / "resnet50.yaml")
        .read_text()
        .replace("name: resnet50\n", "name: My_Net.v2\n", 1)
    )
    config_map, job = render(
        str(recipe), ["batch.global_size=512"], JobOptions(2, 8, namespace="team")
    )
    assert config_map["metadata"]["name"] == "my-net-v2-recipe"
    assert config_map["metadata"]["namespace"] == job["metadata"]["namespace"] == "team"
    assert config_map["data"] == {"mine.yaml": recipe.read_text()}
    (container,) = _pod(job)["containers"]
    assert container["args"][:2] == ["--", "/etc/convoy/mine.yaml"]
    assert {"name": "recipe", "mountPath": "/etc/convoy", "readOnly": True} in container[
        "volumeMounts"
    ]
    assert {"name": "recipe", "configMap": {"name": "my-net-v2-recipe"}} in _pod(job)["volumes"]
    assert (
        yaml.safe_load(
            next(iter(yaml.safe_load_all(to_yaml([config_map, job]))))["data"]["mine.yaml"]
        )["name"]
        == "My_Net.v2"
    )


def test_checkpoints_are_never_written_to_a_pods_disk(tmp_path: Path) -> None:
    (container,) = _pod(_job(options=JobOptions(2, 8, name="r50")))["containers"]
    assert container["args"] == ["--", "resnet50", "checkpoint.url=s3://convoy/checkpoints/r50"]
    (container,) = _pod(_job("resnet50", "checkpoint.url=gs://mine/x"))["containers"]
    assert container["args"] == ["--", "resnet50", "checkpoint.url=gs://mine/x"]
    for overrides in (["checkpoint.url=runs/x"], [f"data.train={tmp_path}"]):
        with pytest.raises(UserError, match=r"checkpoint\.url: "):
            render("resnet50", overrides, GPU)


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (
            ["batch.global_size=1000"], JobOptions(8, 8),
            "1000 is not divisible by 64 ranks; nearest valid sizes: 960 or 1024",
        ),
        (
            ["parallel.pipeline_stages=3"], GPU,
            "parallel.pipeline_stages: 16 ranks are not divisible by 3 stages",
        ),
        (["model.name=resnet5"], GPU, "model.name: there is no model 'resnet5'; nearest: "),
        (["data.image_size=16"], GPU, "data.image_size: 16 is too small"),
        (
            ["parallel.zero_stage=0"], GPU,
            "parallel.zero_stage: 0 cannot train with precision fp16",
        ),
        (
            ["optimizer.momentun=1"], GPU,
            "optimizer.momentun: unknown key; did you mean optimizer.momentum?",
        ),
        ([], JobOptions(0, 8), "--nodes: 0 is too small; the minimum is 1"),
        ([], JobOptions(1, -1), "--gpus-per-node: -1 is too small; the minimum is 0"),
        ([], JobOptions(1, 8, procs_per_node=4), "--procs-per-node: 4 ranks on 8 GPUs"),
        (
            [], JobOptions(1, 0, procs_per_node=0),
            "--procs-per-node: 0 is too small; the minimum is 1",
        ),
        ([], JobOptions(1, 8, name="Resnet_50"), "--name: 'Resnet_50' is not a valid job name"),
        ([], JobOptions(1, 8, name="50"), "--name: '50' is not a valid job name"),
        ([], JobOptions(1, 8, name=""), "--name: '' is not a valid job name"),
        ([], JobOptions(1, 8, name="r" * 51), "at most 50 characters"),
        (
            [], JobOptions(1, 8, namespace="a b"),
            "--namespace: 'a b' is not a valid Kubernetes name",
        ),
        (
            [], JobOptions(1, 8, mlflow_secret="A"),
            "--mlflow-secret: 'A' is not a valid Kubernetes name",
        ),
        (
            [], JobOptions(1, 8, image="convoy:latest"),
            "--image: 'convoy:latest' is not an image with a fixed tag",
        ),
        ([], JobOptions(1, 8, memory="lots"), "--memory: 'lots' is not a quantity"),
        (
            [], JobOptions(1, 8, node_selector=["gpu"]),
            "--node-selector: 'gpu' is not a node label KEY=VALUE",
        ),
        (
            [], JobOptions(1, 8, toleration=["gpu:Never"]),
            "--toleration: 'gpu:Never' is not KEY[=VALUE][:EFFECT]",
        ),
        (
            [], JobOptions(1, 8, kind="CronJob"),
            "--kind: 'CronJob' is not a kind of job; nearest: PyTorchJob",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_invalid_recipes_and_options_are_errors(
    overrides: list[str], options: JobOptions, message: str
) -> None:
    with pytest.raises(UserError) as error:
        render("resnet50", overrides, options)
    assert message in str(error.value)


def test_all_invalid_options_are_reported_at_once() -> None:
    with pytest.raises(UserError) as error:
        render("resnet50", [], JobOptions(0, -1, name="A", image="x:latest", cpu="?"))
    assert len(error.value.faults) == 5


def _shipped() -> list[Path]:
    return [
        p
        for p in sorted((ROOT / "k8s").rglob("*.yaml"))
        if p.read_text().startswith("# Made by: convoy render ")
    ]


@pytest.mark.parametrize("path", _shipped(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_jobs_equal_the_output_of_their_render_command(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command is in the first line of each file.

    It runs in this process, because its imports take seconds.
    """
    command = shlex.split(path.read_text().splitlines()[0].removeprefix("# Made by: "))
    monkeypatch.setattr("sys.argv", command)
    app(command[1:], standalone_mode=False)
    rendered = capsys.readouterr().out
    assert rendered.replace("THIS_FILE", str(path.relative_to(ROOT))) == path.read_text()


def test_each_landmark_network_has_a_job() -> None:
    names = {path.stem for path in _shipped() if path.parent.name == "jobs"}
    assert names == {"alexnet", "vgg16", "googlenet", "resnet50", "resnet152"}


def test_render_prints_only_yaml_and_errors_are_one_line(
    convoy_ok: RunText, convoy_refuses: RunText
) -> None:
    printed = convoy_ok("render", "resnet50", "--nodes", 2, "--gpus-per-node", 8)
    assert printed.startswith("# Made by: convoy render resnet50 --nodes 2 --gpus-per-node 8\n")
    assert [document["kind"] for document in yaml.safe_load_all(printed)] == ["PyTorchJob"]
    assert convoy_refuses("render", "resnet50", "--nodes", 3, "--gpus-per-node", 8) == (
        "convoy: batch.global_size: 256 is not divisible by 24 ranks; nearest valid sizes: "
        "240 or 264\n"
    )
