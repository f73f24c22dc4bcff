"""Classifies errors of the storage client and translates them to one actionable line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from obstore.exceptions import (
    InvalidPathError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from trainer.faults.disk_errors import disk_fault
from trainer.secrets.redaction import redact_credentials


class ErrorKind(Enum):
    """The required reaction to an error."""

    PASSING = "wait and try again"
    REFUSED = "read the credentials again"
    MISSING = "there is no such object"
    FINAL = "report to the user"
    FOREIGN = "not a response of an object store: wait if it gave one before, else report it"


class Interrupted(OSError):
    """A response that is not what was requested: truncated, or too long."""


class Foreign(OSError):
    """A response that no object store gives."""


class ClientPanic(OSError):
    """A panic in the storage client, which is written in Rust."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Converts a panic of the client, which is not even an ``Exception``, to ClientPanic."""
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ClientPanic(
            f"the storage client failed: {error}; check the AWS_* variables"
        ) from None


_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_REGION = re.compile(r"<Region>([\w-]+)</Region>")
_REFUSALS = {
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
}
_PASSING = {408, 409, 425, 429}
_WEB_PAGE = re.compile(r"<!doctype html|<html", re.IGNORECASE)
_FOREIGN = (
    "Got invalid",
    "ETag Header missing",
    "Last-Modified Header missing",
    "Content-Length Header missing",
    "non-ASCII data",
    "Invalid last modified",
    "Invalid content length",
    "Unable to extract metadata",
)
_REGION_CODES = (
    "AuthorizationHeaderMalformed",
    "PermanentRedirect",
    "IllegalLocationConstraintException",
)
CHECK_ENDPOINT = "check that AWS_ENDPOINT_URL is its S3 API, not a console or a proxy"
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(?:Other\(\s*OtherError\(\s*)?(\w+)")
_CERTIFICATE_FAULTS = {
    "UnknownIssuer": "is signed by an unknown CA; set AWS_CA_BUNDLE to a PEM file of that CA's "
    "certificate",
    "Expired": "has expired",
    "ExpiredContext": "has expired",
    "NotValidYet": "is not valid yet; check the clocks",
    "NotValidYetContext": "is not valid yet; check the clocks",
    "NotValidForName": "is for another host name",
    "NotValidForNameContext": "is for another host name",
    "CaUsedAsEndEntity": "is a CA's own certificate; give the server one that the CA signed "
    "(basicConstraints CA:FALSE)",
    "Revoked": "was revoked",
}


def status_of(error: BaseException) -> int | None:
    """Returns the HTTP status in an obstore error; None if there was no response."""
    found = _STATUS.search(str(error))
    return int(found[1]) if found else None


def _code_of(error: BaseException) -> str:
    found = _CODE.search(str(error))
    return found[1] if found else ""


def kind_of(error: BaseException) -> ErrorKind:
    """Classifies an error of obstore or of a file system."""
    text, status, code = str(error), status_of(error), _code_of(error)
    if code in ("RequestTimeTooSkewed", "NoSuchBucket") or isinstance(error, ClientPanic):
        return ErrorKind.FINAL
    if status is None and disk_fault(error):
        return ErrorKind.FINAL
    if (
        isinstance(error, PermissionDeniedError | UnauthenticatedError)
        or status in (401, 403)
        or code in _REFUSALS
    ):
        return ErrorKind.REFUSED
    if isinstance(error, Foreign) or any(
        mark in text for mark in (*_FOREIGN, "InvalidCertificate", "InvalidContentType")
    ):
        return ErrorKind.FOREIGN
    if status is not None and status < 500 and status not in _PASSING and _WEB_PAGE.search(text):
        return ErrorKind.FOREIGN
    if isinstance(error, NotFoundError | FileNotFoundError):
        return ErrorKind.MISSING
    if isinstance(
        error,
        InvalidPathError
        | NotSupportedError
        | PermissionError
        | IsADirectoryError
        | NotADirectoryError,
    ):
        return ErrorKind.FINAL
    if "redirect" in text.split("\n")[0]:  # the bucket is in another region
        return ErrorKind.FINAL
    if (
        status is not None
        and 300 <= status < 500
        and status not in _PASSING
        and code != "RequestTimeout"
    ):
        return ErrorKind.FINAL
    return ErrorKind.PASSING


def reason(error: BaseException, address: str = "") -> str:
    """Describes an obstore error in a few words. ``address``: the store's address."""
    text, status, code = str(error), status_of(error), _code_of(error)
    store = f"the object store at {address or 'its address'}"
    if isinstance(error, ClientPanic):
        return " ".join(text.split())[:300]
    if status is None and (fault := disk_fault(error)):
        return fault
    if isinstance(error, ConnectionError | TimeoutError):  # of a store that is not obstore's
        return f"{store} cannot be reached: {error.strerror or error}"
    if code == "NoSuchBucket":
        return "there is no such bucket"
    if "credential provider" in text:
        given = text.splitlines()[0].split("credential provider: ")[-1]
        return redact_credentials(f"no credentials: {given.removeprefix('RuntimeError: ')}")
    if code == "RequestTimeTooSkewed":
        return "the clock of this machine differs too much from the store's; synchronize it (NTP)"
    if code in ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"):
        return "the credentials have expired; get new ones (AWS_SESSION_TOKEN, or sign in again)"
    if (region := _REGION.search(text)) or code in _REGION_CODES:
        where = (
            f"{region[1]}, not the configured one; set AWS_REGION={region[1]}"
            if region
            else "not the configured one; set AWS_REGION"
        )
        return f"the bucket's region is {where}"
    if found := _CERTIFICATE.search(text):
        what = _CERTIFICATE_FAULTS.get(found[1], f"is not accepted ({found[1]})")
        return f"the certificate of {store} {what}"
    if "InvalidContentType" in text:
        return f"{store} does not speak TLS (https); check the scheme in AWS_ENDPOINT_URL"
    if "HTTP request to an HTTPS server" in text:
        return f"{store} speaks TLS; write https:// in AWS_ENDPOINT_URL"
    if kind_of(error) is ErrorKind.REFUSED or isinstance(error, PermissionError):
        return (
            "permission denied; check the credentials (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY) and the bucket's policy (without the permission to list, a "
            "missing object is denied too)"
        )
    if kind_of(error) is ErrorKind.FOREIGN:
        what = (
            "a web page"
            if _WEB_PAGE.search(text)
            else _first_line(text).removeprefix("Generic S3 error: ")[:120]
        )
        return f"{store} does not answer as an object store does ({what}); {CHECK_ENDPOINT}"
    if isinstance(error, NotFoundError | FileNotFoundError):
        return "not found"
    if "invalid path" in text and isinstance(error, InvalidPathError):
        return (
            f"holds an object whose key cannot be used: {_first_line(text)[:200]}; delete or "
            "rename it"
        )
    if "redirect" in text.split("\n")[0]:
        return (
            "the store redirects to another address: the bucket is in another region "
            "(AWS_REGION), or AWS_ENDPOINT_URL is wrong"
        )
    if status == 416:
        return "the object ends before these bytes"
    if status is not None and 300 <= status < 400:
        return f"{store} redirects ({status}); check AWS_ENDPOINT_URL and AWS_REGION"
    if status is not None:
        return (
            f"the store answered {status} {code}"
            if code
            else f"the store answered {status}; {CHECK_ENDPOINT}"
        )
    for mark, words in (
        ("ConnectionReset", "the connection was reset"),
        ("IncompleteBody", "the response was truncated"),
        (
            "response body error",
            "no more bytes were received" if "TimedOut" in text else "the connection broke",
        ),
        ("TimedOut", f"{store} does not answer"),
        ("onnect", f"{store} cannot be reached (AWS_ENDPOINT_URL)"),
        ("error sending request", f"{store} cannot be reached (AWS_ENDPOINT_URL)"),
        ("dns", f"{store} cannot be reached (AWS_ENDPOINT_URL)"),
    ):
        if mark in text:
            return words
    return redact_credentials(" ".join(text.split("\n\nDebug source")[0].split())[:300])


def _first_line(text: str) -> str:
    return " ".join(text.split("\n")[0].split())
