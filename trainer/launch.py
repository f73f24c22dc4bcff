"""Launcher of a run's ranks, on this machine or in each pod of a job.

Usage: ``python -m trainer.launch [--procs N] RECIPE key=value ...``. In a pod, the
training-operator's environment defines the number of ranks and their rendezvous.
"""

import argparse
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.config.preflight import check_outputs
from trainer.config.run_plan import build_run_plan, tracking_uri
from trainer.config.schema import RunConfig, load_config
from trainer.dependencies.process_patches import log_level
from trainer.distributed.pod_startup import (
    PodEnv,
    check_restart_budget,
    pod_from_environment,
    wait_for_data,
    wait_for_host,
    wait_for_rank0_exit,
)
from trainer.errors import EXIT_RETRY, Preempted, RetryableError, UserError, report
from trainer.faults.hardware_errors import check_gpus
from trainer.process.file_limit import raise_open_file_limit
from trainer.process.launch_environment import (
    LAUNCHER_PID,
    RUN_ID_FILE,
    check_single_node,
    check_working_directory,
    cpus,
    drop_leftovers,
    leftovers,
)
from trainer.process.proxies import bypass_proxies_for_local_services
from trainer.process.standard_streams import secure_standard_streams
from trainer.process.stop_signals import StopSignals
from trainer.process.supervisor import (
    STOP_SECONDS,
    UnfinishedRanks,
    exit_code,
    python_command,
    run_ranks,
)
from trainer.progress.progress_publisher import ProgressPublisher
from trainer.secrets.credentials import take_credentials
from trainer.tracking.run_status import end_unfinished_run

_JOIN_SECONDS = 24 * 3600  # other pods may wait for nodes for a long time


def main() -> int:
    """Launch the ranks and return the exit code of the run."""
    parser = argparse.ArgumentParser(prog="python -m trainer.launch")
    parser.add_argument("--procs", type=int, default=1)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    secure_standard_streams()
    bypass_proxies_for_local_services(os.environ)
    return launch(arguments.recipe, arguments.overrides, arguments.procs)


def launch(recipe: str, overrides: list[str], procs: int) -> int:
    """Train on this machine, or as this pod's part of a job; return the exit code of the run.

    However this process ends, its ranks end too, and their MLflow run gets its final status.
    """
    signals = StopSignals()
    signals.install()
    started = time.time()
    config: RunConfig | None = None
    publisher: ProgressPublisher | None = None
    failure: BaseException | None = None
    try:
        check_working_directory()
        overrides = take_credentials(overrides)  # removes them from the ranks' command lines
        pod = pod_from_environment()
        if pod is None:
            check_single_node()
            if ignored := leftovers():
                print(f"ignoring variables of another launcher: {', '.join(ignored)}", flush=True)
            drop_leftovers()  # the launcher's own imports must not read them either
        raise_open_file_limit()
        config = load_config(recipe, overrides)
        # the pod of rank 0 publishes progress, and lists the store, once per job
        checks = pod is None or pod.is_rank_zero
        publisher = ProgressPublisher(config.name, quiet=not checks)
        if pod is not None or config.data.wait_minutes:
            wait_for_data(config, publisher.waiting)
        run = build_run_plan(
            recipe, overrides, pod.world_size if pod else procs, check_storage=checks
        )
        if checks:
            check_outputs(run)  # rank 0 checks what needs torch
        arguments = [recipe, *overrides]
        if pod is not None:
            code = _launch_pod(pod, config, arguments, signals, publisher)
        else:
            with _run_id_file(config, signals) as file:
                code = run_ranks(procs, arguments, file, signals)
    except (Exception, Preempted) as error:
        code, failure = report(error, "convoy"), error
    if config is not None and publisher is not None:
        publisher.end_for_ranks(config.output_dir, started, code, failure)
    return code


@contextmanager
def _run_id_file(config: RunConfig, signals: StopSignals) -> Iterator[Path]:
    """Create a file in which rank 0 records its MLflow run, and end that run if it is unfinished.

    When all ranks have ended, a run that the file still names becomes FAILED, or KILLED after a
    signal.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="convoy-ranks-", ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"TMPDIR: cannot create a temporary folder: {error.strerror}") from None
    with folder as name:
        file = Path(name) / "run-id"
        try:
            yield file
        finally:
            status = "FAILED" if signals.received is None else "KILLED"
            end_unfinished_run(
                file, tracking_uri(config), config.output_dir / "tracking.jsonl", status
            )


def _launch_pod(
    pod: PodEnv,
    config: RunConfig,
    arguments: list[str],
    signals: StopSignals,
    publisher: ProgressPublisher,
) -> int:
    if pod.is_rank_zero and config.checkpoint.url:
        check_restart_budget(config.checkpoint.url, config.checkpoint.max_starts)
    wait_for_host(pod, publisher.waiting)
    print(f"rendezvous of {pod.nodes} pods at {pod.host}:{pod.port}", flush=True)
    publisher.update(phase="rendezvous", message=None)
    with _run_id_file(config, signals) as file:
        os.environ |= {LAUNCHER_PID: str(os.getpid()), RUN_ID_FILE: str(file)}
        unfinished = UnfinishedRanks(file, pod.procs)
        code = _run_pod_ranks(pod, arguments, signals)
        if code == 0 and any(local_rank in unfinished for local_rank in range(pod.procs)):
            print(
                "convoy: a rank exited with code 0 before training was complete",
                file=sys.stderr,
                flush=True,
            )
            code = EXIT_RETRY
    if code == 0:
        signals.defer(lambda number: sys.exit(0))
        if signals.received is None:
            wait_for_rank0_exit(pod)
    return code


def _run_pod_ranks(pod: PodEnv, arguments: list[str], signals: StopSignals) -> int:
    """Run this pod's ranks under torch's elastic agent and return the exit code of the run.

    A rank that fails ends the others. Raises RetryableError if the agents lose each other,
    UserError if there are fewer GPUs than ranks.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cpus() // pod.procs)))
    import torch
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_gpus(torch.cuda.device_count(), pod.procs)

    class Logs(DefaultLogsSpecs):
        def reify(self, envs: dict[int, dict[str, str]]) -> Any:
            """Hand signals over to the ranks; called right before they are started."""
            signals.defer()
            return super().reify(envs)

    try:
        with (
            # the ranks report their errors themselves
            log_level("torch.distributed.elastic", logging.CRITICAL),
            tempfile.TemporaryDirectory(
                prefix="convoy-agent-", ignore_cleanup_errors=True
            ) as folder,
            _forwarded(signals),
        ):
            config = LaunchConfig(
                min_nodes=pod.nodes,
                max_nodes=pod.nodes,
                nproc_per_node=pod.procs,
                rdzv_backend="c10d",
                rdzv_endpoint=f"{pod.host}:{pod.port}",
                rdzv_configs={"join_timeout": _JOIN_SECONDS},
                run_id=pod.job,
                max_restarts=0,
                monitor_interval=0.2,
                shutdown_timeout=int(STOP_SECONDS),
                # torch's handler raises between the starts of two ranks and loses the first
                signals_to_handle="",
                logs_specs=Logs(log_dir=folder),
            )
            command = python_command("trainer.__main__")
            elastic_launch(config, command[0])(*command[1:], *arguments)
    except ChildFailedError as error:
        return exit_code(
            [failure.exitcode for failure in error.failures.values()], signals.received
        )
    except (RendezvousError, DistError, ConnectionError, TimeoutError) as error:
        if signals.received is not None:
            raise Preempted(signals.received) from None
        raise RetryableError(
            f"lost the connection to the other pods ({str(error).splitlines()[0][:200]})"
        ) from error
    return 0


@contextmanager
def _forwarded(signals: StopSignals) -> Iterator[None]:
    """Forward stop signals to the ranks from a thread while the context is active.

    Each rank gets SIGTERM once, and is killed if it still runs after STOP_SECONDS.
    """
    ended = threading.Event()
    thread = threading.Thread(
        target=_forward, args=(signals, ended), name="forward-signals", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _forward(signals: StopSignals, ended: threading.Event) -> None:
    import psutil

    terminated_at: dict[int, float] = {}
    while not ended.wait(0.1):
        if signals.received is None:
            continue
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if rank.pid not in terminated_at:
                    terminated_at[rank.pid] = time.monotonic()
                    rank.terminate()
                elif time.monotonic() - terminated_at[rank.pid] >= STOP_SECONDS:
                    rank.kill()


if __name__ == "__main__":
    sys.exit(main())
