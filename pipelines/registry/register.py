"""``convoy register``, ``promote`` and ``sync``: manual steps in MLflow after a run."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.index import open_index
from trainer.data.shards.sample_reader import read_image
from trainer.errors import RetryableError, UserError
from trainer.export.model_registry import Registered, register
from trainer.secrets.redaction import redact_credentials
from trainer.tracking import configure_mlflow
from trainer.tracking.server import refusal, validate_tracking_uri
from trainer.tracking.spool.delivery_record import RejectedEntries
from trainer.tracking.spool.spool import SpoolWriter, new_run_key, now_ms
from trainer.tracking.spool.spool_uploader import RunReport, spool_files, sync_spool


def server() -> str:
    """Return the MLflow server that the environment names. Raises UserError if there is none."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError(
            "MLFLOW_TRACKING_URI must name the MLflow server; `convoy local env` prints it"
        )
    validate_tracking_uri(uri, "MLFLOW_TRACKING_URI")
    return uri


def register_output(folder: str, name: str) -> Registered:
    """Register the model in the output folder of a run, whether or not MLflow has the run yet.

    Raises UserError.
    """
    path = Path(folder)
    result, config = _read_output(path)
    run_id = ensure_run(path)
    index, store = open_index(config["data"]["val"] or config["data"]["train"])
    example = read_image(0, index, store)
    return register(
        server(), run_id, name, path, example, result["top1"], result["top5"], index.digest
    )


def _read_output(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read ``result.json`` and ``config.json``."""
    try:
        result = json.loads((path / "result.json").read_text())
        config = json.loads((path / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: is not the output folder of a finished run: {error}") from None
    return result, config


def ensure_run(path: Path) -> str:
    """Return the id of the MLflow run of output folder ``path``.

    A run that MLflow does not have is sent from its spool, or from the folder if it was never
    tracked. Raises UserError.
    """
    result, config = _read_output(path)
    spool = path / "tracking.jsonl"
    if result["mlflow_run_id"] is None and not spool.exists():
        _write_spool(spool, result, config)
        result, config = _read_output(path)
    if spool.exists():
        sync(str(spool)).raise_if_incomplete(needed_key=result.get("run_key"))
        result, config = _read_output(path)
    if result["mlflow_run_id"] is None:
        raise UserError(f"{spool}: holds entries of other runs only; {path} has no MLflow run")
    return str(result["mlflow_run_id"])


def _write_spool(spool: Path, result: dict[str, Any], config: dict[str, Any]) -> None:
    """Write the entries of a run that was trained without a server: its parameters and result."""
    key = new_run_key()
    writer = SpoolWriter(spool, key, now_ms())
    params = {
        f"{section}.{name}" if isinstance(values, dict) else section: str(value)
        for section, values in config.items()
        for name, value in (values.items() if isinstance(values, dict) else [("", values)])
    }
    writer.append(
        "run",
        time_ms=now_ms(),
        experiment=config["tracking"]["experiment"],
        name=result["name"],
        tags={"mlflow.source.type": "JOB"},
        params=params,
        datasets=[],
    )
    figures = {name: result[name] for name in ("top1", "top5") if result.get(name) is not None}
    writer.append("metrics", step=result["steps"], time_ms=now_ms(), values=figures)
    writer.append("finish", status="FINISHED", time_ms=now_ms())
    writer.close()
    record = result | {"run_key": key}
    (spool.with_name("result.json")).write_text(json.dumps(record, indent=1) + "\n")


def promote(name: str, version: str, alias: str) -> None:
    """Assign an alias to a version. Raises UserError if the model or the version does not exist."""
    configure_mlflow()
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=server())
    try:
        client.get_model_version(name, version)
        client.set_registered_model_alias(name, alias, version)
    except MlflowException as error:
        raise UserError(
            f"{name} version {version} cannot become {alias}: {' '.join(str(error).split())[:200]}"
        ) from None


@dataclass
class SyncReport:
    """Result of sending the entries of a spool."""

    spool: Path
    uri: str
    runs: list[RunReport]
    rejected: RejectedEntries
    kept: bool

    def lines(self) -> list[str]:
        """Return one line per run that entries were sent to."""
        return [
            f"sent {run.sent:,} entries to MLflow run {run.run_id}"
            for run in self.runs
            if run.run_id and (run.sent or not run.fault)
        ]

    def raise_if_incomplete(self, needed_key: str | None = None) -> None:
        """Raise UserError, or RetryableError if a retry may succeed, unless all entries were
        accepted.

        ``needed_key``: key of the only run that matters.
        """
        faults = []
        for run in self.runs:
            if run.fault is None or needed_key not in (None, run.key):
                continue
            if run.fault.kind == "unreachable":
                where = f"MLflow at {redact_credentials(self.uri)}"
                if run.run_id is None:
                    raise UserError(f"{where} cannot be reached: {run.fault.reason}")
                raise RetryableError(
                    f"{where} did not accept everything ({run.fault.reason}); the rest is in "
                    f"{self.spool}; try again"
                )
            faults.append(f"{refusal(self.uri, run.fault)}; its entries are kept in {self.spool}")
        if self.rejected.added and needed_key is None:
            path = self.rejected.path
            faults.append(
                f"MLflow rejected {len(self.rejected.added)} entries: {self.rejected.summary()}; "
                f"they are kept in {path}; when the cause is removed, run convoy sync {path}"
            )
        if faults:
            raise UserError(*faults)


def sync(spool: str) -> SyncReport:
    """Send the undelivered entries of a run to MLflow.

    Raises UserError if there is nothing to send or if the spool is in use.
    """
    path = Path(spool)
    spool_files(path)
    uri = server()
    uploader, runs = sync_spool(path, uri)
    _note_run_id(path.with_name("result.json"), runs)
    return SyncReport(path, uri, runs, uploader.rejected, uploader.kept)


def _note_run_id(result: Path, runs: list[RunReport]) -> None:
    """Store the run's id for `convoy register`; it was unknown during training."""
    try:
        record = json.loads(result.read_text())
    except (OSError, ValueError):  # training did not finish, or was killed while writing
        return
    if record.get("run_key"):
        runs = [run for run in runs if run.key == record["run_key"]]
    elif record.get("mlflow_run_id") or len(runs) != 1:
        return
    for run in runs:
        if run.run_id and run.run_id != record.get("mlflow_run_id"):
            record["mlflow_run_id"] = run.run_id
            result.write_text(json.dumps(record, indent=1) + "\n")
