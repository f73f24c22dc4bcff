"""What the API server makes of the shipped manifests, as they are and under Pod Security `restricted`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kubectl import Kubectl, Refused

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("local", "gpu-8", "gpu-64", "gpu-512")


@pytest.fixture(scope="module")
def k8s(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of k8s/ with the files that `convoy secrets` makes."""
    folder = tmp_path_factory.mktemp("k8s") / "k8s"
    shutil.copytree(ROOT / "k8s", folder, ignore=shutil.ignore_patterns("*.env"))
    for overlay in ("local", "gpu-8"):
        file = folder / "overlays" / overlay / "secrets.env"
        subprocess.run([sys.executable, "-m", "pipelines.cli", "secrets", file], check=True, cwd=ROOT)
    return folder


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_admits_each_overlay_without_a_warning(
    own_cluster: Kubectl, namespace: Kubectl, k8s: Path, overlay: str
) -> None:
    """Every object by a dry run on the server; what makes pods is told there too where Pod Security would refuse them."""
    own = k8s.parent / f"own-{overlay}"
    own.mkdir()
    kustomization = {"namespace": namespace.namespace, "resources": [f"../k8s/overlays/{overlay}"]}
    (own / "kustomization.yaml").write_text(json.dumps(kustomization))
    done = subprocess.run(
        namespace.command("apply", "--dry-run=server", "-k", str(own)), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert done.stdout.count("(server dry run)") == len(done.stdout.splitlines()) > 10


def test_an_unknown_field_of_a_job_would_be_refused(own_cluster: Kubectl, namespace: Kubectl, k8s: Path) -> None:
    """So that the test above can fail."""
    job = (k8s / "jobs/resnet50.yaml").read_text().replace("nprocPerNode:", "nProcPerNode:")
    job = job.replace("namespace: convoy\n", f"namespace: {namespace.namespace}\n")
    with pytest.raises(Refused, match="unknown field"):
        namespace("apply", "--dry-run=server", "-f", "-", stdin=job)
