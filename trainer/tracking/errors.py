"""Classifies MLflow client errors: retry, fix the credentials, or drop the entry."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from trainer.secrets.redaction import redact_credentials

_STATUS = re.compile(r"failed with error code (\d{3}) !=")
_DATABASE_REFUSALS = (
    "unable to open database file",
    "readonly database",
    "not a database",
    "authentication failed",
    "access denied",
    "does not exist",
    "unknown database",
)
_REASON_LENGTH = 300


@dataclass(frozen=True)
class Fault:
    """The reason why a request to MLflow failed.

    ``unreachable``: a network fault, an overloaded server or a server error; a retry may succeed.
    ``unauthorized``: the credentials are missing, wrong or insufficient. ``rejected``: the same
    request will fail again.
    """

    kind: Literal["unreachable", "unauthorized", "rejected"]
    reason: str
    status: int | None = None
    """HTTP status, if the server responded."""

    @property
    def may_succeed_later(self) -> bool:
        return self.kind == "unreachable"


class DeliveryStopped(Exception):
    """The server as a whole, or the run, accepts no entries. ``fault`` gives the reason."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.fault = fault


class ServerUnavailable(DeliveryStopped):
    """The server cannot be reached, refuses the credentials, or is not an MLflow server."""


class RunUnavailable(DeliveryStopped):
    """The run or its experiment was deleted, or the run cannot be created."""


class RunMissing(Exception):
    """The server does not know the run."""


def classify(error: BaseException) -> Fault:
    """Returns the fault behind an exception of MLflow, requests, botocore or SQLAlchemy."""
    status = None
    for cause in _chain(error):
        names = {kind.__name__ for kind in type(cause).__mro__}
        if _is(cause, "botocore.exceptions.ClientError"):
            status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        elif _is(cause, "requests.exceptions.HTTPError") and cause.response is not None:
            status = cause.response.status_code
        if status is not None:
            break
        if "SSLError" in names:
            return Fault("rejected", f"the TLS connection failed: {_text(cause)}")
        if names & {"InvalidURL", "InvalidSchema", "MissingSchema", "InvalidUrlException"}:
            return Fault("rejected", _text(cause))
        if names & _NETWORK_ERRORS:
            return Fault("unreachable", _text(cause))
        unavailable = _is(cause, _MLFLOW_EXCEPTION) and cause.error_code == _UNAVAILABLE
        if "OperationalError" in names or unavailable:
            refused = any(words in str(cause).lower() for words in _DATABASE_REFUSALS)
            return Fault("rejected" if refused else "unreachable", _text(cause))
    if status is None:
        status = _mlflow_status(error)
    return Fault(_kind(status), _text(error), status)


def is_service_error(error: BaseException) -> bool:
    """Returns whether MLflow, its stores or the network raised the error, not a caller's bug."""
    packages = {
        "mlflow",
        "requests",
        "urllib3",
        "boto3",
        "botocore",
        "sqlalchemy",
        "google",
        "azure",
    }
    return any(
        isinstance(cause, OSError) or type(cause).__module__.partition(".")[0] in packages
        for cause in _chain(error)
    )


_MLFLOW_EXCEPTION = "mlflow.exceptions.MlflowException"
_UNAVAILABLE = "TEMPORARILY_UNAVAILABLE"
_NETWORK_ERRORS = {
    "ConnectionError",  # raised by Python, requests and botocore
    "Timeout",
    "TimeoutError",
    "RetryError",  # requests: the server answered 408, 429 or 5xx until the retries ended
    "ChunkedEncodingError",
    "HTTPClientError",
    "EndpointConnectionError",
    "NameResolutionError",
    "MaxRetryError",
    "ProtocolError",
}


def _is(error: BaseException, name: str) -> bool:
    """Returns whether the error is of the class ``name``, without importing its package."""
    return any(f"{kind.__module__}.{kind.__name__}" == name for kind in type(error).__mro__)


def _chain(error: BaseException | None) -> Iterator[Any]:
    """Yields the exception and its causes; MLflow raises its own exceptions without ``from``."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _mlflow_status(error: Any) -> int | None:
    """Returns the HTTP status of an MlflowException that was caused by a server response."""
    if match := _STATUS.search(str(error)):
        return int(match[1])
    status = error.get_http_status_code() if _is(error, _MLFLOW_EXCEPTION) else None
    # MLflow reports 500 if it has no known code; a real 500 is a RetryError.
    return None if status is None or status == 500 else int(status)


def _kind(status: int | None) -> Literal["unreachable", "unauthorized", "rejected"]:
    if status in (401, 403):
        return "unauthorized"
    if status is not None and (status in (408, 425, 429) or status >= 500):
        return "unreachable"
    return "rejected"


def _text(error: BaseException) -> str:
    """Formats the error as one line of limited length, without credentials."""
    text = " ".join(re.sub(r"<[^>]*>", " ", str(error)).split()) or type(error).__name__
    return redact_credentials(text)[:_REASON_LENGTH]
