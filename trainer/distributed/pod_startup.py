"""Startup of one pod of a job: the training-operator's environment, and waiting for dependencies.

Nothing here imports torch.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from trainer.config.schema import RunConfig
from trainer.data.index import INDEX_NAME
from trainer.data.storage.location import local_path
from trainer.data.storage.store import Store, is_remote, open_store
from trainer.errors import RetryableError, ServiceUnreachable, UserError
from trainer.faults.node_fault_log import repeated_faults
from trainer.locks.lock_owner import is_of_another_job
from trainer.locks.run_lock import owner_of

STARTS = "starts.json"
_STORE_MINUTES = 5.0  # for an object store that starts or moves to another node meanwhile
# for the first pod, whose node may still pull the image; then this pod is recreated
_HOST_MINUTES = 30.0
_EXIT_SECONDS = 60.0  # for the first pod to end after its ranks have ended
_NOTICE_SECONDS = 5.0  # for the operator to notice the end of the first pod
_RETRY_SECONDS = 0.5
_MESSAGE_SECONDS = 30.0  # between two messages of what a pod waits for


@dataclass(frozen=True)
class PodEnv:
    """Topology of a job: ``nodes`` pods with ``procs`` ranks each.

    The ranks rendezvous at ``host``:``port``, which is the first pod.
    """

    nodes: int
    procs: int
    host: str
    port: int
    job: str

    @property
    def world_size(self) -> int:
        return self.nodes * self.procs

    @property
    def is_rank_zero(self) -> bool:
        return socket.gethostname() == self.host


def pod_from_environment(environment: Mapping[str, str] = os.environ) -> PodEnv | None:
    """Read the PET_* variables, which torchrun reads too; None if no operator set them.

    Raises UserError for invalid values.
    """
    endpoint = environment.get("PET_RDZV_ENDPOINT")
    if not endpoint:
        return None
    if (backend := environment.get("PET_RDZV_BACKEND") or "c10d") != "c10d":
        raise UserError(
            f"PET_RDZV_BACKEND: {backend!r} is not supported; set "
            "spec.elasticPolicy.rdzvBackend: c10d"
        )
    host, _, port = endpoint.rpartition(":")
    nodes = environment.get("PET_NNODES", "1").rpartition(":")[2]
    procs = environment.get("PET_NPROC_PER_NODE", "1")
    if not (host and port.isdigit()):
        raise UserError(f"PET_RDZV_ENDPOINT: {endpoint!r} is not host:port")
    if not nodes.isdigit() or not procs.isdigit():
        raise UserError(
            f"PET_NNODES, PET_NPROC_PER_NODE: {nodes!r} and {procs!r} must be numbers; set "
            "spec.nprocPerNode"
        )
    return PodEnv(
        int(nodes), int(procs), host, int(port), environment.get("PET_RDZV_ID") or "convoy"
    )


def wait_for_data(config: RunConfig, on_wait: Callable[[str], None]) -> None:
    """Wait until the store responds and the indexes exist, at most ``data.wait_minutes``.

    An unreachable store gets at least 5 minutes. Prints what it waits for and calls ``on_wait``
    with it. If something is still missing afterwards, the code that needs it reports that. Raises
    UserError for problems that waiting does not fix.
    """
    for url in (config.data.train, config.data.val):
        if url is not None:
            _wait_for_index(url, config.data.wait_minutes, on_wait)


def _wait_for_index(url: str, minutes: float, on_wait: Callable[[str], None]) -> None:
    store: Store | None = None
    started = time.monotonic()

    def missing() -> str | None:
        nonlocal store
        waited = (time.monotonic() - started) / 60
        try:
            # a folder may be packed later
            if store is None and (is_remote(url) or local_path(url).is_dir()):
                store = open_store(url)
            if store is not None and store.read_small(INDEX_NAME) is not None:
                return None
        except ServiceUnreachable as error:
            if waited >= max(minutes, _STORE_MINUTES):
                raise
            return str(error)
        return f"{url}: no {INDEX_NAME} yet" if waited < minutes else None

    _wait(missing, on_wait)


def wait_for_host(pod: PodEnv, on_wait: Callable[[str], None]) -> None:
    """Wait until the first pod is reachable, if this is another pod.

    Prints what it waits for and calls ``on_wait`` with it. Raises RetryableError.
    """
    started = time.monotonic()

    def missing() -> str | None:
        try:
            socket.create_connection((pod.host, pod.port), timeout=3).close()
        except OSError as error:
            if (time.monotonic() - started) / 60 >= _HOST_MINUTES:
                raise RetryableError(
                    f"the rendezvous at {pod.host}:{pod.port} cannot be reached: {error}"
                ) from None
            return f"rendezvous at {pod.host}:{pod.port}: {error.strerror or error}"
        return None

    if not pod.is_rank_zero:
        _wait(missing, on_wait)


def wait_for_rank0_exit(pod: PodEnv) -> None:
    """After a success, wait until the first pod has ended and the operator has noticed.

    The first pod itself does not wait. The operator considers a job done when any of its pods is
    done, and then deletes those that still run. Waiting preserves the log of the first pod.
    """
    if pod.is_rank_zero:
        return
    give_up = time.monotonic() + _EXIT_SECONDS
    with suppress(OSError):  # the first pod has ended
        while time.monotonic() < give_up:
            socket.create_connection((pod.host, pod.port), timeout=3).close()
            time.sleep(_RETRY_SECONDS)
    time.sleep(_NOTICE_SECONDS)


def _wait(missing: Callable[[], str | None], on_wait: Callable[[str], None]) -> None:
    """Wait until ``missing`` returns None; report its text at once and then every half minute."""
    printed = -_MESSAGE_SECONDS
    while (text := missing()) is not None:
        if time.monotonic() - printed >= _MESSAGE_SECONDS:
            print(f"waiting: {text}", flush=True)
            on_wait(text)
            printed = time.monotonic()
        time.sleep(_RETRY_SECONDS)


def check_restart_budget(url: str, max_starts: int) -> None:
    """Count this start of a job and limit starts that make no progress.

    The count is stored next to the job's checkpoints. A start that finds a newer checkpoint than
    the previous start counts from 1.

    The training-operator recreates a pod without limit. Raises UserError after ``max_starts``
    starts without a newer checkpoint, and then resets the count, so that a job that is submitted
    again gets as many starts. If the store cannot be read, the run itself reports that.
    """
    with suppress(RetryableError, ServiceUnreachable):
        if is_of_another_job(owner_of(url)):
            return  # rank 0 refuses to start or waits; the count belongs to the other job
        store = open_store(url, create=True)
        newest = max(
            (name.partition("/")[0] for name in store.sizes() if name.startswith("step-")),
            default="",
        )
        before, starts = _read(store)
        starts = starts + 1 if before == newest else 1
        if starts > max_starts:
            store.delete([STARTS])
            faults = repeated_faults(store)
            since = f"the checkpoint {newest}" if newest else "its beginning"
            raise UserError(
                f"checkpoint.max_starts: the job was started {max_starts} times since {since} "
                "without writing a newer checkpoint; see the logs of its pods for the cause; "
                "submit it again to resume",
                *faults,
            )
        store.write(STARTS, json.dumps({"newest": newest, "starts": starts}).encode())
        for line in repeated_faults(store):
            print(line, flush=True)


def _read(store: Store) -> tuple[str, int]:
    try:
        record = json.loads(store.read_small(STARTS) or b"{}")
        return str(record["newest"]), int(record["starts"])
    except (ValueError, KeyError, TypeError):
        return "", 0
