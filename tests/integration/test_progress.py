"""``progress.json`` of real trainings: while they run, and however they end."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from support.helpers import ranks_of, run_convoy, start_train, until

from trainer.progress.progress_record import (
    PROGRESS_FILE,
    PROGRESS_LOG_VARIABLE,
    ProgressRecord,
    last_record,
    read_progress,
)


def _settings(digits: Path, out: Path, *more: str) -> list[str]:
    return [
        "digits-resnet8",
        f"data.train={digits}/train",
        f"data.val={digits}/val",
        "model.width=4",
        "train.log_every_steps=1",
        f"train.output_dir={out}",
        "name=observed",
        *more,
    ]


def _wait(out: Path, true: Callable[[ProgressRecord], bool]) -> ProgressRecord:
    """The first record in ``out`` of which ``true`` holds."""
    found: list[ProgressRecord] = []

    def look() -> bool:
        record = read_progress(out)
        if record is not None and true(record):
            found.append(record)
        else:  # a reader never sees a part of a record
            assert record is not None or not (out / PROGRESS_FILE).exists()
        return bool(found)

    until(look)
    return found[0]


def _read(out: Path) -> ProgressRecord:
    record = read_progress(out)
    assert record is not None
    return record


def test_the_progress_of_a_run_can_be_read_while_it_trains(
    digits: Path, service_env: dict[str, str], client: MlflowClient, tmp_path: Path
) -> None:
    out, began = tmp_path / "out", time.time()
    more = ["train.epochs=300", "checkpoint.every_steps=7", f"tracking.experiment={tmp_path.name}"]
    with start_train([*_settings(digits, out, *more), "--procs", "2"], service_env) as process:
        first = _wait(out, lambda record: (record.step or 0) > 0)
        later = _wait(
            out,
            lambda record: (
                (record.step or 0) > (first.step or 0)
                and record.eta_seconds is not None
                and (record.checkpoint_step or 0) > 7
            ),
        )
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    (run,) = client.search_runs([client.get_experiment_by_name(tmp_path.name).experiment_id])
    losses = {
        metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")
    }
    assert later.run_name == "observed"
    assert later.phase in ("training", "evaluating")
    assert began < first.updated_at < later.updated_at < time.time()
    assert later.loss == losses[later.step]
    assert later.epoch == pytest.approx(later.step * 300 / later.total_steps)
    assert later.images_per_second > 0
    assert (later.mlflow_run_id, later.exit_code) == (run.info.run_id, None)
    assert later.mlflow_tracking_uri == service_env["MLFLOW_TRACKING_URI"]
    end = _read(out)
    assert (end.phase, end.exit_code, end.step) == ("preempted", 143, max(losses))
    assert end.checkpoint_step == end.step
    assert (
        json.loads((Path(end.checkpoint_url) / "checkpoint.json").read_text())["step"] == end.step
    )

    more.append(f"train.max_steps={end.step + 3}")
    done = run_convoy("train", *_settings(digits, out, *more), "--procs", 2, env=service_env)
    assert done.returncode == 0, done.stderr
    result, last = json.loads((out / "result.json").read_text()), _read(out)
    assert (last.phase, last.exit_code) == ("finished", 0)
    assert (last.step, last.total_steps) == (end.step + 3, end.step + 3)
    assert (last.mlflow_run_id, last.loss) == (result["mlflow_run_id"], result["loss"])


def test_a_killed_rank_leaves_the_exit_code_of_the_run(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = _settings(digits, out, "train.epochs=10000", "checkpoint.keep=1")
    environment = {PROGRESS_LOG_VARIABLE: "1"}
    with start_train([*settings, "--procs", "2"], environment) as process:
        record = _wait(out, lambda record: (record.step or 0) > 0)
        ranks_of(process)[0].kill()
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 144, said
    end = _read(out)
    assert (end.phase, end.exit_code) == ("failed", 144)
    assert end.step >= record.step
    assert last_record(said.splitlines()) == end


def test_a_training_that_diverges_says_so(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = _settings(digits, out, "optimizer.base_lr=1e30", "schedule.warmup_epochs=0")
    done = run_convoy("train", *settings)
    assert done.returncode == 2
    end = _read(out)
    assert (end.phase, end.exit_code) == ("diverged", 2)
    assert 0 < end.step < end.total_steps
    assert f"convoy: {end.message}" in done.stderr
    assert "training diverged" in end.message


def test_a_run_that_is_refused_leaves_the_record_of_the_one_before(
    digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run_convoy("train", *_settings(digits, out, "train.max_steps=1")).returncode == 0
    before = (out / PROGRESS_FILE).read_bytes()
    done = run_convoy("train", *_settings(digits, out, "train.max_steps=1", "model.width=8"))
    assert done.returncode == 2
    assert (out / PROGRESS_FILE).read_bytes() == before
    assert "checkpoint" in done.stderr
    assert "convoy-progress" not in done.stdout
