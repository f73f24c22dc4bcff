"""Metrics of a run: losses, throughput and time spent waiting for data."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from trainer.data.batch import Batch
from trainer.engine.engine import StepOutput


@dataclass
class TrainState:
    """Progress and metrics of a run.

    ``top1`` and ``top5`` are fractions of the validation split, measured after ``evaluated_step``,
    or None without a validation split. Seconds and images exclude evaluation.
    """

    steps: int = 0
    skipped_steps: int = 0
    loss: float = math.nan
    top1: float | None = None
    top5: float | None = None
    images_per_second: float = 0.0
    data_wait_fraction: float = 0.0
    train_seconds: float = 0.0
    val_samples: int = 0
    evaluated_step: int = 0
    images: int = 0
    waited_seconds: float = 0.0
    bad_samples: int = 0


@dataclass
class MetricsMeter:
    """Time and images since the last ``compute``, excluding evaluation.

    ``outputs`` holds the steps whose losses have not been read from the device yet. ``bad_samples``
    holds one line per sample of those steps that could not be decoded.
    """

    images: int = 0
    waited_seconds: float = 0.0
    train_seconds: float = 0.0
    outputs: list[StepOutput] = field(default_factory=list)
    bad_samples: list[str] = field(default_factory=list)

    def time_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the same batches and measure the time until each arrives."""
        while True:
            requested = time.perf_counter()
            batch = next(batches)
            self.waited_seconds += time.perf_counter() - requested
            self.bad_samples += batch.bad
            yield batch

    def update(self, output: StepOutput, seconds: float) -> None:
        """Add a step that took ``seconds``."""
        self.images += output.images
        self.train_seconds += seconds
        self.outputs.append(output)

    def compute(self, state: TrainState) -> dict[str, float]:
        """Return the rates since the last call, and add its times and images to ``state``."""
        state.images += self.images
        state.waited_seconds += self.waited_seconds
        state.train_seconds += self.train_seconds
        state.images_per_second = state.images / max(state.train_seconds, 1e-9)
        state.data_wait_fraction = state.waited_seconds / max(state.train_seconds, 1e-9)
        seconds = max(self.train_seconds, 1e-9)
        values = {
            "images_per_second": self.images / seconds,
            "data_wait_fraction": self.waited_seconds / seconds,
        }
        self.images, self.waited_seconds, self.train_seconds = 0, 0.0, 0.0
        return values

    def take_outputs(self) -> list[StepOutput]:
        """Return ``outputs`` and clear it."""
        outputs, self.outputs = self.outputs, []
        return outputs

    def take_bad_samples(self) -> list[str]:
        """Return ``bad_samples`` and clear it."""
        bad_samples, self.bad_samples = self.bad_samples, []
        return bad_samples
