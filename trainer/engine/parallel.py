"""The ranks of a run: joining them, wrapping a model in DeepSpeed's engine, and what they add up together."""

import logging
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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


def join(ranks: Ranks, fp16: bool = False) -> torch.device:
    """Join the process group, NCCL with GPUs and gloo without; returns this rank's device. All ranks take part.

    ``fp16``: half precision is wanted, which DeepSpeed must be told that a CPU can do too.
    """
    alone = "RANK" not in os.environ  # no torchrun started this process
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(defaults | os.environ)  # DeepSpeed insists on them
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if fp16 and not torch.cuda.is_available():
        _allow_half_on_cpu()
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # it warns of every optimizer that it did not write
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


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def summed(values: Tensor) -> Tensor:
    """The sum over ranks. All ranks take part."""
    values = values.clone()
    dist.all_reduce(values)
    return values


def averaged(values: Tensor) -> Tensor:
    """The mean over ranks. All ranks take part."""
    return summed(values) / dist.get_world_size()


def gathered(values: list[str]) -> list[str]:
    """The lists of all ranks as one. All ranks take part."""
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]
