"""Folders and processes of a test cluster.

Everything is in one state folder, except two things in the cache that the next cluster reuses: the
programs (build.sh) and the node's image store (images.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
KUBERNETES = "1.37.2"


def default_state() -> Path:
    return Path(tempfile.gettempdir()) / "convoy-cluster"


def cache() -> Path:
    folder = os.environ.get("CONVOY_CACHE")
    return (
        Path(folder)
        if folder
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convoy"
    )


class ClusterError(Exception):
    """An error that the user can fix: reported in one line, without a traceback."""


@dataclass(frozen=True)
class State:
    """The folder of one cluster."""

    folder: Path

    @property
    def kubeconfig(self) -> Path:
        """Kubeconfig for programs on this machine."""
        return self.folder / "kubeconfig"

    @property
    def inner_kubeconfig(self) -> Path:
        """Kubeconfig for programs inside the cluster's network namespace."""
        return self.folder / "inner-kubeconfig"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def processes(self) -> Path:
        """File with pid and start time of each process that `up` started, outermost first."""
        return self.folder / "processes.json"

    @property
    def containerd(self) -> Path:
        return self.folder / "containerd.sock"

    @property
    def cgroup(self) -> str:
        """Name of the parent cgroup of all pods, below the root of each hierarchy."""
        return "convoy-" + hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]

    def record(self, pids: list[int]) -> None:
        self.processes.write_text(json.dumps([[pid, start_time(pid)] for pid in pids]))

    def running(self) -> list[int]:
        """Return the recorded processes that still run; a reused pid does not count."""
        if not self.processes.is_file():
            return []
        return [
            pid
            for pid, started in json.loads(self.processes.read_text())
            if started is not None and start_time(pid) == started
        ]


def start_time(pid: int) -> int | None:
    """Return a process's start time in clock ticks since boot; None if it ended or is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def wait_for(what: str, done: Callable[[], bool], seconds: float, interval: float = 0.1) -> float:
    """Poll until ``done``; return the seconds it took. Raises ClusterError after ``seconds``."""
    start = time.monotonic()
    while not done():
        if time.monotonic() - start > seconds:
            raise ClusterError(f"{what} took longer than {seconds:.0f} s")
        time.sleep(interval)
    return time.monotonic() - start


def end(pids: list[int], grace: float = 10) -> None:
    """Send SIGTERM to the processes, and SIGKILL after ``grace`` seconds."""
    started = {pid: start_time(pid) for pid in pids}

    def remaining() -> list[int]:
        return [
            pid
            for pid, moment in started.items()
            if moment is not None and start_time(pid) == moment
        ]

    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        for pid in remaining():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        try:
            wait_for("ending the processes", lambda: not remaining(), patience)
            return
        except ClusterError:
            continue
    raise ClusterError(f"these processes cannot be ended: {remaining()}")
