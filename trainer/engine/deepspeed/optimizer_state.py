"""Master weights and optimizer state as full fp32 tensors by parameter name.

ZeRO flattens the weights of a group and gives each rank a partition, in a different layout at each
stage. This module hides those layouts, so that a checkpoint fits any ZeRO stage, precision and
number of ranks.

A *slot* is one tensor that an optimizer keeps for each weight. All slots are created before the
first step, so that a saved state can be written into them. torch's optimizers compute the same from
zeros as from an empty state.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.dependencies.torch_compat import interpolate_each
from trainer.engine.deepspeed import compat
from trainer.engine.deepspeed.compat import OptimizerKind
from trainer.engine.deepspeed.zero1_layout import all_gather_full_params
from trainer.training.optimizers.registry import OPTIMIZERS

EMA = "ema"
"""Slot that holds the moving average of a weight, in addition to the optimizer's slots."""


@dataclass(frozen=True)
class TrainingState:
    """Everything an engine needs to resume: fp32 tensors by name, and numbers.

    ``model`` is the full state dict. ``slots`` is keyed by ``slot/parameter``. ``step`` is the
    number of optimizer steps done; ``updates`` is how many of them the optimizer counted, if it
    counts. ``scaler`` is the state of the fp16 loss scale, empty in other precisions.
    """

    model: dict[str, Tensor]
    slots: dict[str, Tensor]
    step: int
    updates: int = 0
    scaler: dict[str, float] = field(default_factory=dict)


class Fp32State:
    """Master weights and slots of one DeepSpeed engine.

    All ranks of its data-parallel group must take part in every read.
    """

    def __init__(self, engine: Any, optimizer_name: str) -> None:
        self._wrapped = engine.optimizer
        self._kind = compat.optimizer_kind(engine.optimizer)
        self._inner = compat.inner_optimizer(engine.optimizer)
        self._parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        spec = OPTIMIZERS[optimizer_name]
        self.names = spec.state_keys
        self._spec = spec
        self._masters = {id(low): master for low, master in compat.fp32_copies(engine.optimizer)}
        for master in compat.fp32_tensors(self._wrapped):
            slots = self._inner.state[master]
            slots |= {name: torch.zeros_like(master) for name in self.names}
            if spec.step_counter == "weight":
                slots["step"] = torch.zeros((), device=master.device)
        if spec.step_counter == "group":
            for group in self._inner.param_groups:
                group["step"] = torch.zeros(())
        compat.link_optimizer_state(self._wrapped)

    def add_average(self, slot: str) -> None:
        """Add a slot for averages of the weights, initialized to their current values."""
        for master in compat.fp32_tensors(self._wrapped):
            self._inner.state[master][slot] = master.detach().clone()
        if slot not in self.names:
            self.names = (*self.names, slot)
        compat.link_optimizer_state(self._wrapped)

    def update_average(self, slot: str, weight: float) -> None:
        """Move each average towards its weight by ``weight`` of their distance.

        This updates the rank's local partition only, without communication.
        """
        masters = compat.fp32_tensors(self._wrapped)
        interpolate_each(
            [self._inner.state[master][slot] for master in masters],
            [m.detach() for m in masters],
            weight,
        )

    def weights(self) -> dict[str, Tensor]:
        """Return the full tensor of every master weight."""
        return self._wholes(None)

    def check_keys(self) -> None:
        """Raise RuntimeError if the optimizer keeps state that no checkpoint would contain."""
        known = {*self.names, *(["step"] if self._spec.step_counter == "weight" else [])}
        unknown = {
            key
            for master in compat.fp32_tensors(self._wrapped)
            for key in self._inner.state[master]
        } - known
        if unknown:
            raise RuntimeError(
                f"optimizer {self._spec.name} keeps the state {', '.join(sorted(unknown))}, which "
                "its OptimizerSpec does not list; a run could not resume with it"
            )

    def slot(self, slot: str) -> dict[str, Tensor]:
        """Return the full tensor of one slot for every weight."""
        return self._wholes(slot)

    def _wholes(self, slot: str | None) -> dict[str, Tensor]:
        flat = self._kind is OptimizerKind.ZERO_1_2
        known = all_gather_full_params(self._wrapped, slot) if flat else {}
        return {
            name: known[p] if p in known else self._read(p, slot)
            for name, p in self._parameters.items()
        }

    def updates(self) -> int:
        """Return the number of updates that the optimizer has counted; 0 if it does not count."""
        counters = self._counters()
        return int(counters[0]) if counters else 0

    def _counters(self) -> list[Tensor]:
        holders = [*self._inner.param_groups, *self._inner.state.values()]
        return [holder["step"] for holder in holders if "step" in holder]

    def scaler(self) -> dict[str, float]:
        return compat.loss_scaler_state(self._wrapped)

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Set the master weights only.

        The weights with which a 16-bit engine computes come from the model it was constructed from.
        """
        for name, parameter in self._parameters.items():
            self._write(parameter, weights[name])

    def set_slots(self, slots: Mapping[str, Tensor], updates: int) -> None:
        """Set slots and update counters. Slots that ``slots`` does not contain are unchanged."""
        for slot, name in itertools.product(self.names, self._parameters):
            if f"{slot}/{name}" in slots:
                self._write(self._parameters[name], slots[f"{slot}/{name}"], slot)
        for counter in self._counters():
            counter.fill_(updates)

    def set_scaler(self, scaler: Mapping[str, float]) -> None:
        compat.set_loss_scaler_state(self._wrapped, scaler)

    def _is_partitioned(self) -> bool:
        return self._kind not in (OptimizerKind.PLAIN, OptimizerKind.UNFUSED)

    def _read(self, parameter: nn.Parameter, slot: str | None) -> Tensor:
        if self._is_partitioned():
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            whole = (
                safe_get_full_optimizer_state(parameter, slot)
                if slot
                else safe_get_full_fp32_param(parameter)
            )
            return torch.as_tensor(whole).detach()
        master = self._masters.get(id(parameter), parameter)
        return torch.as_tensor(self._inner.state[master][slot] if slot else master).detach()

    def _write(self, parameter: nn.Parameter, value: Tensor, slot: str | None = None) -> None:
        from deepspeed import utils

        value = value.to(parameter.device, torch.float32)
        # DeepSpeed's full-tensor call ignores that the last shard is padded
        if self._kind is OptimizerKind.ZERO_3:
            piece = _local_shard(value, parameter)
            if slot:
                utils.safe_set_local_optimizer_state(parameter, piece, slot)
            else:
                utils.safe_set_local_fp32_param(parameter, piece)
        elif self._is_partitioned():
            if slot:
                utils.safe_set_full_optimizer_state(parameter, value, slot)
            else:
                utils.safe_set_full_fp32_param(parameter, value)
        else:
            master = self._masters.get(id(parameter), parameter)
            (self._inner.state[master][slot] if slot else master.data).copy_(value)


def _local_shard(value: Tensor, parameter: Any) -> Tensor:
    """Return this rank's shard of a weight partitioned by ZeRO 3.

    The last shard is padded with zeros.
    """
    size, group = compat.zero3_shard(parameter)
    rank = dist.get_rank(group=group)
    flat = value.flatten()[size * rank : size * (rank + 1)]
    return torch.cat([flat, flat.new_zeros(size - flat.numel())])
