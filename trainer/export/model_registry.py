"""Registers a trained model in MLflow's registry and decides whether it becomes the champion."""

import hashlib
import importlib.metadata
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import RetryableError, UserError
from trainer.export.exported_model import METADATA_NAME, WEIGHTS_NAME
from trainer.export.packaged_code import packaged_code
from trainer.secrets.redaction import redact_credentials
from trainer.tracking import configure_mlflow
from trainer.tracking.errors import Fault, classify, is_service_error
from trainer.tracking.mlflow_run import single_try
from trainer.tracking.server import refusal

_NEEDED = ("torch", "numpy", "pillow", "safetensors", "pydantic", "pyyaml", "pandas")
_WAITS = (2.0, 8.0)  # seconds between attempts


@dataclass(frozen=True)
class Registered:
    """A registered version, the alias it received, and the reason."""

    name: str
    version: str
    alias: str
    why: str


def register(
    uri: str,
    run_id: str,
    name: str,
    export: Path,
    example: bytes,
    top1: float | None,
    top5: float | None,
    val_digest: str,
) -> Registered:
    """Logs the model in folder ``export`` to the run, registers it and promotes it if it is better.

    ``example``: one encoded image. ``val_digest``: identifies the data that ``top1`` was measured
    on. Registering the same weights with the same metrics repeatedly creates only one version per
    run. Raises UserError if the server rejects the model permanently, RetryableError if a retry may
    succeed.
    """
    configure_mlflow()
    import mlflow
    from mlflow.tracking import MlflowClient

    mlflow.set_tracking_uri(uri)
    weights = hashlib.sha256((export / WEIGHTS_NAME).read_bytes()).hexdigest()
    tags = {
        "top1": repr(top1),
        "top5": repr(top5),
        "val_digest": val_digest,
        "weights_sha256": weights,
    }
    logged: dict[str, Any] = {}
    for wait in (*_WAITS, None):
        try:
            client = MlflowClient(tracking_uri=uri)
            version = _version(client, run_id, name, export, example, tags, logged)
            return promote_if_better(client, name, version, top1, val_digest)
        except Exception as error:
            if not is_service_error(error):
                raise
            fault = classify(error)
            if not fault.may_succeed_later:
                raise _refused(uri, name, fault, run_id) from error
            if wait is None:
                where = redact_credentials(uri)
                raise RetryableError(
                    f"MLflow at {where} did not register {name}: {fault.reason}"
                ) from error
        time.sleep(wait)
    raise AssertionError("unreachable")


def _refused(uri: str, name: str, fault: Fault, run_id: str) -> UserError:
    if fault.status == 413:
        return UserError(
            f"MLflow at {redact_credentials(uri)} refuses the model as too large (HTTP 413), so "
            f"{name} has no new version; raise the limit of the proxy in front of it (nginx: "
            "client_max_body_size)"
        )
    if fault.kind == "unauthorized":
        return UserError(f"{name} has no new version: {refusal(uri, fault)}")
    return UserError(
        f"MLflow at {redact_credentials(uri)} refuses to register run {run_id} as {name}: "
        f"{fault.reason}"
    )


def _version(
    client: Any,
    run_id: str,
    name: str,
    export: Path,
    example: bytes,
    tags: dict[str, str],
    logged: dict[str, Any],
) -> str:
    """Returns the version of these weights, creating it if needed.

    ``logged`` keeps the logged model across attempts.
    """
    from mlflow.exceptions import MlflowException

    run = client.get_run(run_id)
    if run.info.lifecycle_stage != "active":
        raise MlflowException.invalid_parameter_value(f"the run {run_id} was deleted; restore it")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for known in client.search_model_versions(f"run_id = '{run_id}'"):
        if known.name == name and tags.items() <= known.tags.items():
            return str(known.version)
    if "info" not in logged:
        logged["info"] = _log_model(client, run, export, example, logged)
    info = logged["info"]
    with single_try():
        version = client.create_model_version(
            name, info.model_uri, run_id=run_id, tags=tags, model_id=info.model_id
        )
    return str(version.version)


def _log_model(client: Any, run: Any, export: Path, example: bytes, logged: dict[str, Any]) -> Any:
    """Uploads the model with its serving code; creates one logged model across all attempts."""
    import mlflow
    import numpy as np
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, _num_classes(export)))]),
    )
    if "model_id" not in logged:
        with single_try():
            model = client.create_logged_model(
                run.info.experiment_id,
                name="model",
                source_run_id=run.info.run_id,
                model_type="image-classifier",
            )
        logged["model_id"] = str(model.model_id)
    requirements = [f"{p}=={importlib.metadata.version(p)}" for p in _NEEDED]
    with packaged_code() as (package, serving):
        return mlflow.pyfunc.log_model(
            name="model",
            python_model=str(serving),
            artifacts={"weights": str(export / WEIGHTS_NAME), "facts": str(export / METADATA_NAME)},
            code_paths=[str(package)],
            pip_requirements=[f"mlflow=={mlflow.__version__}", *requirements],
            signature=signature,
            input_example=pd.DataFrame({"image": [example]}),
            model_id=logged["model_id"],
        )


def _num_classes(export: Path) -> int:
    return int(json.loads((export / METADATA_NAME).read_text(encoding="utf-8"))["num_classes"])


def promote_if_better(
    client: Any, name: str, version: str, top1: float | None, val_digest: str
) -> Registered:
    """Sets the alias ``challenger``, or ``champion`` if the version is at least as good.

    The version becomes champion if its top1 is not worse than the champion's on the same data.
    """
    client.set_registered_model_alias(name, "challenger", version)
    aliases = client.get_registered_model(name).aliases
    if top1 is None:
        return Registered(name, version, "challenger", "it has no top1")
    if "champion" in aliases:
        champion = client.get_model_version(name, aliases["champion"])
        if champion.tags.get("val_digest") != val_digest:
            why = (
                f"the champion, version {champion.version}, was measured on other data; use "
                "`convoy promote` to decide"
            )
            return Registered(name, version, "challenger", why)
        best = champion.tags.get("top1", "None")
        if best != "None" and top1 < float(best):
            return Registered(
                name,
                version,
                "challenger",
                f"the champion, version {champion.version}, has top1 {float(best):.4f}",
            )
    client.set_registered_model_alias(name, "champion", version)
    client.delete_registered_model_alias(name, "challenger")
    return Registered(name, version, "champion", "no champion has a better top1")
