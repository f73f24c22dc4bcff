"""Validation of tracking URIs, and the check of the server before training."""

import threading
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from support.mlflow_proxy import JSON, MlflowProxy

from trainer.errors import UserError
from trainer.tracking.server import check_server, validate_tracking_uri


@pytest.mark.parametrize(
    "uri",
    [
        "http://mlflow:5000",
        "https://user:secret@mlflow.example.com/prefix",
        "http://[::1]:5000",
        "sqlite:///mlflow.db",
        "postgresql://user:secret@db/mlflow",
        "postgresql+psycopg2://db/mlflow",
        "databricks",
        "databricks://profile",
    ],
)
def test_uri_supported_by_mlflow_is_valid(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    validate_tracking_uri(uri)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("localhost:5000", "use http://localhost:5000"),
        ("127.0.0.1:5000/prefix", "use http://127.0.0.1:5000/prefix"),
        ("http://", "names no host"),
        ("http:///prefix", "names no host"),
        ("http://host:port", "not a valid URL"),
        ("http://host?x=1", "query"),
        ("http://host ", "white space"),
        ("ftp://host/x", "does not know"),
        ("mlruns", "MLFLOW_ALLOW_FILE_STORE"),
        ("./mlruns", "MLFLOW_ALLOW_FILE_STORE"),
        ("file:///tmp/mlruns", "MLFLOW_ALLOW_FILE_STORE"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite:////etc/hostname/mlflow.db", "is not a folder"),
        ("mysql+pymysql://user:secret@db/mlflow", "pymysql, which is not installed"),
        ("mssql+pyodbc://user:secret@db/mlflow", "pyodbc, which is not installed"),
        ("uc:http://host", "model registry only"),
        ("databricks-uc", "model registry only"),
    ],
)
def test_uri_that_mlflow_would_reject_is_rejected(uri: str, message: str) -> None:
    with pytest.raises(UserError, match=r"tracking\.uri") as error:
        validate_tracking_uri(uri)
    assert message in str(error.value)
    assert "secret" not in str(error.value)


def test_folder_is_valid_with_mlflow_allow_file_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    validate_tracking_uri("./mlruns")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, b"no", "text/html"), "refuses the credentials (HTTP 401)"),
        (
            (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', JSON),
            "refuses the credentials (HTTP 403)",
        ),
        ((200, b"<html>log in</html>", "text/html"), "is not an MLflow server"),
        ((404, b"<html>nothing here</html>", "text/html"), "is not an MLflow server"),
        ((200, b'{"status": "ok"}', JSON), "does not return it"),
        (
            (400, b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "bad name"}', JSON),
            "bad name",
        ),
    ],
)
def test_server_that_rejects_the_run_is_a_user_error(
    answer: tuple[int, bytes, str], message: str, proxy: MlflowProxy
) -> None:
    proxy.hook = lambda request: answer
    with pytest.raises(UserError) as error:
        check_server(proxy.url.replace("://", "://me:secret@"), "any", None)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "answer", [(503, b"", JSON), (429, b"", JSON), (502, b"<html>", "text/html"), (0, b"", "")]
)
def test_unreachable_server_does_not_prevent_training(
    answer: tuple[int, bytes, str], proxy: MlflowProxy
) -> None:
    proxy.hook = lambda request: answer
    fault = check_server(proxy.url, "any", None)
    assert fault is not None
    assert fault.kind == "unreachable"


def test_server_check_has_a_timeout(proxy: MlflowProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr("trainer.tracking.server._CHECK_SECONDS", 0.2)
    proxy.hook = lambda request: (released.wait(20), None)[1]
    fault = check_server(proxy.url, "any", None)
    released.set()
    assert fault is not None
    assert "no response" in fault.reason


def test_names_that_the_server_would_reject_are_rejected(
    proxy: MlflowProxy, client: MlflowClient, experiment: str
) -> None:
    deleted = client.create_experiment(experiment)
    client.delete_experiment(deleted)
    with pytest.raises(UserError, match=rf"restore it .*--experiment-id {deleted}"):
        check_server(proxy.url, experiment, None)
    with pytest.raises(UserError, match="rejected the run"):
        check_server(proxy.url, "x" * 501, None)
    client.register_prompt("a-prompt", "Say {{word}}")
    with pytest.raises(UserError, match="is a prompt"):
        check_server(proxy.url, "Default", "a-prompt")
    assert check_server(proxy.url, f"{experiment}-new", "no-model-yet") is None


@pytest.mark.parametrize("name", ["team/model", "a:b", "..", "../x", "."])
def test_invalid_model_name_is_rejected_with_and_without_a_server(
    name: str, proxy: MlflowProxy, client: MlflowClient
) -> None:
    with pytest.raises(MlflowException):
        client.create_registered_model(name)
    for uri in (proxy.url, "http://127.0.0.1:9"):
        with pytest.raises(UserError, match=r"^tracking\.register_as: ") as error:
            check_server(uri, "any", name)
        assert repr(name) in str(error.value)


def test_database_that_cannot_be_created_is_rejected() -> None:
    with pytest.raises(UserError, match="nowhere"):
        check_server("sqlite:////proc/nowhere/mlflow.db", "any", None)
