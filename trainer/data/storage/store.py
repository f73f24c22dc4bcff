"""Uniform access to object stores and folders.

Byte ranges are read and full objects are written; transient errors are retried within limits, and
errors are reported in one line.
"""

import json
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

import numpy as np
from obstore.exceptions import BaseError

from trainer.data.storage.client import FolderStore, folder_of
from trainer.data.storage.location import Location, is_remote, parse_storage_url
from trainer.data.storage.object_store import MutableObjectStore, Version, connect
from trainer.data.storage.retry import Retrier, RetryPolicy, StoreClient, TransferStats, read_piece
from trainer.data.storage.store_errors import (
    CHECK_ENDPOINT,
    ErrorKind,
    Foreign,
    kind_of,
    panics_as_errors,
    reason,
    status_of,
)
from trainer.errors import ServiceUnreachable, UserError

__all__ = [
    "RangeReader",
    "Store",
    "Version",
    "is_remote",
    "not_json",
    "open_store",
    "parse_record",
    "parse_storage_url",
    "read_whole",
]

_PIECE = 8 * 2**20  # maximum bytes per request
_REQUESTS = 8  # concurrent requests
_PATIENCE = RetryPolicy()

A = TypeVar("A")


class RangeReader(Protocol):
    """Reads byte ranges of shards: a store, or a cache in front of one."""

    @property
    def url(self) -> str: ...

    def read_ranges(
        self, name: str, starts: Sequence[int], ends: Sequence[int]
    ) -> list[memoryview]: ...


def read_whole(source: RangeReader, name: str, size: int) -> Iterator[memoryview]:
    """Yields an object of ``size`` bytes from beginning to end, in pieces of at most 8 MiB.

    Raises what ``read_ranges`` raises.
    """
    for start in range(0, size, _PIECE):
        yield from source.read_ranges(name, [start], [min(start + _PIECE, size)])


class Store:
    """The objects below one URL.

    Thread-safe. ``counts`` accumulates the transfer counters.
    """

    def __init__(self, url: str, location: Location, patience: RetryPolicy = _PATIENCE) -> None:
        self.url = url.rstrip("/")
        self._link = StoreClient(self.url, connect(location, patience), location.root, patience)
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def counts(self) -> TransferStats:
        return self._link.counts

    def close(self) -> None:
        """Ends all waits for an unavailable store; the waiting calls raise RetryableError."""
        self._link.closed.set()

    def read_ranges(
        self, name: str, starts: Sequence[int], ends: Sequence[int]
    ) -> list[memoryview]:
        """Returns the bytes ``[start, end)`` of an object for each pair.

        Ranges that touch or overlap are fetched together; no other bytes are fetched. Raises
        RetryableError when the limits of ``RetryPolicy`` are reached. Raises UserError if the
        object does not exist, if it ends before a range does, or if it has changed since the first
        read.
        """
        if isinstance(self._link.objects, FolderStore):
            return self._read_local(self._link.objects, name, starts, ends)
        spans = _merged(starts, ends)
        buffers = [np.empty(end - start, np.uint8) for start, end in spans]
        pieces = [
            (start + at, buffer[at : at + _PIECE].data)
            for (start, _), buffer in zip(spans, buffers, strict=True)
            for at in range(0, len(buffer), _PIECE)
        ]
        self._read_pieces(name, pieces)
        firsts = [start for start, _ in spans]
        parts = []
        for start, end in zip(starts, ends, strict=True):
            number = int(np.searchsorted(firsts, start, side="right")) - 1
            part = (
                buffers[number][start - firsts[number] : end - firsts[number]]
                if end > start
                else np.empty(0, np.uint8)
            )
            parts.append(part.data.toreadonly())
        return parts

    def _read_pieces(self, name: str, pieces: list[tuple[int, memoryview]]) -> None:
        def read(piece: tuple[int, memoryview]) -> None:
            read_piece(self._link, name, *piece)

        if len(pieces) <= 1:
            for piece in pieces:
                read(piece)
            return
        with self._lock:
            self._threads = self._threads or ThreadPoolExecutor(_REQUESTS, "storage")
        futures = [self._threads.submit(read, piece) for piece in pieces]
        done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
        for future in waiting:
            future.cancel()
        for future in done:
            future.result()

    def _read_local(
        self, folder: FolderStore, name: str, starts: Sequence[int], ends: Sequence[int]
    ) -> list[memoryview]:
        retrier = Retrier(self._link)
        while True:
            try:
                with panics_as_errors():
                    size = folder.size(name)
                    if max(ends, default=0) > size:
                        raise UserError(
                            f"{self.url}/{name}: has {size:,} bytes, but bytes up to "
                            f"{max(ends):,} are needed"
                        )
                    parts = folder.read_ranges(name, starts, ends)
            except (BaseError, OSError) as error:
                retrier.failed(error, f"{self.url}/{name}")
            else:
                self.counts.add(bytes=sum(map(len, parts)), requests=len(parts))
                return parts

    def _with_retry(
        self, work: Callable[[], A], where: str, missing: Callable[[], A] | None = None
    ) -> A:
        """Calls ``work`` and retries transient errors.

        ``missing``: supplies the result for a missing object, instead of an error. If the address
        never answered, raises ServiceUnreachable after object_store's own retries (20 s): the
        address is probably wrong.
        """
        retrier = Retrier(self._link)
        while True:
            try:
                with panics_as_errors():
                    result = work()
            except (BaseError, OSError) as error:
                kind = kind_of(error)
                if kind is ErrorKind.MISSING and missing is not None:
                    self._link.succeeded()
                    return missing()
                if kind is ErrorKind.PASSING and status_of(error) is None and not self._link.met:
                    raise ServiceUnreachable(
                        f"{where}: {reason(error, self._link.address)}"
                    ) from None
                retrier.failed(error, where)
            else:
                self._link.succeeded()
                return result

    def read_small(self, name: str) -> bytes | None:
        """Returns a full object, or None if it does not exist.

        Raises UserError if the store cannot be read at all, and RetryableError.
        """
        return self._with_retry(
            lambda: b"".join(self._link.objects.read(name)),
            f"{self.url}/{name}",
            lambda: None,
        )

    def read_record(self, name: str) -> dict[str, Any] | None:
        """Returns a JSON object that Convoy wrote, or None if it does not exist.

        Raises UserError in one line for anything else, such as a truncated file or a web page.
        Other errors are those of ``read_small``.
        """
        content = self.read_small(name)
        return None if content is None else parse_record(content, f"{self.url}/{name}")

    def _prove(self) -> None:
        """Raises UserError if something other than an object store answers.

        A web page (a console, a captive portal) answers every request with success: listings are
        empty, and writes are lost.
        """
        if self._link.proven or isinstance(self._link.objects, FolderStore):
            return

        def ask() -> ErrorKind:
            try:
                list(self._link.objects.read(f".convoy-{uuid.uuid4().hex}"))
            except (BaseError, OSError) as error:
                if (kind := kind_of(error)) in (ErrorKind.MISSING, ErrorKind.REFUSED):
                    return kind
                raise
            raise Foreign("it returns an object for every name")

        accepted = self._link.accepted
        kind = self._with_retry(ask, self.url)
        self._link.accepted = accepted or kind is ErrorKind.MISSING
        self._link.proven = True

    def size(self, name: str) -> int | None:
        """Returns the size of an object in bytes, or None if it does not exist."""

        def ask() -> int | None:
            return self._link.objects.size(name)

        return self._with_retry(ask, f"{self.url}/{name}", lambda: None)

    def sizes(self) -> dict[str, int]:
        """Returns the size in bytes of every object, by name."""

        def ask() -> dict[str, int]:
            return dict(self._link.objects.list())

        found: dict[str, int] = self._with_retry(ask, self.url, dict)
        if not found:
            self._prove()
        self._link.proven = True
        return found

    def write(self, name: str, content: bytes | IO[bytes]) -> None:
        """Writes a full object atomically."""
        self._prove()
        first = 0 if isinstance(content, bytes) else content.tell()

        def put() -> None:
            if not isinstance(content, bytes):
                content.seek(first)
            self._link.objects.put(name, content)

        self._with_retry(put, f"{self.url}/{name} cannot be written")

    def read_versioned(self, name: str) -> tuple[bytes, Version, float] | None:
        """Returns an object, its version and its modification time (seconds since 1970).

        Returns None if the object does not exist. Raises UserError if the store is not a
        MutableObjectStore.
        """
        objects = self._mutable()

        def ask() -> tuple[bytes, Version, float] | None:
            return objects.read_versioned(name)

        return self._with_retry(ask, f"{self.url}/{name}", lambda: None)

    def write_if(self, name: str, content: bytes, version: Version | None) -> Version | None:
        """Writes an object if it still has ``version`` (None: if it does not exist).

        Returns the new version. Otherwise writes nothing and returns None. Raises
        NotImplementedError if the store does not support conditional writes, and UserError if it is
        not a MutableObjectStore.
        """
        objects = self._mutable()
        self._prove()
        return self._with_retry(
            lambda: objects.put_if(name, content, version), f"{self.url}/{name} cannot be written"
        )

    @contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """Yields a file to write a large object into.

        The object appears in full when the block ends, and not at all if the block fails.
        """
        folder = self._folder()
        if folder is None:
            with tempfile.TemporaryFile() as file:
                yield file
                file.seek(0)
                self.write(name, file)
            return
        path = folder / name
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                yield file
            part.replace(path)
        except OSError as error:
            raise UserError(f"{self.url}/{name} cannot be written: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)

    def remove_empty_folder(self, name: str) -> None:
        """Removes an empty folder on a disk; object stores have no folders."""
        if folder := self._folder():
            with suppress(OSError):
                (folder / name).rmdir()

    def delete(self, names: Sequence[str]) -> None:
        """Deletes objects; a missing object is not an error.

        Raises UserError if the store is not a MutableObjectStore.
        """
        for name in names:
            self._with_retry(
                partial(self._mutable().delete, name),
                f"{self.url}/{name} cannot be deleted",
                lambda: None,
            )

    def check_mutable(self) -> None:
        """Raises UserError if objects cannot be deleted or replaced on a condition."""
        self._mutable()

    def _mutable(self) -> MutableObjectStore:
        objects = self._link.objects
        if not isinstance(objects, MutableObjectStore):
            raise UserError(
                f"{self.url}: {type(objects).__name__} cannot delete objects and replace them on "
                "a condition, which checkpoints, locks and `convoy pack` need; use s3://, gs://, "
                "az:// or a folder"
            )
        return objects

    def _folder(self) -> Path | None:
        objects = self._link.objects
        return objects.path if isinstance(objects, FolderStore) else None


def _merged(starts: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the ranges in order, merging those that touch or overlap and omitting empty ones."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted(zip(starts, ends, strict=True)):
        if end <= start:
            continue
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((start, end))
    return spans


def parse_record(content: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object. Every record that Convoy reads back is parsed here.

    Raises UserError that names ``where``.
    """
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        raise not_json(content, where) from None
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: holds a JSON {type(record).__name__} instead of an object; Convoy did "
            "not write it"
        )
    return record


def not_json(
    content: bytes, where: str, advice: str = "remove it, or restore it from a copy"
) -> UserError:
    """Returns the error for ``content`` that is not JSON."""
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")) and is_remote(where):
        return UserError(f"{where}: is a web page, not JSON; {CHECK_ENDPOINT}")
    what = "is empty" if not content.strip() else "is not JSON: it is truncated or was changed"
    return UserError(f"{where}: {what}; {advice}")


def open_store(url: str, create: bool = False, patience: RetryPolicy = _PATIENCE) -> Store:
    """Opens the store at ``s3://``, ``gs://``, ``az://``, ``file:///`` or a plain path.

    ``create``: create a missing folder. Raises UserError.
    """
    location = parse_storage_url(url)
    if not location.is_remote:
        folder_of(url, create)
    return Store(url, location, patience)
