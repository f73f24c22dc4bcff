"""Training with the layers of a model spread over ranks: pipeline (model) parallelism, and data parallelism beside it.

Rank ``r`` of ``stages x D`` is stage ``r // D`` of the copy ``r mod D``. Micro-batches follow one another through the stages, so
that ``accumulation_steps`` of them keep ``stages`` stages busy but for a bubble of ``(stages - 1) / (steps + stages - 1)`` of
the time (Huang et al. 2019, 2.3).
"""

import contextlib
import copy
import io
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import RunConfig
from trainer.data.stages import Batch
from trainer.engine.base import Engine, Step, parameters_of, to_device
from trainer.engine.batch import BatchPlan
from trainer.engine.deepspeed_config import deepspeed_config
from trainer.engine.grad_norm import GradNorm
from trainer.engine.objective import weighted_loss
from trainer.engine.optimizer import build_optimizer
from trainer.engine.stage import Draws, Stage
from trainer.errors import UserError
from trainer.models.layers import synchronize_batch_norm


def layer_costs(model: nn.Sequential, image_size: int) -> dict[str, int]:
    """Work of each layer's forward pass on one image: multiply-adds, and one for each number that it puts out."""
    costs = dict.fromkeys((name for name, _ in model.named_children()), 0)

    def count(name: str, layer: nn.Module, output: Tensor) -> None:
        costs[name] += output[0].numel() * (1 + (layer.weight[0].numel() if isinstance(layer, nn.Conv2d | nn.Linear) else 0))

    meta = copy.deepcopy(model).to("meta").eval()
    for name, layer in meta.named_modules():
        if not list(layer.children()):
            owner = name.partition(".")[0]
            layer.register_forward_hook(lambda layer, _, output, owner=owner: count(owner, layer, output))
    meta(torch.empty(1, 3, image_size, image_size, device="meta"))
    return costs


def split(costs: dict[str, int], stages: int, given: Sequence[str] | None = None) -> list[list[str]]:
    """The layers' names, stage by stage: cut where the costliest stage costs least, or before the layers ``given``.

    Raises UserError for more stages than layers, and for a given split that is none.
    """
    names = list(costs)
    if stages > len(names):
        raise UserError(f"parallel.pipeline_stages: {stages} is more than the {len(names)} layers of the model")
    if given is not None:
        unknown = [name for name in given if name not in names[1:]]
        if unknown:
            able = ", ".join(names[1:])
            raise UserError(f"parallel.split: {unknown[0]!r} is no layer that a stage can begin with; those: {able}")
        cuts = [0, *(names.index(name) for name in given), len(names)]
        if cuts != sorted(set(cuts)) or len(cuts) != stages + 1:
            raise UserError(f"parallel.split: must name {stages - 1} layers in their order, for {stages} stages")
    else:
        cuts = _balanced(list(costs.values()), stages)
    return [names[start:stop] for start, stop in pairwise(cuts)]


def check_stages(model: nn.Sequential, parts: list[list[str]], given: Sequence[str] | None) -> None:
    """Raises UserError if a stage has no weights to train: ZeRO and bf16 optimizers cannot be made for such a stage."""
    layers = dict(model.named_children())
    for number, names in enumerate(parts):
        if not any(True for name in names for _ in layers[name].parameters()):
            key = "parallel.pipeline_stages" if given is None else "parallel.split"
            value = len(parts) if given is None else list(given)
            row = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            advice = "use fewer stages or set parallel.split" if given is None else "move the layers at which its stages begin"
            raise UserError(f"{key}: {value} leaves stage {number} ({row}) without weights; {advice}")


def _balanced(costs: Sequence[int], parts: int) -> list[int]:
    """Where to cut a row of ``costs`` into ``parts``, none empty, so that the largest sum is least; with both ends."""
    sums = [0, *accumulate(costs)]
    best = {(1, stop): (sums[stop], [0, stop]) for stop in range(1, len(costs) + 1)}
    for count in range(2, parts + 1):
        for stop in range(count, len(costs) + 1):
            best[count, stop] = min(
                (max(best[count - 1, cut][0], sums[stop] - sums[cut]), [*best[count - 1, cut][1], stop])
                for cut in range(count - 1, stop)
            )
    return best[parts, len(costs)][1]


class PipelineParallel(Engine):
    """Each rank holds one stage of the model, and ``model`` loses the weights of the others. ``parts``: the names of the layers of
    each stage."""

    def __init__(
        self,
        model: nn.Sequential,
        config: RunConfig,
        batch: BatchPlan,
        device: torch.device,
        parts: list[list[str]],
    ) -> None:
        import deepspeed
        from deepspeed.pipe import PipelineModule

        super().__init__(model, config, batch, device)
        self._stage_of = {name: stage for stage, names in enumerate(parts) for name in names}
        self._draws = Draws(model, config.train.seed, dist.get_rank() % batch.ranks, batch.ranks)
        layers = dict(model.named_children())
        stages = [Stage(OrderedDict((name, layers[name]) for name in names), config.train, self._draws) for names in parts]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its layers
            pipe = PipelineModule(
                stages,
                num_stages=len(parts),
                loss_fn=self._loss,
                partition_method="uniform",
                dynamic_shape=config.data.initial_size is not None,
            )
        for number, stage in enumerate(stages):
            if number != pipe.stage_id:
                stage.to("meta")  # else the pipe, and who gave the model, hold all of its weights on every rank
        optimizer = build_optimizer(pipe, config.optimizer, config.optimizer.base_lr)
        weights = parameters_of(pipe)
        engine, *_ = deepspeed.initialize(model=pipe, optimizer=optimizer, config=deepspeed_config(config, batch))
        if config.train.sync_batch_norm:
            synchronize_batch_norm(pipe, engine.grid.get_data_parallel_group())
        _free_after_backward(engine)
        self._adopt(
            engine, weights, GradNorm(engine, config.optimizer.clip_grad_norm, stages=engine.grid.get_pipe_parallel_group())
        )

    def _loss(self, outputs: Any, targets: tuple[Tensor, ...]) -> Tensor:
        labels, weights, *lam = targets  # scaled, see below
        return weighted_loss(outputs, labels, weights, 1.0, 1, self._smoothing, *lam)

    def step(self, batches: Iterator[Batch], learning_rate: float) -> Step:
        self._prepare(learning_rate)
        micro_batches = self._batch.ranks * self._batch.accumulation_steps
        taken: list[Batch] = []

        def loaded() -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
            for batch in batches:
                taken.append(batch)
                weights = to_device(batch.weights, self._device) * (micro_batches / batch.global_weight)
                labels = to_device(batch.labels, self._device)
                lam = () if batch.lam is None else (torch.full((), batch.lam, device=self._device),)
                # the last stage takes the targets alone
                yield self._images(batch) if self._engine.is_first_stage() else labels, (labels, weights, *lam)

        loss = self._engine.train_batch(loaded()).detach().clone().reshape(())
        keys = [key for batch in taken for key in batch.keys] if self._engine.is_first_stage() else []
        skipped = self._skipped()
        self._finish(skipped)
        return Step(loss, int(taken[0].global_weight) if taken else 0, keys, skipped)

    def _whole(self, own: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        grid = self._engine.grid
        whole: dict[str, Tensor] = {}
        for name in names:
            shape, dtype = self._shapes[name]
            value = own[name].contiguous() if name in own else torch.empty(shape, dtype=dtype, device=self._device)
            source = grid.stage_to_global(stage_id=self._stage_of[name.partition(".")[0]])
            dist.broadcast(value, source, group=grid.get_pipe_parallel_group())
            whole[name] = value
        return whole

    def _data_group(self) -> Any:
        return self._engine.grid.get_data_parallel_group()

    def _public(self, name: str) -> str:
        return name.partition(".")[2]  # without the stage's number


def _free_after_backward(engine: Any) -> None:
    """The last stage's outputs, by which DeepSpeed holds their inputs and the gradients of these for some micro-batches more."""
    from deepspeed.runtime.pipe.schedule import BackwardPass

    backward = engine._INSTRUCTION_MAP[BackwardPass]

    def and_free(engine: Any, buffer_id: int) -> None:
        backward(engine, buffer_id)
        engine.pipe_buffers["outputs"][buffer_id] = None
        engine.loss = engine.loss.detach()

    engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | {BackwardPass: and_free}
