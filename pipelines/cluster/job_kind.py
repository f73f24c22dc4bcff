"""What a kind of job is: all that differs between PyTorchJobs and other jobs of Kubernetes."""

import difflib
import importlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from pipelines.cluster.job_spec import JobOptions

Document = dict[str, Any]

KINDS = ("pytorchjob",)
"""The modules of this package whose ``KIND`` is a JobKind. A new kind adds its module here."""


class JobKind(ABC):
    """A kind of job: how it is written, and how its status is read.

    ``job`` is an object of the kind, as the API server returns it.
    """

    name: str
    """As in the field ``kind`` of an object."""
    group: str
    """API group."""
    version: str
    """API version, without the group."""
    plural: str
    """As in the URLs of the API."""
    pod_label: str
    """Label of a pod that its controller sets to the name of the job."""
    succeeded = "Succeeded"
    """Type of the condition of a job that succeeded."""
    failed = "Failed"
    """Type of the condition of a job that failed."""
    install: str
    """What to do if the cluster does not know this kind."""
    not_accepted: str
    """Status of a job that has neither pods nor conditions."""

    def validate(self, options: "JobOptions") -> list[str]:
        """Return one line per option that this kind does not support."""
        return []

    @abstractmethod
    def spec(self, name: str, template: Document, options: "JobOptions") -> Document:
        """Return the field ``spec`` of a new job that runs ``options.nodes`` pods.

        ``template``: the pod template; its container runs ``trainer.launch``.
        """

    @abstractmethod
    def template(self, job: Document) -> Document:
        """Return the pod template."""

    @abstractmethod
    def num_pods(self, job: Document) -> int: ...

    @abstractmethod
    def ranks_per_pod(self, job: Document) -> int: ...

    @abstractmethod
    def pod_name(self, job_name: str, index: int) -> str:
        """Return the name of the pod number ``index``, without a random suffix."""

    @abstractmethod
    def is_suspended(self, job: Document) -> bool: ...

    @abstractmethod
    def suspension(self, suspended: bool) -> Document:
        """Return the patch that suspends or resumes a job."""


def job_kinds() -> list[JobKind]:
    """Return all kinds; the first one is the default."""
    return [importlib.import_module(f"pipelines.cluster.{name}").KIND for name in KINDS]


def job_kind(name: str) -> JobKind:
    """Return the kind of that name, in any case. Raises UserError with the nearest name."""
    kinds = {kind.name.lower(): kind for kind in job_kinds()}
    if name.lower() not in kinds:
        nearest = difflib.get_close_matches(name.lower(), kinds, n=1, cutoff=0.4)
        known = ", ".join(kinds[key].name for key in nearest or kinds)
        raise UserError(f"--kind: {name!r} is not a kind of job; nearest: {known}")
    return kinds[name.lower()]
