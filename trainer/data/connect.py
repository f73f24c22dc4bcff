"""How an object store is reached: addresses, time limits, and credentials that are read again when they change."""

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from trainer.errors import UserError

if TYPE_CHECKING:
    from obstore.store import S3Credential

_SCHEMES = ("s3://", "gs://", "az://", "file://")
_QUIET_RETRIES = {  # of what is no read of ranges: object_store does these by itself
    "max_retries": 8,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3), "base": 2},
    "retry_timeout": timedelta(seconds=20),
}
_NO_RETRIES = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
_REREAD = timedelta(seconds=60)  # the age at which credentials of a file are read again
_ASKED_EARLY = timedelta(seconds=300)  # before they expire, object_store asks for new ones


def endpoint() -> str | None:
    """The S3 endpoint that the environment names."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def is_remote(url: str) -> bool:
    """Whether a URL names an object store, not a folder."""
    return "://" in url and not url.startswith("file://")


def folder_of(url: str, create: bool) -> Path:
    """The folder that a URL without an object store names. ``create`` makes a missing one. Raises UserError."""
    path = Path(url.removeprefix("file://")).absolute()
    try:
        if path.exists() and not path.is_dir():
            raise UserError(f"{url}: is a file, but a folder is needed")
        if create:
            path.mkdir(parents=True, exist_ok=True)
        elif not path.is_dir():
            raise UserError(f"{url}: there is no such folder")
    except OSError as error:
        raise UserError(f"{url}: cannot be {'made' if create else 'read'}: {error.strerror}") from None
    return path


def connector(url: str, connect_seconds: float, silent_seconds: float) -> Callable[[], tuple[ObjectStore, ObjectStore]]:
    """A function that makes the pair (for reads of ranges, for all else), each time with credentials read anew.

    Only the second one retries by itself. ``silent_seconds``: of a read without a byte. Raises UserError.
    """
    if not is_remote(url):
        local = LocalStore(str(folder_of(url, create=False)))
        return lambda: (local, local)
    if not url.startswith(_SCHEMES):
        raise UserError(f"{url}: a URL begins with {', '.join(_SCHEMES)} or is a plain path")
    connect = {"connect_timeout": timedelta(seconds=connect_seconds)}
    for_ranges = connect | {"read_timeout": timedelta(seconds=silent_seconds), "timeout": timedelta(days=1)}
    for_all_else = connect | {"timeout": timedelta(seconds=60)}

    def pair() -> tuple[ObjectStore, ObjectStore]:
        common = _s3_options() if url.startswith("s3://") else {}
        plain = common.pop("client_options", {})
        first: dict[str, Any] = common | {"client_options": plain | for_ranges, "retry_config": _NO_RETRIES}
        second: dict[str, Any] = common | {"client_options": plain | for_all_else, "retry_config": _QUIET_RETRIES}
        try:
            return from_url(url, **first), from_url(url, **second)
        except (BaseError, ValueError) as error:
            raise UserError(f"{url}: {str(error).splitlines()[0]}") from None

    return pair


def _s3_options() -> dict[str, Any]:
    config: dict[str, Any] = {"region": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"}
    options: dict[str, Any] = {"config": config}
    if address := endpoint():
        config["endpoint"] = address
        if address.startswith("http://"):
            options["client_options"] = {"allow_http": True}
    if _credentials_are_in_files():
        options["credential_provider"] = _from_files
    return options


def _credentials_are_in_files() -> bool:
    """By the order of AWS's own programs: what the environment gives wins. Object_store itself knows the environment, web
    identity, containers and instance metadata, and renews those that expire; but it knows no files."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
    if any(os.environ.get(name) for name in (*names, "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE")):
        return False
    if os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or os.environ.get("AWS_PROFILE"):
        return True
    return Path("~/.aws/credentials").expanduser().exists()


def _from_files() -> "S3Credential":
    """Those of the profile, read by a new session: botocore keeps what it has read once. Raises RuntimeError."""
    from botocore.session import Session

    found = Session().get_credentials()
    if found is None:
        raise RuntimeError(f"no credentials in {os.environ.get('AWS_SHARED_CREDENTIALS_FILE', '~/.aws/credentials')}")
    pair = found.get_frozen_credentials()
    until = datetime.now(UTC) + _REREAD + _ASKED_EARLY
    return {"access_key_id": pair.access_key, "secret_access_key": pair.secret_key, "token": pair.token, "expires_at": until}
