"""Commands of ``convoy`` that render, submit and manage training jobs in a cluster."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from trainer.errors import UserError

if TYPE_CHECKING:
    from pipelines.cluster.client import JobClient
    from pipelines.cluster.job_spec import JobOptions

Recipe = Annotated[str, typer.Argument(help="Recipe file, or name of a shipped recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe keys to override.")
]
Nodes = Annotated[int, typer.Option(help="Number of pods.")]
Gpus = Annotated[int, typer.Option(help="GPUs per pod, one rank each; 0: ranks without GPUs.")]
Procs = Annotated[int | None, typer.Option(help="Ranks per pod without GPUs; default: 1.")]
Name = Annotated[str | None, typer.Option(help="Name of the job; default: the recipe's name.")]
Namespace = Annotated[
    str | None,
    typer.Option(
        "--namespace", "-n", help="Namespace; default: the kubeconfig's.", show_default=False
    ),
]
Image = Annotated[
    str, typer.Option(help="Image with a fixed tag or a digest.", envvar="CONVOY_IMAGE")
]
Cpu = Annotated[
    str | None,
    typer.Option(
        help="CPUs per pod; default: 8 per GPU, or 1 per rank without GPUs.", show_default=False
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory per pod; default: 32Gi per GPU, or 4Gi per rank without GPUs.",
        show_default=False,
    ),
]
Shm = Annotated[
    str | None,
    typer.Option(
        help="Size of /dev/shm, part of the memory; default: 2Gi per GPU, or 1Gi per rank "
        "without GPUs.",
        show_default=False,
    ),
]
Scratch = Annotated[str, typer.Option(help="Size limit of /tmp.")]
StoreSecret = Annotated[
    str,
    typer.Option(help="Secret with the AWS_* variables, or those of another store; empty: none."),
]
MlflowSecret = Annotated[str, typer.Option(help="Secret with MLFLOW_TRACKING_URI; empty: none.")]
Account = Annotated[
    str, typer.Option(help="Service account of the pods; empty: the namespace's default.")
]
Priority = Annotated[str, typer.Option(help="Priority class of the pods.")]
Spread = Annotated[
    str,
    typer.Option(
        help="Node label; the pods are spread over its values, such as kubernetes.io/hostname."
    ),
]
Selector = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE", help="Label of the nodes that the pods may run on; repeatable."
    ),
]
Toleration = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY[=VALUE][:EFFECT]",
        help="Taint that the pods tolerate; repeatable. GPU jobs always tolerate nvidia.com/gpu.",
    ),
]
Gang = Annotated[
    bool, typer.Option("--gang", help="Start all pods or none; needs k8s/components/gang.")
]
Suspend = Annotated[
    bool, typer.Option("--suspend", help="Create the job suspended; convoy resume starts it.")
]
Kind = Annotated[str, typer.Option(help="Kind of the job in Kubernetes.")]
_IMAGE = "localhost/convoy:dev"
_STORE_SECRET, _MLFLOW_SECRET = "convoy-object-store", "convoy-mlflow"  # Secret names


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file with ``app``."""
    for command in (render, submit, status, logs, cancel, suspend, resume, secrets):
        app.command()(command)
    app.command(name="list")(list_jobs)


def render(
    recipe: Recipe,
    nodes: Nodes,
    gpus_per_node: Gpus,
    overrides: Overrides = None,
    procs_per_node: Procs = None,
    name: Name = None,
    namespace: Namespace = None,
    image: Image = _IMAGE,
    cpu: Cpu = None,
    memory: Memory = None,
    shm: Shm = None,
    scratch: Scratch = "20Gi",
    object_store_secret: StoreSecret = _STORE_SECRET,
    mlflow_secret: MlflowSecret = _MLFLOW_SECRET,
    service_account: Account = "",
    priority_class: Priority = "",
    spread: Spread = "",
    node_selector: Selector = None,
    toleration: Toleration = None,
    gang: Gang = False,
    suspend: Suspend = False,
    kind: Kind = "PyTorchJob",
) -> None:
    """Print the PyTorchJob manifest of a recipe.

    The output can be piped to kubectl apply -f -.
    """
    from pipelines.cluster.job_spec import render as run
    from pipelines.cluster.job_spec import to_yaml

    options = _options(locals())
    command = shlex.join(["convoy", *sys.argv[1:]])
    print(to_yaml(run(recipe, overrides or [], options), command), end="")


def submit(
    recipe: Recipe,
    nodes: Nodes,
    gpus_per_node: Gpus,
    overrides: Overrides = None,
    procs_per_node: Procs = None,
    name: Name = None,
    namespace: Namespace = None,
    image: Image = _IMAGE,
    cpu: Cpu = None,
    memory: Memory = None,
    shm: Shm = None,
    scratch: Scratch = "20Gi",
    object_store_secret: StoreSecret = _STORE_SECRET,
    mlflow_secret: MlflowSecret = _MLFLOW_SECRET,
    service_account: Account = "",
    priority_class: Priority = "",
    spread: Spread = "",
    node_selector: Selector = None,
    toleration: Toleration = None,
    gang: Gang = False,
    suspend: Suspend = False,
    kind: Kind = "PyTorchJob",
    wait: Annotated[
        bool,
        typer.Option("--wait", help="Follow the job until it ends; the exit code is the job's."),
    ] = False,
    dry_run: Annotated[
        str,
        typer.Option(
            help="server: the API server validates the job; client: only the checks of render."
        ),
    ] = "none",
) -> int:
    """Submit a training job to the cluster."""
    from pipelines.cluster.job_spec import render as run

    if dry_run not in ("none", "client", "server"):
        raise UserError(f"--dry-run: {dry_run!r} is neither client nor server")
    documents = run(recipe, overrides or [], _options(locals()))
    job = documents[-1]["metadata"]["name"]
    if dry_run == "client":
        print(f"{job}: valid, as far as can be checked without the cluster")
        return 0
    from pipelines.cluster.client import JobClient

    cluster = JobClient(namespace)
    cluster.submit(documents, dry_run == "server")
    place = f" --namespace {namespace}" if namespace else ""
    if dry_run == "server":
        print(f"{job}: the API server would accept it in namespace {cluster.namespace}")
        return 0
    print(f"{job}: submitted to namespace {cluster.namespace}; convoy status {job}{place}")
    return cluster.follow(job, _print_line).exit_code or 0 if wait else 0


def _options(given: dict[str, object]) -> "JobOptions":
    from dataclasses import fields

    from pipelines.cluster.job_spec import JobOptions

    known = {field.name for field in fields(JobOptions)}
    options = {key: value for key, value in given.items() if key in known and value is not None}
    return JobOptions(**options)  # type: ignore[arg-type]


def _print_line(line: str) -> None:
    print(line, flush=True)


def status(
    name: Annotated[
        str | None, typer.Argument(help="Job; default: all jobs.", show_default=False)
    ] = None,
    namespace: Namespace = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print each change until the job is finished.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Show the status of one job, or of all jobs, in one line each.

    If a job does not run, the line states the reason and what to do.
    """
    from pipelines.cluster.client import JobClient

    cluster = JobClient(namespace)
    if name is None:
        return _list(cluster)
    if follow:
        return cluster.follow(name, _print_line).exit_code or 0
    found = cluster.status(name)
    print(json.dumps(vars(found), indent=1) if as_json else found.line())
    return 0


def logs(
    name: str,
    namespace: Namespace = None,
    rank: Annotated[
        int, typer.Option(help="Rank whose pod to read; rank 0 prints the progress.", min=0)
    ] = 0,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", "-f", help="Print new lines too, also of a pod that replaces this one."
        ),
    ] = False,
) -> None:
    """Print the logs of a job."""
    from pipelines.cluster.client import JobClient

    for line in JobClient(namespace).logs(name, rank, follow):
        _print_line(line)


def cancel(name: str, namespace: Namespace = None) -> None:
    """Delete a job.

    Its checkpoints are kept: the same job resumes from them when it is submitted again.
    """
    from pipelines.cluster.client import JobClient

    JobClient(namespace).cancel(name)
    print(f"{name}: cancelled")


def suspend(name: str, namespace: Namespace = None) -> None:
    """Suspend a job.

    Its pods write a checkpoint and are deleted.
    """
    from pipelines.cluster.client import JobClient

    JobClient(namespace).suspend(name, True)
    print(f"{name}: suspended; convoy resume {name}")


def resume(name: str, namespace: Namespace = None) -> None:
    """Resume a suspended job from its latest checkpoint."""
    from pipelines.cluster.client import JobClient

    JobClient(namespace).suspend(name, False)
    print(f"{name}: resumed")


def list_jobs(namespace: Namespace = None) -> None:
    """List the training jobs in a namespace."""
    from pipelines.cluster.client import JobClient

    _list(JobClient(namespace))


def _list(cluster: "JobClient") -> int:
    found = cluster.statuses()
    if not found:
        print(f"no jobs in namespace {cluster.namespace}")
        return 0
    table = Table("job", "state", "since", "", box=None)
    for status, since in found:
        table.add_row(status.name, status.state, since, status.says)
    Console().print(table)
    return 0


def secrets(
    file: Annotated[
        Path, typer.Argument(help="File to write, such as k8s/overlays/local/secrets.env.")
    ],
    endpoint: Annotated[
        str, typer.Option(help="Endpoint of the object store.")
    ] = "http://convoy-object-store:8333",
) -> None:
    """Create credentials for the services in k8s/base/services.

    The object store's credentials are written to FILE, the database's to a second file next to it.
    """
    from pipelines.cluster.secrets import write_secrets

    for path in write_secrets(file, endpoint):
        print(f"wrote {path}; keep it out of version control")
