"""Progress of long work: a bar with rate and time left on a terminal, else plain lines."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class WorkProgress:
    """Reports progress on stderr.

    Usage: ``with WorkProgress("packing", total, "images") as p: p.add(n)``.
    """

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "WorkProgress":
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn(self._what),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self._what, total=self._total, rate="")
            self._bar.start()
        return self

    def add(self, count: int) -> None:
        self._done += count
        rate = self._done / max(time.monotonic() - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=f"{rate:,.0f} {self._unit}/s")
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = (self._total - self._done) / max(rate, 1e-9)
            print(
                f"{self._what}: {self._done:,}/{self._total:,} {self._unit}, {rate:,.0f}/s, "
                f"{left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None:
            seconds = time.monotonic() - self._started
            rate = self._done / max(seconds, 1e-9)
            print(
                f"{self._what}: {self._done:,} {self._unit} in {seconds:.1f} s ({rate:,.0f}/s)",
                file=sys.stderr,
                flush=True,
            )
