"""Records of a run: its MLflow run, ``result.json`` and a version in the model registry."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.config.load import find_recipe
from trainer.config.run_plan import RunPlan, tracking_uri
from trainer.data.random_streams import LATEST_VERSION
from trainer.data.shards.sample_reader import read_image
from trainer.distributed.env import DistEnv
from trainer.errors import RetryableError, UserError
from trainer.export.model_registry import register
from trainer.faults.disk_space import AppendLog, write_file
from trainer.secrets.credentials import without_credentials
from trainer.secrets.redaction import redact_credentials
from trainer.tracking import MlflowTracker, NullTracker, SystemMetrics, Tracker
from trainer.tracking.server import check_registered_name, check_server, refusal
from trainer.training.checkpoint import Checkpoint
from trainer.training.metrics.meter import TrainState


def start_tracking(
    run: RunPlan,
    recipe: str,
    ranks: DistEnv,
    found: Checkpoint | None,
    check_lock: Callable[[], None] = lambda: None,
) -> tuple[Tracker, SystemMetrics | None]:
    """Starts logging to MLflow on rank 0 if a server is configured.

    ``found``: the checkpoint from which the run resumes. Raises UserError before the first step if
    the server responds but does not accept the run. A resumed run, or a run whose server is
    unreachable, only keeps its entries in the spool instead.
    """
    config, uri = run.config, tracking_uri(run.config)
    if not ranks.is_rank_zero or uri is None:
        return NullTracker(*((found.run_id, found.run_key) if found else ())), None
    reachable = True
    if found is None:
        fault = check_server(uri, config.tracking.experiment, config.tracking.register_as)
        reachable = fault is None
    elif config.tracking.register_as:
        # The name may differ from the one that was checked when the run started.
        check_registered_name(config.tracking.register_as)
    folder = config.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    run_key = found.run_key if found else None
    if found and not run_key and found.run_id:  # a checkpoint of an earlier version of Convoy
        run_key = f"{0:013d}-{found.run_id}"
    tracker = MlflowTracker(
        uri,
        folder / "tracking.jsonl",
        {"run_id": found.run_id if found else None, **_description(run, recipe, ranks, found)},
        run_key,
        wait=reachable,
        check_lock=check_lock,
    )
    if found is None and tracker.refused is not None:
        tracker.abandon()
        raise UserError(refusal(uri, tracker.refused))
    for name, text in _documents(run, recipe).items():
        write_file(folder / name, text)
        tracker.log_text(name, text)
    return tracker, SystemMetrics(tracker)


def _description(
    run: RunPlan, recipe: str, ranks: DistEnv, found: Checkpoint | None
) -> dict[str, Any]:
    """Returns the experiment, name, tags, parameters and data sets of the run."""
    config = run.config
    splits = [("training", config.data.train, run.train)]
    if run.val:
        splits.append(("eval", str(config.data.val), run.val))
    tags = {
        "convoy.version": importlib.metadata.version("convoy"),
        "convoy.ranks": str(ranks.world_size),
        "convoy.random_streams": str(found.streams_version if found else LATEST_VERSION),
        "mlflow.source.name": f"python -m trainer {recipe}",
        "mlflow.source.type": "JOB",
    }
    if commit := _git_commit():
        tags["mlflow.source.git.commit"] = commit
    datasets: dict[tuple[str, str], dict[str, str]] = {}
    for context, url, index in splits:
        tags[f"convoy.{context}_digest"] = index.digest
        url = redact_credentials(url)
        name, digest = url.split("://")[-1][-200:], index.digest.removeprefix("sha256:")[:32]
        profile = {"samples": index.samples, "bytes": index.bytes, "shards": len(index.shards)}
        dataset = {"name": name, "digest": digest, "url": url, "context": context}
        if same := datasets.get((name, digest)):  # MLflow stores a data set only once per run
            same["context"] += f", {context}"
        else:
            datasets[name, digest] = dataset | {"profile": json.dumps(profile)}
    params = config.flat() | {
        "batch.accumulation_steps": run.batch.accumulation_steps,
        "batch.ranks": ranks.world_size,
        "train.total_steps": run.total_steps,
    }
    return {
        "experiment": config.tracking.experiment,
        "name": config.name,
        "tags": tags,
        "params": {key: redact_credentials(str(value)) for key, value in params.items()},
        "datasets": list(datasets.values()),
    }


def _documents(run: RunPlan, recipe: str) -> dict[str, str]:
    """Returns the recipe as given, the resulting configuration, and the environment."""
    packages = sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions())
    machine = [
        f"python {platform.python_version()}",
        platform.platform(),
        f"{os.cpu_count()} CPUs",
        "",
    ]
    return {
        "recipe.yaml": without_credentials(find_recipe(recipe).read_text(encoding="utf-8")),
        "config.json": run.config.model_dump_json(indent=1) + "\n",
        "environment.txt": "\n".join(machine + packages) + "\n",
    }


def _git_commit() -> str | None:
    """Returns the commit of the running code.

    An image has it in its environment, a checkout in its repository.
    """
    if commit := os.environ.get("CONVOY_GIT_COMMIT"):
        return commit
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    return completed.stdout.strip() or None


def finalize_run(
    run: RunPlan, result: TrainState, tracker: Tracker, failed_checkpoints: int
) -> None:
    """Writes ``result.json``, then registers the model if a name is configured.

    Raises UserError if the registry rejects it permanently, RetryableError if a retry may succeed.
    """
    config = run.config
    record: dict[str, Any] = asdict(result) | {"ranks": run.world_size, "name": config.name}
    record |= {"mlflow_run_id": tracker.run_id, "run_key": tracker.run_key}
    record |= {"train_digest": run.train.digest, "val_digest": run.val.digest if run.val else None}
    record["failed_checkpoints"] = failed_checkpoints
    if failed_checkpoints:
        print(
            f"convoy: training finished, but {failed_checkpoints} checkpoints could not be written "
            "(see above)",
            file=sys.stderr,
            flush=True,
        )
    path = config.output_dir / "result.json"
    write_file(path, json.dumps(record, indent=1) + "\n")
    if not config.tracking.register_as:
        return
    try:
        record |= _register(run, result, tracker.run_id)
    except (RetryableError, UserError) as error:
        name = config.tracking.register_as
        raise type(error)(
            f"{error}; the weights are in {config.output_dir}; register them with: convoy "
            f"register {config.output_dir} {name}"
        ) from None
    write_file(path, json.dumps(record, indent=1) + "\n")


def _register(run: RunPlan, result: TrainState, run_id: str | None) -> dict[str, str]:
    config, uri = run.config, tracking_uri(run.config)
    name = str(config.tracking.register_as)
    if uri is None or run_id is None:
        server = redact_credentials(str(uri))
        raise RetryableError(
            f"MLflow at {server} was unreachable, so no new version of {name} was registered"
        )
    index, store = (
        (run.val, run.val_store) if run.val and run.val_store else (run.train, run.train_store)
    )
    example = read_image(0, index, store)
    registered = register(
        uri, run_id, name, config.output_dir, example, result.top1, result.top5, index.digest
    )
    print(
        f"registered {registered.name} version {registered.version} as {registered.alias}: "
        f"{registered.why}",
        flush=True,
    )
    return {"model": registered.name, "version": registered.version, "alias": registered.alias}


class SampleKeyLogger:
    """Logs the keys of the samples that a rank consumed, and the epoch.

    Writes one line per step, in the format of ``convoy order --json``.
    """

    def __init__(self, folder: Path, run: RunPlan, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._world_size, self._steps_per_epoch = run.world_size, run.steps_per_epoch
        self._file: AppendLog | None = None

    def write(self, step: int, keys: list[str]) -> None:
        """Appends the keys of one step.

        ``step``: step of the run, from 0. The file name contains the first step, the rank and the
        number of ranks.
        """
        if self._file is None:
            name = f"from-{step}-rank-{self._rank}-of-{self._world_size}.jsonl"
            self._file = AppendLog(self._folder / name, append=False)
        epoch, epoch_step = divmod(step, self._steps_per_epoch)
        self._file.write(json.dumps({"epoch": epoch, "step": epoch_step, "keys": keys}))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
