"""The API server admits the shipped manifests, also under Pod Security `restricted`."""

from __future__ import annotations

from pathlib import Path

import pytest
from kubectl import Kubectl, KubectlError
from support.helpers import copy_manifests

OVERLAYS = ("local", "gpu-8", "gpu-64", "gpu-512")


@pytest.fixture(scope="module")
def k8s(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_manifests(tmp_path_factory.mktemp("k8s"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_server_admits_each_overlay_without_warnings(
    own_cluster: Kubectl, namespace: Kubectl, k8s: Path, overlay: str
) -> None:
    """A server-side dry run of every object.

    It also warns about workloads whose pods Pod Security would reject.
    """
    done = namespace.apply_overlay(k8s, overlay, "--dry-run=server")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert done.stdout.count("(server dry run)") == len(done.stdout.splitlines()) > 10


def test_server_rejects_an_unknown_field_of_a_job(
    own_cluster: Kubectl, namespace: Kubectl, k8s: Path
) -> None:
    """This shows that the test above can fail."""
    job = (k8s / "jobs/resnet50.yaml").read_text().replace("nprocPerNode:", "nProcPerNode:")
    job = job.replace("namespace: convoy\n", f"namespace: {namespace.namespace}\n")
    with pytest.raises(KubectlError, match="unknown field"):
        namespace("apply", "--dry-run=server", "-f", "-", stdin=job)
