"""A rank that makes no step any more says where it hangs and ends, so that its job can go on
elsewhere.
"""

import faulthandler
import os
import sys
import threading
import time

from trainer.errors import EXIT_RETRY


class Watchdog:
    """Between construction and ``close``, ``alive`` must be called again within ``minutes``; None:
    never.
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
        """The process ends at once: threads that hang in a collective can't be told to."""
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            silent = time.monotonic() - self._last
            if silent >= self._seconds:
                faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
                told = f"convoy: rank {self._rank}: no step for {silent / 60:.1f} minutes (train.hang_minutes); its threads are above"
                print(told, file=sys.stderr, flush=True)
                os._exit(EXIT_RETRY)
