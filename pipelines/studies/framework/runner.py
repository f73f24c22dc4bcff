"""Runs the trainings of studies through ``python -m trainer.launch``, several at a time.

Each training runs once, and resumes if it was interrupted.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.studies.experiments.data import prepare
from pipelines.studies.framework.progress import StudyProgress
from pipelines.studies.framework.study import Training
from trainer.config.schema import RunConfig, load_config
from trainer.errors import EXIT_PREEMPTED, EXIT_USER, RetryableError, UserError
from trainer.process.supervisor import python_command
from trainer.progress.progress_record import PROGRESS_FILE, read_progress
from trainer.tracking import configure_mlflow

EXPERIMENT = "studies"
_LEAST_FREE = 2**30  # bytes; a full set of studies writes some hundred MiB


@dataclass(frozen=True)
class Run:
    """A training and its location.

    ``folder`` holds the trainer's output, ``folder``.log its log.
    """

    training: Training
    folder: Path
    overrides: list[str]

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def outcome(self) -> Path:
        """File with the outcome of the training; written last, by this process."""
        return self.folder / "outcome.json"

    def config(self) -> RunConfig:
        return load_config(self.training.recipe, self.overrides)

    def is_begun(self) -> bool:
        """Return whether the folder holds a run of this configuration, except for ``tracking``."""
        try:
            saved = RunConfig.model_validate_json((self.folder / "config.json").read_text())
        except (OSError, ValueError):
            return False
        return saved.model_dump(exclude={"tracking"}) == self.config().model_dump(
            exclude={"tracking"}
        )

    def is_done(self) -> bool:
        return self.outcome.exists() and self.is_begun()

    def log_tail(self) -> str:
        """Return the last line of the log, for people."""
        lines = (
            self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        )
        return lines[-1][:300] if lines else ""

    def steps(self) -> int:
        """Return the number of optimizer steps of the training."""
        config = self.config()
        full, rest = divmod(self.training.train_samples, config.batch.global_size)
        total = (config.train.epochs or 10**9) * (full + (rest > 0 and config.data.tail == "pad"))
        return min(total, config.train.max_steps or total)

    def step(self) -> int:
        """Return the last step that the trainer published; 0 if there is none."""
        record = read_progress(self.folder)
        return record.step or 0 if record is not None else 0


class Runs:
    """The results of trainings, for the studies that requested them."""

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder, self.jobs = folder, jobs
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}"
        self._client: Any = None

    @property
    def client(self) -> Any:
        """MLflow client; creates the experiment, before two trainings would do so concurrently."""
        if self._client is None:
            configure_mlflow()
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(tracking_uri=self.uri)
            if self._client.get_experiment_by_name(EXPERIMENT) is None:
                artifacts = (
                    (self.folder / "artifacts").as_uri() if self.uri.startswith("sqlite:") else None
                )
                self._client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        return self._client

    def data(self, training: Training) -> Path:
        return prepare(self.folder / "data", training.train_samples, training.val_samples)

    def run_of(self, training: Training) -> Run:
        folder = self.folder / "trainings" / f"{training.label}-of-{training.train_samples}"
        data = self.data(training)
        overrides = [
            f"name={folder.name}", f"data.train={data}/train",
            f"data.val={data}/{training.measured_on}", f"data.seed={training.seed}",
            f"train.seed={training.seed}", f"train.output_dir={folder}",
            f"tracking.uri={self.uri}", f"tracking.experiment={EXPERIMENT}", *training.keys,
        ]  # fmt: skip
        return Run(training, folder, overrides)

    def outcome(self, training: Training) -> dict[str, Any]:
        """Return the outcome of a training.

        It holds ``diverged``, ``seconds``, ``peak_mib`` (memory of all its ranks together), and the
        contents of the trainer's result.json.
        """
        outcome: dict[str, Any] = json.loads(self.run_of(training).outcome.read_text())
        return outcome

    def top1(self, training: Training) -> float:
        """Return the top-1 after the last epoch, percent; 0 if the training diverged.

        It is measured on the training's evaluation split.
        """
        outcome = self.outcome(training)
        return 0.0 if outcome["diverged"] else 100 * float(outcome["top1"])

    def history(self, training: Training, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps, int64 [n], and values, float64 [n], of a metric, from MLflow."""
        run_id = self.outcome(training)["mlflow_run_id"]
        points = sorted(
            {(point.step, point.value) for point in self.client.get_metric_history(run_id, key)}
        )
        return np.array([step for step, _ in points]), np.array([value for _, value in points])

    def losses(self, training: Training) -> np.ndarray:
        """Return the loss of each step, float64 [steps]. Raises RetryableError if MLflow lacks
        some.
        """
        _, values = self.history(training, "loss")
        outcome = self.outcome(training)
        if not outcome["diverged"] and len(values) != outcome["steps"]:
            spool = self.run_of(training).folder / "tracking.jsonl"
            raise RetryableError(
                f"{training.label}: MLflow has {len(values)} of {outcome['steps']} losses; deliver "
                f"the others with MLFLOW_TRACKING_URI={self.uri} convoy sync {spool}"
            )
        return values

    def train(self, trainings: Sequence[Training], what: str) -> None:
        """Run the trainings that are not done, on ``jobs`` ranks at a time.

        If one fails or this process is terminated, all of them are terminated.
        """
        check_disk_space(self.folder)
        unique = list({training.label: training for training in trainings}.values())
        runs = [self.run_of(training) for training in unique]
        todo = [run for run in runs if not run.is_done()]
        if todo:
            _ = self.client
        with StudyProgress(
            what, [(run.training.label, _cost(run)) for run in todo], len(runs)
        ) as progress:
            for run, process, started, peak in _finished(todo, self.jobs, progress):
                _keep(run, process, time.monotonic() - started, peak)
                progress.ended(run.training.label, _headline(self.outcome(run.training)))


def check_disk_space(folder: Path, needed: int = _LEAST_FREE) -> None:
    """Raise UserError if fewer than ``needed`` bytes are free on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: the disk has {free / 2**20:,.0f} MiB free, but studies need "
            f"{needed / 2**20:,.0f} MiB"
        )


def _cost(run: Run) -> float:
    """Return a cost that is proportional to the time of a training.

    It is the number of training images times the multiply-adds of the network.
    """
    from trainer.engine.partition import layer_costs
    from trainer.models import build_model

    config = run.config()
    options = config.model.model_dump(exclude={"name", "num_classes", "init"}, exclude_none=True)
    images = run.steps() * config.batch.global_size
    work = sum(
        layer_costs(
            build_model(config.model.name, 10, config.data.image_size, **options),
            config.data.image_size,
        ).values()
    )
    return images * work + 2e10  # startup takes some seconds


Finished = tuple[Run, "subprocess.Popen[bytes]", float, float]


def _finished(todo: Sequence[Run], jobs: int, progress: StudyProgress) -> Iterator[Finished]:
    """Yield each run after it exits, with its process, start time and peak memory in MiB."""
    waiting = list(todo)
    active: dict[str, tuple[Run, subprocess.Popen[bytes], float, float]] = {}
    with _ended(active):
        while waiting or active:
            while waiting and (
                not active
                or sum(a[0].training.procs for a in active.values()) + waiting[0].training.procs
                <= jobs
            ):
                run = waiting.pop(0)
                active[run.training.label] = (run, _start(run), time.monotonic(), 0.0)
            time.sleep(0.3)
            for label, (run, process, started, peak) in list(active.items()):
                active[label] = (run, process, started, max(peak, _memory(process.pid)))
                if process.poll() is not None:
                    yield active.pop(label)
                else:
                    progress.at(label, run.step() / run.steps())


@contextmanager
def _ended(active: dict[str, Finished]) -> Iterator[None]:
    """Terminate all trainings on exit, whatever the reason.

    SIGTERM lets each write a checkpoint, from which the next command resumes.
    """
    try:
        yield
    finally:
        for _, process, _, _ in active.values():
            process.terminate()
        for _, process, _, _ in active.values():
            process.wait()


def _memory(pid: int) -> float:
    """Return the peak resident memory of a process and its children, MiB.

    The peak is read from Linux; on other systems it is the current value.
    """
    import psutil

    total = 0.0
    try:
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            status = Path(f"/proc/{member.pid}/status")
            if status.exists():
                peaks = [
                    line.split()[1]
                    for line in status.read_text().splitlines()
                    if line.startswith("VmHWM:")
                ]
                total += float(peaks[0]) / 1024 if peaks else 0.0
            else:
                total += member.memory_info().rss / 2**20
    except (psutil.NoSuchProcess, OSError):
        return 0.0
    return total


def _start(run: Run) -> "subprocess.Popen[bytes]":
    """Start a training with one thread per rank and no GPU.

    It resumes from a checkpoint of the same configuration.
    """
    if not run.is_begun():
        shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    (run.folder / PROGRESS_FILE).unlink(missing_ok=True)  # of the interrupted process
    command = [
        *python_command("trainer.launch"),
        "--procs",
        str(run.training.procs),
        "--",
        run.training.recipe,
        *run.overrides,
    ]
    with run.log.open("wb") as log:
        return subprocess.Popen(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _keep(run: Run, process: "subprocess.Popen[bytes]", seconds: float, peak: float) -> None:
    """Write the outcome of a training.

    Raises UserError or RetryableError for a training that failed, and SystemExit if it was
    terminated.
    """
    code = process.returncode
    record = read_progress(run.folder)
    phase = record.phase if record is not None else None
    diverged = code == EXIT_USER and run.training.may_diverge and phase == "diverged"
    if code in (EXIT_PREEMPTED, -signal.SIGTERM):
        raise SystemExit(EXIT_PREEMPTED)
    if code and not diverged:
        check_disk_space(run.folder)  # a full disk can end a training in many ways
        kind = UserError if code == EXIT_USER else RetryableError
        raise kind(
            f"training {run.training.label} ended with exit code {code}: "
            f"{run.log_tail() or 'no log output'}; see {run.log}"
        )
    facts = {"diverged": diverged, "seconds": round(seconds, 1), "peak_mib": round(peak, 1)}
    if diverged:
        facts |= {"steps": run.step(), "mlflow_run_id": record.mlflow_run_id if record else None}
    else:
        facts |= json.loads((run.folder / "result.json").read_text())
    part = run.outcome.with_suffix(".part")
    part.write_text(json.dumps(facts, indent=1) + "\n")
    part.replace(run.outcome)
    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)  # no further resume is possible


def _headline(outcome: dict[str, Any]) -> str:
    return (
        "diverged"
        if outcome["diverged"]
        else f"top1 {outcome['top1']:.4f}, {outcome['seconds']:.0f} s"
    )
