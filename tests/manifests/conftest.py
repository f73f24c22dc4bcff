"""Fixtures: kustomize, and a copy of the manifests."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from restricted import Documents
from support.go_tools import go_program
from support.helpers import copy_manifests


@pytest.fixture(scope="session")
def kustomize() -> Callable[[Path], Documents]:
    """``kustomize build`` of the version in kubectl 1.34, compiled from its Go module."""
    program = go_program("sigs.k8s.io/kustomize/kustomize/v5", "v5.7.1", "kustomize")
    assert isinstance(program, Path), program

    def build(folder: Path) -> Documents:
        done = subprocess.run(
            [program, "build", folder], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr  # deprecations
        return list(yaml.safe_load_all(done.stdout))

    return build


@pytest.fixture(scope="session")
def k8s(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of k8s/ with the credential files that `convoy secrets` writes."""
    return copy_manifests(tmp_path_factory.mktemp("k8s"))
