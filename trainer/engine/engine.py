"""The interface of engines, the same for every way to distribute a model over the ranks."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config.schema import RunConfig
from trainer.data.batch import Batch
from trainer.data.transforms.mixup import apply_mix
from trainer.dependencies.torch_compat import check_torch
from trainer.engine.deepspeed import compat
from trainer.engine.deepspeed.grad_norm import GradNorm
from trainer.engine.deepspeed.loss_scaler import grow_after_update
from trainer.engine.deepspeed.optimizer_state import EMA, Fp32State, TrainingState
from trainer.engine.dropout_rng import DropoutRNG
from trainer.engine.ema import ExponentialMovingAverage
from trainer.engine.input_transfer import to_device
from trainer.models.layers import normalize
from trainer.training.batch_plan import BatchPlan

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepOutput:
    """Result of an optimizer step.

    ``loss`` is a scalar on the device; its mean over ranks is the mean over the global batch's
    samples. ``images`` is the size of the global batch and ``keys`` lists this rank's samples; they
    are 0 and empty on a rank that reads no data. ``skipped`` is true if the gradients overflowed
    fp16, so that the weights were not updated.
    """

    loss: Tensor
    images: int
    keys: list[str]
    skipped: bool


class Engine(ABC):
    """A model and its optimizer in a DeepSpeed engine. All ranks must take part in every call.

    When resuming, load the model's weights before constructing the engine; ``restore`` then loads
    optimizer state, EMA, loss scale and step.
    """

    _engine: Any
    _fp32_state: Fp32State
    _dropout_rng: DropoutRNG
    _grad_norm: GradNorm

    def __init__(
        self, model: nn.Module, config: RunConfig, batch: BatchPlan, device: torch.device
    ) -> None:
        check_torch()
        self._shapes = {
            name: (value.shape, value.dtype) for name, value in model.state_dict().items()
        }
        self._trained = [name for name, _ in model.named_parameters()]
        self._batch, self._device = batch, device
        self._mean, self._std = config.data.mean, config.data.std
        self._type = _TYPES[config.precision]
        self._optimizer_name, self._decay = config.optimizer.name, config.ema
        self._smoothing = config.train.label_smoothing
        self._ema: ExponentialMovingAverage | None = None
        self._global_step = 0

    def _attach_engine(self, engine: Any, weights: dict[str, Tensor], grad_norm: GradNorm) -> None:
        """Take over a DeepSpeed engine.

        ``weights`` are the fp32 parameters that it was given, before it rounded them.
        """
        self._engine, self._grad_norm = engine, grad_norm
        if self._type == torch.float16:
            grow_after_update(engine.optimizer)
        self._fp32_state = Fp32State(engine, self._optimizer_name)
        if self._type != torch.float32:
            self._fp32_state.set_weights(weights)
        if self._decay is not None:
            self._ema = ExponentialMovingAverage(self._fp32_state, self._statistics(), self._decay)

    @abstractmethod
    def step(self, batches: Iterator[Batch], learning_rate: float) -> StepOutput:
        """Run one optimizer step on the next ``accumulation_steps`` micro-batches."""

    @abstractmethod
    def _gather_full_state_dict(
        self, own: dict[str, Tensor], names: list[str]
    ) -> dict[str, Tensor]:
        """Return the tensors ``names`` of the full model; ``own`` is this rank's part of it."""

    @abstractmethod
    def _data_group(self) -> Any:
        """Return the process group of the ranks that hold the same part of the model."""

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the state dict of the full model on this rank.

        It has the fp32 master weights, and batch norm's running statistics as their mean over the
        data-parallel ranks, each of which saw different samples. The statistics of the engine's own
        model are set to that mean too.
        """
        module, own = self._engine.module, self._fp32_state.weights()
        for _, buffer in self._statistics():
            buffer.copy_(self._mean_over_ranks(buffer))
        own |= {name: buffer.clone() for name, buffer in module.named_buffers()}
        return self._gather_full_state_dict(
            {self._to_fqn(name): value for name, value in own.items()}, list(self._shapes)
        )

    def ema_state_dict(self) -> dict[str, Tensor] | None:
        """Return the full state dict of the moving averages (EMA); None if the run keeps none."""
        if self._ema is None:
            return None
        return self.full_state_dict() | self._slot(EMA)

    def training_state(self) -> TrainingState:
        """Return everything that is needed to resume from here, on any number of ranks."""
        return TrainingState(
            self.full_state_dict(),
            self._slots(),
            self._global_step,
            self._fp32_state.updates(),
            self._fp32_state.scaler(),
        )

    def restore(self, state: TrainingState) -> None:
        """Resume from ``state``.

        The engine must have been constructed from ``state.model``, so that the master weights are
        already those of ``state``.
        """
        own = {self._to_fqn(name): name for name in self._engine.module.state_dict()}
        slots = [(slot.partition("/"), value) for slot, value in state.slots.items()]
        self._fp32_state.set_slots(
            {f"{slot}/{own[name]}": v for (slot, _, name), v in slots if name in own}, state.updates
        )
        averages = self._ema.buffers if self._ema is not None else {}
        for (slot, _, name), value in slots:
            if slot == EMA and own.get(name) in averages:
                averages[own[name]].copy_(value)
        self._fp32_state.set_scaler(state.scaler)
        self._global_step = state.step

    def _slots(self) -> dict[str, Tensor]:
        """Return the optimizer state of the full model by ``slot/name``."""
        self._fp32_state.check_keys()
        return {
            f"{slot}/{name}": value
            for slot in self._fp32_state.names
            for name, value in self._slot(slot).items()
        }

    def _slot(self, slot: str) -> dict[str, Tensor]:
        """Return one slot of the full model by name."""
        own, names = self._fp32_state.slot(slot), self._trained
        if slot == EMA and self._ema is not None:
            averages = self._ema.buffers
            own |= {name: self._mean_over_ranks(value) for name, value in averages.items()}
            names = [name for name, (_, dtype) in self._shapes.items() if dtype.is_floating_point]
        return self._gather_full_state_dict(
            {self._to_fqn(name): value for name, value in own.items()}, names
        )

    def _statistics(self) -> list[tuple[str, Tensor]]:
        return [
            (name, buffer)
            for name, buffer in self._engine.module.named_buffers()
            if buffer.is_floating_point()
        ]

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total, group=self._data_group())
        return total / self._batch.ranks

    def _to_fqn(self, name: str) -> str:
        """Return the full model's name for ``name`` in the engine's module."""
        return name

    def _finish(self, skipped: bool) -> None:
        """Update the moving averages and count the step. Called after each step."""
        self._global_step += 1
        if self._ema is not None and not skipped:
            self._ema.update(self._statistics())

    def grad_norm(self) -> float | None:
        """Return the Euclidean norm of the last step's gradient over all weights, before clipping.

        Returns None if the step was skipped.
        """
        return self._grad_norm.value()

    def loss_scale(self) -> float | None:
        """Return the factor that keeps fp16 gradients from vanishing; None in other precisions."""
        half = self._type == torch.float16
        return compat.loss_scale(self._engine.optimizer) if half else None

    def _prepare(self, learning_rate: float) -> None:
        self._dropout_rng.begin(self._global_step)
        self._grad_norm.begin_step(self.loss_scale() or 1.0)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def _skipped(self) -> bool:
        return compat.gradients_overflowed(self._engine.optimizer)

    def _images(self, batch: Batch) -> Tensor:
        """Return images [N, 3, size, size] in the training dtype, prepared on the device."""
        return apply_mix(
            normalize(to_device(batch.pixels, self._device), self._mean, self._std), batch.mix
        ).to(self._type)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
