"""Submits and manages training jobs in a cluster through Kubeflow's training SDK."""

import difflib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kubeflow.training import TrainingClient, models
from kubeflow.training.constants import constants
from kubeflow.training.utils.utils import FakeResponse, get_default_target_namespace
from kubernetes.client import ApiException
from kubernetes.config import ConfigException
from urllib3.exceptions import HTTPError

from pipelines.cluster.job_kind import Document, JobKind, job_kind, job_kinds
from pipelines.cluster.job_spec import CONTAINER
from pipelines.cluster.status import Status, summarize_job
from trainer.errors import RetryableError, ServiceUnreachable, UserError
from trainer.progress.progress_record import is_record

_GROUP = ("scheduling.k8s.io", "v1beta1")
_TIMEOUTS = {"_request_timeout": (5, 60)}  # connect and read timeouts, seconds
_OURS = "app.kubernetes.io/name=convoy"
_TAIL_LINES = 200  # several progress records, or those before a traceback
_BETWEEN_LOOKS = 2.0  # seconds


class JobClient:
    """Client for the training jobs in one namespace.

    Connects to the cluster that the kubeconfig selects, or to the one it runs in. Raises UserError.
    """

    def __init__(self, namespace: str | None) -> None:
        with _translate_api_errors("the cluster"):
            self._client = TrainingClient(namespace=namespace or get_default_target_namespace())
        self.namespace: str = self._client.namespace

    def submit(self, documents: list[Document], dry_run: bool) -> str:
        """Create the job and, before it, the objects that it needs; return the job's name.

        ``dry_run``: the API server validates the objects and persists nothing.
        """
        *needed, job = documents
        name, kind = str(job["metadata"]["name"]), job_kind(job["kind"])
        asked: dict[str, Any] = {"dry_run": "All"} if dry_run else {}
        with _translate_api_errors(f"job {name} in namespace {self.namespace}", kind):
            for document in needed:
                self._put(document, asked)
            if dry_run or kind.name != self._client.job_kind:
                self._client.custom_api.create_namespaced_custom_object(
                    *self._place(kind), job, **asked, **_TIMEOUTS
                )
            else:
                model = constants.JOB_PARAMETERS[kind.name]["model"]
                self._client.create_job(
                    self._client.api_client.deserialize(FakeResponse(job), model),
                    namespace=self.namespace,
                )
            if dry_run:
                return name
            made = self._get(kind, name)
            owner = {
                "apiVersion": made["apiVersion"],
                "kind": made["kind"],
                "name": name,
                "uid": made["metadata"]["uid"],
            }
            for document in needed:  # so that it is deleted with the job
                self._set_owner(document, {"metadata": {"ownerReferences": [owner]}})
        return name

    def _put(self, document: Document, asked: dict[str, Any]) -> None:
        """Create a ConfigMap, replacing an existing one, or a PodGroup."""
        core, name = self._client.core_api, document["metadata"]["name"]
        try:
            if document["kind"] == "ConfigMap":
                core.create_namespaced_config_map(self.namespace, document, **asked, **_TIMEOUTS)
            else:
                self._client.custom_api.create_namespaced_custom_object(
                    *_GROUP, self.namespace, "podgroups", document, **asked
                )
        except ApiException as error:
            if error.status == 404 and document["kind"] == "PodGroup":
                raise UserError(
                    "--gang: this cluster does not have the resource PodGroup; it needs Kubernetes "
                    "1.37 with the feature gate GenericWorkload"
                ) from None
            if error.status != 409:
                raise
            if document["kind"] == "ConfigMap":
                core.replace_namespaced_config_map(
                    name, self.namespace, document, **asked, **_TIMEOUTS
                )

    def _set_owner(self, document: Document, patch: Document) -> None:
        name = document["metadata"]["name"]
        if document["kind"] == "ConfigMap":
            self._client.core_api.patch_namespaced_config_map(
                name, self.namespace, patch, **_TIMEOUTS
            )
        else:
            self._client.custom_api.patch_namespaced_custom_object(
                *_GROUP, self.namespace, "podgroups", name, patch, **_TIMEOUTS
            )

    def status(self, name: str) -> Status:
        """Return the status of a job. Raises UserError if the job does not exist."""
        with _translate_api_errors(f"job {name} in namespace {self.namespace}"):
            kind, job = self._job(name)
            pods = self._pods(f"{kind.pod_label}={name}")
            events = [] if pods else self._events(kind, name)
            return summarize_job(job, pods, events, self._log(kind, name, pods), kind)

    def statuses(self) -> list[tuple[Status, str]]:
        """Return the status and creation time of each job that Convoy created, newest first.

        Logs are not read.
        """
        with _translate_api_errors(f"jobs in namespace {self.namespace}"):
            found = [
                (kind, job)
                for kind, jobs in self._list(label_selector=_OURS).items()
                for job in jobs
            ]
            ours = self._pods(_OURS)
        found.sort(key=lambda entry: str(entry[1]["metadata"]["creationTimestamp"]), reverse=True)
        return [
            (
                summarize_job(job, _pods_of(kind, job, ours), [], None, kind),
                job["metadata"]["creationTimestamp"],
            )
            for kind, job in found
        ]

    def follow(self, name: str, report: Callable[[str], None]) -> Status:
        """Report each status change until the job is finished; return the last status.

        Retries while the API server is unreachable.
        """
        last = ""
        while True:
            try:
                status = self.status(name)
            except (RetryableError, ServiceUnreachable) as error:
                report(f"convoy: {error}")
            else:
                if status.line() != last:
                    report(status.line())
                    last = status.line()
                if status.finished:
                    return status
            time.sleep(_BETWEEN_LOOKS)

    def logs(self, name: str, rank: int, follow: bool) -> Iterator[str]:
        """Yield the log lines of the pod that runs ``rank``, without progress records.

        ``follow``: continue in the pod that replaces it, until the job is finished.
        """
        with _translate_api_errors(f"job {name} in namespace {self.namespace}"):
            kind, job = self._job(name)
            procs, nodes = kind.ranks_per_pod(job), kind.num_pods(job)
            if rank >= procs * nodes:
                raise UserError(
                    f"--rank: {rank} is too large; job {name} has {procs * nodes} ranks, counted "
                    "from 0"
                )
            index, shown = rank // procs, ""
            while True:
                pod = _find_pod(kind, name, index, self._pods(f"{kind.pod_label}={name}"))
                begun = pod is not None and pod["status"].get("phase") != "Pending"
                if pod is not None and begun and pod["metadata"]["uid"] != shown:
                    shown = pod["metadata"]["uid"]
                    for line in self._lines(pod["metadata"]["name"], follow):
                        if not is_record(line):
                            yield line
                if not follow and not shown:
                    raise UserError(
                        f"{kind.pod_name(name, index)} has no log yet; {self.status(name).line()}"
                    )
                if not follow or self.status(name).finished:
                    return
                time.sleep(_BETWEEN_LOOKS)

    def _lines(self, pod: str, follow: bool) -> Iterator[str]:
        answer = self._client.core_api.read_namespaced_pod_log(
            pod,
            self.namespace,
            container=CONTAINER,
            follow=follow,
            _preload_content=False,
            _request_timeout=(5, None),
        )
        rest = b""
        with suppress(HTTPError):  # the pod's node is gone
            for part in answer.stream():
                *lines, rest = (rest + part).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
        if rest:
            yield rest.decode(errors="replace")

    def cancel(self, name: str) -> None:
        """Delete the job and its recipe; its pods write a checkpoint first."""
        with _translate_api_errors(f"job {name} in namespace {self.namespace}"):
            kind, _ = self._job(name)
            options = models.V1DeleteOptions(propagation_policy="Foreground")
            if kind.name == self._client.job_kind:
                self._client.delete_job(name, namespace=self.namespace, delete_options=options)
            else:
                self._client.custom_api.delete_namespaced_custom_object(
                    *self._place(kind), name, body={"propagationPolicy": "Foreground"}, **_TIMEOUTS
                )
            # objects created by kubectl apply have no owner; others are deleted with the job
            with suppress(ApiException):
                self._client.core_api.delete_namespaced_config_map(
                    f"{name}-recipe", self.namespace, **_TIMEOUTS
                )
            with suppress(ApiException):
                self._client.custom_api.delete_namespaced_custom_object(
                    *_GROUP, self.namespace, "podgroups", name, **_TIMEOUTS
                )

    def suspend(self, name: str, suspended: bool) -> None:
        """Suspend a job, whose pods write a checkpoint and are deleted, or resume it."""
        with _translate_api_errors(f"job {name} in namespace {self.namespace}"):
            kind, _ = self._job(name)
            self._client.custom_api.patch_namespaced_custom_object(
                *self._place(kind), name, kind.suspension(suspended), **_TIMEOUTS
            )

    def _place(self, kind: JobKind) -> tuple[str, str, str, str]:
        return kind.group, kind.version, self.namespace, kind.plural

    def _get(self, kind: JobKind, name: str) -> Document:
        job: Document = self._client.custom_api.get_namespaced_custom_object(
            *self._place(kind), name, **_TIMEOUTS
        )
        return job

    def _job(self, name: str) -> tuple[JobKind, Document]:
        for kind in job_kinds():
            try:
                return kind, self._get(kind, name)
            except ApiException as error:
                if error.status != 404:
                    raise
        names = [job["metadata"]["name"] for jobs in self._list().values() for job in jobs]
        nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else "; convoy list prints all jobs"
        raise UserError(f"there is no job {name!r} in namespace {self.namespace}{hint}")

    def _list(self, **selector: str) -> dict[JobKind, list[Document]]:
        """Return the jobs of each kind that the cluster knows."""
        found: dict[JobKind, list[Document]] = {}
        unknown = None
        for kind in job_kinds():
            try:
                found[kind] = self._client.custom_api.list_namespaced_custom_object(
                    *self._place(kind), **selector, **_TIMEOUTS
                )["items"]
            except ApiException as error:
                if error.status != 404:
                    raise
                unknown = unknown or error
        if unknown and not found:
            raise unknown
        return found

    def _pods(self, selector: str) -> list[Document]:
        found = self._client.core_api.list_namespaced_pod(
            self.namespace, label_selector=selector, **_TIMEOUTS
        )
        plain: list[Document] = self._client.core_api.api_client.sanitize_for_serialization(
            found.items
        )
        return plain

    def _events(self, kind: JobKind, name: str) -> list[Document]:
        selector = f"involvedObject.name={name},involvedObject.kind={kind.name}"
        try:
            found = self._client.core_api.list_namespaced_event(
                self.namespace, field_selector=selector, **_TIMEOUTS
            )
        except ApiException:  # a user who may read pods may not be allowed to read events
            return []
        plain: list[Document] = self._client.core_api.api_client.sanitize_for_serialization(
            found.items
        )
        return plain

    def _log(self, kind: JobKind, name: str, pods: list[Document]) -> str:
        """Return the end of the first pod's log; an empty string if the log is unavailable."""
        first = _find_pod(kind, name, 0, pods)
        if first is None or first["status"].get("phase") == "Pending":
            return ""
        text = ""
        with suppress(ApiException, HTTPError):
            text = self._client.core_api.read_namespaced_pod_log(
                first["metadata"]["name"],
                self.namespace,
                container=CONTAINER,
                tail_lines=_TAIL_LINES,
                **_TIMEOUTS,
            )
        return text


def _find_pod(kind: JobKind, job_name: str, index: int, pods: list[Document]) -> Document | None:
    """Return the newest pod number ``index`` among the pods of a job, or None."""
    expected = kind.pod_name(job_name, index)
    found = [pod for pod in pods if f"{pod['metadata']['name']}-".startswith(f"{expected}-")]
    return max(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]), default=None)


def _pods_of(kind: JobKind, job: Document, pods: list[Document]) -> list[Document]:
    name = job["metadata"]["name"]
    return [pod for pod in pods if pod["metadata"]["labels"].get(kind.pod_label) == name]


@contextmanager
def _translate_api_errors(what: str, kind: JobKind | None = None) -> Iterator[None]:
    """Translate errors of the API server and of the connection to it to one-line errors.

    ``kind``: the kind that a cluster may not know; the default one if None.

    Raises UserError (ServiceUnreachable if the API server does not respond), or RetryableError if
    the error may be transient.
    """
    try:
        yield
    except ConfigException as error:
        text = " ".join(str(error).split())
        raise UserError(
            f"no cluster is configured: {text}; set KUBECONFIG to the kubeconfig file of your "
            "cluster"
        ) from None
    except ApiException as error:
        raise _refusal(error, what, kind) from None
    except HTTPError as error:
        raise _no_answer(error) from None
    except RuntimeError as error:  # the SDK wraps the exceptions that it catches
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ApiException):
            raise _refusal(cause, what, kind) from None
        if isinstance(cause, HTTPError):
            raise _no_answer(cause) from None
        raise


def _no_answer(error: HTTPError) -> ServiceUnreachable:
    return ServiceUnreachable(
        f"the API server does not respond: {' '.join(str(error).split())[:200]}"
    )


def _refusal(error: ApiException, what: str, kind: JobKind | None) -> UserError | RetryableError:
    text = _message(error)
    if error.status == 401:
        return UserError(
            f"{what}: the cluster rejects your credentials (401); renew them in the kubeconfig"
        )
    if error.status == 403:
        return UserError(f"{what}: permission denied (403): {text}")
    if error.status == 404 and "namespaces" in text:
        return UserError(f"{what}: {text}; kubectl get namespaces prints all namespaces")
    if error.status == 404:
        kind = kind or job_kinds()[0]
        return UserError(
            f"{what}: the cluster does not have the resource {kind.name} (404); {kind.install}"
        )
    if error.status == 409:
        return UserError(
            f"{what}: already exists; delete it first (convoy cancel NAME), or choose another "
            "--name"
        )
    if error.status and error.status >= 500:
        return RetryableError(f"{what}: the API server failed ({error.status}): {text}")
    return UserError(f"{what}: rejected ({error.status}): {text}")


def _message(error: ApiException) -> str:
    try:
        return str(json.loads(error.body or "{}")["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason or "no reason given")
