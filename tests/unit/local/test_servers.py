"""The local services: started, found again, closed to strangers, stopped."""

import json
import stat
from pathlib import Path

import boto3
import psutil
import pytest
from botocore import UNSIGNED
from botocore.client import Config
from botocore.exceptions import ClientError
from support.helpers import Run

from pipelines.local import servers


def test_up_twice_status_and_down(
    convoy: Run, convoy_ok: Run, convoy_refuses: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "services"
    try:
        first = convoy_ok("local", "up", "--dir", folder)
        state = json.loads(convoy_ok("local", "status", "--dir", folder, "--json"))
        assert convoy_ok("local", "up", "--dir", folder) == first, (
            "started twice is no error, and nothing new is started"
        )
        assert json.loads(convoy_ok("local", "status", "--dir", folder, "--json")) == state
        assert set(state) == {"s3", "mlflow"}
        family = [p for s in state.values() for p in _family(s["pid"])]
        for process in family:
            for connection in process.net_connections("tcp"):
                assert connection.status != psutil.CONN_LISTEN or connection.laddr.ip in (
                    "127.0.0.1",
                    "::1",
                ), "loopback only"
        services = servers.load(folder)
        assert services is not None
        secret = services.secret_key
        assert not any(secret in part for process in family for part in process.cmdline()), (
            "no secret on a command line"
        )
        for name in ("services.json", "s3.json"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        assert services.mlflow_url in convoy_ok("local", "env", "--dir", folder)
    finally:
        stopped = convoy("local", "down", "--dir", folder)
    assert "stopped mlflow and s3" in stopped.stdout
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert convoy_ok("local", "down", "--dir", folder).strip() == "no services were running"
    assert "not all services are running" in convoy_refuses("local", "status", "--dir", folder)
    assert "no services are running" in convoy_refuses("local", "env", "--dir", folder)
    assert servers._credentials(folder)[1] == secret, "credentials stay with the data"


def _family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


@pytest.mark.parametrize("how", ["unsigned", "wrong secret"])
def test_the_object_store_lets_no_stranger_in(services: servers.Services, how: str) -> None:
    config = Config(signature_version=UNSIGNED) if how == "unsigned" else Config()
    client = boto3.client(
        "s3", endpoint_url=services.s3_url, region_name="us-east-1", config=config,
        aws_access_key_id=services.access_key, aws_secret_access_key="wrong",
    )  # fmt: skip
    with pytest.raises(ClientError) as error:
        client.list_objects_v2(Bucket=servers.BUCKET)
    assert error.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
