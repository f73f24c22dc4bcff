"""Collectives. All ranks must take part in each call."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import RetryableError, UserError

T = TypeVar("T")


def broadcast_from_rank0(work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0 and return its result on every rank.

    A UserError or RetryableError of ``work`` is raised on every rank, and reported by rank 0 only.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (UserError, RetryableError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        outcome[1].reported_elsewhere = dist.get_rank() > 0
        raise outcome[1]
    result: T = outcome[0]
    return result


def broadcast_tensors_from_rank0(
    tensors: dict[str, Tensor] | None, device: torch.device
) -> dict[str, Tensor]:
    """Return the tensors of rank 0 on every rank. All ranks must take part."""
    is_rank_zero = dist.get_rank() == 0
    shapes = broadcast_from_rank0(
        lambda: {name: (value.shape, value.dtype) for name, value in (tensors or {}).items()}
    )
    received = {}
    for name, (shape, dtype) in shapes.items():
        value = (
            tensors[name].to(device)
            if is_rank_zero and tensors
            else torch.empty(shape, dtype=dtype, device=device)
        )
        dist.broadcast(value, src=0)
        received[name] = value
    return received


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum over ranks. All ranks must take part."""
    values = values.clone()
    dist.all_reduce(values)
    return values


def all_reduce_mean(values: Tensor) -> Tensor:
    """Return the mean over ranks. All ranks must take part."""
    return all_reduce_sum(values) / dist.get_world_size()


def all_gather_list(values: list[str]) -> list[str]:
    """Return the concatenated lists of all ranks. All ranks must take part."""
    parts: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]
