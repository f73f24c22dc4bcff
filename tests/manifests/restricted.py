"""Checks pod templates against Pod Security ``restricted`` and rules of manifest scanners."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Object = dict[str, Any]
Documents = list[Object]

_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def templates(document: Object) -> list[Object]:
    """Return the pod templates of an object."""
    spec = document.get("spec") or {}
    if document["kind"] == "PyTorchJob":
        return [replica["template"] for replica in spec["pytorchReplicaSpecs"].values()]
    return [spec["template"]] if document["kind"] in ("Deployment", "StatefulSet", "Job") else []


def faults(template: Object) -> Iterator[str]:
    """Yield the violations of Pod Security ``restricted`` and of this project's other rules."""
    pod = template["spec"]
    outer = pod.get("securityContext") or {}
    if any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares the host's namespaces"
    if outer.get("sysctls"):
        yield "sets sysctls"
    for volume in pod.get("volumes") or []:
        if not set(volume) - {"name"} <= _VOLUMES:
            yield f"the type of volume {volume['name']} is not allowed"
    if pod.get("automountServiceAccountToken") is not False:
        yield "mounts a service account token"
    for container in [*(pod.get("initContainers") or []), *pod["containers"]]:
        yield from (f"{container['name']}: {fault}" for fault in _container(container, outer))


def _container(container: Object, outer: Object) -> Iterator[str]:
    inner = container.get("securityContext") or {}
    both = outer | inner
    if inner.get("privileged") or inner.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges"
    if inner.get("capabilities") != {"drop": ["ALL"]}:
        yield "keeps capabilities"
    if both.get("runAsNonRoot") is not True or not both.get("runAsUser"):
        yield "may run as root"
    if (both.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile"
    if inner.get("readOnlyRootFilesystem") is not True:
        yield "writes to its image"
    if any("hostPort" in port for port in container.get("ports") or []):
        yield "uses a host port"
    image = container["image"]
    if "@sha256:" not in image and (
        ":" not in image.rpartition("/")[2] or image.endswith(":latest")
    ):
        yield f"image {image} has no fixed tag"
    sizes = container.get("resources") or {}
    if not {"cpu", "memory"} <= set(sizes.get("requests") or {}) or "memory" not in (
        sizes.get("limits") or {}
    ):
        yield "has no requests for CPU and memory, or no memory limit"
