"""The manifests rendered by kustomize are valid, satisfy ``restricted`` and contain no secrets.

They are validated against the schemas of Kubernetes.
"""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from restricted import ROOT, Documents, faults, templates

pytestmark = pytest.mark.xdist_group("kustomize")  # one process compiles the program

VERSIONS = ("1.34", "1.37")
COMPONENTS = sorted(path.name for path in (ROOT / "k8s/components").iterdir())
OVERLAYS = ("local", "gpu-8", "gpu-64", "gpu-512")
FOLDERS = ("base", "base/services", "jobs", *(f"overlays/{name}" for name in OVERLAYS))
# API groups of other projects, for which Kubernetes has no schema. A PyTorchJob is checked by its
# SDK in test_render.py, and its pods here.
OTHERS = ("kubeflow.org/", "kueue.x-k8s.io/", "scheduling.volcano.sh/", "monitoring.coreos.com/")


def _check(documents: Documents) -> None:
    names = [
        (d["apiVersion"], d["kind"], d["metadata"].get("namespace"), d["metadata"]["name"])
        for d in documents
    ]
    assert len(names) == len(set(names))
    for document in documents:
        where = f"{document['kind']} {document['metadata']['name']}"
        if not document["apiVersion"].startswith(OTHERS):
            _validate(document, where)
        for template in templates(document):
            meta = {"name": "x", **template.get("metadata", {})}
            _validate(
                {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template["spec"]},
                where,
            )
            assert list(faults(template)) == [], where
            mounted = {
                m["name"] for c in template["spec"]["containers"] for m in c.get("volumeMounts", [])
            }
            claims = {
                c["metadata"]["name"] for c in document["spec"].get("volumeClaimTemplates", [])
            }
            assert mounted <= {v["name"] for v in template["spec"].get("volumes", [])} | claims, (
                where
            )


def _validate(document: dict[str, Any], where: str) -> None:
    found = 0
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            continue
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{where}: {error}")
        found += 1
    assert found, f"{where}: {document['apiVersion']} exists in none of Kubernetes {VERSIONS}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_renders_to_valid_objects(
    kustomize: Callable[[Path], Documents], k8s: Path, folder: str
) -> None:
    documents = kustomize(k8s / folder)
    assert documents
    _check(documents)


@pytest.fixture(scope="module")
def plain(kustomize: Callable[[Path], Documents], k8s: Path) -> tuple[str, Documents]:
    """The overlay gpu-8 without components: its kustomization, and the rendered objects."""
    file = k8s / "overlays/gpu-8/kustomization.yaml"
    original = file.read_text()
    text = original.replace("  - ../../components/gpu\n", "").replace("components:\n", "")
    file.write_text(text)
    try:
        return text, kustomize(file.parent)
    finally:
        file.write_text(original)


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_component_changes_the_overlay_and_keeps_it_valid(
    kustomize: Callable[[Path], Documents],
    k8s: Path,
    plain: tuple[str, Documents],
    component: str,
    tmp_path: Path,
) -> None:
    """The component is added to the overlay gpu-8."""
    shutil.copytree(k8s, tmp_path / "k8s")
    overlay = tmp_path / "k8s/overlays/gpu-8"
    file = overlay / "kustomization.yaml"
    text, before = plain
    file.write_text(
        text.replace("images:\n", f"components:\n  - ../../components/{component}\nimages:\n")
    )
    after = kustomize(overlay)
    assert before != after
    _check(after)


def test_namespace_enforces_restricted_pod_security(
    kustomize: Callable[[Path], Documents], k8s: Path
) -> None:
    (namespace,) = [d for d in kustomize(k8s / "base") if d["kind"] == "Namespace"]
    labels = namespace["metadata"]["labels"]
    assert {
        labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "warn", "audit")
    } == {"restricted"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_contains_the_objects_that_its_pods_reference(
    kustomize: Callable[[Path], Documents], k8s: Path, overlay: str
) -> None:
    """Accounts, priority classes and config maps; and Secrets, if the overlay has services."""
    documents = kustomize(k8s / "overlays" / overlay)
    rendered = {(d["kind"], d["metadata"]["name"]) for d in documents}
    for document in documents:
        for template in templates(document):
            pod = template["spec"]
            assert ("ServiceAccount", pod["serviceAccountName"]) in rendered
            if "priorityClassName" in pod:
                assert ("PriorityClass", pod["priorityClassName"]) in rendered
            for volume in pod.get("volumes", []):
                if "configMap" in volume:
                    assert ("ConfigMap", volume["configMap"]["name"]) in rendered
            if overlay in ("local", "gpu-8"):
                for container in [*pod["containers"], *pod.get("initContainers", [])]:
                    for source in container.get("envFrom", []):
                        assert ("Secret", source["secretRef"]["name"]) in rendered


def test_network_policies_select_existing_components(
    kustomize: Callable[[Path], Documents], k8s: Path
) -> None:
    documents = kustomize(k8s / "overlays/local")
    components = {
        t["metadata"]["labels"]["app.kubernetes.io/component"]
        for d in documents
        for t in templates(d)
    }
    policies = [d for d in documents if d["kind"] == "NetworkPolicy"]
    assert any(
        p["spec"]["podSelector"] == {} and set(p["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        for p in policies
    )
    named = set(re.findall(r"app.kubernetes.io/component': '([\w-]+)'", str(policies)))
    assert named
    assert named <= components


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    known = {"In": lambda e: labels.get(e["key"]) in e["values"]}
    return all(
        labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()
    ) and all(known[e["operator"]](e) for e in selector.get("matchExpressions", []))


def _open(
    policies: Documents, direction: str, pod: dict[str, str], other: dict[str, str], port: int
) -> bool:
    """Return whether ``pod`` may reach (``egress``), or be reached by (``ingress``), ``other``.

    ``pod``, ``other``: labels of pods; ``port``: a TCP port.
    """
    specs = [
        p["spec"]
        for p in policies
        if direction.capitalize() in p["spec"]["policyTypes"]
        and _matches(p["spec"]["podSelector"], pod)
    ]
    peers = {"ingress": "from", "egress": "to"}[direction]
    return not specs or any(
        (peers not in rule or any(_matches(peer["podSelector"], other) for peer in rule[peers]))
        and (
            "ports" not in rule
            or any((p["protocol"], p["port"]) == ("TCP", port) for p in rule["ports"])
        )
        for spec in specs
        for rule in spec.get(direction, [])
    )


def test_network_policies_allow_exactly_these_connections(
    kustomize: Callable[[Path], Documents], k8s: Path
) -> None:
    """Between the pods of the overlay `local`, which has all components."""
    documents = kustomize(k8s / "overlays/local")
    policies = [d for d in documents if d["kind"] == "NetworkPolicy"]
    labels = [t["metadata"]["labels"] for d in documents for t in templates(d)]
    ports = (443, 5000, 5432, 8333, 23456, 29500)
    connections = {
        (*(pod["app.kubernetes.io/component"] for pod in (one, other)), port)
        for one in labels
        for other in labels
        for port in ports
        if _open(policies, "egress", one, other, port)
        and _open(policies, "ingress", other, one, port)
    }
    assert connections == {
        *(("trainer", "trainer", port) for port in ports),
        ("trainer", "object-store", 8333),
        ("trainer", "mlflow", 5000),
        ("data", "object-store", 8333),
        ("data", "mlflow", 5000),
        ("mlflow", "object-store", 8333),
        ("mlflow", "database", 5432),
    }


def _files() -> Iterator[Path]:
    done = subprocess.run(
        ["git", "ls-files", "k8s"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    yield from (ROOT / name for name in done.stdout.splitlines())


def test_each_file_has_usage_comments_and_no_secret() -> None:
    files = [path for path in _files() if path.suffix == ".yaml"]
    assert len(files) > 30
    for path in files:
        text = path.read_text()
        head = text.split("\napiVersion", 1)[0]
        for word in ("# Apply: ", "# Check: ", "# Logs:  ", "# Clean: "):
            assert word in head, f"{path}: no line {word!r}"
        for document in yaml.safe_load_all(text):
            assert document["kind"] != "Secret", path
        assert not re.search(
            r"(PASSWORD|SECRET_ACCESS_KEY|TOKEN)['\"]?[:=] *['\"]?[A-Za-z0-9]{12,}", text
        ), path
        assert ":latest" not in text, path
    assert not [path for path in _files() if path.suffix == ".env"]


def test_training_operator_is_pinned_and_has_raised_limits(
    kustomize: Callable[[Path], Documents], tmp_path: Path
) -> None:
    """A local file replaces the remote base, which needs a network.

    tests/cluster runs the operator itself.
    """
    shipped = ROOT / "k8s/third-party/training-operator"
    text = (shipped / "kustomization.yaml").read_text()
    assert re.findall(r"^  - https://\S+$", text, re.MULTILINE) == [
        "  - https://github.com/kubeflow/training-operator//manifests/overlays/standalone"
        "?ref=v1.9.3"
    ]
    shutil.copytree(shipped, tmp_path / "operator")
    (tmp_path / "operator/kustomization.yaml").write_text(
        re.sub(r"  - https://\S+", "  - base.yaml", text)
    )
    image = "ghcr.io/kubeflow/training-v1/training-operator:v1-d6eb98e"
    container = {"name": "training-operator", "command": ["/manager"], "image": image}
    labels = {"control-plane": "kubeflow-training-operator"}
    template = {
        "metadata": {"labels": labels},
        "spec": {"containers": [container], "serviceAccountName": "training-operator"},
    }
    spec = {"selector": {"matchLabels": labels}, "template": template}
    base = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "training-operator"},
        "spec": spec,
    }
    (tmp_path / "operator/base.yaml").write_text(yaml.safe_dump(base))
    (deployment,) = kustomize(tmp_path / "operator")
    _validate(deployment, "training-operator")
    (patched,) = deployment["spec"]["template"]["spec"]["containers"]
    assert patched["args"] == [
        "--controller-threads=16",
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
    ]
    assert (patched["image"], patched["command"]) == (image, ["/manager"])
