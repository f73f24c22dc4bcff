"""Start a run's ranks on this machine: ``python -m trainer.launch --procs N RECIPE key=value ...``."""

import argparse
import logging
import os
import sys
import uuid

from trainer.errors import EXIT_BUG, EXIT_PREEMPTED, EXIT_RETRY, EXIT_USER, report
from trainer.resolve import resolve


def main() -> int:
    """Returns the exit code of the run."""
    parser = argparse.ArgumentParser(prog="python -m trainer.launch")
    parser.add_argument("--procs", type=int, default=1)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    try:
        resolve(arguments.recipe, arguments.overrides, arguments.procs, check_storage=arguments.procs > 1)
    except Exception as error:
        return report(error, "convoy")
    command = ["-m", "trainer", arguments.recipe, *arguments.overrides]
    if arguments.procs == 1:
        os.execv(sys.executable, [sys.executable, *command])
    return start_ranks(arguments.procs, command)


def start_ranks(procs: int, command: list[str]) -> int:
    """Run ``python *command`` once a rank, under torch's elastic agent; one that ends badly ends the others.

    Returns 0, or of the failed ranks' exit codes the most telling: the user's mistake, a bug, a preemption of all, else "retry".
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // procs)))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # the ranks say what went wrong themselves
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=procs,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in (EXIT_USER, EXIT_BUG):
            if code in codes:
                return code
        return EXIT_PREEMPTED if codes == {EXIT_PREEMPTED} else EXIT_RETRY  # one that was killed is a lost peer
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
