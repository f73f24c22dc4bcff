"""Reading that goes on after faults: which errors pass by themselves, how long they are waited for,
and from which byte on.

A read of a range goes on behind its last good byte. Both the tries and the time without a new byte
are bounded.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore

from trainer.data.storage.store_errors import (
    ErrorKind,
    Interrupted,
    kind_of,
    panics_as_errors,
    reason,
    status_of,
)
from trainer.errors import RetryableError, UserError

CHUNK = 256 * 1024  # bytes that come at once; fewer than these are lost with a connection
_SECONDS_BETWEEN_LINES = 5.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetryPolicy:
    """How faults of the world are waited for. The defaults outlast a store that is away for a
    minute.
    """

    tries: int = 60
    """One after another without a new byte."""
    seconds: float = 120.0
    """Without a new byte, from the first failure on."""
    first_wait: float = 0.1
    """Seconds; the longest that the first wait can be. It doubles with each try, and each wait is
    drawn between 0 and it.
    """
    longest_wait: float = 10.0
    refusals: int = 20
    """Times that refused credentials are read again, one after another."""
    connect_seconds: float = 5.0
    silent_seconds: float = 20.0
    """After which a connection that gives no byte is given up."""


@dataclass
class TransferStats:
    """What went over a store's connections. ``bytes``: of ranges. ``retries``: of everything."""

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
    """The connections to one store, made again with new credentials when the old ones are refused;
    its counts and its voice.
    """

    def __init__(
        self,
        url: str,
        connect: Callable[[], tuple[ObjectStore, ObjectStore, str]],
        patience: RetryPolicy,
    ) -> None:
        self.url = url
        self.patience = patience
        self.counts = TransferStats()
        self.closed = threading.Event()
        self.met = False
        """Whether it ever answered: before that, an address is rather wrong than away."""
        self.accepted = False
        """Whether it ever answered a signed request with what was asked for."""
        self.proven = False
        """Whether it ever answered as only an object store does."""
        self._connect = connect
        self._lock = threading.Lock()
        self.generation = 0
        self.for_ranges, self.for_all_else, self.address = connect()
        self._reported, self._untold = float("-inf"), 0

    def succeeded(self) -> None:
        self.met = self.accepted = True

    def renew(self, generation: int) -> None:
        """Read the credentials anew, unless another thread did since ``generation``."""
        with self._lock:
            if generation == self.generation:
                self.for_ranges, self.for_all_else, self.address = self._connect()
                self.generation += 1

    def tell(self, text: str) -> None:
        """A line of a retry; one in 5 s, with the number of those left out before it."""
        self.counts.add(retries=1)
        with self._lock:
            if time.monotonic() - self._reported < _SECONDS_BETWEEN_LINES:
                self._untold += 1
                return
            more = f" ({self._untold} more since the last line)" if self._untold else ""
            self._reported, self._untold = time.monotonic(), 0
        _LOG.warning("%s%s", text, more)


class Retrier:
    """One piece of work through its failures: ``failed`` returns when it may be tried again, or
    raises.
    """

    def __init__(self, link: StoreClient) -> None:
        self._link = link
        self._refusals = 0
        self.generation = link.generation
        self.progressed()

    def progressed(self) -> None:
        self._tries, self._since = 0, 0.0

    def succeeded(self) -> None:
        """The credentials were accepted, and something came."""
        self._link.succeeded()
        self._refusals = 0
        self.progressed()

    def failed(self, error: Exception, where: str) -> None:
        """Wait before the next try. Raises UserError for what no waiting changes, RetryableError at
        the bounds.
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
        left = patience.seconds - (now - self._since)
        if number > limit or left <= 0:
            tries = "1 try" if number == 1 else f"{number} tries"
            raise RetryableError(
                f"{where}: {why}; given up after {tries} and {now - self._since:.0f} s"
            ) from None
        wait = min(
            left,
            random.uniform(0, min(patience.longest_wait, patience.first_wait * 2 ** (number - 1))),
        )
        again = "; the credentials are read again" if kind is ErrorKind.REFUSED else ""
        link.tell(f"{where}: {why}{again}; try {number + 1} of {limit + 1} in {wait:.1f} s")
        if link.closed.wait(wait):
            raise RetryableError(f"{where}: {why}; the store was closed") from None
        if kind is ErrorKind.REFUSED:
            link.renew(self.generation)
        self.generation = link.generation


def read_piece(
    link: StoreClient,
    name: str,
    start: int,
    into: memoryview,
    check: Callable[[str | None, int], None],
) -> None:
    """Fill ``into`` with an object's bytes from ``start`` on, each fetched once.

    ``check`` is given the object's ETag and size at every answer. Raises UserError, RetryableError.
    """
    at, end = start, start + len(into)
    endurance = Retrier(link)
    while at < end:
        first = at
        try:
            link.counts.add(requests=1)
            with panics_as_errors():
                answer = obstore.get(link.for_ranges, name, options={"range": (at, end)})
                check(answer.meta["e_tag"], answer.meta["size"])
                for chunk in answer.stream(min_chunk_size=CHUNK):
                    if at + len(chunk) > end:
                        at = first
                        raise Interrupted("more bytes came than were asked for")
                    into[at - start : at - start + len(chunk)] = chunk
                    at += len(chunk)
                    link.counts.add(bytes=len(chunk))
                    endurance.succeeded()
                    link.proven = True
            if at < end:
                raise Interrupted("the answer was cut short")
        except (BaseError, OSError) as error:
            endurance.failed(error, f"{link.url}/{name}: byte {at:,}")
