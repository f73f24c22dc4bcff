"""Errors raised inside a real training step: messages, exit codes and fault records."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("failing_step.py")


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": root,
        "OMP_NUM_THREADS": "1",
        "CONVOY_NODE": "gpu-17",
    }


def _settings(digits: Path, out: Path) -> list[str]:
    return [
        "digits-resnet8",
        f"data.train={digits}/train",
        f"data.val={digits}/val",
        "model.width=4",
        "batch.global_size=32",
        "batch.micro_size=16",
        "train.max_steps=5",
        f"train.output_dir={out}",
    ]


def _run(
    kind: str, rank: int, digits: Path, out: Path, procs: int = 1
) -> subprocess.CompletedProcess:
    """Run the script, on several ranks with torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(procs)]
    command = [sys.executable, *(torchrun if procs > 1 else []), str(SCRIPT), kind, str(rank)]
    return subprocess.run(
        [*command, *_settings(digits, out)],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_device_fault_exits_all_ranks_for_retry_and_is_recorded(
    digits: Path, tmp_path: Path
) -> None:
    done = _run("ecc", 1, digits, tmp_path / "out", procs=2)
    assert "convoy: rank 1: hardware fault on node gpu-17" in done.stderr, done.stderr
    assert "uncorrectable ECC error encountered" in done.stderr
    assert f"exitcode  : {144}" in done.stderr, "exit code of a rank, as reported by torchrun"
    assert "exitcode  : 1 " not in done.stderr
    (record,) = (tmp_path / "out/checkpoints/faults").iterdir()
    content = json.loads(record.read_text())
    assert (content["node"], content["rank"]) == ("gpu-17", 1)
    assert "ECC" in content["fault"]


def test_running_collectives_do_not_abort_a_rank_at_exit(digits: Path, tmp_path: Path) -> None:
    done = _run("running", 0, digits, tmp_path / "out", procs=2)
    assert done.returncode == 0, done.stderr
    assert "terminate called" not in done.stderr


def test_out_of_memory_in_a_step_exits_with_code_2_and_advice(digits: Path, tmp_path: Path) -> None:
    done = _run("memory", 0, digits, tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "out of host memory on node gpu-17" in done.stderr
    assert "batch.micro_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out/checkpoints/faults").exists()
