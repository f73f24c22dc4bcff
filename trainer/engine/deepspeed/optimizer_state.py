"""Master weights and optimizer state as whole fp32 tensors by parameter name, however DeepSpeed
keeps them.

ZeRO flattens the weights of a group and gives each rank a piece, in another layout at each stage.
What is read and written here knows nothing of that, so that a checkpoint fits any stage, precision
and number of ranks.

A *slot* is one tensor that an optimizer keeps for each weight. All slots are made before the first
step, so that a state can be written into them then; torch's update rules compute the same from
zeros as from nothing.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.engine.deepspeed.zero1_layout import all_gather_full_params

OPTIMIZER_STATE_KEYS = {
    "sgd": ("momentum_buffer",),
    "lars": ("momentum_buffer",),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "lamb": ("exp_avg", "exp_avg_sq"),
}
"""By ``optimizer.name``."""
EMA = "ema"
"""The slot that holds the moving average of a weight, beside those of the update rule."""
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class TrainingState:
    """All that an engine needs to go on: fp32 tensors by name, and numbers.

    ``model``: the whole state dict; ``slots``: by ``slot/parameter``; ``step``: optimizer steps
    done, of which ``updates`` were counted by a rule that counts; ``scaler``: of fp16's loss scale,
    empty in other precisions.
    """

    model: dict[str, Tensor]
    slots: dict[str, Tensor]
    step: int
    updates: int = 0
    scaler: dict[str, float] = field(default_factory=dict)


class Fp32State:
    """The masters and slots of one DeepSpeed engine. All ranks of its data-parallel group take part
    in every read.
    """

    def __init__(self, engine: Any, optimizer_name: str) -> None:
        self._wrapped = engine.optimizer
        self._inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._parameters: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        self.names = OPTIMIZER_STATE_KEYS[optimizer_name]
        unfused = zip(
            *(getattr(self._wrapped, f"{kind}_groups", []) for kind in ("fp16", "fp32")),
            strict=False,
        )
        self._masters = {
            id(low): master
            for lows, masters in (unfused if engine.zero_optimization_stage() == 0 else ())
            for low, master in zip(lows, masters, strict=True)
        }
        for master in self._flat():
            slots = self._inner.state[master]
            slots |= {name: torch.zeros_like(master) for name in self.names}
            if optimizer_name == "adamw":
                slots["step"] = torch.zeros((), device=master.device)
        if optimizer_name == "lamb":
            for group in self._inner.param_groups:
                group["step"] = torch.zeros(())
        self._link()

    def _link(self) -> None:
        """Let each weight know its piece of the slots, which the engine does only at the first
        step.
        """
        if hasattr(self._wrapped, "_lazy_init_hp_params_optimizer_state"):
            self._wrapped._hp_optimizer_states_linked = False
            self._wrapped._lazy_init_hp_params_optimizer_state()

    def init_ema(self) -> None:
        """Keep a moving average of the weights, which begins at what they are."""
        for master in self._flat():
            self._inner.state[master][EMA] = master.detach().clone()
        if EMA not in self.names:
            self.names = (*self.names, EMA)
        self._link()

    def _flat(self) -> list[Tensor]:
        """This rank's fp32 masters as the update rule sees them: a tensor a weight, or ZeRO's flat
        pieces.
        """
        if hasattr(self._wrapped, "fp32_partitioned_groups_flat"):
            return list(self._wrapped.fp32_partitioned_groups_flat)
        return [master for group in self._inner.param_groups for master in group["params"]]

    def update_ema(self, decay: float) -> None:
        """Move the average of each weight towards the weight: a rank's own piece, no communication."""
        masters = self._flat()
        torch._foreach_lerp_(
            [self._inner.state[master][EMA] for master in masters],
            [m.detach() for m in masters],
            1 - decay,
        )

    def weights(self) -> dict[str, Tensor]:
        """Every weight, whole."""
        return self._wholes(None)

    def slot(self, slot: str) -> dict[str, Tensor]:
        """One slot of every weight, whole."""
        return self._wholes(slot)

    def _wholes(self, slot: str | None) -> dict[str, Tensor]:
        flat = hasattr(self._wrapped, "single_partition_of_fp32_groups")
        known = all_gather_full_params(self._wrapped, slot) if flat else {}
        return {
            name: known[p] if p in known else self._read(p, slot)
            for name, p in self._parameters.items()
        }

    def updates(self) -> int:
        """How many updates the rule has made, where it counts them."""
        counters = self._counters()
        return int(counters[0]) if counters else 0

    def _counters(self) -> list[Tensor]:
        holders = [*self._inner.param_groups, *self._inner.state.values()]
        return [holder["step"] for holder in holders if "step" in holder]

    def scaler(self) -> dict[str, float]:
        scaler = getattr(self._wrapped, "loss_scaler", None)
        return (
            {name: vars(scaler)[name] for name in _SCALER if name in vars(scaler)}
            if getattr(scaler, "dynamic", False)
            else {}
        )

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Of the masters alone: the weights that a 16-bit engine computes with come from the model
        it was made of.
        """
        for name, parameter in self._parameters.items():
            self._write(parameter, weights[name])

    def set_slots(self, slots: Mapping[str, Tensor], updates: int) -> None:
        """Slots that ``slots`` does not hold stay as they are."""
        for slot, name in itertools.product(self.names, self._parameters):
            if f"{slot}/{name}" in slots:
                self._write(self._parameters[name], slots[f"{slot}/{name}"], slot)
        for counter in self._counters():
            counter.fill_(updates)

    def set_scaler(self, scaler: Mapping[str, float]) -> None:
        if scaler and self.scaler():
            for name, value in scaler.items():
                setattr(self._wrapped.loss_scaler, name, value)

    def _read(self, parameter: nn.Parameter, slot: str | None) -> Tensor:
        if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
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
        if hasattr(
            parameter, "ds_id"
        ):  # the whole-tensor call does not know that the last piece is padded
            piece = _local_shard(value, parameter)
            if slot:
                utils.safe_set_local_optimizer_state(parameter, piece, slot)
            else:
                utils.safe_set_local_fp32_param(parameter, piece)
        elif hasattr(parameter, "_hp_mapping"):
            if slot:
                utils.safe_set_full_optimizer_state(parameter, value, slot)
            else:
                utils.safe_set_full_fp32_param(parameter, value)
        else:
            master = self._masters.get(id(parameter), parameter)
            (self._inner.state[master][slot] if slot else master.data).copy_(value)


def _local_shard(value: Tensor, parameter: Any) -> Tensor:
    """This rank's piece of a weight that ZeRO 3 spreads over all, the last one padded with zeros."""
    size, rank = parameter.ds_tensor.numel(), dist.get_rank(group=parameter.ds_process_group)
    flat = value.flatten()[size * rank : size * (rank + 1)]
    return torch.cat([flat, flat.new_zeros(size - flat.numel())])
