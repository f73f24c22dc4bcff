"""Stores that obstore reads: S3, Google Cloud Storage, Azure and folders.

Clients have addresses, timeouts, and credentials that are re-read on change.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store

from trainer.data.storage.aws_credentials import (
    S3Settings,
    bucket_endpoint,
    credentials_from_files,
    s3_settings,
)
from trainer.data.storage.location import Location, parse_storage_url
from trainer.data.storage.object_store import Version
from trainer.data.storage.retry import RetryPolicy
from trainer.data.storage.store_errors import Interrupted, panics_as_errors, status_of
from trainer.errors import UserError
from trainer.secrets.redaction import redact_credentials

CHUNK = 256 * 1024  # bytes per received chunk; a broken connection loses less than this
_QUIET_RETRIES = {  # for all requests except range reads; object_store retries these itself
    "max_retries": 8,
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=3),
        "base": 2,
    },
    "retry_timeout": timedelta(seconds=20),
}
_NO_RETRIES = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}


class _Clients(NamedTuple):
    """The clients of one store; only ``for_all_else`` retries by itself."""

    for_ranges: ObjectStore
    for_all_else: ObjectStore


def folder_of(url: str, create: bool) -> Path:
    """Returns the folder that a local URL denotes.

    ``create``: create it if it is missing. Raises UserError.
    """
    path = Path(parse_storage_url(url).prefix)
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"{url}: is a file, but a folder is needed")
        if create:
            path.mkdir(parents=True, exist_ok=True)
        elif not path.is_dir():
            raise UserError(f"{url}: there is no such folder")
    except OSError as error:
        raise UserError(
            f"{url}: cannot be {'created' if create else 'read'}: {error.strerror}"
        ) from None
    return path


class ObstoreStore:
    """A MutableObjectStore that obstore reads and writes."""

    _clients: _Clients

    def __init__(self, url: str) -> None:
        self._url = url
        self._seen: dict[str, tuple[str | None, int]] = {}
        """ETag and size of each object that ranges were read from; they must not change."""
        self._lock = threading.Lock()

    def size(self, name: str) -> int:
        return obstore.head(self._clients.for_all_else, name)["size"]

    def read(self, name: str, start: int = 0, end: int | None = None) -> Iterator[memoryview]:
        """Yields a range as it arrives; raises UserError if the object changed since the first one.

        Without ``end``, the object is returned in one piece, after object_store's own retries.
        """
        if end is None:
            options: Any = {"range": {"offset": start}} if start else None
            found = obstore.get(self._clients.for_all_else, name, options=options)
            yield memoryview(found.bytes())
            return
        found = obstore.get(self._clients.for_ranges, name, options={"range": (start, end)})
        self._check_same(name, found.meta["e_tag"], found.meta["size"])
        for chunk in found.stream(min_chunk_size=CHUNK):
            yield memoryview(chunk)

    def _check_same(self, name: str, etag: str | None, size: int) -> None:
        with self._lock:
            before = self._seen.setdefault(name, (etag, size))
        if before != (etag, size):
            raise UserError(
                f"{self._url}/{name}: was changed while it was read: {before[1]:,} bytes with "
                f"ETag {before[0]} before, {size:,} bytes with ETag {etag} now"
            )

    def put(self, name: str, content: bytes | IO[bytes]) -> None:
        obstore.put(self._clients.for_all_else, name, content)

    def list(self) -> dict[str, int]:
        return {
            meta["path"]: meta["size"]
            for batch in obstore.list(self._clients.for_all_else)
            for meta in batch
            if meta["path"]  # consoles create an empty object for a folder
        }

    def delete(self, name: str) -> None:
        obstore.delete(self._clients.for_all_else, name)

    def read_versioned(self, name: str) -> tuple[bytes, Version, float]:
        found = obstore.get(self._clients.for_all_else, name)
        return (
            found.bytes().to_bytes(),
            _version(found.meta),
            found.meta["last_modified"].timestamp(),
        )

    def put_if(self, name: str, content: bytes, version: Version | None) -> Version | None:
        mode: Any = version or "create"
        try:
            return _version(obstore.put(self._clients.for_all_else, name, content, mode=mode))
        except (AlreadyExistsError, PreconditionError):
            return None
        except BaseError as error:
            if isinstance(error, NotFoundError) and version is not None:
                return None
            if status_of(error) == 501:
                raise NotImplementedError from None
            raise


class FolderStore(ObstoreStore):
    """The files below a folder."""

    def __init__(self, location: Location, policy: RetryPolicy) -> None:
        super().__init__(location.url)
        self.path = Path(location.prefix)
        local = LocalStore(location.prefix)
        self._clients = _Clients(local, local)

    def read_ranges(
        self, name: str, starts: Sequence[int], ends: Sequence[int]
    ) -> list[memoryview]:
        """Returns the bytes ``[start, end)`` of a file for each pair, opening it once."""
        parts = obstore.get_ranges(
            self._clients.for_ranges, name, starts=starts, ends=ends, coalesce=0
        )
        if [len(part) for part in parts] != [
            end - start for start, end in zip(starts, ends, strict=True)
        ]:
            raise Interrupted("the file was cut short while it was read")
        return [memoryview(part) for part in parts]


class CloudStore(ObstoreStore):
    """The objects below a prefix of a bucket (S3, Google Cloud Storage) or container (Azure)."""

    def __init__(self, location: Location, policy: RetryPolicy) -> None:
        super().__init__(location.url)
        self._location, self._policy = location, policy
        self.renew()

    def renew(self) -> None:
        """Connects with the current settings and credentials. Raises UserError."""
        location = self._location
        connect = {"connect_timeout": timedelta(seconds=self._policy.connect_seconds)}
        for_ranges = connect | {
            "read_timeout": timedelta(seconds=self._policy.silent_seconds),
            "timeout": timedelta(days=1),
        }
        for_all_else = connect | {"timeout": timedelta(seconds=60)}
        settings = s3_settings() if location.scheme == "s3" else None
        try:
            with panics_as_errors():
                self._clients = _Clients(
                    _store(location, settings, for_ranges, _NO_RETRIES),
                    _store(location, settings, for_all_else, _QUIET_RETRIES),
                )
        except (BaseError, ValueError, OSError) as error:
            raise UserError(
                f"{location.url}: {redact_credentials(str(error).splitlines()[0])}"
            ) from None
        self.address = settings.address if settings else location.root


def _version(meta: Mapping[str, Any]) -> Version:
    return {key: meta[key] for key in ("e_tag", "version") if meta.get(key) is not None}


def _store(
    location: Location, settings: S3Settings | None, client: dict[str, Any], retry: dict[str, Any]
) -> ObjectStore:
    """Builds a client from the bucket and the literal prefix.

    object_store's own URL parser is not used because it drops and decodes parts of a URL.
    """
    common: dict[str, Any] = {
        "prefix": location.prefix or None,
        "client_options": dict(client),
        "retry_config": retry,
    }
    if location.scheme == "gs":
        return GCSStore(location.bucket, **common)
    if location.scheme == "az":
        return AzureStore(location.bucket, **common)
    assert settings is not None
    config: Any = {
        "region": settings.region,
        "virtual_hosted_style_request": settings.virtual_hosted,
    }
    if endpoint := bucket_endpoint(settings, location.bucket):
        # If only "endpoint" were set, aws_endpoint_url_s3 from the environment would override it.
        config |= {"endpoint": endpoint, "aws_endpoint_url_s3": endpoint}
        common["client_options"]["allow_http"] = endpoint.startswith("http://")
    if settings.root_certificates is not None:
        common["client_options"]["root_certificate"] = settings.root_certificates
    if settings.credentials_in_files:
        common["credential_provider"] = credentials_from_files
    return S3Store(location.bucket, config=config, **common)
