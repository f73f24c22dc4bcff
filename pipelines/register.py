"""``convoy register``, ``promote`` and ``sync``: what a person does in MLflow after a run."""

import json
import os
from pathlib import Path

from trainer.data.index import open_index
from trainer.data.reader import read_image
from trainer.errors import UserError
from trainer.registration import Registered, register
from trainer.tracking import Delivery, configure_mlflow


def server() -> str:
    """The server that the environment names; raises UserError where none is."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError("MLFLOW_TRACKING_URI must name the MLflow server; `convoy local env` prints it")
    return uri


def register_output(folder: str, name: str) -> Registered:
    """Register the model in a run's output folder, for a run whose server was away at its end."""
    path = Path(folder)
    try:
        result = json.loads((path / "result.json").read_text())
        config = json.loads((path / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder}: is not the output folder of a finished run: {error}") from None
    if result["mlflow_run_id"] is None:
        raise UserError(f"{folder}: the run is not in MLflow yet; first: convoy sync {path / 'tracking.jsonl'}")
    index, store = open_index(config["data"]["val"] or config["data"]["train"])
    example = read_image(0, index, store)
    return register(server(), result["mlflow_run_id"], name, path, example, result["top1"], result["top5"], index.digest)


def promote(name: str, version: str, alias: str) -> None:
    """Give a version an alias. Raises UserError where the model or the version is not there."""
    configure_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server())
    try:
        client.get_model_version(name, version)
        client.set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        raise UserError(f"{name} version {version} cannot become {alias}: {' '.join(str(error).split())[:200]}") from None


def sync(spool: str) -> tuple[str, int]:
    """Send what a run could not tell MLflow; returns the run's id and the number of entries sent. Raises UserError."""
    path = Path(spool)
    if not path.is_file():
        raise UserError(f"{spool}: there is no such file")
    delivery = Delivery(path, server())
    sent = 0
    try:
        while count := delivery.deliver():
            sent += count
    except json.JSONDecodeError as error:
        raise UserError(f"{spool}: is not a spool that a run left: {error}") from None
    except Exception as error:
        raise UserError(f"MLflow at {delivery.uri} cannot be reached: {' '.join(str(error).split())[:200]}") from None
    delivery.finish()
    result = path.with_name("result.json")
    if result.is_file():  # `convoy register` needs the run's id, which training could not know
        facts = json.loads(result.read_text()) | {"mlflow_run_id": delivery.run_id}
        result.write_text(json.dumps(facts, indent=1) + "\n")
    return str(delivery.run_id), sent
