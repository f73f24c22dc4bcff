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

from pipelines.cluster.pytorchjob import CONTAINER, Document
from pipelines.cluster.status import Status, summarize_job
from trainer.errors import RetryableError, ServiceUnreachable, UserError

_KIND = (constants.GROUP, constants.VERSION)
_PARAMETERS = constants.JOB_PARAMETERS[constants.PYTORCHJOB_KIND]
_PLURAL = _PARAMETERS["plural"]
_GROUP = ("scheduling.k8s.io", "v1beta1")
_TIMEOUTS = {"_request_timeout": (5, 60)}  # connect and read timeouts, seconds
_OURS = "app.kubernetes.io/name=convoy"
_JOB_LABEL = constants.JOB_NAME_LABEL
_HEAD_BYTES, _TAIL_LINES = 20_000, 50
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
        name = str(job["metadata"]["name"])
        asked: dict[str, Any] = {"dry_run": "All"} if dry_run else {}
        with _translate_api_errors(f"job {name} in namespace {self.namespace}"):
            for document in needed:
                self._put(document, asked)
            if dry_run:
                self._client.custom_api.create_namespaced_custom_object(
                    *_KIND, self.namespace, _PLURAL, job, **asked, **_TIMEOUTS
                )
                return name
            model = self._client.api_client.deserialize(FakeResponse(job), _PARAMETERS["model"])
            self._client.create_job(model, namespace=self.namespace)
            made = self._job(name)
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
            job = self._job(name)
            pods = self._pods(f"{_JOB_LABEL}={name}")
            return summarize_job(
                job, pods, [] if pods else self._events(name), self._log(name, pods)
            )

    def statuses(self) -> list[tuple[Status, str]]:
        """Return the status and creation time of each job that Convoy created, newest first.

        Logs are not read.
        """
        with _translate_api_errors(f"jobs in namespace {self.namespace}"):
            found = self._client.custom_api.list_namespaced_custom_object(
                *_KIND, self.namespace, _PLURAL, label_selector=_OURS, **_TIMEOUTS
            )
            pods: dict[str, list[Document]] = {}
            for pod in self._pods(_OURS):
                pods.setdefault(pod["metadata"]["labels"].get(_JOB_LABEL, ""), []).append(pod)
        jobs = sorted(
            found["items"], key=lambda job: str(job["metadata"]["creationTimestamp"]), reverse=True
        )
        return [
            (
                summarize_job(job, pods.get(job["metadata"]["name"], []), [], None),
                job["metadata"]["creationTimestamp"],
            )
            for job in jobs
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
        """Yield the log lines of the pod that runs ``rank``.

        ``follow``: continue in the pod that replaces it, until the job is finished.
        """
        with _translate_api_errors(f"job {name} in namespace {self.namespace}"):
            job = self._job(name)
            procs, nodes = (
                int(job["spec"].get("nprocPerNode", 1)),
                job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"],
            )
            if rank >= procs * nodes:
                raise UserError(
                    f"--rank: {rank} is too large; job {name} has {procs * nodes} ranks, counted "
                    "from 0"
                )
            pod_name, shown = f"{name}-worker-{rank // procs}", ""
            while True:
                pod = next(
                    (
                        p
                        for p in self._pods(f"{_JOB_LABEL}={name}")
                        if p["metadata"]["name"] == pod_name
                    ),
                    None,
                )
                begun = pod is not None and pod["status"].get("phase") != "Pending"
                if pod is not None and begun and pod["metadata"]["uid"] != shown:
                    shown = pod["metadata"]["uid"]
                    yield from self._lines(pod_name, follow)
                if not follow and not shown:
                    raise UserError(f"{pod_name} has no log yet; {self.status(name).line()}")
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
            self._job(name)
            options = models.V1DeleteOptions(propagation_policy="Foreground")
            self._client.delete_job(name, namespace=self.namespace, delete_options=options)
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
            self._job(name)
            self._client.custom_api.patch_namespaced_custom_object(
                *_KIND,
                self.namespace,
                _PLURAL,
                name,
                {"spec": {"runPolicy": {"suspend": suspended}}},
                **_TIMEOUTS,
            )

    def _job(self, name: str) -> Document:
        try:
            job: Document = self._client.custom_api.get_namespaced_custom_object(
                *_KIND, self.namespace, _PLURAL, name, **_TIMEOUTS
            )
        except ApiException as error:
            if error.status != 404:
                raise
            found = self._client.custom_api.list_namespaced_custom_object(
                *_KIND, self.namespace, _PLURAL, **_TIMEOUTS
            )
            names = [job["metadata"]["name"] for job in found["items"]]
            nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
            hint = (
                f"; nearest: {', '.join(nearest)}" if nearest else "; convoy list prints all jobs"
            )
            raise UserError(
                f"there is no job {name!r} in namespace {self.namespace}{hint}"
            ) from None
        return job

    def _pods(self, selector: str) -> list[Document]:
        found = self._client.core_api.list_namespaced_pod(
            self.namespace, label_selector=selector, **_TIMEOUTS
        )
        plain: list[Document] = self._client.core_api.api_client.sanitize_for_serialization(
            found.items
        )
        return plain

    def _events(self, name: str) -> list[Document]:
        selector = f"involvedObject.name={name},involvedObject.kind={constants.PYTORCHJOB_KIND}"
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

    def _log(self, name: str, pods: list[Document]) -> str:
        """Return the beginning of the first pod's log, which names the MLflow run, and its end.

        Returns an empty string if the log is unavailable.
        """
        first = next((pod for pod in pods if pod["metadata"]["name"] == f"{name}-worker-0"), None)
        if first is None or first["status"].get("phase") == "Pending":
            return ""
        texts = []
        for part in ({"limit_bytes": _HEAD_BYTES}, {"tail_lines": _TAIL_LINES}):
            with suppress(ApiException, HTTPError):
                place = (f"{name}-worker-0", self.namespace)
                texts.append(
                    self._client.core_api.read_namespaced_pod_log(
                        *place, container=CONTAINER, **part, **_TIMEOUTS
                    )
                )
        return "\n".join(texts)


@contextmanager
def _translate_api_errors(what: str) -> Iterator[None]:
    """Translate errors of the API server and of the connection to it to one-line errors.

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
        raise _refusal(error, what) from None
    except HTTPError as error:
        raise _no_answer(error) from None
    except RuntimeError as error:  # the SDK wraps the exceptions that it catches
        cause = error.__cause__ or error.__context__
        if isinstance(cause, ApiException):
            raise _refusal(cause, what) from None
        if isinstance(cause, HTTPError):
            raise _no_answer(cause) from None
        raise


def _no_answer(error: HTTPError) -> ServiceUnreachable:
    return ServiceUnreachable(
        f"the API server does not respond: {' '.join(str(error).split())[:200]}"
    )


def _refusal(error: ApiException, what: str) -> UserError | RetryableError:
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
        return UserError(
            f"{what}: the cluster does not have the resource PyTorchJob (404); install the "
            "training operator: kubectl apply --server-side -k k8s/third-party/training-operator"
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
