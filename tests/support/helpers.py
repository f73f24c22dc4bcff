"""Helpers that run the real command, for several tests."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from trainer.process.supervisor import python_command

Run = Callable[..., subprocess.CompletedProcess]
"""Runs ``convoy`` and returns the ended process."""
RunText = Callable[..., str]
"""The same, but checks the exit code and returns what the command printed."""

_REMOVED_PREFIXES = ("AWS_", "MLFLOW_", "CONVOY_")


def run_convoy(
    *arguments: object, env: dict[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess:
    """Run the ``convoy`` command as a user does.

    ``env``: variables in addition to those of a plain shell.
    """
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith(_REMOVED_PREFIXES)
    }
    environment = plain | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"} | (env or {})
    command = [sys.executable, "-m", "pipelines.cli", *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def start_train(
    arguments: Sequence[object], environment: dict[str, str], **options: Any
) -> subprocess.Popen:
    """Start ``convoy train`` with few variables besides ``environment``; stdout has stderr too."""
    plain = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*python_command("pipelines.cli.main"), "train", *map(str, arguments)],
        env=plain | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


@contextmanager
def started(
    recipe: str, settings: list[str], environment: dict[str, str], procs: int = 2
) -> Iterator[subprocess.Popen]:
    """Start a training and wait for its first step."""
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "train",
        recipe,
        "--procs",
        str(procs),
        *settings,
    ]
    plain = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"} | environment
    with subprocess.Popen(
        command, env=plain, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("step"):
                break
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def until(
    condition: Callable[[], bool], seconds: float = 120, explain: Callable[[], str] = lambda: ""
) -> None:
    """Poll until ``condition`` is true, using at most a third of the time for the polls.

    ``explain``: returns text for the error message.
    """
    began = time.monotonic()
    while True:
        polled = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        assert now < began + seconds, f"not true within {seconds:.0f} s\n{explain()}"
        time.sleep(max(0.01, 2 * (now - polled)))


def copy_manifests(folder: Path) -> Path:
    """Copy k8s/ to ``folder``, with the files that `convoy secrets` creates."""
    from pipelines.cluster.secrets import write_secrets

    copy = folder / "k8s"
    shutil.copytree(Path(__file__).parents[2] / "k8s", copy, ignore=shutil.ignore_patterns("*.env"))
    for overlay in ("local", "gpu-8"):
        write_secrets(
            copy / "overlays" / overlay / "secrets.env", "http://convoy-object-store:8333"
        )
    return copy


def ranks_of(process: subprocess.Popen, procs: int = 2) -> list[psutil.Process]:
    """Return the rank processes of a training, in rank order."""
    ranks = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "RANK" in p.environ()
    ]
    assert len(ranks) == procs
    return sorted(ranks, key=lambda p: p.environ()["RANK"])
