"""Checkpoints on a disk and in an object store: whole or none, newest good one first, others passed
over and told.
"""

import dataclasses
import json
import os
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


def test_the_newest_comes_back_bit_for_bit(url: str) -> None:
    written = _checkpoint(20, top1=0.5)
    checkpoints = _saved(url, 10)
    checkpoints.save(written)
    written.state.model["conv.weight"].zero_()  # training goes on: what was to be kept was copied
    checkpoints.wait()
    notes: list[str] = []
    found = CheckpointManager(url, 9).load_latest(FINGERPRINT, notes.append)
    assert found is not None
    assert (found.state.step, found.state.updates, found.state.scaler) == (
        20,
        7,
        {"cur_scale": 1024.0},
    )
    assert (found.result, found.run_id, notes) == (written.result, "run", [])
    assert torch.equal(found.state.model["conv.weight"], torch.full((2, 3), 20.0))
    assert found.state.model["norm.num_batches_tracked"] == 20
    assert torch.equal(*(c.state.slots["momentum_buffer/conv.weight"] for c in (found, written)))


def test_plain_tools_read_it(tmp_path: Path) -> None:
    _saved(str(tmp_path), 1200)
    folder = tmp_path / "step-000001200"
    assert torch.equal(
        load_file(folder / "model.safetensors")["conv.weight"], torch.full((2, 3), 1200.0)
    )
    told = json.loads((folder / "checkpoint.json").read_text())
    sums = subprocess.run(
        ["sha256sum", *sorted(told["files"])],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert sums.split()[::2] == [told["files"][name]["sha256"] for name in sorted(told["files"])]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_torn_or_changed_one_is_passed_over_and_told(url: str, file: str, damage: str) -> None:
    _saved(url, 10, 20)
    store, name = open_store(url), f"step-000000020/{file}"
    content = store.read_small(name)
    assert content
    if damage == "cut":
        store.write(name, content[: len(content) // 2])
    elif damage == "changed":
        place = content.index(b'"step": 20') + 9 if file == "checkpoint.json" else len(content) - 1
        store.write(name, content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        store.delete([name])
    notes: list[str] = []
    found = CheckpointManager(url, 9).load_latest(FINGERPRINT, notes.append)
    assert found is not None
    assert found.state.step == 10
    if damage == "gone" and file == "checkpoint.json":
        assert notes == [], "without it there never was one"
    else:
        assert len(notes) == 1
        assert "step-000000020 is passed over: " in notes[0]
        assert file in notes[0]


def test_none_is_none(url: str) -> None:
    assert CheckpointManager(url, 3).load_latest(FINGERPRINT, print) is None


def test_the_last_ones_and_the_best_stay(tmp_path: Path) -> None:
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
    assert _steps(tmp_path) == [6, 7, 8], "of two that are equally good the newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000006",
        "step-000000007",
        "step-000000008",
    ]
    again = CheckpointManager(str(tmp_path), 1)  # another process knows the best too
    again.load_latest(FINGERPRINT, print)
    again.save(_checkpoint(9, 0.2))
    again.wait()
    assert _steps(tmp_path) == [6, 9]


def test_what_a_kill_left_half_written_is_removed_later(tmp_path: Path) -> None:
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


def test_one_of_another_recipe_is_refused(tmp_path: Path) -> None:
    _saved(str(tmp_path), 10)
    other = FINGERPRINT | {"optimizer.base_lr": 0.2, "model.name": "vgg11"}
    with pytest.raises(UserError) as refused:
        CheckpointManager(str(tmp_path), 3).load_latest(other, print)
    told = str(refused.value)
    assert (
        "step-000000010 is of another recipe: model.name is 'resnet8' there and 'vgg11' here"
        in told
    )
    assert "optimizer.base_lr is 0.1 there and 0.2 here" in told
    assert "checkpoint.resume=never" in told


def test_a_key_that_is_newer_than_the_checkpoint_must_have_its_default(tmp_path: Path) -> None:
    """A new optimizer or network may bring a key; existing runs resume."""
    _saved(str(tmp_path), 10)
    newer = FINGERPRINT | {"optimizer.momentum": 0.9, "model.stem": None}
    assert CheckpointManager(str(tmp_path), 3).load_latest(newer, print) is not None
    with pytest.raises(UserError, match=r"optimizer\.momentum is None there and 0\.5 here"):
        CheckpointManager(str(tmp_path), 3).load_latest(newer | {"optimizer.momentum": 0.5}, print)
def test_a_key_that_the_checkpoint_lacks_must_have_its_default(tmp_path: Path) -> None:
    """Such a key, of a later version, had no effect when the checkpoint was written."""
    _saved(str(tmp_path), 10)
    checkpoints = CheckpointManager(str(tmp_path), 3)
    assert checkpoints.load_latest(FINGERPRINT | {"augment.erase": 0.0, "ema": None}, print)
    with pytest.raises(UserError, match=r"augment\.erase is 0\.0 there and 0\.5 here"):
        checkpoints.load_latest(FINGERPRINT | {"augment.erase": 0.5}, print)


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


def test_beginning_anew_removes_those_that_stand(url: str) -> None:
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


def test_a_full_disk_is_told_and_the_old_one_stays(tmp_path: Path) -> None:
    """A file system of its own with room for 200 kB where mounts are allowed; else files of at most
    that size.
    """
    url = tmp_path / "checkpoints"
    url.mkdir()
    code = FULL.format(tests=str(Path(__file__).parent), url=str(url))
    (tmp_path / "save.py").write_text(code)
    mount = f"mount -t tmpfs -o size=200k none {url}"
    inside = f"{sys.executable} {tmp_path}/save.py && find {url} -type f | sort"
    can = (
        subprocess.run(
            ["unshare", "--mount", "sh", "-c", mount], capture_output=True, check=False
        ).returncode
        == 0
    )
    command = (
        ["unshare", "--mount", "sh", "-c", f"{mount} && {inside}"]
        if can
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
    assert done.stderr.count("no checkpoint of step 3, training goes on:") == 1
    assert "No space left" in done.stderr or not can
    names = {line.rpartition("checkpoints/")[2] for line in done.stdout.split()}
    assert names == {
        f"step-000000002/{file}"
        for file in ("model.safetensors", "optimizer.safetensors", "checkpoint.json")
    }


def test_a_place_that_cannot_be_written_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be created"):
        CheckpointManager("/proc/checkpoints", 3)
