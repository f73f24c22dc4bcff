"""A trained model into MLflow's registry, and who is champion there."""

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ServiceLost
from trainer.export import FACTS_NAME, WEIGHTS_NAME
from trainer.packaged_code import packaged_code
from trainer.tracking import configure_mlflow

_NEEDED = ("torch", "numpy", "pillow", "safetensors", "pydantic", "pyyaml", "pandas")


@dataclass(frozen=True)
class Registered:
    """A version and the alias that it won."""

    name: str
    version: str
    alias: str
    why: str


def register(
    uri: str, run_id: str, name: str, export: Path, example: bytes, top1: float | None, top5: float | None, val_digest: str
) -> Registered:
    """Log the model of folder ``export`` to the run, register it and let it challenge the champion.

    ``example``: one encoded image. ``val_digest``: the data that ``top1`` was measured on. Raises ServiceLost.
    """
    configure_mlflow()
    import mlflow
    import numpy as np
    import pandas as pd
    from mlflow.exceptions import MlflowException
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, _num_classes(export)))]),
    )
    tags = {"top1": repr(top1), "top5": repr(top5), "val_digest": val_digest}
    try:
        mlflow.set_tracking_uri(uri)
        with packaged_code() as (package, serving):
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(serving),
                artifacts={"weights": str(export / WEIGHTS_NAME), "facts": str(export / FACTS_NAME)},
                code_paths=[str(package)],
                pip_requirements=[f"mlflow=={mlflow.__version__}", *(f"{p}=={importlib.metadata.version(p)}" for p in _NEEDED)],
                signature=signature,
                input_example=pd.DataFrame({"image": [example]}),
                model_id=_new_logged_model(uri, run_id),
            )
        client = MlflowClient(tracking_uri=uri)
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = client.create_model_version(name, info.model_uri, run_id=run_id, tags=tags, model_id=info.model_id)
        return challenge(client, name, str(version.version), top1, val_digest)
    except MlflowException as error:
        raise ServiceLost(f"MLflow at {uri} did not register {name}: {' '.join(str(error).split())[:200]}") from None


def _new_logged_model(uri: str, run_id: str) -> str:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment_id = client.get_run(run_id).info.experiment_id
    model = client.create_logged_model(experiment_id, name="model", source_run_id=run_id, model_type="image-classifier")
    return str(model.model_id)


def _num_classes(export: Path) -> int:
    return int(json.loads((export / FACTS_NAME).read_text(encoding="utf-8"))["num_classes"])


def challenge(client: Any, name: str, version: str, top1: float | None, val_digest: str) -> Registered:
    """Alias ``challenger``; it becomes ``champion`` when its top1 is not worse than the champion's on the same data."""
    client.set_registered_model_alias(name, "challenger", version)
    aliases = client.get_registered_model(name).aliases
    if top1 is None:
        return Registered(name, version, "challenger", "it has no top1")
    if "champion" in aliases:
        champion = client.get_model_version(name, aliases["champion"])
        if champion.tags.get("val_digest") != val_digest:
            why = f"the champion, version {champion.version}, was measured on other data; `convoy promote` decides"
            return Registered(name, version, "challenger", why)
        best = champion.tags.get("top1", "None")
        if best != "None" and top1 < float(best):
            return Registered(name, version, "challenger", f"the champion, version {champion.version}, has top1 {float(best):.4f}")
    client.set_registered_model_alias(name, "champion", version)
    client.delete_registered_model_alias(name, "challenger")
    return Registered(name, version, "champion", "no champion has a better top1")
