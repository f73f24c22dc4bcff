"""Where a test cluster keeps what it is made of, and whether it is alive.

Everything lies under one state folder, but for the two things that the next cluster uses again: the
programs (build.sh) and the node's image store (images.py), which lie in the cache.
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
    own = os.environ.get("CONVOY_CACHE")
    return (
        Path(own)
        if own
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convoy"
    )


class ClusterError(Exception):
    """What the user can do something about: one line, no traceback."""


@dataclass(frozen=True)
class State:
    """The folder of one cluster."""

    folder: Path

    @property
    def kubeconfig(self) -> Path:
        """For programs on this machine."""
        return self.folder / "kubeconfig"

    @property
    def inner_kubeconfig(self) -> Path:
        """For programs inside the cluster's network namespace."""
        return self.folder / "inner-kubeconfig"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def processes(self) -> Path:
        """Pid and start time of each process that `up` started on this machine, outermost first."""
        return self.folder / "processes.json"

    @property
    def containerd(self) -> Path:
        return self.folder / "containerd.sock"

    @property
    def cgroup(self) -> str:
        """The cgroup that holds every pod's, below the root of each hierarchy."""
        return "convoy-" + hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]

    def record(self, pids: list[int]) -> None:
        self.processes.write_text(json.dumps([[pid, start_time(pid)] for pid in pids]))

    def running(self) -> list[int]:
        """The recorded processes that are still the same ones: a number may have gone to another
        program since.
        """
        if not self.processes.is_file():
            return []
        return [
            pid
            for pid, started in json.loads(self.processes.read_text())
            if started is not None and start_time(pid) == started
        ]


def start_time(pid: int) -> int | None:
    """Clock ticks between the machine's start and the process's; None for one that is gone or a
    zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def wait_for(what: str, done: Callable[[], bool], seconds: float, interval: float = 0.1) -> float:
    """Poll until `done`; gives the seconds it took, raises ClusterError after `seconds`."""
    start = time.monotonic()
    while not done():
        if time.monotonic() - start > seconds:
            raise ClusterError(f"{what} took longer than {seconds:.0f} s")
        time.sleep(interval)
    return time.monotonic() - start


def end(pids: list[int], grace: float = 10) -> None:
    """Ask the processes to end; after `grace` seconds kill them."""
    started = {pid: start_time(pid) for pid in pids}

    def left() -> list[int]:
        return [
            pid
            for pid, moment in started.items()
            if moment is not None and start_time(pid) == moment
        ]

    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        for pid in left():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        try:
            wait_for("ending", lambda: not left(), patience)
            return
        except ClusterError:
            continue
    raise ClusterError(f"these processes cannot be ended: {left()}")
