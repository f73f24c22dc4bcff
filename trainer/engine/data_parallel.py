"""Training with the whole model on every rank: data parallelism, its state partitioned over the ranks by ZeRO where asked."""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import RunConfig
from trainer.data.stages import Batch
from trainer.engine.base import Engine, Step, parameters_of, to_device
from trainer.engine.batch import BatchPlan
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.gradients import Gradients, PartitionedGradients, arrange_partitioned_weights, whole_gradients
from trainer.engine.objective import weighted_loss
from trainer.engine.optimizer import build_optimizer
from trainer.engine.stage import Draws, Stage
from trainer.models.layers import synchronize_batch_norm


class DataParallel(Engine):
    """Every rank computes other samples with the same weights; gradients are averaged over ranks."""

    def __init__(self, model: nn.Sequential, config: RunConfig, batch: BatchPlan, device: torch.device) -> None:
        import deepspeed

        super().__init__(model, config, batch, device)
        self._draws = Draws(model, config.train.seed, dist.get_rank(), batch.ranks)
        stage = Stage(OrderedDict(model.named_children()), config.train, self._draws)
        optimizer = build_optimizer(stage, config.optimizer, config.optimizer.base_lr)
        weights = parameters_of(stage)
        engine, *_ = deepspeed.initialize(model=stage, optimizer=optimizer, config=deepspeed_config(config, batch))
        if config.train.channels_last and config.parallel.zero_stage == 0:
            engine.module.to(memory_format=torch.channels_last)  # only now, since it cannot broadcast such weights
            for master in chain(*getattr(engine.optimizer, "fp32_groups", [])):
                if master.dim() == 4:  # else its gradient would be laid out anew in every step
                    master.data = master.data.contiguous(memory_format=torch.channels_last)
        if config.train.sync_batch_norm:
            synchronize_batch_norm(engine.module, dist.group.WORLD)
        self._gradients = _own_gradients(engine, config, batch.ranks)
        self._clips = config.optimizer.clip_grad_norm is not None
        self._keeps_gradients = config.parallel.zero_stage == 0 and config.precision == "fp32"
        self._scale = 1.0
        """Of fp16's loss, by which the gradients of the last step are too large."""
        if self._keeps_gradients:  # until the next step, for their norm
            engine.zero_grad = lambda: None
        self._adopt(engine, weights)

    def step(self, batches: Iterator[Batch], learning_rate: float) -> Step:
        self._prepare(learning_rate)
        self._engine.train()
        if self._keeps_gradients:
            for parameter in self._engine.module.parameters():
                parameter.grad = None
        micro_batches = self._batch.ranks * self._batch.accumulation_steps
        total = torch.zeros((), device=self._device)
        keys: list[str] = []
        for number in range(1, self._batch.accumulation_steps + 1):
            last = number == self._batch.accumulation_steps
            batch = next(batches)
            labels, weights = to_device(batch.labels, self._device), to_device(batch.weights, self._device)
            outputs = self._engine(self._images(batch))
            loss = weighted_loss(outputs, labels, weights, batch.global_weight, micro_batches, self._smoothing, batch.lam)
            if self._gradients is not None:
                self._gradients.expect(last)
            self._engine.backward(loss)
            if self._gradients is not None and last:
                self._gradients.finish()
                self._scale = self.loss_scale() or 1.0
            self._engine.step()
            total += loss.detach() / self._batch.accumulation_steps
            keys += batch.keys
        skipped = self._skipped()
        self._finish(skipped)
        return Step(total, int(batch.global_weight), keys, skipped)

    def grad_norm(self) -> float | None:
        """Computed only here, where DeepSpeed did not need it; None where DeepSpeed clips at ZeRO 0 and does not tell."""
        gradients: list[Tensor] | None = None
        if self._keeps_gradients and not self._clips:
            gradients = [parameter.grad for parameter in self._engine.module.parameters() if parameter.grad is not None]
        elif self._gradients is not None and self._engine.get_global_grad_norm() is None:
            gradients = self._gradients.buffers
        if gradients is None:
            return super().grad_norm()
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        return float(torch.linalg.vector_norm(torch.stack(norms))) / self._scale

    def _whole(self, own: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        return {name: own[name] for name in names}

    def _data_group(self) -> Any:
        return None


def _own_gradients(engine: Any, config: RunConfig, ranks: int) -> Gradients | None:
    """Take the averaging of gradients from DeepSpeed where we do it faster; None where it is DeepSpeed's, or nobody's."""
    stage = config.parallel.zero_stage
    if stage > 1:
        return None
    engine.enable_backward_allreduce = False
    if stage == 0:
        return whole_gradients(engine.module, ranks)
    arrange_partitioned_weights(engine.optimizer, config.train.channels_last)
    return PartitionedGradients(engine.module, engine.optimizer, ranks)
