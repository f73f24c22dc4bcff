"""The owner of a lock: the process and run recorded in it, and whether that process is alive."""

import getpass
import json
import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

# A larger value in a lock is corrupt and must not make others wait.
_MAX_RECORD_LEASE_SECONDS = 600.0


@dataclass(frozen=True)
class Process:
    """A process on a host.

    A PID is valid only within one boot and one PID namespace (a container has its own).
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_ticks: int
    """Start time of the process, in clock ticks since boot; distinguishes it from a later process
    with the same PID.
    """

    def shares_pids_with(self, other: "Process") -> bool:
        """Returns whether ``other``'s PID can be looked up from this process."""
        here = (self.host, self.boot_id, self.pid_namespace)
        return bool(self.boot_id) and here == (other.host, other.boot_id, other.pid_namespace)

    def is_alive(self) -> bool:
        """Returns whether the process is running; a zombie is not.

        Only valid if the PID can be looked up from this process.
        """
        if self.pid <= 0:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # the process belongs to another user
        state = _process_state(self.pid)
        return state is None or (state[0] not in "ZX" and state[1] == self.start_ticks)


def process_of(pid: int) -> Process:
    """Returns a process of this host."""
    state = _process_state(pid)
    return Process(
        socket.gethostname(), _boot_id(), _pid_namespace(), pid, state[1] if state else 0
    )


@dataclass(frozen=True)
class Owner:
    """The content of a lock.

    ``token`` is unique to one acquisition. Times are for people: no decision depends on a clock.
    """

    token: str
    location: str
    program: str
    run: str | None
    user: str
    since: str
    lease_seconds: float
    process: Process
    launcher: Process | None = None
    """The process that started the ranks; they end when it exits."""
    pod: str | None = None
    """Namespace, job and name of the pod. Kubernetes starts a pod of the same name only after the
    previous one is gone.
    """

    @staticmethod
    def current(location: str, program: str, run: str | None, lease_seconds: float) -> "Owner":
        """Returns an owner for this process, with a new token."""
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        return Owner(
            token=uuid.uuid4().hex,
            location=location,
            program=program,
            run=run,
            user=_user(),
            since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            lease_seconds=lease_seconds,
            process=process_of(os.getpid()),
            launcher=process_of(os.getppid()) if launched else None,
            pod=pod_identity(),
        )

    def to_json(self, renewals: int) -> bytes:
        """Returns the record as JSON.

        ``renewals`` makes the content, and therefore the object's ETag, different each time.
        """
        return (json.dumps(asdict(self) | {"renewals": renewals}, indent=1) + "\n").encode()

    def describe(self) -> str:
        who = f"run {self.run!r}" if self.run is not None else f"`{self.program}`"
        return (
            f"{who} (host {self.process.host}, pid {self.process.pid}, user {self.user}, "
            f"since {self.since})"
        )


def parse_owner(content: bytes) -> Owner | None:
    """Returns the owner recorded in a lock.

    Returns None if the record is truncated, corrupt or written by another program.
    """
    try:
        record = json.loads(content)
        run, pod = record["run"], record["pod"]
        return Owner(
            **{key: str(record[key]) for key in ("token", "location", "program", "user", "since")},
            run=None if run is None else str(run),
            lease_seconds=min(max(float(record["lease_seconds"]), 0.0), _MAX_RECORD_LEASE_SECONDS),
            process=_parse_process(record["process"]),
            launcher=None if record["launcher"] is None else _parse_process(record["launcher"]),
            pod=None if pod is None else str(pod),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def pod_identity(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns ``namespace/job/pod``, or None outside of a job's pod."""
    job = environment.get("PET_RDZV_ID")
    if not job or not environment.get("PET_RDZV_ENDPOINT"):
        return None
    return f"{environment.get('CONVOY_NAMESPACE', '')}/{job}/{socket.gethostname()}"


def is_of_another_job(owner: Owner | None) -> bool:
    """Returns whether a lock belongs to a different Kubernetes job than this pod's."""
    return owner is not None and _job(owner.pod) != _job(pod_identity())


def _job(pod: str | None) -> str | None:
    return pod.rpartition("/")[0] if pod is not None else None


def _parse_process(record: Mapping[str, object]) -> Process:
    host, boot_id, pid_namespace = (
        str(record[key]) for key in ("host", "boot_id", "pid_namespace")
    )
    return Process(
        host, boot_id, pid_namespace, int(str(record["pid"])), int(str(record["start_ticks"]))
    )


def _process_state(pid: int) -> tuple[str, int] | None:
    """Returns state and start time of a process from ``/proc``, or None if they cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode(), int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())
