"""Writes spools in the format of a run."""

from pathlib import Path
from typing import Any

from trainer.tracking.spool.spool import SpoolWriter, new_run_key, now_ms

LOSSES = [(step, 1 / step) for step in range(1, 6)]


def describe_run(experiment: str, name: str = "run", **changed: Any) -> dict[str, Any]:
    dataset = {
        "name": "digits/train",
        "digest": "0123",
        "url": "s3://bucket/digits/train",
        "context": "training",
        "profile": "{}",
    }
    return {
        "experiment": experiment,
        "name": name,
        "tags": {"convoy.version": "1"},
        "params": {"optimizer.base_lr": 0.1, "batch.ranks": 2},
        "datasets": [dataset, {**dataset, "name": "digits/val", "context": "eval"}],
        **changed,
    }


def write_run(
    path: Path,
    experiment: str,
    name: str = "run",
    steps: int = 5,
    metrics: dict[str, float] | None = None,
    run_key: str | None = None,
    attempt: int | None = None,
    **changed: Any,
) -> str:
    """Write a finished run with losses 1/step for steps 1 to ``steps``; return its key."""
    writer = SpoolWriter(path, run_key or new_run_key(), now_ms() if attempt is None else attempt)
    writer.append("run", time_ms=now_ms(), **describe_run(experiment, name, **changed))
    writer.append("artifact", name="config.json", folder="", text=f"config of {name}")
    for step in range(1, steps + 1):
        values = {"loss": 1 / step} | (metrics or {})
        writer.append("metrics", step=step, time_ms=now_ms(), values=values)
    writer.append("finish", status="FINISHED", time_ms=now_ms())
    writer.close()
    return writer.run_key
