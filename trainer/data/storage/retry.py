"""Retries of storage requests: which errors are retried, for how long, and from which byte.

After a storage error, a range read resumes at the first missing byte. Both the number of attempts
and the time without a new byte are bounded.
"""

import logging
import random
import threading
import time
from dataclasses import dataclass, field

from obstore.exceptions import BaseError

from trainer.data.storage.object_store import ObjectStore, RenewableObjectStore
from trainer.data.storage.store_errors import (
    ErrorKind,
    Interrupted,
    kind_of,
    panics_as_errors,
    reason,
    status_of,
)
from trainer.errors import RetryableError, UserError

_SECONDS_BETWEEN_LINES = 5.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """Limits for retries after storage errors. The defaults outlast a one-minute outage."""

    tries: int = 60
    """Maximum number of consecutive retries without a new byte."""
    seconds: float = 120.0
    """Maximum seconds without a new byte, from the first failure on."""
    first_wait: float = 0.1
    """Upper bound of the first wait, in seconds.

    The bound doubles with each retry; each wait is drawn uniformly between 0 and the bound.
    """
    longest_wait: float = 10.0
    refusals: int = 20
    """Maximum number of consecutive times that rejected credentials are re-read."""
    connect_seconds: float = 5.0
    silent_seconds: float = 20.0
    """Seconds after which a connection that delivers no byte is abandoned."""


@dataclass
class TransferStats:
    """Transfer counters of a store.

    ``bytes`` and ``requests`` count range reads; ``retries`` counts retries of all operations.
    """

    bytes: int = 0
    requests: int = 0
    retries: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, bytes: int = 0, requests: int = 0, retries: int = 0) -> None:
        with self._lock:
            self.bytes += bytes
            self.requests += requests
            self.retries += retries


class StoreClient:
    """An object store with its transfer counters and retry log.

    Credentials are re-read when the store rejects the old ones. ``root``: the URL's first part, for
    messages about a store without an address of its own.
    """

    def __init__(self, url: str, objects: ObjectStore, root: str, patience: RetryPolicy) -> None:
        self.url = url
        self.patience = patience
        self.counts = TransferStats()
        self.closed = threading.Event()
        self.met = False
        """Whether it ever answered; before that, the address is more likely wrong than unavailable.
        """
        self.accepted = False
        """Whether it ever answered a signed request successfully."""
        self.proven = False
        """Whether it ever answered as only an object store does."""
        self.objects = objects
        self._root = root
        self._lock = threading.Lock()
        self.generation = 0
        self._reported, self._unlogged = float("-inf"), 0

    @property
    def address(self) -> str:
        objects = self.objects
        return objects.address if isinstance(objects, RenewableObjectStore) else self._root

    def succeeded(self) -> None:
        self.met = self.accepted = True

    def renew(self, generation: int) -> None:
        """Re-reads the credentials, unless another thread has done so since ``generation``."""
        with self._lock:
            if generation == self.generation and isinstance(self.objects, RenewableObjectStore):
                self.objects.renew()
                self.generation += 1

    def log_retry(self, text: str) -> None:
        """Logs a retry, at most one line every 5 s.

        The line includes the number of retries that were not logged since the last one.
        """
        self.counts.add(retries=1)
        with self._lock:
            if time.monotonic() - self._reported < _SECONDS_BETWEEN_LINES:
                self._unlogged += 1
                return
            more = f" ({self._unlogged} more since the last line)" if self._unlogged else ""
            self._reported, self._unlogged = time.monotonic(), 0
        _LOG.warning("%s%s", text, more)


class Retrier:
    """Tracks the failures of one operation.

    ``failed`` returns when the operation may be retried, or raises.
    """

    def __init__(self, link: StoreClient) -> None:
        self._link = link
        self._refusals = 0
        self.generation = link.generation
        self.progressed()

    def progressed(self) -> None:
        self._tries, self._since = 0, 0.0

    def succeeded(self) -> None:
        """Records that the credentials were accepted and data arrived."""
        self._link.succeeded()
        self._refusals = 0
        self.progressed()

    def failed(self, error: Exception, where: str) -> None:
        """Waits before the next attempt.

        Raises UserError for errors that no retry can fix, and RetryableError when a limit is
        reached.
        """
        link, patience = self._link, self._link.patience
        kind, why = kind_of(error), reason(error, link.address)
        link.met = link.met or status_of(error) is not None
        hopeless = {
            ErrorKind.MISSING: True,
            ErrorKind.FINAL: True,
            ErrorKind.REFUSED: not link.accepted,
            ErrorKind.FOREIGN: not link.proven,
        }
        if hopeless.get(kind):
            raise UserError(f"{where}: {why}") from None
        now = time.monotonic()
        self._since = self._since or now
        if kind is ErrorKind.REFUSED:
            self._refusals += 1
            number, limit = self._refusals, patience.refusals
        else:
            self._tries += 1
            number, limit = self._tries, patience.tries
        remaining = patience.seconds - (now - self._since)
        if number > limit or remaining <= 0:
            tries = "1 try" if number == 1 else f"{number} tries"
            raise RetryableError(
                f"{where}: {why}; gave up after {tries} and {now - self._since:.0f} s"
            ) from None
        wait = min(
            remaining,
            random.uniform(0, min(patience.longest_wait, patience.first_wait * 2 ** (number - 1))),
        )
        again = "; re-reading the credentials" if kind is ErrorKind.REFUSED else ""
        link.log_retry(f"{where}: {why}{again}; try {number + 1} of {limit + 1} in {wait:.1f} s")
        if link.closed.wait(wait):
            raise RetryableError(f"{where}: {why}; the store was closed") from None
        if kind is ErrorKind.REFUSED:
            link.renew(self.generation)
        self.generation = link.generation


def read_piece(link: StoreClient, name: str, start: int, into: memoryview) -> None:
    """Fills ``into`` with an object's bytes from ``start`` on, fetching each byte once.

    Raises UserError, RetryableError.
    """
    at, end = start, start + len(into)
    retrier = Retrier(link)
    while at < end:
        first = at
        try:
            link.counts.add(requests=1)
            with panics_as_errors():
                for chunk in link.objects.read(name, at, end):
                    if at + len(chunk) > end:
                        at = first
                        raise Interrupted("the response is longer than requested")
                    into[at - start : at - start + len(chunk)] = chunk
                    at += len(chunk)
                    link.counts.add(bytes=len(chunk))
                    retrier.succeeded()
                    link.proven = True
            if at < end:
                raise Interrupted("the response was truncated")
        except (BaseError, OSError) as error:
            retrier.failed(error, f"{link.url}/{name}: byte {at:,}")
