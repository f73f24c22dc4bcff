"""The MLflow server: client settings, validation of tracking URIs, and the check at startup."""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import threading
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from trainer.errors import UserError
from trainer.secrets.redaction import redact_credentials
from trainer.tracking.errors import DeliveryStopped, Fault, classify
from trainer.tracking.mlflow_run import ensure_experiment

_CHECK_SECONDS = 10.0
# For a new SQLite file; a process that exits earlier leaves it partially migrated.
_MIGRATION_SECONDS = 120.0
_DATABASES = ("postgresql", "mysql", "sqlite", "mssql")
_DRIVERS = {"mysql": "MySQLdb", "mssql": "pyodbc", "postgresql": "psycopg2"}
_HOST_AND_PORT = re.compile(r"^[\w.-]+:\d{1,5}(/.*)?$")


def configure_mlflow(retries: int = 2) -> None:
    """Sets short timeouts, no pickle and no progress output for MLflow.

    Call it before MLflow is imported. Variables that are already set are kept.
    """
    for name, value in (
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(retries)),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "15"),
        ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        ("MLFLOW_LOGGING_LEVEL", "ERROR"),
    ):
        os.environ.setdefault(name, value)


def connect(uri: str) -> Any:
    """Returns an MLflow client. Raises what MLflow raises.

    Contacts a database, but not a server.
    """
    configure_mlflow(retries=1)  # the uploader retries as well
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def validate_tracking_uri(uri: str, key: str = "tracking.uri") -> None:
    """Raises UserError if MLflow would not accept ``uri``, or would not persist anything there.

    Makes no connection and does not import MLflow.
    """
    shown = redact_credentials(uri)
    if uri.lower().startswith("http"):
        shown = re.split("[?#]", shown)[0]  # the query or fragment may be a secret

    def refuse(reason: str) -> None:
        raise UserError(f"{key}: {shown!r} {reason}")

    if uri != uri.strip() or re.search(r"[\x00-\x1f]", uri):
        refuse("begins or ends with white space, or has control characters; remove them")
    if uri == "databricks":
        return
    if uri in ("uc", "databricks-uc") or uri.startswith(("uc:", "databricks-uc:")):
        refuse("is a model registry only; use databricks, and MLFLOW_REGISTRY_URI for the registry")
    if _HOST_AND_PORT.match(uri):
        refuse(f"has no scheme; use http://{shown}")
    try:
        parts = urlsplit(uri)
        port = parts.port if parts.scheme in ("http", "https") else None
    except ValueError as error:
        refuse(f"is not a valid URL: {error}")
    scheme = parts.scheme.lower()
    database = scheme.partition("+")[0]
    if scheme in ("http", "https"):
        if not parts.hostname or port == 0:
            refuse("names no host; use http://HOST:PORT")
        if parts.query or parts.fragment:
            refuse(
                "has a query or a fragment, which MLflow would put before its own path; remove it"
            )
    elif database in _DATABASES:
        _validate_database(database, scheme, parts.path, uri, refuse)
    elif scheme in ("", "file"):
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("true", "1"):
            refuse(
                "is a folder, which this version of MLflow no longer supports as a store; use "
                "sqlite:///FILE, or set MLFLOW_ALLOW_FILE_STORE=true"
            )
    elif scheme == "databricks":
        return
    elif scheme not in _plugin_schemes():
        refuse(
            "has a scheme that MLflow does not know; valid schemes: http, https, sqlite, "
            "postgresql, mysql, mssql, databricks"
        )


def _validate_database(database: str, scheme: str, path: str, uri: str, refuse: Any) -> None:
    driver = scheme.partition("+")[2] or _DRIVERS.get(database)
    if driver and database != "sqlite" and importlib.util.find_spec(driver) is None:
        refuse(f"needs the Python package {driver}, which is not installed")
    if database != "sqlite":
        return
    file = unquote(path[1:])
    if not uri.lower().startswith(f"{scheme}:///") or file in ("", ":memory:"):
        refuse("is a database in memory, which would be lost; use sqlite:///FILE")
    target = Path(file)
    existing = target
    while not existing.exists():
        existing = existing.parent
    if target.is_dir() or (existing != target and not existing.is_dir()):
        refuse(f"{existing} is not a {'file' if target.is_dir() else 'folder'}")
    if not os.access(existing, os.W_OK):
        refuse(f"{existing} is not writable")


def _plugin_schemes() -> set[str]:
    return {point.name for point in importlib.metadata.entry_points(group="mlflow.tracking_store")}


def check_registered_name(name: str) -> None:
    """Raises UserError if MLflow's registry would reject the name (mlflow.utils.validation)."""
    if "/" in name or ":" in name:
        raise UserError(
            f"tracking.register_as: {name!r} is invalid: MLflow allows neither / nor : in "
            "the name of a registered model"
        )
    if name == "." or name.startswith(".."):
        raise UserError(
            f"tracking.register_as: {name!r} is invalid: MLflow does not allow a relative "
            "path as the name of a model"
        )


def check_server(uri: str, experiment: str, register_as: str | None) -> Fault | None:
    """Requests the experiment from the server, and the registered model if one is named.

    Returns the fault if the server cannot be reached within seconds, which does not prevent
    training. Raises UserError if the server responds but the run could not be logged, or if the
    model's name is not allowed.
    """
    outcome: list[Fault | None] = []
    configure_mlflow(retries=1)
    # Imported here so that the time limit covers only the server.
    importlib.import_module("mlflow.tracking")
    seconds = _MIGRATION_SECONDS if uri.startswith("sqlite") else _CHECK_SECONDS

    def check() -> None:
        try:
            client = connect(uri)
            ensure_experiment(client, experiment)
            if register_as:
                _check_model(client, register_as)
            outcome.append(None)
        except DeliveryStopped as stop:
            outcome.append(stop.fault)
        except Exception as error:
            outcome.append(classify(error))

    thread = threading.Thread(target=check, name="mlflow-check", daemon=True)
    thread.start()
    thread.join(seconds)
    if register_as:
        check_registered_name(register_as)
    if not outcome:
        return Fault("unreachable", f"no response within {seconds:.0f} s")
    fault = outcome[0]
    if fault is not None and not fault.may_succeed_later:
        raise UserError(refusal(uri, fault))
    return fault


def _check_model(client: Any, name: str) -> None:
    """Raises MlflowException or DeliveryStopped if the registry would not accept a new version."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
        return
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    try:
        taken = client.get_prompt(name) is not None
    except MlflowException:
        return  # a registry without prompts
    if taken:
        reason = f"tracking.register_as: {name!r} is a prompt in the registry; choose another name"
        raise DeliveryStopped(Fault("rejected", reason))


def refusal(uri: str, fault: Fault) -> str:
    """Formats the message for a server that responds but does not accept the run."""
    server = f"MLflow at {redact_credentials(uri)}"
    if fault.kind == "unauthorized":
        return (
            f"{server} refuses the credentials (HTTP {fault.status}); check "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, and "
            "the user's permissions"
        )
    if "valid JSON" in fault.reason or fault.status in (404, 405, 501):
        return (
            f"tracking.uri: {redact_credentials(uri)} is not an MLflow server: {fault.reason}; "
            "check the address, its path and the proxy in front of it"
        )
    return f"{server} rejected the run: {fault.reason}"
