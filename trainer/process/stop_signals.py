"""Handles the signals that ask a process to stop: SIGTERM, SIGINT, SIGHUP and SIGQUIT."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from trainer.errors import Preempted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_STUCK_SECONDS = 3.0  # after which a main thread that did not see the signal counts as blocked
_UNWIND_SECONDS = 30.0  # for a main thread that saw the signal to clean up
# Minimum time between the two SIGINTs of an impatient user; one key press may be delivered twice.
_FORCE_SECONDS = 1.0


class StopSignals:
    """Handles stop signals: raises Preempted until ``defer`` is called, then only records them.

    Preempted is raised in the main thread. A main thread that is blocked in native code, such as
    connecting to a rendezvous, cannot raise; the process then exits after 3 s. A signal that was
    ignored when the process started, such as SIGHUP under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the first signal received."""
        self.forced = False
        """Whether a second SIGINT arrived, which means: do not wait for a checkpoint."""
        self._first_time = 0.0
        self._action: Callable[[int], None] = _terminate

    def install(self) -> None:
        """Installs the handlers. Must be called in the main thread."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        # The wakeup descriptor is written to even if the main thread is blocked.
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)
        threading.Thread(
            target=self._exit_if_stuck, args=(reader,), name="stop-signals", daemon=True
        ).start()

    def defer(self, action: Callable[[int], None] = lambda number: None) -> None:
        """Makes the first signal call ``action`` with its number instead of raising Preempted."""
        self._action = action

    def resume(self) -> None:
        """Undoes ``defer``. Raises Preempted if a signal has arrived in the meantime."""
        self._action = _terminate
        if self.received is not None:
            raise Preempted(self.received)

    def ignore(self) -> None:
        """Ignores all stop signals: the outcome is decided and the process is about to exit."""
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

    def _exit_if_stuck(self, reader: int) -> None:
        while True:
            number = os.read(reader, 1)[0]
            if number not in STOP_SIGNALS:
                continue
            received_at = time.monotonic()
            while self._action is _terminate:
                time.sleep(0.1)
                if time.monotonic() - received_at >= (
                    _STUCK_SECONDS if self.received is None else _UNWIND_SECONDS
                ):
                    os._exit(128 + number)


def _terminate(number: int) -> NoReturn:
    raise Preempted(number)
