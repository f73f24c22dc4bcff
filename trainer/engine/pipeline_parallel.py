"""Pipeline parallelism: the layers of a model spread over ranks, combined with data parallelism.

Rank ``r`` of ``stages x D`` runs stage ``r // D`` of model replica ``r mod D``. Micro-batches pass
through the stages one after another, so that ``accumulation_steps`` of them keep ``stages`` stages
busy except for a bubble of ``(stages - 1) / (steps + stages - 1)`` of the time (Huang et al. 2019,
2.3).
"""

import contextlib
import io
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
from trainer.engine.dropout_rng import DropoutRNG
from trainer.engine.engine import Engine, StepOutput, parameters_of
from trainer.engine.input_transfer import to_device
from trainer.engine.model_chunk import ModelChunk
from trainer.models.batch_norm import synchronize_batch_norm
from trainer.training.batch_plan import BatchPlan
from trainer.training.loss import weighted_loss
from trainer.training.optimizers.build import build_optimizer


class PipelineParallel(Engine):
    """Engine for pipeline parallelism: each rank holds one stage of the model.

    ``model`` loses the weights of the other stages. ``parts`` holds the layer names of each stage.
    """

    def __init__(
        self,
        model: nn.Sequential,
        config: RunConfig,
        batch: BatchPlan,
        device: torch.device,
        parts: list[list[str]],
    ) -> None:
        from deepspeed.pipe import PipelineModule

        super().__init__(model, config, batch, device)
        self._stage_of = {name: stage for stage, names in enumerate(parts) for name in names}
        self._dropout_rng = DropoutRNG(
            model, config.train.seed, dist.get_rank() % batch.ranks, batch.ranks
        )
        layers = dict(model.named_children())
        stages = [
            ModelChunk(
                OrderedDict((name, layers[name]) for name in names), config.train, self._dropout_rng
            )
            for names in parts
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # PipelineModule prints its layers
            pipe = PipelineModule(
                stages,
                num_stages=len(parts),
                loss_fn=self._loss,
                partition_method="uniform",
                dynamic_shape=config.data.initial_size is not None,
            )
        for number, stage in enumerate(stages):
            if number != pipe.stage_id:
                # otherwise the pipe and the caller would hold all of its weights on every rank
                stage.to("meta")
        optimizer = build_optimizer(pipe, config.optimizer, config.optimizer.base_lr)
        weights = parameters_of(pipe)
        engine = compat.initialize(pipe, optimizer, deepspeed_config(config, batch))
        if config.train.sync_batch_norm:
            synchronize_batch_norm(pipe, engine.grid.get_data_parallel_group())
        compat.free_outputs_after_backward(engine)
        self._attach_engine(
            engine,
            weights,
            GradNorm(
                engine,
                config.optimizer.clip_grad_norm,
                stages=engine.grid.get_pipe_parallel_group(),
            ),
        )

    def _loss(self, outputs: Any, targets: tuple[Tensor, ...]) -> Tensor:
        labels, weights, *lam = targets  # the weights are scaled in ``step``
        return weighted_loss(outputs, labels, weights, 1.0, 1, self._smoothing, *lam)

    def step(self, batches: Iterator[Batch], learning_rate: float) -> StepOutput:
        self._prepare(learning_rate)
        micro_batches = self._batch.ranks * self._batch.accumulation_steps
        taken: list[Batch] = []

        def loaded() -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
            for batch in batches:
                taken.append(batch)
                weights = to_device(batch.weights, self._device) * (
                    micro_batches / batch.global_weight
                )
                labels = to_device(batch.labels, self._device)
                lam = () if batch.lam is None else (torch.full((), batch.lam, device=self._device),)
                # the last stage uses only the targets
                yield (
                    self._images(batch) if self._engine.is_first_stage() else labels,
                    (labels, weights, *lam),
                )

        loss = self._engine.train_batch(loaded()).detach().clone().reshape(())
        keys = (
            [key for batch in taken for key in batch.keys] if self._engine.is_first_stage() else []
        )
        skipped = self._skipped()
        self._finish(skipped)
        return StepOutput(loss, int(taken[0].global_weight) if taken else 0, keys, skipped)

    def _gather_full_state_dict(
        self, own: dict[str, Tensor], names: list[str]
    ) -> dict[str, Tensor]:
        grid = self._engine.grid
        full: dict[str, Tensor] = {}
        for name in names:
            shape, dtype = self._shapes[name]
            value = (
                own[name].contiguous()
                if name in own
                else torch.empty(shape, dtype=dtype, device=self._device)
            )
            source = grid.stage_to_global(stage_id=self._stage_of[name.partition(".")[0]])
            dist.broadcast(value, source, group=grid.get_pipe_parallel_group())
            full[name] = value
        return full

    def _data_group(self) -> Any:
        return self._engine.grid.get_data_parallel_group()

    def _to_fqn(self, name: str) -> str:
        return name.partition(".")[2]  # without the stage number
