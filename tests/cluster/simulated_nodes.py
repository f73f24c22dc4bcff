"""Simulated GPU clusters: kwok nodes for one test, the gang policy for one namespace, and jobs."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from kubectl import KWOK_TAINT, Kubectl, container, pod, simulated_node
from support.helpers import until

GPUS = 8  # per node
POLICY = Path(__file__).resolve().parents[2] / "k8s/components/gang/policy.yaml"
JOB_LABEL = "training.kubeflow.org/job-name"


@dataclass(frozen=True)
class Pool:
    """Simulated nodes with a unique value of the label `type`."""

    kubectl: Kubectl
    name: str

    def add(self, count: int, taint: str | None = None) -> list[str]:
        """Create ``count`` nodes and wait until they are ready; return their names."""
        batch = uuid.uuid4().hex[:6]
        names = [f"{self.name}-{batch}-{number}" for number in range(count)]
        self.kubectl.create(*[simulated_node(name, GPUS, self.name, taint) for name in names])
        each = (
            "{range .items[*]}{.metadata.name}="
            '{.status.conditions[?(@.type=="Ready")].status} {end}'
        )
        ready = {f"{name}=True" for name in names}

        def all_ready() -> bool:
            return ready <= set(
                self.kubectl(
                    "get", "nodes", "-l", f"type={self.name}", "-o", f"jsonpath={each}"
                ).split()
            )

        until(all_ready, 120)
        return names

    def job(self, nodes: int, name: str, *more: str, kubectl: Kubectl) -> tuple[str | int, ...]:
        """Return the arguments of `convoy submit` for ResNet-50 on ``nodes`` of these nodes."""
        place = (
            "--namespace",
            kubectl.namespace,
            "--node-selector",
            f"type={self.name}",
            "--toleration",
            KWOK_TAINT,
        )
        sizes = ("--nodes", nodes, "--gpus-per-node", GPUS)
        return (
            "submit",
            "resnet50",
            "--name",
            name,
            *sizes,
            *place,
            *more,
            "batch.global_size=8192",
        )


@contextmanager
def pool(kubectl: Kubectl) -> Iterator[Pool]:
    """Yield an empty pool; delete its nodes at the end.

    Delete pods first: the deletion of a pod takes a minute if its node has been deleted.
    """
    name = f"pool-{uuid.uuid4().hex[:6]}"
    try:
        yield Pool(kubectl, name)
    finally:
        kubectl("delete", "nodes", "-l", f"type={name}", "--wait=false")


@contextmanager
def gang_policy(kubectl: Kubectl) -> Iterator[None]:
    """Apply the shipped policy to one namespace."""
    policy, binding = yaml.safe_load_all(POLICY.read_text())
    for document in (policy, binding):
        document["metadata"]["name"] = kubectl.namespace
    binding["spec"]["policyName"] = kubectl.namespace
    policy["spec"]["matchConstraints"]["namespaceSelector"] = {
        "matchLabels": {"kubernetes.io/metadata.name": kubectl.namespace}
    }
    kubectl.create(policy, binding)
    probe = pod("probe", container("localhost/pause:3.10"))
    probe["metadata"]["labels"] = {JOB_LABEL: "probe", "convoy/gang": "true"}

    def in_force() -> bool:
        answer = kubectl(
            "create", "--dry-run=server", "-o", "json", "-f", "-", stdin=json.dumps(probe)
        )
        return json.loads(answer)["spec"].get("schedulingGroup") == {"podGroupName": "probe"}

    try:
        until(in_force, 30)
        yield
    finally:
        kubectl(
            "delete", "mutatingadmissionpolicybinding,mutatingadmissionpolicy", kubectl.namespace
        )


def phases(kubectl: Kubectl, job: str) -> dict[str, int]:
    """Return the number of a job's pods by phase."""
    found = kubectl(
        "get", "pods", "-l", f"{JOB_LABEL}={job}", "-o", "jsonpath={.items[*].status.phase}"
    ).split()
    return {phase: found.count(phase) for phase in set(found)}


def active(kubectl: Kubectl, job: str) -> int:
    """Return the number of active pods as the operator counts them.

    The response is small, which matters with hundreds of pods.
    """
    return int(
        kubectl("get", "pytorchjob", job, "-o", "jsonpath={.status.replicaStatuses.Worker.active}")
        or 0
    )
