"""Progress of a study's trainings: a bar with the time left on a terminal, else plain lines."""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_SECONDS_BETWEEN_LINES = 15.0


class StudyProgress:
    """Reports the progress of the trainings of a study.

    ``trainings``: label and cost of each training to run; ``of``: number of all trainings. The time
    left is estimated from the cost done so far.
    """

    def __init__(self, what: str, trainings: Sequence[tuple[str, float]], of: int) -> None:
        self._what, self._of = what, of
        self._costs = dict(trainings)
        self._parts = dict.fromkeys(self._costs, 0.0)
        self._done = of - len(self._costs)
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "StudyProgress":
        if self._costs and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn(self._what),
                BarColumn(),
                TextColumn("{task.description}"),
                console=Console(),
            )
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        elif self._costs:
            print(f"{self._what}: {self._done} of {self._of} trainings already done", flush=True)
        return self

    def at(self, label: str, part: float) -> None:
        """Record that the fraction ``part`` of one training's steps is done."""
        self._parts[label] = min(1.0, part)
        text = f"{self._done}/{self._of} trainings, {self.left()}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.part(), description=text)
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"{self._what}: {text}", flush=True)

    def ended(self, label: str, text: str) -> None:
        self._done += 1
        self._parts[label] = 1.0
        line = f"{self._what}: {label}: {text}"
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, flush=True)
        self.at(label, 1.0)

    def part(self) -> float:
        """Return the fraction of the total cost that is done, from 0 to 1."""
        return sum(self._costs[label] * part for label, part in self._parts.items()) / max(
            sum(self._costs.values()), 1e-9
        )

    def left(self) -> str:
        """Return the time left at the pace so far; it is unknown until 2% are done."""
        part = self.part()
        if part < 0.02:
            return "time left unknown"
        seconds = (time.monotonic() - self._started) * (1 - part) / part
        return f"{timedelta(seconds=round(seconds))} left"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
