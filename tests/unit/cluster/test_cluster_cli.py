"""Cluster commands without a reachable cluster, and the credential files of ``convoy secrets``."""

import stat
from pathlib import Path

import pytest
import yaml
from support.helpers import RunText

from pipelines.local.servers import _free_ports

SUBMIT = ["submit", "fashion-resnet8", "--nodes", 2, "--gpus-per-node", 0]
COMMANDS = [
    SUBMIT,
    ["status"],
    ["status", "x"],
    ["logs", "x"],
    ["cancel", "x"],
    ["suspend", "x"],
    ["list"],
]


@pytest.fixture
def unreachable(tmp_path: Path) -> dict[str, str]:
    """Environment with a kubeconfig whose API server is unreachable."""
    (port,) = _free_ports(1)
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "users": [{"name": "u", "user": {}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(config))
    return {"KUBECONFIG": str(path), "HOME": str(tmp_path)}


@pytest.mark.parametrize("command", COMMANDS[:2], ids=lambda command: command[0])
def test_missing_kubeconfig_error_names_the_variable_to_set(
    convoy_refuses: RunText, tmp_path: Path, command: list[object]
) -> None:
    error = convoy_refuses(
        *command, env={"KUBECONFIG": str(tmp_path / "none"), "HOME": str(tmp_path)}
    )
    assert error.startswith("convoy: no cluster is configured: ")
    assert "set KUBECONFIG" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(map(str, command[:2])))
def test_unreachable_api_server_is_a_one_line_error(
    convoy_refuses: RunText, unreachable: dict[str, str], command: list[object]
) -> None:
    error = convoy_refuses(*command, env=unreachable)
    assert error.splitlines()[-1].startswith("convoy: the API server does not respond: ")
    assert "Traceback" not in error


def test_client_dry_run_needs_no_cluster(
    convoy_ok: RunText, convoy_refuses: RunText, unreachable: dict[str, str]
) -> None:
    assert "valid" in convoy_ok(*SUBMIT, "--dry-run", "client", env=unreachable)
    job = ("submit", "resnet50", "--nodes", 3, "--gpus-per-node", 1)
    assert "is not divisible by 3 ranks" in convoy_refuses(
        *job, "--dry-run", "client", env=unreachable
    )
    assert "neither client nor server" in convoy_refuses(
        *SUBMIT, "--dry-run", "yes", env=unreachable
    )


def test_secrets_are_random_private_and_never_overwritten(
    convoy_ok: RunText, convoy_refuses: RunText, tmp_path: Path
) -> None:
    printed = [convoy_ok("secrets", tmp_path / folder) for folder in ("a.env", "b.env")]
    files = [tmp_path / name for name in ("a.env", "a-postgres.env")]
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        other = tmp_path / file.name.replace("a", "b", 1)
        values, others = (
            dict(line.split("=", 1) for line in f.read_text().splitlines()) for f in (file, other)
        )
        assert values.keys() == others.keys()
        for key in values:
            if "SECRET" in key or "PASSWORD" in key or "KEY_ID" in key:
                assert values[key] != others[key]
                assert values[key] not in "".join(printed)
                assert len(values[key]) >= 20
    before = [file.read_text() for file in files]
    files[0].unlink()
    assert "a-postgres.env: already exists" in convoy_refuses("secrets", files[0])
    assert not files[0].exists()
    assert files[1].read_text() == before[1]
