"""Pods of a job: several launchers on this machine with the training-operator's variables."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from support.helpers import ranks_of, until

from pipelines.local.servers import _free_ports
from trainer.distributed.pod_startup import STARTS
from trainer.progress.progress_record import PROGRESS_LOG_VARIABLE, last_record

RECIPE = "digits-resnet8"


def _settings(digits: Path, out: Path, *more: str) -> list[str]:
    given = [
        f"data.train={digits}/train",
        f"data.val={digits}/val",
        "model.width=4",
        "train.log_every_steps=1",
    ]
    return [*given, f"train.output_dir={out}", f"checkpoint.url={out}/checkpoints", *more]


@contextmanager
def _pods(
    settings: list[str], folder: Path, nodes: int = 2, more: Mapping[str, str] | None = None
) -> Iterator[list[subprocess.Popen]]:
    """Start ``nodes`` launchers with one rank each.

    The first is addressed by its host name, as the operator addresses worker-0.
    """
    (port,) = _free_ports(1)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        pods = []
        for number in range(nodes):
            host = socket.gethostname() if number == 0 else "localhost"
            environment = {
                "PATH": os.environ["PATH"],
                "CONVOY_CPUS": "1",
                "PET_RDZV_ENDPOINT": f"{host}:{port}",
                "PET_NNODES": f"{nodes}:{nodes}",
                "PET_NPROC_PER_NODE": "1",
                "CONVOY_TERMINATION_LOG": str(folder / f"message-{number}"),
                **(more or {}),
            }
            command = [sys.executable, "-m", "trainer.launch", RECIPE, *settings]
            log = stack.enter_context((folder / f"log-{number}").open("w"))
            pod = stack.enter_context(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
            pods.append(pod)
        try:
            yield pods
        finally:
            for pod in pods:
                if pod.poll() is None:
                    pod.kill()


def _log(folder: Path, number: int = 0) -> str:
    return (folder / f"log-{number}").read_text()


def _phase(folder: Path) -> str | None:
    """The phase in the last progress record of the first pod's log."""
    record = last_record(_log(folder).splitlines())
    return record.phase if record is not None else None


def _codes(pods: list[subprocess.Popen]) -> list[int]:
    return [pod.wait(timeout=240) for pod in pods]


def test_killed_rank_ends_both_pods_with_144_and_the_restarted_job_resumes(
    digits: Path, tmp_path: Path
) -> None:
    settings = _settings(digits, tmp_path / "out", "train.epochs=40", "checkpoint.every_steps=5")
    with _pods(settings, tmp_path / "first") as pods:
        until(lambda: (tmp_path / "out/checkpoints/step-000000020/checkpoint.json").exists())
        (rank,) = ranks_of(pods[1], 1)
        assert rank.environ()["OMP_NUM_THREADS"] == "1", "one thread per CPU that the pod requested"
        rank.kill()
        assert _codes(pods) == [144, 144], _log(tmp_path / "first")
    assert json.loads((tmp_path / "out/checkpoints" / STARTS).read_text()) == {
        "newest": "",
        "starts": 1,
    }
    with _pods([*settings, "train.max_steps=60"], tmp_path / "second") as pods:
        assert _codes(pods) == [0, 0], _log(tmp_path / "second")
    assert "resuming from" in _log(tmp_path / "second")
    assert "step 60/60" in _log(tmp_path / "second")
    assert last_record(_log(tmp_path / "second").splitlines()) is None, "nobody asked for records"
    assert (
        json.loads((tmp_path / "out/checkpoints" / STARTS).read_text())["newest"] > "step-000000000"
    )


def test_sigterm_of_one_pod_writes_a_checkpoint_and_ends_both_with_143(
    digits: Path, tmp_path: Path
) -> None:
    with _pods(
        _settings(digits, tmp_path / "out", "train.epochs=1000", "checkpoint.keep=1"),
        tmp_path,
        more={PROGRESS_LOG_VARIABLE: "1"},
    ) as pods:
        until(lambda: _phase(tmp_path) == "training")
        pods[1].send_signal(signal.SIGTERM)
        assert _codes(pods) == [143, 143], _log(tmp_path)
    assert "stop signal received: checkpoint of step" in _log(tmp_path)
    end = last_record(_log(tmp_path).splitlines())
    assert end is not None
    assert (end.phase, end.exit_code) == ("preempted", 143)
    assert f"step-{end.step:09d}" in (end.checkpoint_url or "")


def test_rank_exiting_early_with_code_0_fails_the_pod_with_144(
    digits: Path, tmp_path: Path
) -> None:
    """For example, because a library calls exit()."""
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'RANK' in os.environ: os._exit(0)\n")
    settings = _settings(digits, tmp_path / "out")
    with _pods(settings, tmp_path, nodes=1, more={"PYTHONPATH": str(tmp_path)}) as pods:
        assert _codes(pods) == [144], _log(tmp_path)
    assert "before training was complete" in _log(tmp_path)


def test_first_pod_exits_first(digits: Path, tmp_path: Path) -> None:
    """When one pod is done, the operator deletes the others, with their logs."""
    with _pods(_settings(digits, tmp_path / "out", "train.max_steps=1"), tmp_path) as (
        first,
        second,
    ):
        assert first.wait(timeout=240) == 0, _log(tmp_path)
        assert second.poll() is None
        second.send_signal(signal.SIGTERM)
        assert second.wait(timeout=30) == 0, _log(tmp_path, 1)


def test_user_error_ends_every_pod_with_2_and_is_the_termination_message(
    digits: Path, tmp_path: Path
) -> None:
    with _pods(_settings(digits, tmp_path / "out", "optimizer.momentun=0.9"), tmp_path) as pods:
        assert _codes(pods) == [2, 2]
    for number in range(2):
        assert (tmp_path / f"message-{number}").read_text() == (
            "digits-resnet8.yaml: optimizer.momentun: unknown key; did you mean "
            "optimizer.momentum?\n"
        )


def test_starts_without_progress_are_limited_and_then_reset(digits: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "out/checkpoints"
    checkpoints.mkdir(parents=True)
    settings = _settings(digits, tmp_path / "out", "train.max_steps=1", "checkpoint.max_starts=3")
    (checkpoints / STARTS).write_text('{"newest": "", "starts": 3}')
    with _pods(settings, tmp_path, nodes=1) as pods:
        assert _codes(pods) == [2]
    expected = (
        "checkpoint.max_starts: the job was started 3 times since its beginning without writing a "
        "newer checkpoint"
    )
    assert (tmp_path / "message-0").read_text().startswith(expected)
    assert not (checkpoints / STARTS).exists()


def test_pod_waits_for_data_that_is_still_being_packed(digits: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    # the folder train does not exist yet, as on a volume to which a pod packs
    (data / "val").mkdir(parents=True)
    settings = _settings(data, tmp_path / "out", "train.max_steps=1", "data.wait_minutes=5")
    with _pods(settings, tmp_path / "pod", nodes=1, more={PROGRESS_LOG_VARIABLE: "1"}) as pods:
        until(lambda: _phase(tmp_path / "pod") == "waiting")
        waiting = last_record(_log(tmp_path / "pod").splitlines())
        assert waiting is not None
        assert f"waiting: {waiting.message}\n" in _log(tmp_path / "pod")
        for split in ("train", "val"):
            (data / split).mkdir(exist_ok=True)
            for file in sorted(
                (digits / split).iterdir(), key=lambda file: file.name == "index.json"
            ):
                part = data / split / "part"
                part.write_bytes(file.read_bytes())
                part.rename(data / split / file.name)
        assert _codes(pods) == [0], _log(tmp_path / "pod")
    assert _phase(tmp_path / "pod") == "finished"


def test_hanging_rank_dumps_its_stacks_and_exits_with_144(digits: Path, tmp_path: Path) -> None:
    """The other rank is suspended, so that this one waits for it forever."""
    settings = _settings(
        digits,
        tmp_path / "out",
        "train.epochs=1000",
        "checkpoint.keep=1",
        "train.hang_minutes=0.05",
    )
    with _pods(settings, tmp_path) as pods:
        until(lambda: "\nstep " in _log(tmp_path))
        (rank,) = ranks_of(pods[1], 1)
        rank.suspend()
        try:
            assert pods[0].wait(timeout=240) == 144, _log(tmp_path)
        finally:
            if rank.is_running():
                rank.resume()
        assert pods[1].wait(timeout=240) == 144, _log(tmp_path, 1)
    text = _log(tmp_path)
    message = "no step for 0.1 minutes (train.hang_minutes); the stacks of its threads are above"
    assert message in text
    assert "trainer.py" in text
    assert "in any_rank_received" in text or "in step" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [("PET_RDZV_ENDPOINT", "worker-0"), ("PET_NPROC_PER_NODE", "auto")],
    ids=lambda value: value,
)
def test_invalid_pod_variables_are_rejected_by_name(digits: Path, name: str, value: str) -> None:
    environment = {"PATH": os.environ["PATH"], "PET_RDZV_ENDPOINT": "worker-0:1", name: value}
    command = [sys.executable, "-m", "trainer.launch", RECIPE, f"data.train={digits}/train"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert name in done.stderr


def test_pod_waiting_for_the_first_pod_exits_on_sigterm(digits: Path, tmp_path: Path) -> None:
    with _pods(_settings(digits, tmp_path / "out"), tmp_path) as (first, second):
        psutil.Process(first.pid).kill()
        until(lambda: "waiting: rendezvous at localhost" in _log(tmp_path, 1))
        second.send_signal(signal.SIGTERM)
        assert second.wait(timeout=120) == 143
