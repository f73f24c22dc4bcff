"""Jobs that cannot run: output of `kubectl describe` and `convoy status`, with the real image."""

from __future__ import annotations

import base64
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubectl import Kubectl
from support.helpers import RunText, until

STORE = Path(__file__).resolve().parents[2] / "k8s/base/services/object-store.yaml"
IMAGE = os.environ.get("CONVOY_IMAGE", "localhost/convoy:dev")
SIZES = ("--nodes", 1, "--gpus-per-node", 0, "--cpu", "100m", "--memory", "2Gi")
NO_SECRETS = ("--object-store-secret", "", "--mlflow-secret", "")
SECONDS = 60
"""Time until a job that cannot work ends; on a busy machine the command itself may take longer."""

Status = Callable[[str], str]


@pytest.fixture
def status(namespace: Kubectl, convoy_ok: RunText) -> Status:
    """A function that waits until the line of `convoy status` starts with a prefix; returns it."""

    def line(prefix: str) -> str:
        lines = [""]

        def has_prefix() -> bool:
            lines[:] = convoy_ok(
                "status", prefix.partition(":")[0], "--namespace", namespace.namespace
            ).splitlines()
            return lines[0].startswith(prefix)

        until(has_prefix, 3 * SECONDS, lambda: "\n".join(lines))
        assert len(lines) == 1
        return lines[0]

    return line


def submit(convoy_ok: RunText, kubectl: Kubectl, name: str, *more: str) -> None:
    image = () if "--image" in more else ("--image", IMAGE)
    convoy_ok(
        "submit",
        "fashion-resnet8",
        *SIZES,
        "--name",
        name,
        "--namespace",
        kubectl.namespace,
        *image,
        *more,
    )


def test_wrong_recipe_key_fails_the_job_and_is_reported_by_the_pod(
    namespace: Kubectl, convoy_ok: RunText, status: Status
) -> None:
    """`convoy submit` would reject the key, so the test changes the rendered manifest."""
    where = ("--namespace", namespace.namespace, "--image", IMAGE)
    manifest = convoy_ok(
        "render",
        "fashion-resnet8",
        *SIZES,
        "--name",
        "typo",
        *where,
        *NO_SECRETS,
        "optimizer.momentum=0.9",
    )
    manifest = manifest.replace("optimizer.momentum", "optimizer.momentun")
    namespace("create", "-f", "-", stdin=manifest)
    namespace("wait", "--for=condition=Failed", f"--timeout={SECONDS}s", "pytorchjob/typo")
    error = "optimizer.momentun: unknown key; did you mean optimizer.momentum?"
    assert error in namespace("describe", "pod", "typo-worker-0")
    assert status("typo: failed: ").endswith(error)


def test_status_names_a_missing_image(
    namespace: Kubectl, convoy_ok: RunText, status: Status
) -> None:
    submit(convoy_ok, namespace, "no-image", "--image", "localhost/none:1", *NO_SECRETS)
    assert status("no-image: no image: 1 of 1 pods: localhost/none:1 cannot be pulled (").endswith(
        "access to its registry"
    )


def test_status_names_a_missing_secret(
    namespace: Kubectl, convoy_ok: RunText, status: Status
) -> None:
    submit(convoy_ok, namespace, "no-secret", "--mlflow-secret", "")
    assert 'secret "convoy-object-store" not found' in status(
        "no-secret: not started: 1 of 1 pods: "
    )


@pytest.fixture
def store(base: Kubectl) -> Kubectl:
    """A namespace with the shipped object store, without a volume.

    It has the Secrets of an owner, of a guest without access to the bucket, and of an unknown user.
    """
    keys = {
        name: {"AWS_ACCESS_KEY_ID": f"{name}-key", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}
        for name in ("owner", "guest")
    }
    place = {"AWS_ENDPOINT_URL": "http://convoy-object-store:8333", "AWS_REGION": "us-east-1"}
    base.create(
        secret("convoy-object-store", keys["owner"]), secret("guest", {**place, **keys["guest"]})
    )
    base.create(
        secret(
            "stranger", {**place, "AWS_ACCESS_KEY_ID": "stranger", "AWS_SECRET_ACCESS_KEY": "none"}
        )
    )
    service, stateful_set = yaml.safe_load_all(STORE.read_text())
    del stateful_set["spec"]["volumeClaimTemplates"]
    template = stateful_set["spec"]["template"]["spec"]
    template["volumes"].append({"name": "data", "emptyDir": {}})
    template["containers"][0]["image"] = IMAGE
    template["terminationGracePeriodSeconds"] = 1
    base.create(service, stateful_set)
    base("rollout", "status", "statefulset/convoy-object-store", "--timeout=110s")
    identity = " ".join(
        f"-{key}={value}"
        for key, value in zip(("access_key", "secret_key"), keys["guest"].values(), strict=True)
    )
    configure = f"s3.configure -user=guest {identity} -buckets=other -actions=Read,List -apply"
    shell = f"echo '{configure}' | weed shell"
    base("exec", "convoy-object-store-0", "--", "sh", "-c", shell)
    return base


def secret(name: str, values: dict[str, str]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": values}


ERROR_CODE = """
import boto3
from botocore.exceptions import ClientError
client = boto3.client("s3", aws_access_key_id="{id}", aws_secret_access_key="{key}")
try:
    client.list_objects_v2(Bucket="convoy")
except ClientError as error:
    print(error.response["Error"]["Code"])
"""


def error_code(kubectl: Kubectl, name: str) -> str:
    """Return the object store's error code for the credentials in Secret ``name``."""
    data = {
        key: base64.b64decode(value).decode()
        for key, value in kubectl.get("secret", name)["data"].items()
    }
    code = ERROR_CODE.format(id=data["AWS_ACCESS_KEY_ID"], key=data["AWS_SECRET_ACCESS_KEY"])
    where = f"AWS_ENDPOINT_URL={data['AWS_ENDPOINT_URL']}"
    return kubectl(
        "exec", "convoy-object-store-0", "--", "env", where, "python", "-c", code
    ).strip()


@pytest.mark.parametrize(
    ("key", "code"), [("stranger", "InvalidAccessKeyId"), ("guest", "AccessDenied")]
)
def test_status_reports_missing_permission_for_a_bucket(
    store: Kubectl, convoy_ok: RunText, status: Status, key: str, code: str
) -> None:
    """With an unknown key, and with a valid key that may not read this bucket."""
    until(lambda: error_code(store, key) == code, SECONDS, lambda: error_code(store, key))
    submit(
        convoy_ok,
        store,
        key,
        "--object-store-secret",
        key,
        "--mlflow-secret",
        "",
        "data.wait_minutes=1",
    )
    line = status(f"{key}: failed: s3://convoy/fashion-mnist/train/index.json: permission denied; ")
    assert "check the credentials" in line
