"""Runs kubectl, and builds the small manifests that the tests apply."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from support.helpers import until

_PREFIX = "convoy-test-"  # of the tests' namespaces
RESTRICTED = {
    "runAsNonRoot": True,
    "runAsUser": 10001,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


class KubectlError(Exception):
    """kubectl failed; the message is its stderr."""


@dataclass(frozen=True)
class Kubectl:
    """Runs kubectl against one cluster, in one namespace."""

    program: str
    namespace: str = "default"

    def within(self, namespace: str) -> Kubectl:
        return replace(self, namespace=namespace)

    def command(self, *arguments: str) -> list[str]:
        return [self.program, "--namespace", self.namespace, *arguments]

    def __call__(self, *arguments: str, stdin: str | None = None, timeout: float = 120) -> str:
        done = subprocess.run(
            self.command(*arguments), input=stdin, capture_output=True, text=True, timeout=timeout
        )
        if done.returncode:
            raise KubectlError(done.stderr.strip())
        return done.stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        return json.loads(self("get", *arguments, "-o", "json"))

    def create(self, *manifests: dict[str, Any]) -> None:
        self(
            "create",
            "-f",
            "-",
            stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)}),
        )

    def apply_overlay(
        self, manifests: Path, overlay: str, *options: str, without: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `kubectl apply -k` with an overlay of k8s/overlays in this namespace.

        ``manifests``: a copy of k8s/; ``without``: a kind whose objects are omitted.
        """
        folder = manifests.parent / f"test-{overlay}"
        folder.mkdir()
        kustomization: dict[str, Any] = {
            "namespace": self.namespace,
            "resources": [f"../{manifests.name}/overlays/{overlay}"],
        }
        if without is not None:
            deletion = {
                "apiVersion": "v1",
                "kind": without,
                "metadata": {"name": "any"},
                "$patch": "delete",
            }
            kustomization["patches"] = [
                {"target": {"kind": without}, "patch": json.dumps(deletion)}
            ]
        (folder / "kustomization.yaml").write_text(json.dumps(kustomization))
        command = self.command("apply", *options, "-k", str(folder))
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    def phases(self, selector: str) -> list[str]:
        return [pod["status"].get("phase", "") for pod in self.get("pods", "-l", selector)["items"]]

    def wait_for_pod(self, name: str, phase: str, seconds: float = 60) -> None:
        def reached() -> bool:
            status = self.get("pod", name)["status"]
            if phase != "Failed" and status.get("phase") == "Failed":
                raise AssertionError(f"{name} failed: {self('logs', name)}")
            return status.get("phase") == phase

        until(reached, seconds, lambda: self("describe", "pod", name))


@contextmanager
def temporary_namespace(cluster: Kubectl, wait: bool = False) -> Iterator[Kubectl]:
    """Create a namespace that enforces Pod Security `restricted`, and delete it at the end.

    ``wait``: wait for the deletion; otherwise `wait_for_namespace_deletion` does.
    """
    name = new_namespace_name()
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    manifest = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": labels},
    }
    cluster("apply", "-f", "-", stdin=json.dumps(manifest))
    kubectl = cluster.within(name)
    try:
        until(
            lambda: "serviceaccount/default" in kubectl("get", "serviceaccounts", "-o", "name"), 30
        )
        yield kubectl
    finally:
        cluster(
            "delete",
            "namespace",
            name,
            f"--wait={str(wait).lower()}",
            "--timeout=120s",
            timeout=150,
        )


def new_namespace_name() -> str:
    return f"{_PREFIX}{uuid.uuid4().hex[:8]}"


def wait_for_namespace_deletion(cluster: Kubectl) -> None:
    """Wait until the deleted namespaces of tests no longer exist.

    Called once for all tests, because a deletion takes longer than many tests.
    """

    def terminating() -> list[str]:
        found = [
            item
            for item in cluster.get("namespaces")["items"]
            if item["status"]["phase"] == "Terminating"
        ]
        return [
            item["metadata"]["name"]
            for item in found
            if item["metadata"]["name"].startswith(_PREFIX)
        ]

    until(lambda: not terminating(), 240, lambda: f"not deleted: {terminating()}")


def container(image: str, *command: str, **more: Any) -> dict[str, Any]:
    return {
        "name": "main",
        "image": image,
        "command": list(command),
        "securityContext": RESTRICTED,
        **more,
    }


def pod(name: str, *containers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "containers": list(containers),
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            **spec,
        },
    }


def pytorch_job(
    name: str, workers: int, *command: str, image: str, master: bool = False, **spec: Any
) -> dict[str, Any]:
    template = {"spec": {"containers": [{**container(image, *command), "name": "pytorch"}], **spec}}
    replicas = {"Worker": {"replicas": workers, "restartPolicy": "OnFailure", "template": template}}
    if master:
        replicas["Master"] = {"replicas": 1, "restartPolicy": "OnFailure", "template": template}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {"pytorchReplicaSpecs": replicas},
    }


def simulated_node(
    name: str, gpus: int, kind: str = "fake", taint: str | None = None
) -> dict[str, Any]:
    """Return a node that kwok simulates: it accepts pods and reports them as Running.

    A taint keeps other pods away. ``kind``: its label `type`; ``taint``: key of another taint.
    """
    resources = {"cpu": "64", "memory": "512Gi", "pods": "110", "nvidia.com/gpu": str(gpus)}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name,
            "annotations": {"kwok.x-k8s.io/node": "fake"},
            "labels": {"type": kind, "kubernetes.io/hostname": name},
        },
        "spec": {
            "taints": [
                {"key": key, "value": "fake", "effect": "NoSchedule"}
                for key in filter(None, (KWOK_TAINT, taint))
            ]
        },
        "status": {"allocatable": resources, "capacity": resources},
    }


KWOK_TAINT = "kwok.x-k8s.io/node"
ON_SIMULATED_NODES = {
    "nodeSelector": {"type": "fake"},
    "tolerations": [{"key": KWOK_TAINT, "operator": "Exists"}],
}
