"""Prerequisites of the other cluster tests: nodes, DNS, volumes, Pod Security, the training
operator and simulated nodes.
"""

from __future__ import annotations

import pytest
from kubectl import ON_SIMULATED_NODES, Kubectl, KubectlError, container, pod, pytorch_job

FETCH = (
    "import urllib.request as u; "
    "print(u.urlopen('http://web.{namespace}.svc.cluster.local:8080/').status)"
)


def test_every_node_is_ready(cluster: Kubectl) -> None:
    for node in cluster.get("nodes")["items"]:
        ready = [
            condition["status"]
            for condition in node["status"]["conditions"]
            if condition["type"] == "Ready"
        ]
        assert ready == ["True"], node["metadata"]["name"]


def test_restricted_pod_reaches_a_service_by_name(namespace: Kubectl, image: str) -> None:
    probe = {"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1}
    server = container(
        image,
        "python3",
        "-m",
        "http.server",
        "8080",
        "--directory",
        "/etc/ssl",
        readinessProbe=probe,
    )
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 8080}]},
    }
    namespace.create(pod("web", server), service)
    namespace("wait", "--for=condition=Ready", "--timeout=60s", "pod/web")
    namespace.create(
        pod(
            "client", container(image, "python3", "-c", FETCH.format(namespace=namespace.namespace))
        )
    )
    namespace.wait_for_pod("client", "Succeeded")
    assert namespace("logs", "client").strip() == "200"
    assert namespace("exec", "web", "--", "id", "-u").strip() == "10001"


def test_pod_that_violates_restricted_is_rejected(namespace: Kubectl, image: str) -> None:
    with pytest.raises(KubectlError, match='violates PodSecurity "restricted'):
        namespace.create(pod("root", {"name": "main", "image": image}))


def test_volume_claim_keeps_data_between_pods(namespace: Kubectl, image: str) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "16Mi"}}},
    }
    volume = {
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
        "securityContext": {"fsGroup": 10001},
    }
    mount = {"volumeMounts": [{"name": "data", "mountPath": "/data"}]}
    namespace.create(
        claim,
        pod("writer", container(image, "sh", "-c", "echo kept > /data/file", **mount), **volume),
    )
    namespace.wait_for_pod("writer", "Succeeded")
    namespace.create(pod("reader", container(image, "cat", "/data/file", **mount), **volume))
    namespace.wait_for_pod("reader", "Succeeded")
    assert namespace("logs", "reader").strip() == "kept"


def test_operator_rejects_a_job_with_a_wrong_container_name(namespace: Kubectl, image: str) -> None:
    job = pytorch_job("bad", 1, "true", image=image)
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["name"] = (
        "other"
    )
    with pytest.raises(KubectlError, match="pytorch"):
        namespace.create(job)


def test_operator_runs_workers_under_restricted(namespace: Kubectl, image: str) -> None:
    job = pytorch_job(
        "job", 2, "python3", "-c", "import os; print(os.environ['PET_RDZV_ENDPOINT'])", image=image
    )
    job["spec"]["elasticPolicy"] = {"rdzvBackend": "c10d", "minReplicas": 2, "maxReplicas": 2}
    namespace.create(job)
    namespace("wait", "--for=condition=Succeeded", "--timeout=60s", "pytorchjob/job")
    assert namespace("logs", "job-worker-0").startswith("job-worker-0:")


CONNECT = """
import os, socket, time
port = int(os.environ["MASTER_PORT"])
if os.environ["RANK"] == "0":
    server = socket.create_server(("", port))
    print(sorted(server.accept()[0].recv(8).decode() for _ in range(2)))
else:
    for _ in range(200):
        try:
            master = socket.create_connection((os.environ["MASTER_ADDR"], port))
            master.sendall(os.environ["RANK"].encode())
            break
        except OSError:
            time.sleep(0.1)
"""


def test_workers_connect_to_their_master_under_restricted(namespace: Kubectl, image: str) -> None:
    """With a master, each worker gets an init container, which must satisfy `restricted` too."""
    namespace.create(pytorch_job("job", 2, "python3", "-c", CONNECT, image=image, master=True))
    namespace("wait", "--for=condition=Succeeded", "--timeout=60s", "pytorchjob/job")
    assert namespace("logs", "job-master-0").strip() == "['1', '2']"


def test_simulated_nodes_run_pods(
    namespace: Kubectl, simulated_nodes: list[str], image: str
) -> None:
    gpus = {"resources": {"limits": {"nvidia.com/gpu": "8"}}}
    for number in range(len(simulated_nodes)):
        namespace.create(
            pod(f"pod-{number}", container(image, "true", **gpus), **ON_SIMULATED_NODES)
        )
    for number in range(len(simulated_nodes)):
        namespace.wait_for_pod(f"pod-{number}", "Running")
    used = {item["spec"]["nodeName"] for item in namespace.get("pods")["items"]}
    assert used == set(simulated_nodes)


@pytest.mark.usefixtures("own_cluster")
def test_postgresql_runs_with_a_read_only_root_file_system(namespace: Kubectl) -> None:
    variables = {
        "POSTGRES_USER": "mlflow",
        "POSTGRES_PASSWORD": "secret",
        "POSTGRES_DB": "mlflow",
        "PGDATA": "/data/pgdata",
    }
    folders = {"data": "/data", "socket": "/var/run/postgresql", "tmp": "/tmp"}
    server = container(
        "localhost/convoy-postgres:dev",
        env=[{"name": name, "value": value} for name, value in variables.items()],
        volumeMounts=[{"name": name, "mountPath": path} for name, path in folders.items()],
        readinessProbe={
            "exec": {"command": ["pg_isready", "-h", "127.0.0.1", "-U", "mlflow"]},
            "periodSeconds": 1,
        },
    )
    del server["command"]
    server["securityContext"] = {**server["securityContext"], "runAsUser": 999}
    volumes = [{"name": name, "emptyDir": {}} for name in folders]
    namespace.create(pod("postgres", server, volumes=volumes, securityContext={"fsGroup": 999}))
    namespace("wait", "--for=condition=Ready", "--timeout=60s", "pod/postgres")
    query = "PGPASSWORD=secret psql -h 127.0.0.1 -U mlflow -d mlflow -Atc 'select current_user'"
    assert namespace("exec", "postgres", "--", "sh", "-c", query).strip() == "mlflow"
