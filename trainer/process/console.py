"""Shows training progress: a live bar on a terminal, plain lines in a pod."""

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Progress output of a training run.

    Call ``update`` whenever the progress changes and ``note`` for text that should stay on the
    screen. If ``quiet`` is true, nothing is printed.
    """

    def __init__(self, total_steps: int, quiet: bool) -> None:
        self._quiet = quiet
        self._total = total_steps
        self._last_line = 0.0
        self._first: tuple[int, float] | None = None
        self._bar: Progress | None = None
        if not quiet and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=Console(),
            )
            self._task = self._bar.add_task("", total=total_steps)
            self._bar.start()

    def update(self, step: int, text: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif not self._quiet and (
            step == self._total or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES
        ):
            self._last_line = time.monotonic()
            print(f"step {step}/{self._total} {text}{self._left(step)}", flush=True)

    def _left(self, step: int) -> str:
        """Returns the estimated remaining time as text.

        Extrapolates the pace since the first line, including evaluation.
        """
        now = time.monotonic()
        first, then = self._first = self._first or (step, now)
        if step in (first, self._total):
            return ""
        seconds = round((now - then) / (step - first) * (self._total - step))
        return f", {timedelta(seconds=seconds)} left"

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif not self._quiet:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
