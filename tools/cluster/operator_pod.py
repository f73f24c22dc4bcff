"""The training operator in its own pod: upstream's manifests, with our image and what many pods and `restricted` need."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from state import State, wait_for

if TYPE_CHECKING:
    from cluster import Kubectl

NAMESPACE = "kubeflow"
# Upstream's own template has no security context, which `restricted` refuses, and wants an image with nslookup.
INIT_CONTAINER = """- name: init-pytorch
  image: {{.InitContainerImage}}
  imagePullPolicy: IfNotPresent
  command: [sh, -c, "for i in $(seq {{.MaxTries}}); do getent hosts {{.MasterAddr}} && exit; sleep 1; done; exit 1"]
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


def kustomization(upstream: str) -> dict[str, Any]:
    container = {
        "name": "training-operator",
        "args": [
            "-controller-threads=16",
            "-kube-api-qps=500",
            "-kube-api-burst=1000",
            "-enable-scheme=pytorchjob",
            "-pytorch-init-container-image=localhost/convoy-base:dev",
        ],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "readinessProbe": {"initialDelaySeconds": 0, "periodSeconds": 1},
        "volumeMounts": [{"name": "init-container", "mountPath": "/etc/config", "readOnly": True}],
    }
    volume = {"name": "init-container", "configMap": {"name": "training-operator-init-container"}}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "training-operator"},
        "spec": {"template": {"spec": {"containers": [container], "volumes": [volume]}}},
    }
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    }
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": [upstream],
        "images": [
            {
                "name": "ghcr.io/kubeflow/training-v1/training-operator",
                "newName": "localhost/convoy-training-operator",
                "newTag": "1.9.3",
            }
        ],
        "configMapGenerator": [{"name": "training-operator-init-container", "files": ["initContainer.yaml"]}],
        "patches": [{"patch": json.dumps(deployment)}, {"patch": json.dumps(namespace)}],
    }


PROBE = {
    "pytorchReplicaSpecs": {
        "Worker": {"template": {"spec": {"containers": [{"name": "pytorch", "image": "localhost/pause:3.10"}]}}}
    }
}


def apply_operator(state: State, tools: Path, kubectl: Kubectl) -> None:
    folder = state.folder / "operator"
    folder.mkdir()
    upstream = os.path.relpath(tools / "training-operator/overlays/standalone", folder)
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization(upstream), indent=2))
    (folder / "initContainer.yaml").write_text(INIT_CONTAINER)
    kubectl("apply", "--server-side", "-f", "-", stdin=kubectl("kustomize", str(folder)))


def wait_for_operator(kubectl: Kubectl) -> None:
    kubectl("-n", NAMESPACE, "rollout", "status", "--timeout=120s", "deployment/training-operator")
    # Ready is not enough: until the webhook has its certificate in place, each job is refused.
    probe = json.dumps({"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "probe"}, "spec": PROBE})
    asked = ("-n", "default", "create", "--dry-run=server", "-f", "-")
    wait_for("the operator's webhook", lambda: kubectl.succeeds(*asked, stdin=probe), 60, 0.2)
