"""Signals that ask a process to stop: SIGTERM, SIGINT, SIGHUP and SIGQUIT."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from trainer.errors import Preempted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_STUCK_SECONDS = 3.0  # until a main thread that has not noticed the signal is held to be blocked
_UNWIND_SECONDS = 30.0  # that one has to clean up which has
_FORCE_SECONDS = (
    1.0  # between two SIGINTs of an impatient user; one key press may be delivered twice
)


class StopSignals:
    """Before ``defer`` the first signal raises Preempted in the main thread; after it, signals are
    only recorded.

    A main thread that is blocked in native code, such as connecting to a rendezvous, cannot raise:
    the process then ends after 3 s. A signal that was ignored when the process started, such as
    SIGHUP under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The first signal's number."""
        self.forced = False
        """A second SIGINT came: do not wait for a checkpoint."""
        self._first_time = 0.0
        self._action: Callable[[int], None] = _terminate

    def install(self) -> None:
        """In the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(
            writer, warn_on_full_buffer=False
        )  # written to even if the main thread is blocked
        for number in STOP_SIGNALS:
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)
        threading.Thread(
            target=self._end_if_stuck, args=(reader,), name="stop-signals", daemon=True
        ).start()

    def defer(self, action: Callable[[int], None] = lambda number: None) -> None:
        """From now on the first signal calls ``action`` with its number instead of raising
        Preempted.
        """
        self._action = action

    def resume(self) -> None:
        """Undo ``defer``. Raises Preempted if a signal came meanwhile."""
        self._action = _terminate
        if self.received is not None:
            raise Preempted(self.received)

    def ignore(self) -> None:
        """The outcome of the process is decided; it ends by itself."""
        self._action = lambda number: None
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._first_time = number, now
            self._action(number)
        elif number == signal.SIGINT and now - self._first_time >= _FORCE_SECONDS:
            self.forced = True

    def _end_if_stuck(self, reader: int) -> None:
        while True:
            number = os.read(reader, 1)[0]
            if number not in STOP_SIGNALS:
                continue
            came = time.monotonic()
            while self._action is _terminate:
                time.sleep(0.1)
                if time.monotonic() - came >= (
                    _STUCK_SECONDS if self.received is None else _UNWIND_SECONDS
                ):
                    os._exit(128 + number)


def _terminate(number: int) -> NoReturn:
    raise Preempted(number)
