"""Memory layout of ZeRO 1's flat buffers."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ParamOffsets = dict[nn.Parameter, int]
"""Offset of each parameter's gradient in a flat buffer, in ascending order."""


def param_offsets(optimizer: Any) -> list[ParamOffsets]:
    groups = zip(
        optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True
    )
    return [dict(zip(parameters, offsets, strict=True)) for parameters, offsets in groups]


def relayout_zero1_weights(optimizer: Any, channels_last: bool) -> None:
    """Lay out ZeRO 1's flat buffers in channels-last order if ``channels_last``.

    In fp32, alias the partition as the master copy instead of keeping a second one.
    """
    single = optimizer.dtype == torch.float32
    if single:
        for master, parts in zip(
            optimizer.single_partition_of_fp32_groups,
            optimizer.parallel_partitioned_bit16_groups,
            strict=True,
        ):
            master.data = parts[dist.get_rank()]
        # before the layout changes: DeepSpeed keeps a flattened view of each weight, which would be
        # a copy in another layout
        optimizer._link_all_hp_params()
    for flat, places in zip(optimizer.bit16_groups_flat, param_offsets(optimizer), strict=True):
        for parameter, offset in places.items():
            if channels_last and parameter.dim() == 4:
                strides = torch.empty_like(
                    parameter, device="meta", memory_format=torch.channels_last
                ).stride()
                values, place = (
                    parameter.detach().clone(),
                    flat.as_strided(parameter.shape, strides, offset),
                )
                place.copy_(values)
                parameter.data = place
    if not single:
        optimizer.refresh_fp32_params()
    # DeepSpeed's method would recreate all views in its own layout in each step
    optimizer._update_model_bit16_weights = lambda group: None
    if dist.get_backend() == "gloo" or dist.get_world_size() == 1:
        from deepspeed.runtime.zero import stage_1_and_2

        stage_1_and_2.all_gather_dp_groups = _broadcast_partitions
    for places in param_offsets(optimizer):
        for parameter in places:
            parameter.set_full_hp_param = MethodType(_set_full_param, parameter)  # type: ignore[attr-defined]


def _broadcast_partitions(
    groups_flat: Sequence[Tensor],
    partitioned_param_groups: Sequence[Sequence[Tensor]],
    dp_process_group: Sequence[Any],
    **_: Any,
) -> None:
    """Send the partition that each rank updated to all ranks.

    gloo's in-place broadcasts take a third of the time of its all-gather. With one rank nothing is
    sent, whereas DeepSpeed gathers even then.
    """
    handles: list[Any] = [
        dist.broadcast(part, group=group, group_src=owner, async_op=True)
        for parts, group in zip(partitioned_param_groups, dp_process_group, strict=True)
        for owner, part in enumerate(parts)
        if len(parts) > 1
    ]
    for handle in handles:
        handle.wait()


def all_gather_full_params(optimizer: Any, slot: str | None) -> dict[nn.Parameter, Tensor]:
    """Return the full tensors that ZeRO 1 and 2 partition over the ranks, on each rank.

    These are the fp32 weights, or one ``slot`` of the optimizer.

    Each rank sends one flat tensor. DeepSpeed's own call sums one tensor of mostly zeros per weight
    instead.
    """
    wholes: dict[nn.Parameter, Tensor] = {}
    masters, groups = optimizer.single_partition_of_fp32_groups, optimizer.real_dp_process_group
    for offsets, master, group in zip(param_offsets(optimizer), masters, groups, strict=True):
        part = (master if slot is None else optimizer.optimizer.state[master][slot]).detach()
        whole = part.new_empty(dist.get_world_size(group) * part.numel())
        if dist.get_backend(group) == "gloo":
            parts = whole.split(part.numel())
            parts[dist.get_rank(group)].copy_(part)
            _broadcast_partitions([whole], [parts], [group])
        else:
            dist.all_gather_into_tensor(whole, part, group)
        wholes |= {
            parameter: whole.as_strided(parameter.shape, parameter.stride(), offset)
            for parameter, offset in offsets.items()
        }
    return wholes


def _set_full_param(
    parameter: nn.Parameter, value: Tensor, optim_state_key: str | None = None
) -> None:
    from deepspeed.utils import set_full_hp_param

    laid_out = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    set_full_hp_param(parameter, laid_out.as_strided((laid_out.numel(),), (1,)), optim_state_key)
