"""One pod of a job: what the training-operator's environment says, and what is waited for before
ranks start. No torch here.
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
_STORE_MINUTES = 5.0  # for an object store that starts, or moves to another node, at the same time
_HOST_MINUTES = (
    30.0  # for the first pod, whose node may still pull the image; then this one is made anew
)
_LAST_SECONDS = 60.0  # that the first pod may take to end after its ranks have
_SEEN_SECONDS = 5.0  # until its end has come to the operator
_BETWEEN_TRIES = 0.5
_BETWEEN_WORDS = 30.0


@dataclass(frozen=True)
class PodEnv:
    """``nodes`` pods of ``procs`` ranks meet at ``host``:``port``, which is the first pod."""

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
    """By the variables that torchrun reads too (PET_*), or None where no operator set them. Raises
    UserError.
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


def wait_for_data(config: RunConfig) -> None:
    """Until the store answers and the indexes are there, for as long as `data.wait_minutes` lets
    it; says what it waits for.

    What is still missing then is told by whoever needs it. Raises UserError for what waiting does
    not cure.
    """
    for url in (config.data.train, config.data.val):
        if url is not None:
            _wait_for_index(url, config.data.wait_minutes)


def _wait_for_index(url: str, minutes: float) -> None:
    store: Store | None = None
    started = time.monotonic()

    def there() -> str | None:
        nonlocal store
        waited = (time.monotonic() - started) / 60
        try:
            if store is None and (
                is_remote(url) or local_path(url).is_dir()
            ):  # a folder may be packed later
                store = open_store(url)
            if store is not None and store.read_small(INDEX_NAME) is not None:
                return None
        except ServiceUnreachable as error:
            if waited >= max(minutes, _STORE_MINUTES):
                raise
            return str(error)
        return f"{url}: no {INDEX_NAME} yet" if waited < minutes else None

    _wait(there)


def wait_for_host(pod: PodEnv) -> None:
    """Until the first pod can be reached, where this is another one. Raises RetryableError."""
    started = time.monotonic()

    def there() -> str | None:
        try:
            socket.create_connection((pod.host, pod.port), timeout=3).close()
        except OSError as error:
            if (time.monotonic() - started) / 60 >= _HOST_MINUTES:
                raise RetryableError(
                    f"{pod.host}:{pod.port}, where the ranks meet, cannot be reached: {error}"
                ) from None
            return f"rendezvous at {pod.host}:{pod.port}: {error.strerror or error}"
        return None

    if not pod.is_rank_zero:
        _wait(there)


def wait_for_rank0_exit(pod: PodEnv) -> None:
    """After a success, wait where this is another pod until the first has ended, and been seen to.

    The operator calls a job done when any of its pods is, and then deletes those that still run:
    the first one's log is to stay.
    """
    if pod.is_rank_zero:
        return
    give_up = time.monotonic() + _LAST_SECONDS
    with suppress(OSError):  # it is gone
        while time.monotonic() < give_up:
            socket.create_connection((pod.host, pod.port), timeout=3).close()
            time.sleep(_BETWEEN_TRIES)
    time.sleep(_SEEN_SECONDS)


def _wait(missing: Callable[[], str | None]) -> None:
    """Until ``missing`` gives None; what it gives else is told at once and then every half minute."""
    told = -_BETWEEN_WORDS
    while (text := missing()) is not None:
        if time.monotonic() - told >= _BETWEEN_WORDS:
            print(f"waiting: {text}", flush=True)
            told = time.monotonic()
        time.sleep(_BETWEEN_TRIES)


def check_restart_budget(url: str, most: int) -> None:
    """Count this start of a job, beside its checkpoints; one that found a newer checkpoint than the
    start before counts from 1.

    The training-operator makes a pod anew without end. Raises UserError after ``most`` starts that
    came no further, and then forgets them, so that a job that is submitted again gets as many.
    Where the store cannot be read the run itself will say so.
    """
    with suppress(RetryableError, ServiceUnreachable):
        if is_of_another_job(owner_of(url)):
            return  # the first rank refuses to start, or waits; the count is the other job's
        store = open_store(url, create=True)
        newest = max(
            (name.partition("/")[0] for name in store.sizes() if name.startswith("step-")),
            default="",
        )
        before, starts = _read(store)
        starts = starts + 1 if before == newest else 1
        if starts > most:
            store.delete([STARTS])
            faults = repeated_faults(store)
            since = f"the checkpoint {newest}" if newest else "its beginning"
            raise UserError(
                f"checkpoint.max_starts: the job was started {most} times since {since} and "
                "made no newer checkpoint; the logs of "
                "its pods say why; submit it again to go on",
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
