"""Runs the training operator in a pod: k8s/third-party with a local image, under `restricted`."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state import CHECKOUT, ClusterError, State, wait_for

if TYPE_CHECKING:
    from cluster import Kubectl

NAMESPACE = "kubeflow"
# Upstream's template has no security context, which `restricted` requires, and needs an image with
# nslookup.
INIT_CONTAINER = """- name: init-pytorch
  image: {{.InitContainerImage}}
  imagePullPolicy: IfNotPresent
  command:
    - sh
    - -c
    - |
      for i in $(seq {{.MaxTries}}); do getent hosts {{.MasterAddr}} && exit; sleep 1; done
      exit 1
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {cpu: 100m, memory: 32Mi}
  securityContext:
    runAsNonRoot: true
    runAsUser: 65534
    allowPrivilegeEscalation: false
    capabilities: {drop: [ALL]}
    seccompProfile: {type: RuntimeDefault}
"""


def kustomization() -> dict[str, Any]:
    """Return changes to the shipped kustomization: local image, jobs with a master, readiness."""
    mount = {"name": "init-container", "mountPath": "/etc/config", "readOnly": True}
    volume = {"name": "init-container", "configMap": {"name": "training-operator-init-container"}}
    container = "/spec/template/spec/containers/0"
    deployment = [
        {
            "op": "add",
            "path": f"{container}/args/-",
            "value": "-pytorch-init-container-image=localhost/convoy-base:dev",
        },
        {"op": "add", "path": f"{container}/args/-", "value": "-enable-scheme=pytorchjob"},
        {"op": "add", "path": f"{container}/readinessProbe/initialDelaySeconds", "value": 0},
        {"op": "add", "path": f"{container}/readinessProbe/periodSeconds", "value": 1},
        {"op": "add", "path": f"{container}/volumeMounts/-", "value": mount},
        {"op": "add", "path": "/spec/template/spec/volumes/-", "value": volume},
    ]
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": NAMESPACE,
            "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
        },
    }
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": ["shipped"],
        "images": [
            {
                "name": "ghcr.io/kubeflow/training-v1/training-operator",
                "newName": "localhost/convoy-training-operator",
                "newTag": "1.9.3",
            }
        ],
        "configMapGenerator": [
            {"name": "training-operator-init-container", "files": ["initContainer.yaml"]}
        ],
        "patches": [
            {
                "target": {"kind": "Deployment", "name": "training-operator"},
                "patch": json.dumps(deployment),
            },
            {"patch": json.dumps(namespace)},
        ],
    }


def ship(folder: Path, upstream: Path) -> None:
    """Copy k8s/third-party/training-operator; the copy's upstream is a folder of this machine."""
    shutil.copytree(CHECKOUT / "k8s/third-party/training-operator", folder)
    file = folder / "kustomization.yaml"
    text, count = re.subn(
        r"https://github.com/kubeflow/training-operator//manifests\S+",
        os.path.relpath(upstream, folder),
        file.read_text(),
    )
    if count != 1:
        raise ClusterError(f"{file} must name its upstream exactly once")
    file.write_text(text)


PROBE = {
    "pytorchReplicaSpecs": {
        "Worker": {
            "template": {
                "spec": {"containers": [{"name": "pytorch", "image": "localhost/pause:3.10"}]}
            }
        }
    }
}


def apply_operator(state: State, tools: Path, kubectl: Kubectl) -> None:
    folder = state.folder / "operator"
    ship(folder / "shipped", tools / "training-operator/overlays/standalone")
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization(), indent=2))
    (folder / "initContainer.yaml").write_text(INIT_CONTAINER)
    kubectl("apply", "--server-side", "-f", "-", stdin=kubectl("kustomize", str(folder)))


def wait_for_operator(kubectl: Kubectl) -> None:
    kubectl("-n", NAMESPACE, "rollout", "status", "--timeout=120s", "deployment/training-operator")
    # Ready is not enough: until the webhook has its certificate, every job is rejected.
    probe = json.dumps(
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": {"name": "probe"},
            "spec": PROBE,
        }
    )
    dry_run = ("-n", "default", "create", "--dry-run=server", "-f", "-")
    wait_for("the operator's webhook", lambda: kubectl.succeeds(*dry_run, stdin=probe), 60, 0.2)
