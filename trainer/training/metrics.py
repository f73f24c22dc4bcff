"""Figures of a run: losses, rates, time spent waiting for data."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from trainer.data.batch import Batch
from trainer.engine.engine import StepOutput


@dataclass
class TrainState:
    """Figures of a run. ``top1`` and ``top5`` are fractions of the validation split, None without one, as measured after
    ``evaluated_step``; seconds and images without evaluation."""

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
    """Time and images since the last reading, and over the run; evaluation does not count."""

    images: int = 0
    waited: float = 0.0
    seconds: float = 0.0
    skipped_in_a_row: int = 0
    steps: list[StepOutput] = field(default_factory=list)
    """Those whose losses were not read from the device yet."""
    bad: list[str] = field(default_factory=list)
    """Samples of these steps that could not be decoded, a line each."""

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each comes is time waited."""
        while True:
            asked = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - asked
            self.bad += batch.bad
            yield batch

    def took(self, step: StepOutput) -> None:
        """Count a step."""
        self.images += step.images
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if step.skipped else 0
        self.steps.append(step)

    def read(self, result: TrainState) -> dict[str, float]:
        """The rates since the last reading, which ``result`` adds up."""
        result.images += self.images
        result.waited_seconds += self.waited
        result.train_seconds += self.seconds
        result.images_per_second = result.images / max(result.train_seconds, 1e-9)
        result.data_wait_fraction = result.waited_seconds / max(result.train_seconds, 1e-9)
        seconds = max(self.seconds, 1e-9)
        values = {"images_per_second": self.images / seconds, "data_wait_fraction": self.waited / seconds}
        self.images, self.waited, self.seconds = 0, 0.0, 0.0
        return values
