"""The reason for a failed request, from the exceptions that the real packages raise."""

import pytest
import requests
from botocore.exceptions import ClientError
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, TEMPORARILY_UNAVAILABLE

from trainer.tracking.errors import classify


def _http_error(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("no", response=response)


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (_http_error(503), "unreachable", 503),
        (_http_error(401), "unauthorized", 401),
        (requests.HTTPError("no response"), "rejected", None),
        (
            ClientError({"ResponseMetadata": {"HTTPStatusCode": 403}}, "PutObject"),
            "unauthorized",
            403,
        ),
        (ClientError({}, "PutObject"), "rejected", None),
        (MlflowException("no", PERMISSION_DENIED), "unauthorized", 403),
        (MlflowException("no", TEMPORARILY_UNAVAILABLE), "unreachable", None),
        (MlflowException("no"), "rejected", None),
        (ValueError("no"), "rejected", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_the_status_and_the_kind_of_a_failed_request(
    error: Exception, kind: str, status: int | None
) -> None:
    fault = classify(error)
    assert (fault.kind, fault.status) == (kind, status)


def test_the_status_of_a_cause_counts() -> None:
    error = MlflowException("no")
    error.__cause__ = _http_error(502)
    assert classify(error).status == 502
