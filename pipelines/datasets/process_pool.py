"""Worker processes that do not outlive the command that started them."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor

from trainer.errors import RetryableError


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool of new processes that exit when this one does, even if it is killed."""
    return ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    )


def worker_lost() -> RetryableError:
    """Return the error to raise for a BrokenProcessPool; a retry may succeed."""
    return RetryableError(
        "a worker process was killed, often because memory ran out, or could not start; use "
        "fewer --workers or more memory"
    )


def _start_worker() -> None:
    threading.Thread(target=_exit_with_parent, name="parent", daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a worker"
    parent.join()
    os._exit(1)
