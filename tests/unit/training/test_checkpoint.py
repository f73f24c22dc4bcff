"""Checkpoints on a disk and in an object store: atomic writes, skipping of corrupt checkpoints."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.data.random_streams import LATEST_VERSION
from trainer.data.storage.store import open_store
from trainer.engine.deepspeed.optimizer_state import TrainingState
from trainer.errors import UserError
from trainer.training.checkpoint import Checkpoint, CheckpointManager

FINGERPRINT = {
    "model.name": "resnet8",
    "optimizer.base_lr": 0.1,
    "optimizer.betas": [0.9, 0.999],
    "data.train": "sha256:1",
}


def _checkpoint(step: int, top1: float | None = None) -> Checkpoint:
    model = {
        "conv.weight": torch.full((2, 3), float(step)),
        "norm.num_batches_tracked": torch.tensor(step),
    }
    slots = {"momentum_buffer/conv.weight": torch.randn(2, 3)}
    result = {"loss": 0.5, "top1": top1, "evaluated_step": step if top1 is not None else 0}
    return Checkpoint(
        TrainingState(model, slots, step, 7, {"cur_scale": 1024.0}), FINGERPRINT, result, "run"
    )


def _saved(url: str, *steps: int, keep: int = 9) -> CheckpointManager:
    checkpoints = CheckpointManager(url, keep)
    for step in steps:
        checkpoints.save(_checkpoint(step))
    checkpoints.wait()
    return checkpoints


def _steps(folder: Path) -> list[int]:
    return sorted(
        int(path.parent.name.removeprefix("step-")) for path in folder.rglob("checkpoint.json")
    )


@pytest.fixture(params=["disk", "object store"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "checkpoints")
    environment = request.getfixturevalue("service_env")
    monkeypatch = request.getfixturevalue("monkeypatch")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return f"{request.getfixturevalue('bucket')}/checkpoints/{tmp_path.name}"


def test_load_latest_returns_the_newest_checkpoint_bit_equal(url: str) -> None:
    written = _checkpoint(20, top1=0.5)
    checkpoints = _saved(url, 10)
    checkpoints.save(written)
    written.state.model["conv.weight"].zero_()  # save() must have copied it
    checkpoints.wait()
    messages: list[str] = []
    found = CheckpointManager(url, 9).load_latest(FINGERPRINT, messages.append)
    assert found is not None
    assert (found.state.step, found.state.updates, found.state.scaler) == (
        20,
        7,
        {"cur_scale": 1024.0},
    )
    assert (found.result, found.run_id, messages) == (written.result, "run", [])
    assert torch.equal(found.state.model["conv.weight"], torch.full((2, 3), 20.0))
    assert found.state.model["norm.num_batches_tracked"] == 20
    assert torch.equal(*(c.state.slots["momentum_buffer/conv.weight"] for c in (found, written)))


def test_checkpoint_is_readable_with_safetensors_and_sha256sum(tmp_path: Path) -> None:
    _saved(str(tmp_path), 1200)
    folder = tmp_path / "step-000001200"
    assert torch.equal(
        load_file(folder / "model.safetensors")["conv.weight"], torch.full((2, 3), 1200.0)
    )
    manifest = json.loads((folder / "checkpoint.json").read_text())
    sums = subprocess.run(
        ["sha256sum", *sorted(manifest["files"])],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert sums.split()[::2] == [
        manifest["files"][name]["sha256"] for name in sorted(manifest["files"])
    ]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("corruption", ["truncated", "modified", "missing"])
def test_corrupt_checkpoint_is_skipped_and_reported(url: str, file: str, corruption: str) -> None:
    _saved(url, 10, 20)
    store, name = open_store(url), f"step-000000020/{file}"
    content = store.read_small(name)
    assert content
    if corruption == "truncated":
        store.write(name, content[: len(content) // 2])
    elif corruption == "modified":
        i = content.index(b'"step": 20') + 9 if file == "checkpoint.json" else len(content) - 1
        store.write(name, content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
    else:
        store.delete([name])
    messages: list[str] = []
    found = CheckpointManager(url, 9).load_latest(FINGERPRINT, messages.append)
    assert found is not None
    assert found.state.step == 10
    if corruption == "missing" and file == "checkpoint.json":
        assert messages == [], "a folder without a manifest is not a checkpoint"
    else:
        assert len(messages) == 1
        assert messages[0].startswith("skipping checkpoint ")
        assert "step-000000020: " in messages[0]
        assert file in messages[0]


def test_load_latest_returns_none_without_checkpoints(url: str) -> None:
    assert CheckpointManager(url, 3).load_latest(FINGERPRINT, print) is None


def test_last_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(str(tmp_path), 2)
    for step, top1 in (
        (1, 0.3),
        (2, 0.9),
        (3, 0.5),
        (4, None),
        (5, 0.6),
        (6, 0.9),
        (7, 0.1),
        (8, None),
    ):
        checkpoints.save(_checkpoint(step, top1))
    checkpoints.wait()
    assert _steps(tmp_path) == [6, 7, 8], "of two equally good checkpoints, the newer is kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000006",
        "step-000000007",
        "step-000000008",
    ]
    resumed = CheckpointManager(str(tmp_path), 1)  # load_latest reads the best top1
    resumed.load_latest(FINGERPRINT, print)
    resumed.save(_checkpoint(9, 0.2))
    resumed.wait()
    assert _steps(tmp_path) == [6, 9]


def test_partial_checkpoint_is_removed_by_a_later_save(tmp_path: Path) -> None:
    _saved(str(tmp_path), 10)
    (tmp_path / "step-000000020").mkdir()
    (tmp_path / "step-000000020" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("not ours")
    _saved(str(tmp_path), 30)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes.txt",
        "step-000000010",
        "step-000000030",
    ]


def test_checkpoint_of_another_recipe_is_rejected(tmp_path: Path) -> None:
    _saved(str(tmp_path), 10)
    other = FINGERPRINT | {"optimizer.base_lr": 0.2, "model.name": "vgg11"}
    with pytest.raises(UserError) as error:
        CheckpointManager(str(tmp_path), 3).load_latest(other, print)
    message = str(error.value)
    assert (
        "step-000000010 belongs to a different recipe: model.name is 'resnet8' in the checkpoint "
        "and 'vgg11' in the recipe"
    ) in message
    assert "optimizer.base_lr is 0.1 in the checkpoint and 0.2 in the recipe" in message
    assert "checkpoint.resume=never" in message


@pytest.mark.parametrize(
    ("fitting", "key", "default"),
    [
        ({"optimizer.momentum": 0.9, "model.stem": None}, "optimizer.momentum", 0.9),
        ({"augment.erase": 0.0, "ema": None}, "augment.erase", 0.0),
    ],
)
def test_a_key_that_the_checkpoint_lacks_must_have_its_default(
    tmp_path: Path, fitting: dict[str, object], key: str, default: float
) -> None:
    """Such a key, of a later version, had no effect when the checkpoint was written."""
    _saved(str(tmp_path), 10)
    checkpoints = CheckpointManager(str(tmp_path), 3)
    assert checkpoints.load_latest(FINGERPRINT | fitting, print) is not None
    message = f"{key} is {default} in the checkpoint and 0.5 in the recipe"
    with pytest.raises(UserError, match=re.escape(message)):
        checkpoints.load_latest(FINGERPRINT | fitting | {key: 0.5}, print)


def _loaded(folder: Path) -> Checkpoint:
    found = CheckpointManager(str(folder), 3).load_latest(FINGERPRINT, print)
    assert found is not None
    return found


@pytest.mark.parametrize("version", [1, LATEST_VERSION])
def test_the_version_of_the_random_streams_is_kept(tmp_path: Path, version: int) -> None:
    checkpoints = CheckpointManager(str(tmp_path), 3)
    checkpoints.save(dataclasses.replace(_checkpoint(10), streams_version=version))
    checkpoints.wait()
    assert _loaded(tmp_path).streams_version == version


def test_a_checkpoint_without_a_version_of_the_random_streams_has_version_1(
    tmp_path: Path,
) -> None:
    _saved(str(tmp_path), 10)
    file = tmp_path / "step-000000010/checkpoint.json"
    manifest = json.loads(file.read_text())
    assert manifest.pop("random_streams") == LATEST_VERSION
    file.write_text(json.dumps(manifest))
    assert _loaded(tmp_path).streams_version == 1


def test_a_newer_version_of_the_random_streams_is_refused(tmp_path: Path) -> None:
    _saved(str(tmp_path), 10)
    file = tmp_path / "step-000000010/checkpoint.json"
    newer = json.loads(file.read_text()) | {"random_streams": LATEST_VERSION + 1}
    file.write_text(json.dumps(newer))
    with pytest.raises(
        UserError,
        match=f"step-000000010 uses version {LATEST_VERSION + 1} of the random streams, but this "
        f"version of Convoy supports versions up to {LATEST_VERSION}",
    ):
        _loaded(tmp_path)


def test_clear_deletes_all_checkpoints(url: str) -> None:
    _saved(url, 10, 20)
    checkpoints = CheckpointManager(url, 3)
    checkpoints.clear()
    assert CheckpointManager(url, 3).load_latest(FINGERPRINT, print) is None


FULL = """
import sys
sys.path.insert(0, {tests!r})
from test_checkpoint import CheckpointManager, _checkpoint
from trainer.data.storage import store as storage
object.__setattr__(storage._PATIENCE, "seconds", 3.0)
checkpoints = CheckpointManager({url!r}, 1)
for step in (1, 2):
    checkpoints.save(_checkpoint(step))
    checkpoints.wait()
import torch
big = _checkpoint(3)
big.state.model["conv.weight"] = torch.zeros(1_000_000)
checkpoints.save(big)
checkpoints.wait()
"""


def test_full_disk_is_reported_and_the_old_checkpoint_is_kept(tmp_path: Path) -> None:
    """A file system of 200 kB if mounts are allowed, else a file size limit of 200 kB."""
    url = tmp_path / "checkpoints"
    url.mkdir()
    code = FULL.format(tests=str(Path(__file__).parent), url=str(url))
    (tmp_path / "save.py").write_text(code)
    mount = f"mount -t tmpfs -o size=200k none {url}"
    inside = f"{sys.executable} {tmp_path}/save.py && find {url} -type f | sort"
    can_mount = (
        subprocess.run(
            ["unshare", "--mount", "sh", "-c", mount], capture_output=True, check=False
        ).returncode
        == 0
    )
    command = (
        ["unshare", "--mount", "sh", "-c", f"{mount} && {inside}"]
        if can_mount
        else ["bash", "-c", f"ulimit -f 200; {inside}"]
    )
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 3 could not be written, training continues:") == 1
    assert "No space left" in done.stderr or not can_mount
    names = {line.rpartition("checkpoints/")[2] for line in done.stdout.split()}
    assert names == {
        f"step-000000002/{file}"
        for file in ("model.safetensors", "optimizer.safetensors", "checkpoint.json")
    }


def test_unwritable_checkpoint_url_is_rejected() -> None:
    with pytest.raises(UserError, match="cannot be created"):
        CheckpointManager("/proc/checkpoints", 3)
