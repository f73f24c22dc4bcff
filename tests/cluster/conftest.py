"""Fixtures: one Kubernetes for all tests.

It is the user's cluster (KUBECONFIG), or a cluster that the tests create and delete;
CONVOY_KEEP_CLUSTER=1 keeps it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubectl import (
    Kubectl,
    KubectlError,
    simulated_node,
    temporary_namespace,
    wait_for_namespace_deletion,
)
from support.helpers import copy_manifests

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools/cluster"))
from state import State, default_state  # noqa: E402

CLUSTER = [sys.executable, str(ROOT / "tools/cluster/cluster.py")]
WATCHED_SETTINGS = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "net/ipv4/ip_forward",
)


def machine_state() -> dict[str, list[str]]:
    """Return the state of this machine that a cluster could leave changed."""
    programs = filter(
        shutil.which, ("iptables-save", "ip6tables-save")
    )  # installed with the cluster
    filters = [
        subprocess.run([program], capture_output=True, text=True).stdout for program in programs
    ]
    return {
        "interfaces": sorted(path.name for path in Path("/sys/class/net").iterdir()),
        "mounts": sorted(
            line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()
        ),
        "filters": [
            line
            for text in filters
            for line in text.splitlines()
            if line.startswith(("-A", ":KUBE", ":CNI"))
        ],
        "cgroups": sorted(str(path) for path in Path("/sys/fs/cgroup").glob("*/convoy-*")),
        "settings": [Path("/proc/sys", name).read_text() for name in WATCHED_SETTINGS],
    }


@pytest.fixture(scope="session")
def cluster() -> Iterator[Kubectl]:
    if os.environ.get("KUBECONFIG"):
        program = shutil.which("kubectl")
        assert program, "KUBECONFIG is set, but there is no kubectl"
        yield (kubectl := Kubectl(program))
        wait_for_namespace_deletion(kubectl)
        return
    was_up = bool(State(default_state()).running())
    before = machine_state()
    exports = subprocess.run(
        [*CLUSTER, "up"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    values = dict(line.removeprefix("export ").split("=", 1) for line in exports)
    os.environ["KUBECONFIG"] = values["KUBECONFIG"]
    try:
        yield (kubectl := Kubectl(str(Path(values["PATH"].partition(":")[0]) / "kubectl")))
        wait_for_namespace_deletion(kubectl)
    finally:
        del os.environ["KUBECONFIG"]
        if not was_up and os.environ.get("CONVOY_KEEP_CLUSTER") != "1":
            subprocess.run([*CLUSTER, "down"], check=True)
            assert machine_state() == before


@pytest.fixture(scope="session")
def own_cluster(cluster: Kubectl) -> Kubectl:
    """A cluster created by tools/cluster: only it has kwok, gangs and the small images."""
    try:
        cluster("get", "node", "convoy-node")
    except KubectlError:
        pytest.skip("needs a cluster created by tools/cluster")
    return cluster


@pytest.fixture(scope="session")
def image(cluster: Kubectl) -> str:
    """An image with Python that is available to the cluster's nodes."""
    if os.environ.get("CONVOY_IMAGE"):
        return os.environ["CONVOY_IMAGE"]
    try:
        cluster("get", "node", "convoy-node")
    except KubectlError:
        return "localhost/convoy:dev"
    return "localhost/convoy-base:dev"


@pytest.fixture
def namespace(cluster: Kubectl) -> Iterator[Kubectl]:
    """A new namespace that enforces Pod Security `restricted`."""
    with temporary_namespace(cluster) as kubectl:
        yield kubectl


@pytest.fixture
def base(namespace: Kubectl, tmp_path: Path) -> Kubectl:
    """A new namespace with the objects of k8s/base."""
    folder = copy_manifests(tmp_path).parent / "test-base"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(
        json.dumps({"namespace": namespace.namespace, "resources": ["../k8s/base"]})
    )
    namespace("apply", "-k", str(folder))
    return namespace


@pytest.fixture(scope="session")
def simulated_nodes(own_cluster: Kubectl) -> Iterator[list[str]]:
    """Names of four nodes with 8 GPUs that kwok simulates.

    They exist for the whole session, because the deletion of a pod takes a minute if its node has
    been deleted.
    """
    names = [f"fake-{uuid.uuid4().hex[:8]}" for _ in range(4)]
    own_cluster.create(*[simulated_node(name, 8) for name in names])
    own_cluster(
        "wait", "--for=condition=Ready", "--timeout=60s", *[f"node/{name}" for name in names]
    )
    yield names
    own_cluster("delete", "node", *names)
