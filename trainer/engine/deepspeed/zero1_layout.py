"""Memory layout of ZeRO 1's flat buffers."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.engine.deepspeed import compat

ParamOffsets = dict[nn.Parameter, int]
"""Offset of each parameter's gradient in a flat buffer, in ascending order."""


def relayout_zero1_weights(optimizer: Any, channels_last: bool) -> None:
    """Lay out ZeRO 1's flat buffers in channels-last order if ``channels_last``.

    In fp32, alias the partition as the master copy instead of keeping a second one.
    """
    groups = compat.flat_groups(optimizer)
    single = groups[0].weights.dtype == torch.float32
    if single:
        for group in groups:
            group.fp32_partition.data = group.partitions[dist.get_rank()]
        # before the layout changes: DeepSpeed keeps a flattened view of each weight, which would be
        # a copy in another layout
        compat.link_fp32_weights(optimizer)
    for group in groups:
        for parameter, offset in group.offsets.items():
            if channels_last and parameter.dim() == 4:
                strides = torch.empty_like(
                    parameter, device="meta", memory_format=torch.channels_last
                ).stride()
                values, place = (
                    parameter.detach().clone(),
                    group.weights.as_strided(parameter.shape, strides, offset),
                )
                place.copy_(values)
                parameter.data = place
    if not single:
        compat.copy_weights_to_fp32(optimizer)
    compat.keep_weight_layout(optimizer)
    if dist.get_backend() == "gloo" or dist.get_world_size() == 1:
        compat.replace_weight_gathering(_broadcast_partitions)
    for group in groups:
        for parameter in group.offsets:
            compat.replace_weight_setter(parameter, _set_full_param)


def _broadcast_partitions(
    partitioned: Sequence[Sequence[Tensor]], process_groups: Sequence[Any]
) -> None:
    """Send the partition that each rank updated to all ranks.

    gloo's in-place broadcasts take a third of the time of its all-gather. With one rank nothing is
    sent, whereas DeepSpeed gathers even then.
    """
    handles: list[Any] = [
        dist.broadcast(part, group=group, group_src=owner, async_op=True)
        for parts, group in zip(partitioned, process_groups, strict=True)
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
    state = compat.inner_optimizer(optimizer).state
    for flat in compat.flat_groups(optimizer):
        master, group = flat.fp32_partition, flat.process_group
        part = (master if slot is None else state[master][slot]).detach()
        whole = part.new_empty(dist.get_world_size(group) * part.numel())
        if dist.get_backend(group) == "gloo":
            parts = whole.split(part.numel())
            parts[dist.get_rank(group)].copy_(part)
            _broadcast_partitions([parts], [group])
        else:
            dist.all_gather_into_tensor(whole, part, group)
        wholes |= {
            parameter: whole.as_strided(parameter.shape, parameter.stride(), offset)
            for parameter, offset in flat.offsets.items()
        }
    return wholes


def _set_full_param(parameter: nn.Parameter, value: Tensor, slot: str | None = None) -> None:
    laid_out = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    compat.set_full_tensor(parameter, laid_out.as_strided((laid_out.numel(),), (1,)), slot)
