"""Watchdog for a rank that stops making steps.

It prints where the rank hangs and ends the process, so that the job can resume elsewhere.
"""

import faulthandler
import os
import sys
import threading
import time

from trainer.errors import EXIT_RETRY


class Watchdog:
    """Thread that ends the process if ``heartbeat`` is not called in time.

    From construction until ``close``, ``heartbeat`` must be called at least once every ``minutes``.
    If ``minutes`` is None, the watchdog is disabled.
    """

    def __init__(self, minutes: float | None, rank: int) -> None:
        self._seconds = minutes * 60 if minutes is not None else 0.0
        self._rank = rank
        self._last = time.monotonic()
        self._closed = threading.Event()
        if minutes is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def heartbeat(self) -> None:
        self._last = time.monotonic()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        """End the process if there is no heartbeat in time.

        The process exits immediately, because threads that hang in a collective cannot be stopped.
        """
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            silent = time.monotonic() - self._last
            if silent >= self._seconds:
                faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
                message = f"convoy: rank {self._rank}: no step for {silent / 60:.1f} minutes"
                message += " (train.hang_minutes); the stacks of its threads are above"
                print(message, file=sys.stderr, flush=True)
                os._exit(EXIT_RETRY)
