"""Creates object store clients: addresses, timeouts, and credentials that are re-read on change."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store

from trainer.data.storage.aws_credentials import (
    S3Settings,
    bucket_endpoint,
    credentials_from_files,
    s3_settings,
)
from trainer.data.storage.location import Location, parse_storage_url
from trainer.data.storage.store_errors import panics_as_errors
from trainer.errors import UserError
from trainer.secrets.redaction import redact_credentials

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


class Connections(NamedTuple):
    """The clients of one store; only ``for_all_else`` retries by itself.

    ``address``: the store's address, for messages.
    """

    for_ranges: ObjectStore
    for_all_else: ObjectStore
    address: str


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


def connector(url: str, connect_seconds: float, silent_seconds: float) -> Callable[[], Connections]:
    """Returns a function that connects to a store.

    Each call re-reads settings and credentials. ``silent_seconds``: maximum time that a range read
    may go without receiving a byte. Raises UserError.
    """
    location = parse_storage_url(url)
    if not location.is_remote:
        local = LocalStore(str(folder_of(url, create=False)))
        return lambda: Connections(local, local, location.prefix)
    connect = {"connect_timeout": timedelta(seconds=connect_seconds)}
    for_ranges = connect | {
        "read_timeout": timedelta(seconds=silent_seconds),
        "timeout": timedelta(days=1),
    }
    for_all_else = connect | {"timeout": timedelta(seconds=60)}

    def connected() -> Connections:
        settings = s3_settings() if location.scheme == "s3" else None
        address = settings.address if settings else location.root
        try:
            with panics_as_errors():
                first = _store(location, settings, for_ranges, _NO_RETRIES)
                return Connections(
                    first, _store(location, settings, for_all_else, _QUIET_RETRIES), address
                )
        except (BaseError, ValueError, OSError) as error:
            raise UserError(
                f"{location.url}: {redact_credentials(str(error).splitlines()[0])}"
            ) from None

    return connected


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
