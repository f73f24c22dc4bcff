"""The rights of each service account of k8s/base, as listed by the API server.

They must equal the table in rights.txt and suffice to submit and manage jobs.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from kubectl import Kubectl
from support.helpers import RunText, until

from trainer.config.load import RECIPES

Rights = dict[str, set[str]]  # a resource or a path, and the verbs
EVERYONE = "every account"


def table() -> dict[str, Rights]:
    """Return the rights of each account in rights.txt."""
    found: dict[str, Rights] = {}
    _, *paragraphs = Path(__file__).with_name("rights.txt").read_text().split("\n\n")
    for paragraph in paragraphs:
        account, *lines = paragraph.splitlines()
        rows = (line.split() for line in lines)
        found[account.partition(":")[0]] = {what: set(verbs) for what, *verbs in rows}
    return found


def listed(kubectl: Kubectl, account: str) -> Rights:
    found: Rights = {}
    for line in kubectl("auth", "can-i", "--list", "--as", account).splitlines()[1:]:
        match = re.fullmatch(r"(\S*) +\[(\S*)\] +\[\] +\[(.*)\]", line)
        assert match, f"unexpected format of a right: {line}"
        found.setdefault(match[1] or match[2], set()).update(match[3].split())
    return found


@pytest.mark.usefixtures("own_cluster")
def test_each_account_has_exactly_the_rights_in_the_table(base: Kubectl) -> None:
    expected = table()
    everyone = expected.pop(EVERYONE)
    accounts = base(
        "get", "serviceaccounts", "-l", "app.kubernetes.io/part-of=convoy", "-o", "name"
    ).split()
    assert {name.removeprefix("serviceaccount/") for name in accounts} == set(expected)
    for account, more in expected.items():
        assert (
            listed(base, f"system:serviceaccount:{base.namespace}:{account}") == everyone | more
        ), account


@pytest.fixture
def submitter(base: Kubectl, tmp_path: Path) -> dict[str, str]:
    """Environment whose kubeconfig has only a token of convoy-submitter."""
    config = json.loads(base("config", "view", "--raw", "--minify", "-o", "json"))
    server = config["clusters"][0]
    if authority := server["cluster"].pop("certificate-authority", None):
        server["cluster"]["certificate-authority-data"] = base64.b64encode(
            Path(authority).read_bytes()
        ).decode()
    config["users"] = [
        {
            "name": "submitter",
            "user": {"token": base("create", "token", "convoy-submitter").strip()},
        }
    ]
    context = {"cluster": server["name"], "user": "submitter", "namespace": base.namespace}
    config |= {"contexts": [{"name": "own", "context": context}], "current-context": "own"}
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    return {"KUBECONFIG": str(path)}


def test_rights_of_the_submitter_suffice_for_each_command(
    base: Kubectl,
    submitter: dict[str, str],
    tmp_path: Path,
    convoy_ok: RunText,
    convoy_refuses: RunText,
) -> None:
    """The job has a recipe file and no data; it waits or fails, but its pod has a log."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text((RECIPES / "fashion-resnet8.yaml").read_text())
    sizes = (
        "--nodes",
        1,
        "--gpus-per-node",
        0,
        "--cpu",
        "100m",
        "--memory",
        "2Gi",
        "--name",
        "mine",
    )
    no_secrets = ("--object-store-secret", "", "--mlflow-secret", "")
    command = (
        "submit",
        recipe,
        *sizes,
        *no_secrets,
        "data.train=file:///none",
        "checkpoint.url=file:///tmp/kept",
    )
    assert "would accept it" in convoy_ok(*command, "--dry-run", "server", env=submitter)
    assert "submitted" in convoy_ok(*command, env=submitter)
    until(lambda: base.phases("app.kubernetes.io/instance=mine") in (["Running"], ["Failed"]), 120)
    until(lambda: bool(convoy_ok("logs", "mine", env=submitter).strip()), 120)
    assert convoy_ok("status", "mine", env=submitter).startswith("mine: ")
    assert "mine" in convoy_ok("list", env=submitter)
    assert "suspended" in convoy_ok("suspend", "mine", env=submitter)
    assert "resumed" in convoy_ok("resume", "mine", env=submitter)
    assert "cancelled" in convoy_ok("cancel", "mine", env=submitter)
    until(lambda: "mine" not in base("get", "pytorchjobs,configmaps", "-o", "name"), 150)
    assert "permission denied (403)" in convoy_refuses(
        "list", "--namespace", "default", env=submitter
    )


@pytest.mark.usefixtures("own_cluster")
def test_submitter_may_create_and_delete_a_gang(
    base: Kubectl, submitter: dict[str, str], convoy_ok: RunText
) -> None:
    command = (
        "submit",
        "fashion-resnet8",
        "--nodes",
        1,
        "--gpus-per-node",
        0,
        "--name",
        "gang",
        "--gang",
        "--suspend",
    )
    convoy_ok(*command, env=submitter)
    (owner,) = base.get("podgroup", "gang")["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("PyTorchJob", "gang")
    convoy_ok("cancel", "gang", env=submitter)
    until(lambda: "gang" not in base("get", "pytorchjobs,podgroups", "-o", "name"), 60)
