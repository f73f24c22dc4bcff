"""The ranks of a run: joining them, wrapping a model in DeepSpeed's engine, and what they add up together."""

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """Who this process is."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """As torchrun tells; alone where it did not start this process."""
    return Ranks(*(int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))


def join(ranks: Ranks) -> torch.device:
    """Join the process group, NCCL with GPUs and gloo without; returns this rank's device. All ranks take part."""
    alone = "RANK" not in os.environ  # no torchrun started this process
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(defaults | os.environ)  # DeepSpeed insists on them
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # its shared-memory reduction is compiled at start: no compiler in a pod, and gloo does without
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if alone:  # no port is needed
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
    return device


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], channels_last: bool) -> Any:
    """DeepSpeed's engine around ``model``. Weights become channels-last after it, since it cannot broadcast such ones."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if channels_last:
        engine.module.to(memory_format=torch.channels_last)
    return engine


def summed(values: Tensor) -> Tensor:
    """The sum over ranks. All ranks take part."""
    values = values.clone()
    dist.all_reduce(values)
    return values


def average_batch_norm(model: nn.Module) -> None:
    """Running statistics become their mean over ranks, each of which saw other samples. All ranks take part."""
    world_size = dist.get_world_size()
    if world_size == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            for buffer in (module.running_mean, module.running_var):
                assert isinstance(buffer, Tensor)
                dist.all_reduce(buffer)
                buffer.div_(world_size)
