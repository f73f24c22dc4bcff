"""The ranks of a run: joining them, wrapping a model in DeepSpeed's engine, and what they add up together."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import ServiceLost, UserError
from trainer.launch_environment import STORE_FD, check_rank_environment

T = TypeVar("T")

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # DeepSpeed's default


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
    """As the launcher or torchrun set it; alone if neither started this process. Raises UserError for leftovers."""
    return Ranks(*check_rank_environment())


def join(ranks: Ranks, fp16: bool = False) -> torch.device:
    """Join the process group, NCCL with GPUs and gloo without; returns this rank's device. All ranks take part.

    ``fp16``: half precision is wanted, which DeepSpeed must be told that a CPU can do too.
    """
    alone = ranks.world_size == 1
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
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
    device = torch.device("cuda", ranks.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes stay the same: the fastest algorithm of each convolution, tried once
    backend = "nccl" if device.type == "cuda" else "gloo"
    if alone:  # no port is needed
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    elif STORE_FD in os.environ:
        dist.init_process_group(
            backend, store=_local_store(ranks), rank=ranks.rank, world_size=ranks.world_size, timeout=_COLLECTIVE_TIMEOUT
        )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False)
    return device


def _local_store(ranks: Ranks) -> Any:
    """The rendezvous of ranks on one machine: the launcher has bound its port already."""
    given = os.environ.pop(STORE_FD)
    return torch._C._distributed_c10d.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        ranks.world_size,
        ranks.is_first,
        timeout=_COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=int(given) if ranks.is_first else None,
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


def describe_gpu(ranks: Ranks) -> str | None:
    """The rank's GPU with its name and UUID, as far as the driver still answers; None without GPUs."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    try:
        properties = torch.cuda.get_device_properties(ranks.local_rank)
    except (RuntimeError, AssertionError):  # a device that fell off the bus
        return f"GPU {ranks.local_rank}"
    return f"GPU {ranks.local_rank} ({properties.name}, UUID {properties.uuid})"


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class StopRequest:
    """SIGTERM, heard by all ranks at the end of the same step, whichever of them was told.

    The question goes round beside the step's own work, through the CPU, so that it costs a GPU no synchronization.
    """

    def __init__(self) -> None:
        self.told = False
        """This rank was."""
        self._group: Any = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._answer = torch.zeros(1)
        self._round: dist.Work | None = None

    def tell(self, number: int) -> None:
        """This rank received the signal ``number``."""
        self.told = True

    def ask(self) -> None:
        """Before a step."""
        self._answer.fill_(self.told)
        self._round = dist.all_reduce(self._answer, group=self._group, async_op=True) if self._group else None

    def agreed(self) -> bool:
        """After it: whether any rank had been told when the step began. All ranks take part."""
        if self._round is not None:
            self._round.wait()
        return bool(self._answer.item())


def from_first(work: Callable[[], T]) -> T:
    """What ``work`` gives on the first rank, or its UserError or ServiceLost, on every rank; told by the first alone."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (UserError, ServiceLost) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        outcome[1].told = dist.get_rank() > 0
        raise outcome[1]
    result: T = outcome[0]
    return result


def tensors_from_first(tensors: dict[str, Tensor] | None, device: torch.device) -> dict[str, Tensor]:
    """Those of the first rank, on every rank. All ranks take part."""
    first = dist.get_rank() == 0
    described = from_first(lambda: {name: (value.shape, value.dtype) for name, value in (tensors or {}).items()})
    received = {}
    for name, (shape, dtype) in described.items():
        value = tensors[name].to(device) if first and tensors else torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(value, src=0)
        received[name] = value
    return received


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
