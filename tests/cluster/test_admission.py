"""What the API server makes of the shipped manifests, as they are and under Pod Security
`restricted`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from kubectl import Kubectl, Refused
from support.helpers import copy_manifests

OVERLAYS = ("local", "gpu-8", "gpu-64", "gpu-512")


@pytest.fixture(scope="module")
def k8s(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_manifests(tmp_path_factory.mktemp("k8s"))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_admits_each_overlay_without_a_warning(
    own_cluster: Kubectl, namespace: Kubectl, k8s: Path, overlay: str
) -> None:
    """Every object by a dry run on the server; what makes pods is told there too where Pod Security
    would refuse them.
    """
    done = namespace.apply_overlay(k8s, overlay, "--dry-run=server")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert done.stdout.count("(server dry run)") == len(done.stdout.splitlines()) > 10


def test_an_unknown_field_of_a_job_would_be_refused(
    own_cluster: Kubectl, namespace: Kubectl, k8s: Path
) -> None:
    """So that the test above can fail."""
    job = (k8s / "jobs/resnet50.yaml").read_text().replace("nprocPerNode:", "nProcPerNode:")
    job = job.replace("namespace: convoy\n", f"namespace: {namespace.namespace}\n")
    with pytest.raises(Refused, match="unknown field"):
        namespace("apply", "--dry-run=server", "-f", "-", stdin=job)
