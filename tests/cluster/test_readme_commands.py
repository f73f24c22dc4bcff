"""The README's section "On your cluster", executed line by line on a real API server.

The node with 8 GPUs is simulated by kwok, and no registry serves the images, so pods of the
services stay without an image; what the commands create, change and print is real.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kubectl import Kubectl, KubectlError, simulated_node
from support.helpers import until

ROOT = Path(__file__).resolve().parents[2]
REGISTRY = "registry.test"
CLAIM = """
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: imagenet, namespace: convoy}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
"""


def readme_commands() -> list[str]:
    """Return the section's commands, the first of which replaces the registry."""
    section = (ROOT / "README.md").read_text().split("## On your cluster\n")[1].split("\n## ")[0]
    block = section.split("```\n")[1]
    lines = [line.split("  # ")[0].strip() for line in block.splitlines()]
    return [line.replace("REGISTRY", REGISTRY) for line in lines]


@contextmanager
def eight_gpus(cluster: Kubectl) -> Iterator[None]:
    node = simulated_node(f"gpu-{uuid.uuid4().hex[:8]}", 8)
    node["spec"]["taints"] = []  # a user's pods do not tolerate kwok's
    cluster.create(node)
    try:
        yield
    finally:
        cluster("delete", "namespace", "convoy", "--ignore-not-found", timeout=300)
        cluster("delete", "node", node["metadata"]["name"])


def test_readme_commands_start_resnet50_on_eight_gpus(own_cluster: Kubectl, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s", ignore=shutil.ignore_patterns("*.env"))
    paths = (Path(sys.executable).parent, Path(own_cluster.program).parent)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([*map(str, paths), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
    }

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    # the operator's manifests are downloaded from GitHub; the cluster has the same version already
    replace, image, operator, *commands, status = readme_commands()
    assert operator == "kubectl apply --server-side -k k8s/third-party/training-operator"
    assert image == f"make image IMAGE={REGISTRY}/convoy:0.1.0"
    assert status == "convoy status resnet50 --namespace convoy --follow"
    kubectl = own_cluster.within("convoy")
    with eight_gpus(own_cluster):
        run(replace)
        for command in commands:
            run(command)
            if command.startswith("kubectl apply -k"):
                kubectl("apply", "-f", "-", stdin=CLAIM)

        def job_runs() -> bool:
            try:
                pod = kubectl.get("pod", "resnet50-worker-0")
            except KubectlError:  # the operator has not created it yet
                return False
            return bool(pod["status"].get("phase") == "Running")

        until(job_runs, 120, lambda: kubectl("get", "events", "--sort-by=.lastTimestamp")[-3000:])
        (container,) = kubectl.get("pod", "resnet50-worker-0")["spec"]["containers"]
        assert container["image"] == f"{REGISTRY}/convoy:0.1.0"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        assert run(status.removesuffix(" --follow")).startswith("resnet50: ")
        packing = kubectl.get("job", "pack-imagenet")
        assert packing["spec"]["template"]["spec"]["containers"][0]["image"] == container["image"]
