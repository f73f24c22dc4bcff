"""The ranks of a run: joining them, wrapping a model in DeepSpeed's engine, and what they add up
together.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed.env import DistEnv
from trainer.process.launch_environment import STORE_FD

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # DeepSpeed's default


def init_distributed(ranks: DistEnv, fp16: bool = False) -> torch.device:
    """Join the process group, NCCL with GPUs and gloo without; returns this rank's device. All
    ranks take part.

    ``fp16``: half precision is wanted, which DeepSpeed must be told that a CPU can do too.
    """
    alone = ranks.world_size == 1
    defaults = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    os.environ.update(defaults if alone else defaults | os.environ)  # DeepSpeed insists on them
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with _absent("mlflow"):  # which its autotuner would load: a second and 100 MB of every rank
        if fp16 and not torch.cuda.is_available():
            _allow_half_on_cpu()
        import deepspeed
        from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # it warns of every optimizer that it did not write
    # its shared-memory reduction is compiled at start: no compiler in a pod, and gloo does without
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = (
        torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = (
            True  # shapes stay the same: the fastest algorithm of each convolution, tried once
        )
    backend = "nccl" if device.type == "cuda" else "gloo"
    if alone:  # no port is needed
        dist.init_process_group(
            backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1
        )
    elif STORE_FD in os.environ:
        dist.init_process_group(
            backend,
            store=_local_store(ranks),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=_COLLECTIVE_TIMEOUT,
        )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
    return device


def _local_store(ranks: DistEnv) -> Any:
    """The rendezvous of ranks on one machine: the launcher has bound its port already."""
    given = os.environ.pop(STORE_FD)
    return torch._C._distributed_c10d.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks.world_size,
        ranks.is_rank_zero,
        timeout=_COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=int(given) if ranks.is_rank_zero else None,
    )


@contextmanager
def _absent(package: str) -> Iterator[None]:
    """Meanwhile ``import package`` finds nothing, unless it was imported before."""
    sys.modules.setdefault(package, None)  # type: ignore[arg-type]
    try:
        yield
    finally:
        if sys.modules[package] is None:
            del sys.modules[package]


def _allow_half_on_cpu() -> None:
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class HalfAccelerator(CPU_Accelerator):  # type: ignore[misc]
        """Slow, but it lets every fp16 path be tried without a GPU."""

        def is_fp16_supported(self) -> bool:
            return True

        def supported_dtypes(self) -> list[torch.dtype]:
            return [torch.float32, torch.float16, torch.bfloat16]

    set_accelerator(HalfAccelerator())


def describe_gpu(ranks: DistEnv) -> str | None:
    """The rank's GPU with its name and UUID, as far as the driver still answers; None without GPUs."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    try:
        properties = torch.cuda.get_device_properties(ranks.local_rank)
    except (RuntimeError, AssertionError):  # a device that fell off the bus
        return f"GPU {ranks.local_rank}"
    return f"GPU {ranks.local_rank} ({properties.name}, UUID {properties.uuid})"


def cleanup() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
