"""The commands for a cluster where there is none, and what they leave on the disk."""

import stat
from pathlib import Path

import pytest
import yaml
from support.helpers import Run

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
def nowhere(tmp_path: Path) -> dict[str, str]:
    """A kubeconfig whose API server does not answer."""
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
def test_without_a_kubeconfig_the_line_says_what_to_set(
    convoy_refuses: Run, tmp_path: Path, command: list[object]
) -> None:
    told = convoy_refuses(
        *command, env={"KUBECONFIG": str(tmp_path / "none"), "HOME": str(tmp_path)}
    )
    assert told.startswith("convoy: no cluster is known: ")
    assert "set KUBECONFIG" in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: "-".join(map(str, command[:2])))
def test_a_server_that_does_not_answer_is_one_line(
    convoy_refuses: Run, nowhere: dict[str, str], command: list[object]
) -> None:
    told = convoy_refuses(*command, env=nowhere)
    assert told.splitlines()[-1].startswith("convoy: the API server does not answer: ")
    assert "Traceback" not in told


def test_a_dry_run_of_the_client_needs_no_cluster(
    convoy_ok: Run, convoy_refuses: Run, nowhere: dict[str, str]
) -> None:
    assert "good" in convoy_ok(*SUBMIT, "--dry-run", "client", env=nowhere)
    assert "is not divisible by 3 ranks" in convoy_refuses(
        "submit", "resnet50", "--nodes", 3, "--gpus-per-node", 1, "--dry-run", "client", env=nowhere
    )
    assert "neither client nor server" in convoy_refuses(*SUBMIT, "--dry-run", "yes", env=nowhere)


def test_secrets_are_random_private_and_never_overwritten(
    convoy_ok: Run, convoy_refuses: Run, tmp_path: Path
) -> None:
    said = [convoy_ok("secrets", tmp_path / folder) for folder in ("a.env", "b.env")]
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
                assert values[key] not in "".join(said)
                assert len(values[key]) >= 20
    before = [file.read_text() for file in files]
    files[0].unlink()
    assert "a-postgres.env: is there already" in convoy_refuses("secrets", files[0])
    assert not files[0].exists()
    assert files[1].read_text() == before[1]
