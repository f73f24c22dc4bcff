"""Data parallelism: every rank runs the full model; ZeRO can partition the state."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config.schema import RunConfig
from trainer.data.batch import Batch
from trainer.engine.deepspeed import compat
from trainer.engine.deepspeed.config import deepspeed_config
from trainer.engine.deepspeed.grad_norm import GradNorm
from trainer.engine.deepspeed.grad_reducer import GradReducer, Zero1GradReducer, make_grad_reducer
from trainer.engine.deepspeed.zero1_layout import relayout_zero1_weights
from trainer.engine.dropout_rng import DropoutRNG
from trainer.engine.engine import Engine, StepOutput, parameters_of
from trainer.engine.input_transfer import to_device
from trainer.engine.model_chunk import ModelChunk
from trainer.models.batch_norm import synchronize_batch_norm
from trainer.training.batch_plan import BatchPlan
from trainer.training.loss import weighted_loss
from trainer.training.optimizers.build import build_optimizer


class DataParallel(Engine):
    """Engine for data parallelism.

    Every rank computes different samples with the same weights; gradients are averaged over ranks.
    ``model`` belongs to the engine, which keeps it in training mode.
    """

    def __init__(
        self, model: nn.Sequential, config: RunConfig, batch: BatchPlan, device: torch.device
    ) -> None:
        super().__init__(model, config, batch, device)
        self._dropout_rng = DropoutRNG(model, config.train.seed, dist.get_rank(), batch.ranks)
        stage = ModelChunk(OrderedDict(model.named_children()), config.train, self._dropout_rng)
        optimizer = build_optimizer(stage, config.optimizer, config.optimizer.base_lr)
        weights = parameters_of(stage)
        engine = compat.initialize(stage, optimizer, deepspeed_config(config, batch))
        if config.train.channels_last and config.parallel.zero_stage == 0:
            # only after deepspeed.initialize, which cannot broadcast channels-last weights
            engine.module.to(memory_format=torch.channels_last)
            for _, master in compat.fp32_copies(engine.optimizer):
                # otherwise the gradient's memory layout would be converted in every step
                if master.dim() == 4:
                    master.data = master.data.contiguous(memory_format=torch.channels_last)
        engine.train()  # once: it takes 3 ms of CPU time for ResNet-50's 160 modules
        if config.train.sync_batch_norm:
            synchronize_batch_norm(engine.module, dist.group.WORLD)
        graphs = _uses_graphs(config, device)
        self._grad_reducer = _own_gradients(engine, config, batch.ranks, graphs)
        if graphs and self._grad_reducer is not None:
            stage.use_graphs(self._grad_reducer, batch.ranks)
        buffers = self._grad_reducer.buffers if self._grad_reducer is not None else ()
        self._attach_engine(
            engine, weights, GradNorm(engine, config.optimizer.clip_grad_norm, buffers)
        )

    def step(self, batches: Iterator[Batch], learning_rate: float) -> StepOutput:
        self._prepare(learning_rate)
        micro_batches = self._batch.ranks * self._batch.accumulation_steps
        total = torch.zeros((), device=self._device)
        keys: list[str] = []
        for number in range(1, self._batch.accumulation_steps + 1):
            last = number == self._batch.accumulation_steps
            batch = next(batches)
            labels = to_device(batch.labels, self._device)
            weights = to_device(batch.weights, self._device)
            outputs = self._engine(self._images(batch))
            loss = weighted_loss(
                outputs,
                labels,
                weights,
                batch.global_weight,
                micro_batches,
                self._smoothing,
                batch.lam,
            )
            if self._grad_reducer is not None:
                self._grad_reducer.prepare_for_backward(last)
            self._engine.backward(loss)
            if self._grad_reducer is not None and last:
                self._grad_reducer.finalize_backward()
            self._engine.step()
            total += loss.detach() / self._batch.accumulation_steps
            keys += batch.keys
        skipped = self._skipped()
        self._finish(skipped)
        return StepOutput(total, int(batch.global_weight), keys, skipped)

    def _gather_full_state_dict(
        self, own: dict[str, Tensor], names: list[str]
    ) -> dict[str, Tensor]:
        return {name: own[name] for name in names}

    def _data_group(self) -> Any:
        return None


def _uses_graphs(config: RunConfig, device: torch.device) -> bool:
    """Return whether to use CUDA graphs.

    They are not used if DeepSpeed reduces the gradients (ZeRO 2 and 3), if activations are
    recomputed, or if layers are compiled, which is untested.
    """
    train = config.train
    eager = (
        train.cuda_graphs == "off"
        or train.activation_checkpointing
        or train.compile
        or config.parallel.zero_stage > 1
    )
    return device.type == "cuda" and not eager


def _own_gradients(engine: Any, config: RunConfig, ranks: int, graphs: bool) -> GradReducer | None:
    """Replace DeepSpeed's averaging of gradients at ZeRO 0 and 1, for which ours is faster.

    Returns None if DeepSpeed averages the gradients (ZeRO 2 and 3) or no averaging is needed (ZeRO
    0 on one rank without CUDA graphs).
    """
    stage = config.parallel.zero_stage
    if stage > 1:
        return None
    compat.disable_gradient_averaging(engine)
    if stage == 0:
        return make_grad_reducer(engine.module, ranks) if ranks > 1 or graphs else None
    relayout_zero1_weights(engine.optimizer, config.train.channels_last)
    return Zero1GradReducer(engine.module, engine.optimizer, ranks)
