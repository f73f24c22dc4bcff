"""The S3 settings that AWS's own tools read: environment, profile, config file, CA bundle.

botocore reads them, so the order of precedence is the same. Values that botocore accepts but that
would make the storage client panic (an endpoint without a scheme, a region with a space, a key with
a newline) are completed or rejected here.
"""

import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from trainer.errors import UserError
from trainer.secrets.redaction import redact_credentials

if TYPE_CHECKING:
    from obstore.store import S3Credential

_REREAD = timedelta(seconds=60)  # age at which credentials from files are re-read
_ASKED_EARLY = timedelta(seconds=300)  # object_store refreshes credentials this long before expiry
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_BUNDLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_NETLOC = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?")
_FILE_VARIABLES = (
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
)
_OTHER_SOURCES = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)


@dataclass(frozen=True)
class S3Settings:
    """Settings of the S3 client.

    ``endpoint``: with a scheme and without a trailing slash; None for Amazon's.
    ``root_certificates``: in PEM form.
    """

    region: str
    endpoint: str | None
    virtual_hosted: bool
    root_certificates: bytes | None
    credentials_in_files: bool

    @property
    def address(self) -> str:
        """The address that requests are sent to, for messages."""
        return self.endpoint or f"https://s3.{self.region}.amazonaws.com"


def s3_settings() -> S3Settings:
    """Reads the settings.

    Raises UserError that names the invalid variable, or the profile and file.
    """
    _forget_empty_variables()
    for name in _KEYS:
        if name in os.environ:
            _check_key(name, os.environ[name])
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        session = Session()
        scoped = session.get_scoped_config()
        region = (
            os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
        )
        bundle = session.get_config_variable("ca_bundle")
        style = (session.get_config_variable("s3") or {}).get("addressing_style")
        source, endpoint = _endpoint(session, scoped)
    except (BotoCoreError, OSError, ValueError) as error:
        raise UserError(f"AWS configuration: {_one_line(error)}; {_files()}") from None
    region = region.strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]+", region):
        raise UserError(
            f"the AWS region {region!r} is not a region such as us-east-1 (AWS_REGION, "
            f"AWS_DEFAULT_REGION, {_files()})"
        )
    virtual = style == "virtual" or os.environ.get(
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST", ""
    ).lower() in ("1", "true")
    ignored = endpoint is None and any(name in os.environ for name in (*_ENDPOINTS, "AWS_ENDPOINT"))
    if ignored:  # object_store would read the variable anyway
        endpoint, source = (
            f"https://s3.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}",
            "AWS_REGION",
        )
    address = parse_endpoint(endpoint, source) if endpoint else None
    return S3Settings(region, address, virtual, _certificates(bundle), _credentials_are_in_files())


def _endpoint(session: Any, scoped: dict[str, Any]) -> tuple[str, str | None]:
    """Returns the source of the endpoint and its value."""
    if session.get_config_variable("ignore_configured_endpoint_urls"):
        return "", None
    for name in _ENDPOINTS:
        if value := os.environ.get(name):
            return name, value
    if section := scoped.get("services"):
        services = session.full_config.get("services", {})
        if section not in services:
            raise ValueError(
                f"the profile names services {section!r}, which the config file does not define"
            )
        if value := (services[section].get("s3") or {}).get("endpoint_url"):
            return f"endpoint_url of services {section}", value
    if value := scoped.get("endpoint_url"):
        return f"endpoint_url of profile {session.profile or 'default'}", value
    return "AWS_ENDPOINT", os.environ.get("AWS_ENDPOINT")  # object_store's own name for it


def parse_endpoint(text: str, source: str) -> str:
    """Returns the endpoint with a scheme and without a trailing slash.

    If the scheme is missing, a loopback address gets http and any other address https. Raises
    UserError that names ``source``.
    """
    address = text.strip()
    shown = redact_credentials(address)
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", address):
        if redact_credentials(f"https://{address}") != f"https://{address}":
            raise UserError(
                f"{source}: credentials do not belong in an endpoint; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )
        address = f"https://{address}"
        if _is_loopback(address):
            address = address.replace("https", "http", 1)
    if shown != text.strip():
        raise UserError(
            f"{source}: credentials do not belong in an endpoint; set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY"
        )
    wrong = f"{source}: {shown!r} is not an endpoint such as http://HOST:9000 or https://HOST"
    if not re.fullmatch(r"[\x21-\x7e]+", address) or any(
        mark in address for mark in "\"'<>\\^`{|}"
    ):
        raise UserError(
            f"{wrong}: it contains a space or a character that is invalid in an address"
        )
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise UserError(f"{wrong}: {_one_line(error)}") from None
    if parts.scheme not in ("http", "https"):
        raise UserError(f"{wrong}: the scheme must be http or https")
    if not _NETLOC.fullmatch(parts.netloc) or not _is_host(parts.hostname or "") or port == 0:
        raise UserError(
            f"{wrong}: it needs a host name or address, and a port from 1 to 65535 after a colon"
        )
    if "?" in address or "#" in address:
        raise UserError(f"{wrong}: remove what follows ? or #")
    if not re.fullmatch(r"[A-Za-z0-9._~/-]*", parts.path) or {".", ".."} & set(
        parts.path.split("/")
    ):
        raise UserError(f"{wrong}: its path {parts.path!r} is not supported")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def bucket_endpoint(settings: S3Settings, bucket: str) -> str | None:
    """Returns the endpoint for object_store.

    With virtual hosting, the bucket is part of the host name.
    """
    if settings.endpoint is None or not settings.virtual_hosted:
        return settings.endpoint
    scheme, _, rest = settings.endpoint.partition("://")
    return settings.endpoint if rest.startswith(f"{bucket}.") else f"{scheme}://{bucket}.{rest}"


def credentials_from_files() -> "S3Credential":
    """Returns the profile's credentials.

    They are read by a new session, because botocore caches what it has read. Supports files,
    credential_process, single sign-on and assumed roles. Raises RuntimeError with one line.
    """
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        found = Session().get_credentials()
        pair = found.get_frozen_credentials() if found is not None else None
    except (BotoCoreError, OSError, ValueError, KeyError) as error:
        raise RuntimeError(f"{_one_line(error)} ({_files()})") from None
    if pair is None or not pair.access_key:
        raise RuntimeError(f"no credentials in the environment and in {_files()}")
    for name, value in zip(_KEYS, (pair.access_key, pair.secret_key, pair.token), strict=True):
        if value:
            _check_key(f"{name} of {_files()}", value)
    until = datetime.now(UTC) + _REREAD + _ASKED_EARLY
    return {
        "access_key_id": pair.access_key,
        "secret_access_key": pair.secret_key,
        "token": pair.token,
        "expires_at": until,
    }


def _credentials_are_in_files() -> bool:
    """Whether the credentials come from files, in AWS's order of precedence: the environment wins.

    object_store itself supports the environment, web identity, containers and instance metadata,
    and renews credentials that expire, but it does not read files.
    """
    if any(os.environ.get(name) for name in ("AWS_ACCESS_KEY_ID", *_OTHER_SOURCES)):
        return False
    if any(os.environ.get(name) for name in _FILE_VARIABLES):
        return True
    return any(Path(name).expanduser().exists() for name in ("~/.aws/credentials", "~/.aws/config"))


def _forget_empty_variables() -> None:
    """Removes empty AWS_* variables from the environment.

    ``AWS_ENDPOINT_URL=`` in an env file means that it is not set; object_store would use the empty
    value.
    """
    for name in [
        name for name, value in os.environ.items() if name.startswith("AWS_") and not value.strip()
    ]:
        os.environ.pop(name, None)


def _check_key(name: str, value: str) -> None:
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise UserError(
            f"{name}: holds a space, a newline or another character that is not printable "
            "ASCII; if it comes from `echo`, it ends with a newline: use `printf %s`"
        )


def _is_loopback(address: str) -> bool:
    try:
        host = urlsplit(address).hostname or ""
        return host == "localhost" or host.endswith(".localhost") or ip_address(host).is_loopback
    except ValueError:
        return False


def _is_host(host: str) -> bool:
    """Whether the storage client accepts the host without a panic."""
    try:
        if ":" in host or re.fullmatch(r"(.*\.)?(\d+|0[xX][0-9a-fA-F]*)\.?", host):
            ip_address(host)
        host.encode().decode("idna")
    except ValueError:  # includes UnicodeError
        return False
    return True


def _certificates(bundle: str | None) -> bytes | None:
    """Returns the content of the CA bundle.

    AWS's setting takes precedence over the settings of other tools.
    """
    source = "AWS_CA_BUNDLE" if os.environ.get("AWS_CA_BUNDLE") else f"ca_bundle in {_files()}"
    if not bundle:
        source = next((name for name in _BUNDLES if os.path.isfile(os.environ.get(name, ""))), "")
        bundle = os.environ.get(source)
    if not bundle:
        return None
    path = Path(bundle).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{source}: {path}: {error.strerror}; it must be a file of CA certificates in PEM form"
        ) from None
    if b"-----BEGIN CERTIFICATE-----" not in content:
        raise UserError(
            f"{source}: {path}: holds no CA certificate in PEM form (-----BEGIN CERTIFICATE-----)"
        )
    return content


def _files() -> str:
    """Names the files that a setting can come from, for messages."""
    config = os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config"
    return f"{config} and {os.environ.get('AWS_SHARED_CREDENTIALS_FILE') or '~/.aws/credentials'}"


def _one_line(error: BaseException) -> str:
    return redact_credentials(" ".join(str(error).split()))[:300]
