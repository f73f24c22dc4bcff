"""Training with the whole model on every rank: data parallelism, its state partitioned over the ranks by ZeRO where asked."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.config import RunConfig
from trainer.data.loader import Batch
from trainer.engine.batch import BatchPlan
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.objective import weighted_loss
from trainer.engine.optimizer import build_optimizer
from trainer.engine.parallel import summed
from trainer.models.layers import normalize

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Step:
    """What came of an optimizer step.

    ``loss``: scalar on the device, this rank's share: the mean over ranks is the mean over the global batch's samples.
    ``skipped``: the gradients overflowed fp16, so that the weights stayed as they were.
    """

    loss: Tensor
    images: int
    keys: list[str]
    skipped: bool


class DataParallel:
    """A model and its optimizer in DeepSpeed's engine. All ranks take part in every call."""

    def __init__(self, model: nn.Module, config: RunConfig, batch: BatchPlan, device: torch.device) -> None:
        import deepspeed

        self._batch, self._device = batch, device
        self._mean, self._std = config.data.mean, config.data.std
        self._type = _TYPES[config.precision]
        optimizer = build_optimizer(model, config.optimizer, config.optimizer.base_lr)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config, batch))
        if config.train.channels_last and config.parallel.zero_stage == 0:
            # only now, since it cannot broadcast such weights; ZeRO's flat buffers do not keep the layout
            self._engine.module.to(memory_format=torch.channels_last)

    def step(self, batches: Iterator[Batch], learning_rate: float) -> Step:
        """One optimizer step of the next ``accumulation_steps`` micro-batches."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.train()
        micro_batches = self._batch.ranks * self._batch.accumulation_steps
        total = torch.zeros((), device=self._device)
        keys: list[str] = []
        for _ in range(self._batch.accumulation_steps):
            batch = next(batches)
            images = normalize(to_device(batch.pixels, self._device), self._mean, self._std).to(self._type)
            labels, weights = to_device(batch.labels, self._device), to_device(batch.weights, self._device)
            loss = weighted_loss(self._engine(images), labels, weights, batch.global_weight, micro_batches)
            self._engine.backward(loss)
            self._engine.step()
            total += loss.detach() / self._batch.accumulation_steps
            keys += batch.keys
        return Step(total, int(batch.global_weight), keys, bool(getattr(self._engine.optimizer, "overflow", False)))

    def grad_norm(self) -> float | None:
        """Euclidean norm of the last step's gradient before clipping, where ZeRO computed it anyway."""
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def loss_scale(self) -> float | None:
        """The factor that keeps fp16 gradients from vanishing; None in other precisions."""
        return float(self._engine.optimizer.cur_scale) if self._type == torch.float16 else None

    def state(self) -> dict[str, Tensor]:
        """The whole model on this rank: fp32 master weights, and batch norm's running statistics as their mean over ranks,
        each of which saw other samples (Goyal et al. 2017, 2.3 speaks of the per-worker statistics)."""
        from deepspeed.utils import safe_get_full_fp32_param

        module = self._engine.module
        state: dict[str, Tensor] = {}
        for name, parameter in module.named_parameters():
            master = safe_get_full_fp32_param(parameter)
            state[name] = (parameter if master is None else master).detach()
        for name, buffer in module.named_buffers():
            state[name] = summed(buffer) / self._batch.ranks if buffer.is_floating_point() else buffer
        return {name: state[name] for name in module.state_dict()}


def to_device(array: object, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
