"""The local services: start, status, access control and stop."""

import json
import stat
from pathlib import Path

import boto3
import psutil
import pytest
from botocore import UNSIGNED
from botocore.client import Config
from botocore.exceptions import ClientError
from support.helpers import Run, RunText

from pipelines.local import servers


def test_up_is_idempotent_and_down_stops_all_services(
    convoy: Run, convoy_ok: RunText, convoy_refuses: RunText, tmp_path: Path
) -> None:
    folder = tmp_path / "services"
    try:
        first = convoy_ok("local", "up", "--dir", folder)
        state = json.loads(convoy_ok("local", "status", "--dir", folder, "--json"))
        assert convoy_ok("local", "up", "--dir", folder) == first, (
            "a second start must not start anything"
        )
        assert json.loads(convoy_ok("local", "status", "--dir", folder, "--json")) == state
        assert set(state) == {"s3", "mlflow"}
        processes = [p for s in state.values() for p in _process_tree(s["pid"])]
        for process in processes:
            for connection in process.net_connections("tcp"):
                assert connection.status != psutil.CONN_LISTEN or connection.laddr.ip in (
                    "127.0.0.1",
                    "::1",
                ), "services must listen on loopback only"
        services = servers.load(folder)
        assert services is not None
        secret = services.secret_key
        assert not any(secret in part for process in processes for part in process.cmdline()), (
            "a command line contains a secret"
        )
        for name in ("services.json", "s3.json"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        assert services.mlflow_url in convoy_ok("local", "env", "--dir", folder)
    finally:
        stopped = convoy("local", "down", "--dir", folder)
    assert "stopped mlflow and s3" in stopped.stdout
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert convoy_ok("local", "down", "--dir", folder).strip() == "no services were running"
    assert "not all services are running" in convoy_refuses("local", "status", "--dir", folder)
    assert "no services are running" in convoy_refuses("local", "env", "--dir", folder)
    assert servers._credentials(folder)[1] == secret, "credentials must be kept with the data"


def _process_tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@pytest.mark.parametrize("signature", ["unsigned", "wrong secret"])
def test_object_store_rejects_invalid_signatures(
    services: servers.Services, signature: str
) -> None:
    config = Config(signature_version=UNSIGNED) if signature == "unsigned" else Config()
    client = boto3.client(
        "s3", endpoint_url=services.s3_url, region_name="us-east-1", config=config,
        aws_access_key_id=services.access_key, aws_secret_access_key="wrong",
    )  # fmt: skip
    with pytest.raises(ClientError) as error:
        client.list_objects_v2(Bucket=servers.BUCKET)
    assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
