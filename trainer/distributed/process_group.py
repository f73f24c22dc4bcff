"""Process group of a run: initialization, cleanup and this rank's GPU."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.dependencies.process_patches import set_attribute, set_item, undo_patches
from trainer.distributed.env import DistEnv
from trainer.engine.deepspeed import compat
from trainer.process.launch_environment import STORE_FD

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # DeepSpeed's default


def init_distributed(ranks: DistEnv, fp16: bool = False) -> torch.device:
    """Join the process group and return this rank's device. All ranks must take part.

    The backend is NCCL with GPUs and gloo without. Set ``fp16`` if the run uses half precision:
    DeepSpeed must be configured to accept it on a CPU. ``cleanup`` undoes what this changes in the
    process.
    """
    alone = ranks.world_size == 1
    defaults = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for name, value in defaults.items():  # DeepSpeed requires them
        if alone or name not in os.environ:
            set_item(os.environ, name, value)
    compat.import_deepspeed(allow_fp16_on_cpu=fp16)
    import deepspeed

    device = (
        torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # shapes stay the same, so the fastest algorithm of each convolution is searched only once
        set_attribute(torch.backends.cudnn, "benchmark", True)
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
    """Leave the process group, and undo what the run changed in this process."""
    if dist.is_initialized():
        dist.destroy_process_group()
    undo_patches()
