"""Summarizes the status of a training job in one line.

The sources are the objects of the API server and a log.
"""

import re
from dataclasses import dataclass
from typing import Any

from pipelines.cluster.pytorchjob import GANG_LABEL
from trainer.errors import EXIT_BUG, EXIT_USER

Object = dict[str, Any]

_STEP = re.compile(
    r"^step (\d+)/(\d+) (.*?)(?:, ((?:\d+ days?, )?\d+:\d\d:\d\d) left)?$", re.MULTILINE
)
_RATE = re.compile(r"([\d,.]+) images/s")
_RUN = re.compile(r"MLflow run (\w+) at (\S+)")
_WAITING = re.compile(r"^waiting: (.*)$", re.MULTILINE)
_QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_SEVERITY = ("image", "secret", "start", "unschedulable", "pulling")


@dataclass(frozen=True)
class Status:
    """Status of a job.

    ``state``: one or two words; ``says``: the rest of the line. ``finished``: whether the job has
    ended.
    """

    name: str
    state: str
    says: str = ""
    step: int | None = None
    total: int | None = None
    images_per_second: float | None = None
    left: str | None = None
    mlflow: str | None = None
    exit_code: int | None = None

    @property
    def finished(self) -> bool:
        return self.exit_code is not None

    def line(self) -> str:
        return f"{self.name}: {self.state}" + (f": {self.says}" if self.says else "")


def summarize_job(job: Object, pods: list[Object], events: list[Object], log: str | None) -> Status:
    """Summarize the status of a job.

    ``pods``, ``events``: those of the job. ``log``: beginning and end of the first pod's log; empty
    if there is none, None if it was not requested.
    """
    read, log = log is not None, log or ""
    name, spec, status = job["metadata"]["name"], job["spec"], job.get("status", {})
    nodes = spec["pytorchReplicaSpecs"]["Worker"].get("replicas", 1)
    conditions = {c["type"]: c for c in status.get("conditions") or [] if c["status"] == "True"}
    seen = _seen(log)
    link = {"mlflow": seen.pop("mlflow", None)}
    if "Succeeded" in conditions:
        return Status(name, "succeeded", _progress(seen, link), exit_code=0, **seen, **link)
    if "Failed" in conditions:
        says, code = _failure(name, conditions["Failed"], pods, log)
        return Status(name, "failed", says, exit_code=code, **seen, **link)
    if (spec.get("runPolicy") or {}).get("suspend"):
        if _QUEUE_LABEL in (job["metadata"].get("labels") or {}):
            return Status(
                name,
                "queued",
                f"Kueue's queue {job['metadata']['labels'][_QUEUE_LABEL]} admits it when its "
                "quota allows",
            )
        return Status(name, "suspended", f"it has no pods; start it with convoy resume {name}")
    troubles = sorted(
        filter(None, map(_trouble, pods)), key=lambda trouble: _SEVERITY.index(trouble[0])
    )
    running = sum(pod["status"].get("phase") == "Running" for pod in pods)
    if troubles and troubles[0][0] != "pulling":
        kind, says = troubles[0]
        count = sum(trouble[0] == kind for trouble in troubles)
        state = {
            "unschedulable": "unschedulable",
            "image": "no image",
            "secret": "not started",
            "start": "not started",
        }[kind]
        gang = ", a gang that starts together" if kind == "unschedulable" and _is_gang(spec) else ""
        return Status(name, state, f"{count} of {nodes} pods{gang}: {says}")
    if not pods:
        return Status(name, "queued", _why_no_pods(status, events))
    if running < nodes:
        pulling = f"{len(troubles)} getting their image and volumes, " if troubles else ""
        return Status(
            name,
            "starting",
            f"{running} of {nodes} pods running, {pulling}{nodes - running - len(troubles)} "
            "waiting for a node",
        )
    if seen:
        return Status(name, "training", _progress(seen, link), **seen, **link)
    waits = _WAITING.findall(log)
    if "rendezvous of" in log or (waits and "rendezvous" in waits[-1]):
        return Status(
            name, "rendezvous", f"{nodes} pods are connecting; the first step follows", **link
        )
    if waits:
        return Status(name, "waiting", waits[-1])
    return (
        Status(name, "starting", f"{nodes} pods running, no log output yet")
        if read
        else Status(name, "running", f"{nodes} pods")
    )


def _is_gang(spec: Object) -> bool:
    template = spec["pytorchReplicaSpecs"]["Worker"].get("template") or {}
    return GANG_LABEL in ((template.get("metadata") or {}).get("labels") or {})


def _seen(log: str) -> dict[str, Any]:
    """Return the values of the last progress line, and the URL of the MLflow run."""
    seen: dict[str, Any] = {}
    if runs := _RUN.findall(log):
        run, address = runs[-1]
        seen["mlflow"] = f"{address.rstrip('/')}/#/runs/{run}"
    for match in _STEP.finditer(log):
        rate = _RATE.search(match[3])
        seen |= {"step": int(match[1]), "total": int(match[2]), "left": match[4]}
        seen["images_per_second"] = float(rate[1].replace(",", "")) if rate else None
    return seen


def _progress(seen: dict[str, Any], link: dict[str, str | None]) -> str:
    parts = []
    if "step" in seen:
        parts.append(f"step {seen['step']:,} of {seen['total']:,}")
        if seen["images_per_second"] is not None:
            parts.append(f"{seen['images_per_second']:,.0f} images/s")
        if seen["left"] and seen["step"] < seen["total"]:
            parts.append(f"{seen['left']} left")
    if link["mlflow"]:
        parts.append(str(link["mlflow"]))
    return ", ".join(parts)


def _ended(pods: list[Object]) -> list[Object]:
    """Return how containers ended, most informative first: user errors, bugs, then the rest."""
    states = [
        s["state"].get("terminated")
        for pod in pods
        for s in pod["status"].get("containerStatuses") or []
    ]
    return sorted(
        filter(None, states),
        key=lambda s: {EXIT_USER: 0, EXIT_BUG: 1}.get(s["exitCode"], 2 + (s["exitCode"] == 0)),
    )


def _failure(name: str, condition: Object, pods: list[Object], log: str) -> tuple[str, int]:
    for ended in _ended(pods):
        message = " ".join((ended.get("message") or "").split())
        if ended["exitCode"] == EXIT_USER:
            lines = [line for line in (ended.get("message") or "").splitlines() if line.strip()]
            return " · ".join(lines[:5]) or f"user error; see convoy logs {name}", EXIT_USER
        if ended["exitCode"] == EXIT_BUG:
            last = (
                message.rpartition("Traceback")[2][-200:] or (log.strip().splitlines() or [""])[-1]
            )
            return f"bug: ...{last.strip()}; convoy logs {name} prints the full log", EXIT_BUG
    return condition.get("message") or condition.get(
        "reason"
    ) or "the training operator gives no reason", EXIT_BUG


def _trouble(pod: Object) -> tuple[str, str] | None:
    """Return why a pod does not run and what to do, as (kind, message), or None."""
    status = pod["status"]
    for container in [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]:
        waiting = container["state"].get("waiting") or {}
        reason, message = (
            waiting.get("reason", ""),
            " ".join((waiting.get("message") or "").split()),
        )
        if reason in (
            "ImagePullBackOff",
            "ErrImagePull",
            "InvalidImageName",
            "ErrImageNeverPull",
            "ImageInspectError",
        ):
            says = (
                f"{container['image']} cannot be pulled ({reason}); check its name and the nodes' "
                "access to its registry"
            )
            return "image", says
        if reason == "CreateContainerConfigError":
            return "secret", f"{message}; create it in this namespace, see convoy secrets --help"
        if reason in ("CreateContainerError", "RunContainerError", "CrashLoopBackOff"):
            return "start", f"{reason}: {message}"
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    scheduled = conditions.get("PodScheduled", {})
    if status.get("phase") == "Pending" and scheduled.get("status") == "False":
        if scheduled.get("reason") == "SchedulingGated":
            return None
        return (
            "unschedulable",
            f"{scheduled.get('message', '')}; request less, or wait until other jobs end".strip(),
        )
    if status.get("phase") == "Pending" and scheduled.get("status") == "True":
        return "pulling", ""
    return None


def _why_no_pods(status: Object, events: list[Object]) -> str:
    refused = [
        event
        for event in events
        if event.get("reason") in ("FailedCreatePod", "FailedCreate", "FailedCreateService")
    ]
    if refused:
        return f"its pods are rejected: {' '.join((refused[-1].get('message') or '').split())}"
    if not status.get("conditions"):
        return (
            "the training operator has not processed it yet; check that it runs: "
            "kubectl get pods -A | grep training-operator"
        )
    return "its pods are being created"
