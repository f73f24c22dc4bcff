"""Summarizes the status of a training job in one line.

The sources are the objects of the API server and the progress records in a log.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pipelines.cluster.job_kind import JobKind
from pipelines.cluster.job_spec import GANG_LABEL
from pipelines.cluster.pytorchjob import KIND
from trainer.errors import EXIT_BUG, EXIT_USER
from trainer.progress.progress_record import ProgressRecord, is_record, last_record

Object = dict[str, Any]

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


def summarize_job(
    job: Object, pods: list[Object], events: list[Object], log: str | None, kind: JobKind = KIND
) -> Status:
    """Summarize the status of a job.

    ``pods``, ``events``: those of the job. ``log``: end of the first pod's log; empty if there is
    none, None if it was not requested. Only its progress records are used.
    """
    record = last_record((log or "").split("\n"))
    name, status, nodes = job["metadata"]["name"], job.get("status", {}), kind.num_pods(job)
    conditions = {c["type"]: c for c in status.get("conditions") or [] if c["status"] == "True"}
    seen = _seen(record)
    if kind.succeeded in conditions:
        return Status(name, "succeeded", _progress(seen), exit_code=0, **seen)
    if kind.failed in conditions:
        says, code = _failure(name, conditions[kind.failed], pods, record)
        return Status(name, "failed", says, exit_code=code, **seen)
    if kind.is_suspended(job):
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
        trouble, says = troubles[0]
        count = sum(other == trouble for other, _ in troubles)
        state = {
            "unschedulable": "unschedulable",
            "image": "no image",
            "secret": "not started",
            "start": "not started",
        }[trouble]
        labels = (kind.template(job).get("metadata") or {}).get("labels") or {}
        gang = (
            ", a gang that starts together"
            if trouble == "unschedulable" and GANG_LABEL in labels
            else ""
        )
        return Status(name, state, f"{count} of {nodes} pods{gang}: {says}")
    if not pods:
        return Status(name, "queued", _why_no_pods(status, events, kind))
    if running < nodes:
        pulling = f"{len(troubles)} getting their image and volumes, " if troubles else ""
        return Status(
            name,
            "starting",
            f"{running} of {nodes} pods running, {pulling}{nodes - running - len(troubles)} "
            "waiting for a node",
        )
    if record is None:
        return (
            Status(name, "starting", f"{nodes} pods running, no log output yet")
            if log == ""
            else Status(name, "running", f"{nodes} pods")
        )
    if record.phase == "waiting":
        return Status(name, "waiting", record.message or "")
    if record.phase in ("rendezvous", "starting"):
        return Status(
            name, "rendezvous", f"{nodes} pods are connecting; the first step follows", **seen
        )
    return Status(name, "training", _progress(seen), **seen)


def _seen(record: ProgressRecord | None) -> dict[str, Any]:
    """Return the fields of a Status that the progress record determines."""
    if record is None:
        return {}
    seen: dict[str, Any] = {}
    if record.mlflow_run_id and record.mlflow_tracking_uri:
        address = record.mlflow_tracking_uri.rstrip("/")
        seen["mlflow"] = f"{address}/#/runs/{record.mlflow_run_id}"
    if record.step is not None and record.total_steps is not None:
        seen |= {"step": record.step, "total": record.total_steps}
        seen["images_per_second"] = record.images_per_second
    if record.eta_seconds is not None:
        seen["left"] = str(timedelta(seconds=round(record.eta_seconds)))
    return seen


def _progress(seen: dict[str, Any]) -> str:
    parts = []
    if "step" in seen:
        parts.append(f"step {seen['step']:,} of {seen['total']:,}")
        if seen["images_per_second"] is not None:
            parts.append(f"{seen['images_per_second']:,.0f} images/s")
        if "left" in seen and seen["step"] < seen["total"]:
            parts.append(f"{seen['left']} left")
    if "mlflow" in seen:
        parts.append(seen["mlflow"])
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


def _failure(
    name: str, condition: Object, pods: list[Object], record: ProgressRecord | None
) -> tuple[str, int]:
    for ended in _ended(pods):
        # the end of the log, if the container left no message
        message_lines = (ended.get("message") or "").splitlines()
        lines = [line for line in message_lines if line.strip() and not is_record(line)]
        message = " ".join(" ".join(lines).split())
        if ended["exitCode"] == EXIT_USER:
            return " · ".join(lines[:5]) or f"user error; see convoy logs {name}", EXIT_USER
        if ended["exitCode"] == EXIT_BUG:
            last = message.rpartition("Traceback")[2][-200:] or (record and record.message) or ""
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


def _why_no_pods(status: Object, events: list[Object], kind: JobKind) -> str:
    refused = [
        event
        for event in events
        if event.get("reason") in ("FailedCreatePod", "FailedCreate", "FailedCreateService")
    ]
    if refused:
        return f"its pods are rejected: {' '.join((refused[-1].get('message') or '').split())}"
    if not status.get("conditions"):
        return kind.not_accepted
    return "its pods are being created"
