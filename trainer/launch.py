"""Start a run's ranks: ``python -m trainer.launch [--procs N] RECIPE key=value ...``, on this machine or in each pod of a job.

In a pod the training-operator's environment says how many ranks there are and where they meet.
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import uuid
from typing import Any, NoReturn

from trainer.config import load_config
from trainer.credentials import take_credentials
from trainer.errors import EXIT_BUG, EXIT_PREEMPTED, EXIT_RETRY, EXIT_USER, ServiceLost, report
from trainer.hardware_faults import check_gpus
from trainer.pod import Pod, count_start, let_first_end, pod_from_environment, wait_for_data, wait_for_host
from trainer.preflight import check_run
from trainer.resolve import resolve

_STOP_SECONDS = 100  # that ranks have for a checkpoint on SIGTERM; less than the pods' grace period

_JOIN_SECONDS = 24 * 3600  # the others may wait for nodes for long


def main() -> int:
    """Returns the exit code of the run."""
    parser = argparse.ArgumentParser(prog="python -m trainer.launch")
    parser.add_argument("--procs", type=int, default=1)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    try:
        arguments.overrides = take_credentials(arguments.overrides)  # out of the ranks' command lines
        procs, command = arguments.procs, ["-m", "trainer", arguments.recipe, *arguments.overrides]
        pod = pod_from_environment()
        if pod is not None:  # process 1 of a container is deaf to signals that it does not ask for
            signal.signal(signal.SIGTERM, _leave)
        config = load_config(arguments.recipe, arguments.overrides)
        if pod is not None or config.data.wait_minutes:
            wait_for_data(config)
        world_size = pod.world_size if pod else procs
        # one listing of the store a job: where the first rank is
        checks = pod.is_first if pod else procs > 1
        run = resolve(arguments.recipe, arguments.overrides, world_size, check_storage=checks)
        if checks:
            check_run(run, pod.procs if pod else procs)  # rank 0 prints its notes
        if pod is not None:
            if pod.is_first and config.checkpoint.url:
                count_start(config.checkpoint.url, config.checkpoint.max_starts)
            wait_for_host(pod)
            code = start_ranks(pod.procs, command, **_meeting(pod))
            if code == 0:
                signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
                let_first_end(pod)
            return code
        if procs == 1:
            os.execv(sys.executable, [sys.executable, *command])
        return start_ranks(procs, command)
    except Exception as error:
        return report(error, "convoy")


def _leave(number: int, frame: Any) -> NoReturn:
    sys.exit(EXIT_PREEMPTED)


def _meeting(pod: Pod) -> dict[str, Any]:
    print(f"rendezvous of {pod.nodes} pods at {pod.host}:{pod.port}", flush=True)
    return {
        "nodes": pod.nodes,
        "rdzv_endpoint": f"{pod.host}:{pod.port}",
        "run_id": pod.job,
        "rdzv_configs": {"join_timeout": _JOIN_SECONDS},
        "shutdown_timeout": _STOP_SECONDS,
    }


def _cpus() -> int:
    """Those that the pod asked for, rounded up: ranks that count on the whole node's spin for each other's. Else this process's."""
    return int(os.environ.get("CONVOY_CPUS") or len(os.sched_getaffinity(0)))


def start_ranks(procs: int, command: list[str], nodes: int = 1, **meeting: Any) -> int:
    """Run ``python *command`` once a rank, under torch's elastic agent; one that ends badly ends the others.

    ``nodes``: how many agents meet; ``meeting``: where. Returns 0, or of the failed ranks' exit codes the most telling: the
    user's mistake, a bug, a preemption of all, else "retry". Raises ServiceLost where the agents lose each other, UserError where
    there are fewer GPUs than ranks.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cpus() // procs)))
    import torch
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_gpus(torch.cuda.device_count(), procs)
    # the ranks say what went wrong themselves
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    alone = {"rdzv_endpoint": "127.0.0.1:0", "run_id": uuid.uuid4().hex}
    try:
        with tempfile.TemporaryDirectory(prefix="convoy-ranks-") as folder:  # torch would leave its own behind
            config = LaunchConfig(
                min_nodes=nodes,
                max_nodes=nodes,
                nproc_per_node=procs,
                rdzv_backend="c10d",
                max_restarts=0,
                monitor_interval=0.2,
                logs_specs=DefaultLogsSpecs(log_dir=folder),
                **(meeting or alone),
            )
            elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in (EXIT_USER, EXIT_BUG):
            if code in codes:
                return code
        return EXIT_PREEMPTED if codes == {EXIT_PREEMPTED} else EXIT_RETRY  # one that was killed is a lost peer
    except SignalException as error:
        return 128 + int(error.sigval)
    except (RendezvousError, DistError, ConnectionError, TimeoutError) as error:
        raise ServiceLost(f"the other pods are gone ({str(error).splitlines()[0][:200]})") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
