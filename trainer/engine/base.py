"""What the loop may ask of an engine, whichever way a model is spread over the ranks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import RunConfig
from trainer.data.augment import Mix
from trainer.data.loader import Batch
from trainer.engine.batch import BatchPlan
from trainer.models.layers import normalize

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Step:
    """What came of an optimizer step.

    ``loss``: scalar on the device; its mean over ranks is the mean over the global batch's samples.
    ``images``, ``keys``: of the global batch, and of this rank's part of it; 0 and none on a rank that reads no data.
    ``skipped``: the gradients overflowed fp16, so that the weights stayed as they were.
    """

    loss: Tensor
    images: int
    keys: list[str]
    skipped: bool


class Engine(ABC):
    """A model and its optimizer in one of DeepSpeed's engines. All ranks take part in every call."""

    _engine: Any

    def __init__(self, config: RunConfig, batch: BatchPlan, device: torch.device) -> None:
        self._batch, self._device = batch, device
        self._mean, self._std = config.data.mean, config.data.std
        self._type = _TYPES[config.precision]
        self._smoothing = config.train.label_smoothing

    @abstractmethod
    def step(self, batches: Iterator[Batch], learning_rate: float) -> Step:
        """One optimizer step of the next ``accumulation_steps`` micro-batches."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The whole model on this rank: fp32 master weights, and batch norm's running statistics as their mean over the
        data-parallel ranks, each of which saw other samples."""

    def grad_norm(self) -> float | None:
        """Euclidean norm of the last step's gradient before clipping, where DeepSpeed computed it anyway."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def loss_scale(self) -> float | None:
        """The factor that keeps fp16 gradients from vanishing; None in other precisions."""
        return float(self._engine.optimizer.cur_scale) if self._type == torch.float16 else None

    def _prepare(self, learning_rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def _skipped(self) -> bool:
        return bool(getattr(self._engine.optimizer, "overflow", False))

    def _images(self, batch: Batch) -> Tensor:
        """[N, 3, size, size] in the training type, made on the device."""
        return mixed(normalize(to_device(batch.pixels, self._device), self._mean, self._std), batch.mix).to(self._type)


def master_state(module: nn.Module, group: Any, ranks: int) -> dict[str, Tensor]:
    """A module's state dict in fp32, buffers averaged over the ``ranks`` data-parallel ranks of ``group``, who take part."""
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_fp32_param

    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        master = safe_get_full_fp32_param(parameter)
        state[name] = (parameter if master is None else master).detach()
    for name, buffer in module.named_buffers():
        state[name] = buffer.clone()
        if buffer.is_floating_point():
            dist.all_reduce(state[name], group=group)
            state[name] /= ranks
    return {name: state[name] for name in module.state_dict()}


def mixed(images: Tensor, mix: Mix | None) -> Tensor:
    """[N, C, H, W], each mixed with the one at its place in the reversed batch. Overwrites them."""
    if mix is None:
        return images
    if mix.box is None:
        others = images.flip(0)
        return images.mul_(mix.lam).add_(others, alpha=1 - mix.lam)
    top, bottom, left, right = mix.box
    part = images[:, :, top:bottom, left:right]
    part.copy_(part.flip(0))
    return images


def to_device(array: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
