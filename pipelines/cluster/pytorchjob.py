"""The PyTorchJob (Kubeflow training-operator 1.9.3): the only module that knows its fields."""

from typing import TYPE_CHECKING

from pipelines.cluster.job_kind import Document, JobKind

if TYPE_CHECKING:
    from pipelines.cluster.job_spec import JobOptions


class PyTorchJob(JobKind):
    """A PyTorchJob with workers only.

    With a master, the operator would add an init container to the workers that Pod Security
    ``restricted`` rejects.

    No rank is restarted inside a pod (maxRestarts 0): the launcher exits with 144, and the operator
    recreates the pod.
    """

    name = "PyTorchJob"
    group = "kubeflow.org"
    version = "v1"
    plural = "pytorchjobs"
    pod_label = "training.kubeflow.org/job-name"
    install = (
        "install the training operator: "
        "kubectl apply --server-side -k k8s/third-party/training-operator"
    )
    not_accepted = (
        "the training operator has not processed it yet; check that it runs: "
        "kubectl get pods -A | grep training-operator"
    )

    def spec(self, name: str, template: Document, options: "JobOptions") -> Document:
        return {
            "nprocPerNode": str(options.ranks_per_node),
            "elasticPolicy": {
                "rdzvBackend": "c10d",
                "rdzvId": name,
                "minReplicas": options.nodes,
                "maxReplicas": options.nodes,
                "maxRestarts": 0,
            },
            "runPolicy": {"cleanPodPolicy": "Running", "suspend": options.suspend},
            "pytorchReplicaSpecs": {
                "Worker": {
                    "replicas": options.nodes,
                    "restartPolicy": "ExitCode",
                    "template": template,
                }
            },
        }

    def template(self, job: Document) -> Document:
        return job["spec"]["pytorchReplicaSpecs"]["Worker"].get("template") or {}

    def num_pods(self, job: Document) -> int:
        return int(job["spec"]["pytorchReplicaSpecs"]["Worker"].get("replicas", 1))

    def ranks_per_pod(self, job: Document) -> int:
        return int(job["spec"].get("nprocPerNode", 1))

    def pod_name(self, job_name: str, index: int) -> str:
        return f"{job_name}-worker-{index}"

    def is_suspended(self, job: Document) -> bool:
        return bool((job["spec"].get("runPolicy") or {}).get("suspend"))

    def suspension(self, suspended: bool) -> Document:
        return {"spec": {"runPolicy": {"suspend": suspended}}}


KIND = PyTorchJob()
