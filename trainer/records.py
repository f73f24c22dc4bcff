"""What a run leaves behind: its MLflow run, ``result.json`` and a version in the model registry."""

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

from trainer.checkpoint import Checkpoint
from trainer.credentials import without_credentials
from trainer.data.reader import read_image
from trainer.disk import AppendLog, write_file
from trainer.engine.loop import Result
from trainer.engine.parallel import Ranks
from trainer.errors import ServiceLost
from trainer.recipe import find_recipe
from trainer.registration import register
from trainer.resolve import Resolved, tracking_uri
from trainer.tracking import MlflowTracker, NullTracker, SystemMetrics, Tracker


def start_tracking(
    run: Resolved, recipe: str, ranks: Ranks, found: Checkpoint | None, check_lock: Callable[[], None] = lambda: None
) -> tuple[Tracker, SystemMetrics | None]:
    """MLflow on the first rank where a server is named, silence elsewhere. ``found``: what the run goes on from."""
    config, uri = run.config, tracking_uri(run.config)
    if not ranks.is_first or uri is None:
        return NullTracker(), None
    folder = config.output_dir
    sets = [("training", config.data.train, run.train)] + ([("eval", str(config.data.val), run.val)] if run.val else [])
    commit = _git_commit()
    tags: dict[str, str | None] = {"convoy.version": importlib.metadata.version("convoy"), "convoy.ranks": str(ranks.world_size)}
    tags |= {f"convoy.{context}_digest": index.digest for context, _, index in sets}
    tags |= {"mlflow.source.git.commit": commit, "mlflow.source.name": f"python -m trainer {recipe}", "mlflow.source.type": "JOB"}
    derived = {
        "batch.accumulation_steps": run.batch.accumulation_steps,
        "batch.ranks": ranks.world_size,
        "train.total_steps": run.total_steps,
    }
    tracker = MlflowTracker(
        uri,
        folder / "tracking.jsonl",
        {
            "run_id": found.run_id if found else None,
            "experiment": config.tracking.experiment,
            "name": config.name,
            "tags": {key: value for key, value in tags.items() if value},
            "params": config.flat() | derived,
            "datasets": [
                {
                    "name": url.split("://")[-1][-200:],
                    "digest": index.digest.removeprefix("sha256:")[:32],
                    "url": url,
                    "context": context,
                    "profile": json.dumps({"samples": index.samples, "bytes": index.bytes, "shards": len(index.shards)}),
                }
                for context, url, index in sets
            ],
        },
        goes_on=found is not None,
        check_lock=check_lock,
    )
    for name, text in _documents(run, recipe).items():
        write_file(folder / name, text)
        tracker.log_artifact(folder / name)
    return tracker, SystemMetrics(tracker)


def _documents(run: Resolved, recipe: str) -> dict[str, str]:
    """The recipe as given, the configuration that came of it, and the environment."""
    packages = sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions())
    machine = [f"python {platform.python_version()}", platform.platform(), f"{os.cpu_count()} CPUs", ""]
    return {
        "recipe.yaml": without_credentials(find_recipe(recipe).read_text(encoding="utf-8")),
        "config.json": run.config.model_dump_json(indent=1) + "\n",
        "environment.txt": "\n".join(machine + packages) + "\n",
    }


def _git_commit() -> str | None:
    """Of the code that runs: an image carries it in its environment, a checkout knows it."""
    if commit := os.environ.get("CONVOY_GIT_COMMIT"):
        return commit
    if shutil.which("git") is None:
        return None
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def finish(run: Resolved, result: Result, tracker: Tracker, delivered: bool, failed_checkpoints: int) -> None:
    """Register where asked, and leave ``result.json``."""
    config = run.config
    facts = asdict(result) | {"ranks": run.world_size, "mlflow_run_id": tracker.run_id, "name": config.name}
    facts |= {"train_digest": run.train.digest, "val_digest": run.val.digest if run.val else None}
    facts["failed_checkpoints"] = failed_checkpoints
    if failed_checkpoints:
        print(
            f"convoy: the training is finished, but {failed_checkpoints} of its checkpoints could not be written (see above)",
            file=sys.stderr,
            flush=True,
        )
    lost = None
    if config.tracking.register_as:
        try:
            facts |= _register(run, result, tracker, delivered)
        except ServiceLost as error:
            lost = error
    write_file(config.output_dir / "result.json", json.dumps(facts, indent=1) + "\n")
    if lost:
        raise ServiceLost(f"{lost}; the weights are in {config.output_dir}")


def _register(run: Resolved, result: Result, tracker: Tracker, delivered: bool) -> dict[str, str]:
    config, uri = run.config, tracking_uri(run.config)
    if uri is None or tracker.run_id is None or not delivered:
        raise ServiceLost(f"MLflow at {uri} was not there, so {config.tracking.register_as} has no new version")
    index, store = (run.val, run.val_store) if run.val and run.val_store else (run.train, run.train_store)
    example = read_image(0, index, store)
    registered = register(
        uri, tracker.run_id, str(config.tracking.register_as), config.output_dir, example, result.top1, result.top5, index.digest
    )
    print(f"registered {registered.name} version {registered.version} as {registered.alias}: {registered.why}", flush=True)
    return {"model": registered.name, "version": registered.version, "alias": registered.alias}


class KeyLog:
    """The keys of the samples that a rank took, a line a step as ``convoy order --json`` prints it, and the epoch."""

    def __init__(self, folder: Path, run: Resolved, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._world_size, self._steps_per_epoch = run.world_size, run.steps_per_epoch
        self._file: AppendLog | None = None

    def write(self, step: int, keys: list[str]) -> None:
        """``step``: of the run, from 0. The file is named by the first one, the rank and the number of ranks."""
        if self._file is None:
            name = f"from-{step}-rank-{self._rank}-of-{self._world_size}.jsonl"
            self._file = AppendLog(self._folder / name, append=False)
        epoch, place = divmod(step, self._steps_per_epoch)
        self._file.write(json.dumps({"epoch": epoch, "step": place, "keys": keys}))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
