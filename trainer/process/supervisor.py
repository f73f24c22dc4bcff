"""Runs the ranks of one machine as child processes: starts, watches, stops and cleans up."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.errors import EXIT_BUG, EXIT_PREEMPTED, EXIT_RETRY, EXIT_USER
from trainer.process.launch_environment import (
    LAUNCHER_PID,
    RUN_ID_FILE,
    STORE_FD,
    local_rank_environment,
)
from trainer.process.stop_signals import StopSignals

STOP_SECONDS = 100.0
"""Time for ranks to write a checkpoint after a stop signal; less than the pods' grace period."""
_LOST_PEER_SECONDS = 30.0  # for the ranks to exit after one has failed
_REPORT_SECONDS = 2.0  # after which ranks that have not exited by themselves are terminated
_POLL_SECONDS = 0.1
_ENTRY = Path(__file__).parents[2] / "convoy_entry" / "run.py"


def python_command(module: str) -> list[str]:
    """Returns the command that calls ``main`` of a module of this installation.

    It does not depend on the contents of the working directory.
    """
    return [sys.executable, "-P", str(_ENTRY), module]


def run_ranks(procs: int, arguments: list[str], run_id_file: Path, signals: StopSignals) -> int:
    """Runs ``procs`` ranks on this machine until all have ended; returns the exit code of the run.

    A stop signal is forwarded once, as SIGTERM; a failing rank makes the others end. No process
    started by a rank outlives this call. Defers ``signals`` from here on.
    """
    signals.defer()
    ranks: list[subprocess.Popen[bytes]] = []
    unfinished = UnfinishedRanks(run_id_file, procs)
    try:
        _start(ranks, procs, arguments, run_id_file)
        with _suspended_together(ranks):
            stopped = _watch(ranks, unfinished, signals)
    finally:
        for process in ranks:
            if process.returncode is None:
                _kill_group(process)
                process.wait()
    codes = [
        unfinished.code_of(rank, process.returncode) or 0 for rank, process in enumerate(ranks)
    ]
    for rank, code in enumerate(codes):
        if ranks[rank].returncode == 0 and code and signals.received is None:
            print(
                f"convoy: rank {rank} exited with code 0 before training was complete",
                file=sys.stderr,
                flush=True,
            )
        if code < 0 and rank not in stopped and signals.received is None:
            name = signal.Signals(-code).name
            hint = "; the host may be out of memory" if code == -signal.SIGKILL else ""
            print(f"convoy: rank {rank} was killed by {name}{hint}", file=sys.stderr, flush=True)
    return exit_code(codes, signals.received)


def exit_code(codes: Iterable[int], received: int | None) -> int:
    """Returns the run's exit code, from its ranks' codes and the launcher's stop signal.

    A negative code is that of a rank killed by a signal. Returns 0 if all ranks succeeded;
    otherwise the most informative code: a user error, a bug, a stop, or "retry", in this order.
    """
    failed = {code for code in codes if code != 0}
    for code in (EXIT_USER, EXIT_BUG):
        if code in failed:
            return code
    if not failed:
        return 0
    if received is not None:
        return 128 + received
    # A rank that was killed counts as a lost peer.
    return EXIT_PREEMPTED if failed == {EXIT_PREEMPTED} else EXIT_RETRY


class UnfinishedRanks:
    """Local ranks that have not called ``report_finished``.

    An exit code of 0 alone does not prove that the work is done. Each rank has a file, because
    torch's agent does not pass on pipes; removing a file needs no disk space.
    """

    def __init__(self, run_id_file: Path, procs: int) -> None:
        self._files = [_unfinished_file(run_id_file, local_rank) for local_rank in range(procs)]
        for file in self._files:
            file.touch()

    def __contains__(self, local_rank: int) -> bool:
        return self._files[local_rank].exists()

    def code_of(self, local_rank: int, code: int | None) -> int | None:
        """Returns the effective exit code of a rank, or None while it runs.

        A rank that exited early with 0 counts as a lost peer.
        """
        return EXIT_RETRY if code == 0 and local_rank in self else code


def _unfinished_file(run_id_file: Path, local_rank: int | str) -> Path:
    return run_id_file.with_name(f"unfinished-{local_rank}")


def report_finished() -> None:
    """Report to the launcher that this rank has finished its work."""
    if file := os.environ.get(RUN_ID_FILE):
        with suppress(OSError):  # the launcher has exited
            _unfinished_file(Path(file), os.environ["LOCAL_RANK"]).unlink(missing_ok=True)


def _start(
    ranks: list["subprocess.Popen[bytes]"], procs: int, arguments: list[str], run_id_file: Path
) -> None:
    """Starts the ranks.

    Rank 0 inherits the listening socket of the rendezvous store, so that no other process can take
    its port.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=max(128, procs)) as listener:
        port = listener.getsockname()[1]
        launcher = {LAUNCHER_PID: str(os.getpid()), RUN_ID_FILE: str(run_id_file)}
        for rank in range(procs):
            environment = local_rank_environment(os.environ, rank, procs, port) | launcher
            store = (listener.fileno(),) if rank == 0 else ()
            environment[STORE_FD] = "".join(map(str, store))
            ranks.append(
                subprocess.Popen(
                    [*python_command("trainer.__main__"), *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    pass_fds=store,
                    start_new_session=True,
                )
            )


def _watch(
    ranks: list["subprocess.Popen[bytes]"], unfinished: UnfinishedRanks, signals: StopSignals
) -> set[int]:
    """Waits until all ranks have ended. Returns the ranks that were terminated or killed.

    Ranks that lose a peer get a moment to report it and exit by themselves.
    """
    stopped: set[int] = set()
    terminate_at = kill_at = math.inf
    while running := [rank for rank, process in enumerate(ranks) if not _has_ended(process)]:
        now = time.monotonic()
        failed = {
            code
            for rank, process in enumerate(ranks)
            if (code := unfinished.code_of(rank, process.returncode))
        }
        if signals.received is not None:
            terminate_at = min(terminate_at, now)
            kill_at = min(kill_at, now + STOP_SECONDS)
        elif failed:
            terminate_at = min(terminate_at, now + _REPORT_SECONDS)
            kill_at = min(
                kill_at, now + (STOP_SECONDS if failed == {EXIT_PREEMPTED} else _LOST_PEER_SECONDS)
            )
        for rank in running:
            if signals.forced or now >= kill_at:
                stopped.add(rank)
                _kill_group(ranks[rank])
            elif now >= terminate_at and rank not in stopped:
                stopped.add(rank)
                with suppress(ProcessLookupError):
                    ranks[rank].terminate()
        time.sleep(_POLL_SECONDS)
    return stopped


def _has_ended(process: "subprocess.Popen[bytes]") -> bool:
    """Returns whether a rank has ended, and kills the processes it left behind.

    They are killed before the rank is reaped, while its process ID, which is also its group's,
    cannot be reused.
    """
    if process.returncode is None:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return False
        _kill_group(process)
        process.wait()
    return True


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kills the rank, if it still runs, and the processes it started.

    Each rank leads its own session.
    """
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _suspended_together(ranks: list["subprocess.Popen[bytes]"]) -> Iterator[None]:
    """Stops the ranks together with this process on Ctrl-Z, and continues them on ``fg``.

    The ranks are not in the terminal's process group.
    """

    def suspend(number: int, frame: Any) -> None:
        for process in ranks:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        for process in ranks:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)

    if signal.getsignal(signal.SIGTSTP) == signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGTSTP, suspend)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)
