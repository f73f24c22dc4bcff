"""What a store is: four methods, and the table of stores by URL scheme.

`Store` adds everything else to any store: retries, coalescing of ranges, one-line errors; the cache
on a node's disk is in front of it.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import IO, TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from trainer.data.storage.location import Location
    from trainer.data.storage.retry import RetryPolicy

STORES = {
    "s3": "trainer.data.storage.client:CloudStore",
    "gs": "trainer.data.storage.client:CloudStore",
    "az": "trainer.data.storage.client:CloudStore",
    "file": "trainer.data.storage.client:FolderStore",
}
"""The store of each URL scheme, as MODULE:NAME of a function from Location and RetryPolicy to an
ObjectStore. A new store adds one line.
"""

Version = dict[str, str]
"""ETag of an object's content and, if the store has versioning, its version."""


class ObjectStore(Protocol):
    """The objects below one URL, by name: ``a/b`` below ``scheme://host/c`` is ``c/a/b``.

    Methods are called from several threads. They raise FileNotFoundError if the object does not
    exist, UserError for errors that no retry can fix, and another OSError for errors that are
    retried.
    """

    def size(self, name: str) -> int:
        """Returns the size of an object in bytes."""

    def read(
        self, name: str, start: int = 0, end: int | None = None
    ) -> Iterable[bytes | memoryview]:
        """Yields the bytes ``[start, end)`` of an object in pieces of any size.

        ``end``: None for the end of the object. After an error, the next call starts at the first
        byte that was not yielded.
        """

    def put(self, name: str, content: bytes | IO[bytes]) -> None:
        """Writes a full object atomically. A file is read from its current position."""

    def list(self) -> Mapping[str, int]:
        """Returns the size in bytes of every object, by name."""


@runtime_checkable
class MutableObjectStore(ObjectStore, Protocol):
    """An ObjectStore whose objects can be deleted, and replaced if they have not changed.

    Checkpoints, locks and ``convoy pack`` need it; reading data does not.
    """

    def delete(self, name: str) -> None:
        """Deletes an object."""

    def read_versioned(self, name: str) -> tuple[bytes, Version, float]:
        """Returns an object, its version and its modification time (seconds since 1970)."""

    def put_if(self, name: str, content: bytes, version: Version | None) -> Version | None:
        """Writes an object if it still has ``version`` (None: if it does not exist).

        Returns the new version, or None if nothing was written. Raises NotImplementedError if the
        service does not support conditions.
        """


@runtime_checkable
class RenewableObjectStore(ObjectStore, Protocol):
    """An ObjectStore that can re-read its settings and credentials when these are rejected."""

    @property
    def address(self) -> str:
        """The address of the service, for messages."""

    def renew(self) -> None:
        """Re-reads settings and credentials. Raises UserError."""


def connect(location: "Location", policy: "RetryPolicy") -> ObjectStore:
    """Returns the store of a location. Raises UserError."""
    module, _, name = STORES[location.scheme].partition(":")
    make: Callable[[Location, RetryPolicy], ObjectStore]
    make = getattr(importlib.import_module(module), name)
    return make(location, policy)
