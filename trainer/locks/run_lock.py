"""A lock with a lease on an output folder or a checkpoint URL: one writer per location.

The owner renews the lease from a thread. Other processes never compare clocks: a lock is expired if
its version has not changed for a full lease while it was watched. An owner that cannot renew stops
writing before that, and exits when it finds another owner.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from trainer.errors import EXIT_RETRY, RetryableError, UserError, report
from trainer.locks.lock_file import LockFile, Seen, lock_file
from trainer.locks.lock_owner import Owner, parse_owner
from trainer.secrets.redaction import redact_credentials

LOCK_NAME = "run.lock"
LEASE_SECONDS = 60.0
OUTAGE_SECONDS = 120.0
"""Time that an owner waits for unreachable storage, in seconds; it writes nothing after its lease
ends.
"""
_RENEWALS_PER_LEASE = 6
_WATCH_FACTOR = 1.1
"""Number of leases that other processes wait: their clocks may run faster than the owner's."""
_ENDING_SECONDS = 130.0
"""Time for ranks without a launcher to write a checkpoint and exit, in seconds."""
_RELEASE_SECONDS = 10.0
_MIN_POLL_SECONDS, _MAX_POLL_SECONDS = 0.02, 1.0


class LockHeld(UserError):
    """Another live process owns the lock."""


class LockLost(RetryableError):
    """The lease could not be renewed in time; nothing may be written any more."""


def _clock() -> float:
    """Returns seconds of a clock that also runs while the machine is suspended, if there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _end_process(error: LockLost) -> None:
    """Exits immediately, because any further writes would affect the new owner's files."""
    code = report(error, "convoy")
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code or EXIT_RETRY)


class RunLock:
    """The lock of one location. ``advice``: what the user can do if another process owns it.

    ``lease_seconds`` and ``on_taken_over`` are for tests; the latter may be called from any thread.
    """

    def __init__(
        self,
        url: str,
        program: str,
        run: str | None,
        advice: str,
        name: str = LOCK_NAME,
        lease_seconds: float = LEASE_SECONDS,
        on_taken_over: Callable[[LockLost], None] = _end_process,
        on_wait: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._file: LockFile = lock_file(url, name)
        self._name, self._advice = name, advice
        self._where = redact_credentials(url)
        self._lease = lease_seconds
        self._outage = lease_seconds * OUTAGE_SECONDS / LEASE_SECONDS
        self._poll = min(max(lease_seconds / 60, _MIN_POLL_SECONDS), _MAX_POLL_SECONDS)
        self.owner = Owner.current(
            redact_credentials(self._file.location), program, run, lease_seconds
        )
        self._on_taken_over, self._on_wait = on_taken_over, on_wait
        self._watch: _Watch | None = None
        self._seen: Seen | None = None
        self._renewed = 0.0
        self._renewals = 0
        self._is_failing = False
        self._lost: LockLost | None = None
        self._mutex = threading.Lock()
        self._stop = threading.Event()

    def acquire(self) -> None:
        """Becomes the owner, waiting for at most a lease to find out if another owner is alive.

        Raises LockHeld (a UserError that names the owner) if it is, UserError if the lock cannot be
        written, RetryableError if the storage is unreachable.
        """
        try:
            self._acquire()
        except OSError as error:
            raise UserError(
                f"{self._where}: {self._name} cannot be written: {error.strerror or error}; use "
                "a writable location"
            ) from None
        threading.Thread(target=self._keep, name="run-lock", daemon=True).start()

    def watch(self) -> None:
        """Starts to watch another owner's lock, which shortens the wait of a later ``acquire``."""
        seen = self._file.read()
        if seen is not None:
            self._watch = _Watch(seen, parse_owner(seen.content), _clock())

    def _acquire(self) -> None:
        watch = self._watch
        while True:
            seen = self._file.read()
            if seen is None:
                if self._take(None):
                    return
                continue
            holder = parse_owner(seen.content)
            if watch is None or watch.token != _token(holder, seen):
                watch = _Watch(seen, holder, _clock())
            if self._may_take(seen, holder, watch):
                if self._take(seen):
                    return
                continue
            if not watch.is_announced:
                watch.is_announced = True
                text = f"{self._where}: {self._waiting_for(holder)}"
                print(f"waiting: {text}", flush=True)
                self._on_wait(text)
            time.sleep(self._poll)

    def _may_take(self, seen: Seen, holder: Owner | None, watch: "_Watch") -> bool:
        """Returns whether the owner is gone; False while that is unknown.

        Raises LockHeld if it is alive.
        """
        lease = holder.lease_seconds if holder is not None else self._lease
        waited = _clock() - watch.since
        if holder is not None:
            if self.owner.process.shares_pids_with(holder.process):
                if not holder.process.is_alive():
                    return True
                if self._is_ending(holder):
                    if waited > _ENDING_SECONDS:
                        raise self._held(holder, seen)
                    return False
                if holder.location == self.owner.location and time.time() - seen.written_at < lease:
                    raise self._held(holder, seen)
            elif holder.pod is not None and holder.pod == self.owner.pod:
                return True
        if seen.version != watch.version:
            raise self._held(holder, seen)
        return waited >= lease * _WATCH_FACTOR

    def _is_ending(self, holder: Owner) -> bool:
        """Returns whether the launcher of the owner's ranks was killed, so that they will exit."""
        launcher = holder.launcher
        return (
            launcher is not None
            and self.owner.process.shares_pids_with(launcher)
            and not launcher.is_alive()
        )

    def _waiting_for(self, holder: Owner | None) -> str:
        if holder is None:
            return (
                f"{self._name} is corrupt; it is replaced if it is not renewed within "
                f"{self._lease * _WATCH_FACTOR:.0f} s"
            )
        if self._is_ending(holder) and self.owner.process.shares_pids_with(holder.process):
            return f"{holder.describe()} lost its launcher and is exiting"
        seconds = holder.lease_seconds * _WATCH_FACTOR
        return (
            f"owned by {holder.describe()}; its lock expires if it is not renewed within "
            f"{seconds:.0f} s"
        )

    def _held(self, holder: Owner | None, seen: Seen) -> LockHeld:
        who = holder.describe() if holder is not None else "an unknown process"
        lease = holder.lease_seconds if holder is not None else self._lease
        age = max(0.0, time.time() - seen.written_at)
        return LockHeld(
            f"{self._where}: in use by {who}, whose lock was renewed {age:.0f} s ago; "
            f"{self._advice} (a lock that is not renewed expires after "
            f"{lease * _WATCH_FACTOR:.0f} s)"
        )

    def _take(self, seen: Seen | None) -> bool:
        """Writes this process's record, either over ``seen`` or as a new one.

        Returns False if another process was faster.
        """
        before = _clock()
        content = self.owner.to_json(self._renewals)
        new = self._file.create(content) if seen is None else self._file.replace(seen, content)
        if new is not None and not self._file.is_atomic:
            seconds = self._lease / _RENEWALS_PER_LEASE
            print(
                f"convoy: {self._where}: the storage has no conditional writes; {self._name} is "
                f"verified by reading it again after {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(seconds)
            before = _clock()
            new = self._file.read()
            if new is None or new.content != content:
                return False
        if new is None:
            return False
        self._seen, self._renewed = new, before
        return True

    def check(self) -> None:
        """Returns if this process is still the only writer; waits while that is unknown.

        Raises LockLost if it is not.
        """
        while self._lost is None and self._age() > self._lease:
            self._renew()
            if self._age() > self._outage or self._stop.is_set():
                self._lose(f"could not be renewed for {self._age():.0f} s", taken_over=False)
            elif self._age() > self._lease:
                self._stop.wait(self._poll)
        if self._lost is not None:
            raise self._lost

    def _age(self) -> float:
        """Returns the seconds since the last renewal began."""
        return _clock() - self._renewed

    def _keep(self) -> None:
        while not self._stop.wait(self._lease / _RENEWALS_PER_LEASE):
            self._renew()

    def _renew(self) -> None:
        with self._mutex:
            if self._seen is None or self._stop.is_set():
                return
            before = _clock()
            self._renewals += 1
            try:
                self._renew_from(self._seen, before)
            except (UserError, RetryableError, OSError) as error:
                self._report_failure(str(error))

    def _renew_from(self, seen: Seen, before: float) -> None:
        new = self._file.renew(seen, self.owner.to_json(self._renewals))
        if new is None:
            found = self._file.read()
            holder = parse_owner(found.content) if found is not None else None
            if found is not None and holder is not None and holder.token == self.owner.token:
                self._seen = found  # the file was touched, or copied back
                new = self._file.renew(found, self.owner.to_json(self._renewals))
                if new is None:
                    return  # changed once more: the next renewal starts from the state it finds
            elif found is None and self._can_write_again(before):
                new = self._file.create(self.owner.to_json(self._renewals))
            if new is None:
                who = holder.describe() if holder is not None else "another process"
                self._lose(f"was taken over by {who}", taken_over=True)
                return
        self._seen, self._renewed = new, before
        if self._is_failing:
            self._is_failing = False
            print(
                f"convoy: {self._where}: {self._name} is renewed again", file=sys.stderr, flush=True
            )

    def _can_write_again(self, now: float) -> bool:
        """Returns whether a missing lock was merely deleted.

        Another owner cannot have taken and released it within the lease, unless it took over
        immediately, as a pod of the same job does.
        """
        return now - self._renewed <= self._lease and self.owner.pod is None

    def _report_failure(self, reason: str) -> None:
        if not self._is_failing and self._lost is None:
            self._is_failing = True
            left = max(0.0, self._outage - self._age())
            line = redact_credentials(reason).splitlines()[0][:200]
            print(
                f"convoy: {self._where}: {self._name} could not be renewed ({line}); this process "
                f"exits in {left:.0f} s unless a renewal succeeds",
                file=sys.stderr,
                flush=True,
            )

    def _lose(self, reason: str, taken_over: bool) -> None:
        if self._lost is None or taken_over:
            self._lost = LockLost(
                f"{self._where}: {self._name} {reason}; this process stops writing there and exits"
            )
            if taken_over:
                self._on_taken_over(self._lost)

    def release(self) -> None:
        """Removes the lock if this process still owns it.

        Waits a limited time for unreachable storage.
        """
        if self._seen is None:
            return
        self._stop.set()
        timer = threading.Timer(_RELEASE_SECONDS, self._file.close)
        timer.daemon = True
        timer.start()
        try:
            with self._mutex:
                if self._lost is None and self._age() <= self._lease:
                    self._file.delete(self._seen)
        except (UserError, RetryableError, OSError) as error:
            reason = redact_credentials(str(error)).splitlines()[0][:200]
            print(
                f"convoy: {self._where}: {self._name} could not be removed ({reason}); it expires",
                file=sys.stderr,
                flush=True,
            )
        finally:
            timer.cancel()
            self._seen = None


class RunLocks:
    """The locks of a run: its output folder's and its checkpoint URL's.

    Empty on ranks other than rank 0.
    """

    def __init__(self) -> None:
        self._locks: list[RunLock] = []

    def acquire(
        self,
        output_dir: str,
        checkpoint_url: str,
        run: str,
        on_wait: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Acquires both locks. ``on_wait`` is called with what it waits for.

        Raises as ``RunLock.acquire``; ``release`` must be called in that case too.
        """
        for url, key in (
            (output_dir, "name or train.output_dir"),
            (checkpoint_url, "checkpoint.url"),
        ):
            advice = f"use another {key}, or wait until it ends"
            lock = RunLock(url, "convoy train", run, advice, on_wait=on_wait)
            if lock.owner.location not in [held.owner.location for held in self._locks]:
                self._locks.append(lock)
        for lock in self._locks[1:]:
            lock.watch()
        for lock in self._locks:
            lock.acquire()

    def check(self) -> None:
        """Raises LockLost if any lock is lost."""
        for lock in self._locks:
            lock.check()

    def check_output(self) -> None:
        """Raises LockLost if the output folder's lock is lost."""
        for lock in self._locks[:1]:
            lock.check()

    def release(self) -> None:
        for lock in reversed(self._locks):
            lock.release()


class _Watch:
    """A lock's state and the time at which it was first seen in that state."""

    def __init__(self, seen: Seen, holder: Owner | None, since: float) -> None:
        self.token = _token(holder, seen)
        self.version = seen.version
        self.since = since
        self.is_announced = False


def _token(holder: Owner | None, seen: Seen) -> object:
    """Returns a value that does not change while an owner renews its lock."""
    return holder.token if holder is not None else seen.content


@contextmanager
def exclusive(url: str, program: str, advice: str, name: str = LOCK_NAME) -> Iterator[None]:
    """Holds the lock of a location while the command ``program`` works there.

    Raises LockHeld if a run or another command holds it.
    """
    lock = RunLock(url, program, None, advice, name)
    try:
        lock.acquire()
        yield
    finally:
        lock.release()


def owner_of(url: str) -> Owner | None:
    """Returns the owner recorded in a location's lock, whether it is alive or not.

    Returns None if no lock can be read.
    """
    try:
        seen = lock_file(url, LOCK_NAME).read()
    except OSError:
        return None
    return parse_owner(seen.content) if seen is not None else None
