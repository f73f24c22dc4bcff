"""kubectl by subprocess, and the small manifests that the tests apply."""

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


class Refused(Exception):
    """kubectl ended with an error; the text is what it said."""


@dataclass(frozen=True)
class Kubectl:
    """Commands to one cluster, in one namespace."""

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
            raise Refused(done.stderr.strip())
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
        """`kubectl apply -k` of one of k8s/overlays, moved into this namespace. ``manifests``: a
        copy of k8s/; ``without``: a kind that is left out.
        """
        own = manifests.parent / f"own-{overlay}"
        own.mkdir()
        kustomization: dict[str, Any] = {
            "namespace": self.namespace,
            "resources": [f"../{manifests.name}/overlays/{overlay}"],
        }
        if without is not None:
            gone = {
                "apiVersion": "v1",
                "kind": without,
                "metadata": {"name": "any"},
                "$patch": "delete",
            }
            kustomization["patches"] = [{"target": {"kind": without}, "patch": json.dumps(gone)}]
        (own / "kustomization.yaml").write_text(json.dumps(kustomization))
        command = self.command("apply", *options, "-k", str(own))
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
def own_namespace(cluster: Kubectl, wait: bool = False) -> Iterator[Kubectl]:
    """A new one that enforces Pod Security `restricted`. ``wait``: until it is gone; else
    `until_namespaces_are_gone` does.
    """
    name = new_namespace_name()
    labels = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
    made = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    cluster("apply", "-f", "-", stdin=json.dumps(made))
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


def until_namespaces_are_gone(cluster: Kubectl) -> None:
    """Those of tests that are being deleted: once for all tests, since each takes longer than many
    a test.
    """

    def leaving() -> list[str]:
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

    until(lambda: not leaving(), 240, lambda: f"still there: {leaving()}")


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


def fake_node(name: str, gpus: int, kind: str = "fake", taint: str | None = None) -> dict[str, Any]:
    """A node that kwok plays: it takes pods and says that they run. Only pods that ask for it come
    here; ``kind``: its label `type`, ``taint``: the key of another taint.
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
                for key in filter(None, (FAKE, taint))
            ]
        },
        "status": {"allocatable": resources, "capacity": resources},
    }


FAKE = "kwok.x-k8s.io/node"
ON_FAKE_NODES = {
    "nodeSelector": {"type": "fake"},
    "tolerations": [{"key": FAKE, "operator": "Exists"}],
}
