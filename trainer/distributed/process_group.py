"""Process group of a run: initialization, cleanup and this rank's GPU."""

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
    """Join the process group and return this rank's device. All ranks must take part.

    The backend is NCCL with GPUs and gloo without. Set ``fp16`` if the run uses half precision:
    DeepSpeed must be configured to accept it on a CPU.
    """
    alone = ranks.world_size == 1
    defaults = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    os.environ.update(defaults if alone else defaults | os.environ)  # DeepSpeed requires them
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with _absent("mlflow"):  # DeepSpeed's autotuner imports it: 1 s and 100 MB per rank
        if fp16 and not torch.cuda.is_available():
            _allow_half_on_cpu()
        import deepspeed
        from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # it warns about every optimizer that is not DeepSpeed's
    # DeepSpeed compiles its shared-memory reduction at startup: a pod has no compiler, and gloo
    # does not need it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = (
        torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # shapes stay the same, so the fastest algorithm of each convolution is searched only once
        torch.backends.cudnn.benchmark = True
    backend = "nccl" if device.type == "cuda" else "gloo"
    if alone:  # needs no port
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
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
    """Return the rendezvous store of ranks on one machine.

    The launcher has already bound its port.
    """
    given = os.environ.pop(STORE_FD)
    return dist.TCPStore(  # type: ignore[attr-defined]
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
    """Make ``import package`` fail in this context, unless it was imported before."""
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
        """CPU accelerator with fp16: slow, but it allows testing every fp16 path without a GPU."""

        def is_fp16_supported(self) -> bool:
            return True

        def supported_dtypes(self) -> list[torch.dtype]:
            return [torch.float32, torch.float16, torch.bfloat16]

    set_accelerator(HalfAccelerator())


def describe_gpu(ranks: DistEnv) -> str | None:
    """Return the rank's GPU with name and UUID, if the driver still responds; None without GPUs."""
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
