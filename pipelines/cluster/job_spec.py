"""``convoy render``: builds the job of a recipe: its options, their validation, and its pods.

What differs between the kinds of jobs is in a JobKind.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipelines.cluster.job_kind import Document, JobKind, job_kind
from trainer.config.load import RECIPES, find_recipe
from trainer.config.run_plan import check_config, split_ranks
from trainer.config.schema import RunConfig, load_config
from trainer.data.storage.store import is_remote, parse_storage_url
from trainer.errors import UserError
from trainer.faults.hardware_errors import GPUS_VARIABLE, NODE_VARIABLE
from trainer.progress.progress_record import PROGRESS_LOG_VARIABLE
from trainer.secrets.credentials import refuse_credentials
from trainer.tracking.server import check_registered_name

CONTAINER = "pytorch"  # the container name that the training-operator looks for
GANG_LABEL = "convoy/gang"
_PORT = 23456  # rendezvous port; the training-operator's default
_USER = 10001  # user and group ID of the image
_RECIPE_FOLDER = "/etc/convoy"
_GRACE_SECONDS = (
    120  # from SIGTERM to SIGKILL; the launcher gives the ranks 100 s of this for a checkpoint
)
_LONGEST_NAME = 50  # a pod and its hostname are NAME-worker-N, at most 63 characters
_ANY_SAMPLES = 2**62
_GPU = "nvidia.com/gpu"
_KEY = r"([a-z0-9]([-.a-z0-9]*[a-z0-9])?/)?[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?"
_VALUE = r"([A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?)?"
_SELECTOR = re.compile(f"(?P<key>{_KEY})=(?P<value>{_VALUE})")
_TOLERATION = re.compile(
    f"(?P<key>{_KEY})(=(?P<value>{_VALUE}))?(:(?P<effect>NoSchedule|PreferNoSchedule|NoExecute))?"
)


@dataclass(frozen=True)
class JobOptions:
    """Options of a job in addition to its recipe.

    Sizes are Kubernetes quantities per pod. An empty name omits its field.
    """

    nodes: int
    gpus_per_node: int
    procs_per_node: int | None = None
    """Number of ranks per pod without GPUs."""
    name: str | None = None
    namespace: str = ""
    image: str = "localhost/convoy:dev"
    cpu: str | None = None
    memory: str | None = None
    shm: str | None = None
    scratch: str = "20Gi"
    object_store_secret: str = "convoy-object-store"
    mlflow_secret: str = "convoy-mlflow"
    service_account: str = ""
    priority_class: str = ""
    spread: str = ""
    """Node label over whose values the pods are spread evenly, if possible."""
    node_selector: list[str] = field(default_factory=list)
    """KEY=VALUE labels of the nodes that the pods may run on."""
    toleration: list[str] = field(default_factory=list)
    """KEY[=VALUE][:EFFECT] taints that the pods tolerate.

    Pods with GPUs always tolerate the taint of GPU nodes.
    """
    gang: bool = False
    """Start all pods or none, through a PodGroup.

    Needs Kubernetes 1.37 and the component `gang`, which links the pods to the PodGroup.
    """
    suspend: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    kind: str = "PyTorchJob"

    @property
    def ranks_per_node(self) -> int:
        return self.gpus_per_node or self.procs_per_node or 1


def render(recipe: str, overrides: list[str], options: JobOptions) -> list[Document]:
    """Return the manifests of a recipe: the objects that the job needs, then the job.

    The objects are the ConfigMap of a recipe that is not shipped, and the PodGroup of a gang. No
    data is read. Raises UserError for every error that can be detected without the data.
    """
    refuse_credentials(
        {recipe: find_recipe(recipe).read_text(encoding="utf-8")}
        | {o.partition("=")[0]: o for o in overrides}
    )
    config = load_config(recipe, overrides)
    name = options.name if options.name is not None else re.sub(r"[._]", "-", config.name.lower())
    kind = job_kind(options.kind)
    faults = [*_validate(name, options), *kind.validate(options)]
    if faults:
        raise UserError(*faults)
    check_config(config)
    if config.tracking.register_as:
        check_registered_name(config.tracking.register_as)
    _check_model(config)
    split_ranks(config, options.nodes * options.ranks_per_node, _ANY_SAMPLES)
    path = find_recipe(recipe)
    documents: list[Document] = []
    shipped = path.parent == RECIPES
    key = path.name if re.fullmatch(r"[-._a-zA-Z0-9]+", path.name) else "recipe.yaml"
    if not shipped:
        data = {key: path.read_text(encoding="utf-8")}
        meta = _metadata(f"{name}-recipe", name, options)
        documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data})
    arguments = [
        path.stem if shipped else f"{_RECIPE_FOLDER}/{key}",
        *_default_checkpoint_url(config, name),
        *overrides,
    ]
    if options.gang:
        spec = {"schedulingPolicy": {"gang": {"minCount": options.nodes}}}
        meta = _metadata(name, name, options)
        documents.append(
            {
                "apiVersion": "scheduling.k8s.io/v1beta1",
                "kind": "PodGroup",
                "metadata": meta,
                "spec": spec,
            }
        )
    pod = _pod(name, arguments, None if shipped else f"{name}-recipe", options)
    documents.append(_job(kind, name, pod, options))
    return documents


def to_yaml(documents: list[Document], command: str = "") -> str:
    """Return the manifests as YAML that starts with usage instructions.

    ``command``: the command that created the manifests.
    """
    job = documents[-1]["metadata"]
    name, place = job["name"], f" --namespace {job['namespace']}" if "namespace" in job else ""
    lines = [f"# Made by: {command}"] if command else []
    lines += [
        f"# Apply: kubectl apply{place} -f THIS_FILE",
        f"# Check: convoy status {name}{place}",
        f"# Logs:  convoy logs {name}{place} --follow",
        f"# Clean: convoy cancel {name}{place}",
    ]
    body = yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=200, explicit_start=True)
    return "\n".join(lines) + "\n" + body


class _Dumper(yaml.SafeDumper):
    """YAML dumper without anchors.

    Writes multi-line strings as blocks and indents lists as kubectl users expect.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", value, style="|" if "\n" in value else None
    )


_Dumper.add_representer(str, _text)


def _validate(name: str, options: JobOptions) -> list[str]:
    """Return the errors that the API server or the operator would reject or never start."""
    faults = []
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > _LONGEST_NAME:
        faults.append(
            f"--name: {name!r} is not a valid job name; it must be a lower-case letter, followed "
            f"by lower-case letters, digits and dashes, at most {_LONGEST_NAME} characters"
        )
    for option, value in (
        ("--namespace", options.namespace),
        ("--object-store-secret", options.object_store_secret),
        ("--mlflow-secret", options.mlflow_secret),
        ("--service-account", options.service_account),
        ("--priority-class", options.priority_class),
    ):
        if value and not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", value):
            faults.append(
                f"{option}: {value!r} is not a valid Kubernetes name; use lower-case letters, "
                "digits and dashes"
            )
    if options.nodes < 1:
        faults.append(f"--nodes: {options.nodes} is too small; the minimum is 1")
    if options.gpus_per_node < 0:
        faults.append(
            f"--gpus-per-node: {options.gpus_per_node} is too small; the minimum is 0 (no GPUs)"
        )
    if options.procs_per_node is not None and options.procs_per_node < 1:
        faults.append(f"--procs-per-node: {options.procs_per_node} is too small; the minimum is 1")
    elif options.procs_per_node is not None and options.gpus_per_node not in (
        0,
        options.procs_per_node,
    ):
        faults.append(
            f"--procs-per-node: {options.procs_per_node} ranks on {options.gpus_per_node} GPUs; "
            "each rank needs one GPU"
        )
    if not re.fullmatch(r"[a-z0-9][a-zA-Z0-9./_:@-]*", options.image) or options.image.endswith(
        ":latest"
    ):
        faults.append(f"--image: {options.image!r} is not an image with a fixed tag or a digest")
    for option, quantity in (
        ("--cpu", options.cpu), ("--memory", options.memory), ("--shm", options.shm),
        ("--scratch", options.scratch),
    ):  # fmt: skip
        if quantity is not None and not re.fullmatch(
            r"(\d+(\.\d+)?|\.\d+)(m|[kMGTPE]|[KMGTPE]i)?", quantity
        ):
            faults.append(f"{option}: {quantity!r} is not a quantity such as 500m, 4 or 16Gi")
    for label in options.node_selector:
        if not _SELECTOR.fullmatch(label):
            faults.append(f"--node-selector: {label!r} is not a node label KEY=VALUE")
    for taint in options.toleration:
        if not _TOLERATION.fullmatch(taint):
            faults.append(
                f"--toleration: {taint!r} is not KEY[=VALUE][:EFFECT], with the effect "
                "NoSchedule, PreferNoSchedule or NoExecute"
            )
    return faults


def _check_model(config: RunConfig) -> None:
    """Build the model without memory, to detect invalid options and too small images early."""
    import torch

    from trainer.export.exported_model import ModelMetadata

    with torch.device("meta"):
        ModelMetadata.of(config, [], config.model.num_classes or 1000).build()


def _default_checkpoint_url(config: RunConfig, name: str) -> list[str]:
    """Return an override that places checkpoints next to the data, if the recipe sets no URL.

    A pod's own disk is lost with the pod, so it cannot hold checkpoints. Raises UserError.
    """
    if config.checkpoint.url is not None:
        if not is_remote(config.checkpoint.url) and not config.checkpoint.url.lower().startswith(
            "file://"
        ):
            raise UserError(
                f"checkpoint.url: {config.checkpoint.url} would be lost with its pod; use an "
                "object store (s3://...), or file:///... for a volume that all pods share"
            )
        return []
    if not is_remote(config.data.train):
        raise UserError(
            "checkpoint.url: must be set, because data.train is not in an object store; use "
            "s3://BUCKET/PREFIX"
        )
    return [f"checkpoint.url={parse_storage_url(config.data.train).root}/checkpoints/{name}"]


def _metadata(name: str, job: str, options: JobOptions) -> Document:
    place = {"namespace": options.namespace} if options.namespace else {}
    return {"name": name, **place, "labels": _labels(job) | options.labels}


def _labels(job: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "convoy",
        "app.kubernetes.io/component": "trainer",
        "app.kubernetes.io/part-of": "convoy",
        "app.kubernetes.io/instance": job,
    }


def _job(kind: JobKind, name: str, pod: Document, options: JobOptions) -> Document:
    labels = _labels(name) | ({GANG_LABEL: "true"} if options.gang else {})
    return {
        "apiVersion": f"{kind.group}/{kind.version}",
        "kind": kind.name,
        "metadata": _metadata(name, name, options),
        "spec": kind.spec(name, {"metadata": {"labels": labels}, "spec": pod}, options),
    }


def _pod(name: str, arguments: list[str], config_map: str | None, options: JobOptions) -> Document:
    volumes: list[Document] = [
        {"name": "tmp", "emptyDir": {"sizeLimit": options.scratch}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _sizes(options)["shm"]}},
    ]
    if config_map is not None:
        volumes.append({"name": "recipe", "configMap": {"name": config_map}})
    pod: Document = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(arguments, volumes, options)],
        "volumes": volumes,
    }
    for key, value in (
        ("serviceAccountName", options.service_account),
        ("priorityClassName", options.priority_class),
    ):
        if value:
            pod[key] = value
    if options.node_selector:
        pod["nodeSelector"] = dict(label.split("=", 1) for label in options.node_selector)
    if tolerations := _tolerations(options):
        pod["tolerations"] = tolerations
    if options.spread:
        pod["topologySpreadConstraints"] = [
            {
                "maxSkew": 1,
                "topologyKey": options.spread,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"app.kubernetes.io/instance": name}},
            }
        ]
    return pod


def _tolerations(options: JobOptions) -> list[Document]:
    """Return the tolerations.

    A taint without a value tolerates any value, and one without an effect tolerates every effect.
    """
    found: list[Document] = []
    if options.gpus_per_node:
        found.append({"key": _GPU, "operator": "Exists", "effect": "NoSchedule"})
    for match in filter(None, map(_TOLERATION.fullmatch, options.toleration)):
        value, effect = match["value"], match["effect"]
        meant = {"operator": "Exists"} if value is None else {"operator": "Equal", "value": value}
        found.append({"key": match["key"], **meant, **({"effect": effect} if effect else {})})
    return found


def _container(arguments: list[str], volumes: list[Document], options: JobOptions) -> Document:
    sizes = _sizes(options)
    requests = {"cpu": sizes["cpu"], "memory": sizes["memory"]}
    limits = {"memory": sizes["memory"]}  # no CPU limit: ranks without GPUs may use idle CPUs
    if options.gpus_per_node:
        requests[_GPU] = str(options.gpus_per_node)
        limits = dict(requests)
    mounts = {"tmp": {"mountPath": "/tmp"}, "shm": {"mountPath": "/dev/shm"}}
    mounts |= {"recipe": {"mountPath": _RECIPE_FOLDER, "readOnly": True}}  # type: ignore[dict-item]
    secrets = [secret for secret in (options.object_store_secret, options.mlflow_secret) if secret]
    return {
        "name": CONTAINER,
        "image": options.image,
        "command": ["python", "-m", "trainer.launch"],
        "args": ["--", *arguments],
        "env": [
            {"name": "CONVOY_TERMINATION_LOG", "value": "/dev/termination-log"},
            {"name": PROGRESS_LOG_VARIABLE, "value": "1"},
            {
                "name": "CONVOY_CPUS",
                "valueFrom": {"resourceFieldRef": {"resource": "requests.cpu"}},
            },
            {"name": NODE_VARIABLE, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            *(
                [{"name": GPUS_VARIABLE, "value": str(options.gpus_per_node)}]
                if options.gpus_per_node
                else []
            ),
            {
                "name": "CONVOY_NAMESPACE",
                "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}},
            },
        ],
        "envFrom": [{"secretRef": {"name": secret}} for secret in secrets],
        "ports": [{"name": "pytorchjob-port", "containerPort": _PORT}],
        "resources": {"requests": requests, "limits": limits},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [{"name": volume["name"], **mounts[volume["name"]]} for volume in volumes],
    }


def _sizes(options: JobOptions) -> dict[str, str]:
    """Return the CPU, memory and /dev/shm sizes of a pod.

    The CPUs decode the images of the GPUs. Memory holds prefetched data and a checkpoint of the
    full model. NCCL communicates through /dev/shm.
    """
    ranks = options.ranks_per_node
    default = (8, 32, 2) if options.gpus_per_node else (1, 4, 1)
    cpu, memory, shm = (
        given or f"{number * ranks}{unit}"
        for given, number, unit in zip(
            (options.cpu, options.memory, options.shm), default, ("", "Gi", "Gi"), strict=True
        )
    )
    return {"cpu": cpu, "memory": memory, "shm": shm}
