"""The gradient norm over all weights, for clipping and logging, on every topology.

DeepSpeed computes this norm in five places, one for each of its optimizers. Two of them fail with
pipeline stages. With fp32 and ZeRO 0, clipping counts only the first stage. With ZeRO 1, the stages
are summed once per parameter group, which hangs if one stage has weights both with and without
weight decay and another has only one kind. These two are replaced here.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.engine.deepspeed import compat


class GradNorm:
    """The Euclidean norm of the last step's gradient before clipping.

    All ranks must take part in every call.

    Args:
        max_norm: The norm to which larger gradients are scaled; None disables clipping.
        buffers: Flat tensors that hold all of this rank's gradients after a step, if there are any.
        stages: Process group of the ranks that together hold one copy of the model; None if each
            rank holds all of it.
    """

    def __init__(
        self,
        engine: Any,
        max_norm: float | None,
        buffers: Sequence[Tensor] = (),
        stages: Any = None,
    ) -> None:
        self._engine, self._max_norm, self._buffers, self._stages = (
            engine,
            max_norm,
            buffers,
            stages,
        )
        # without a wrapper the optimizer updates the module's parameters directly, and nothing else
        # clips gradients or stores a norm
        kind = compat.optimizer_kind(engine.optimizer)
        self._unwrapped = kind is compat.OptimizerKind.PLAIN
        self._norm: Tensor | None = None
        self._loss_scale = 1.0
        if self._unwrapped:
            compat.replace_clipping(engine, self._clip)
            compat.keep_gradients_after_step(engine)  # until the next step, for ``value``
        elif stages is not None and kind is compat.OptimizerKind.ZERO_1_2:
            compat.replace_gradient_norm(engine.optimizer, self._norm_of_partitions)

    def begin_step(self, loss_scale: float) -> None:
        """Discard the last step's gradients.

        ``loss_scale`` is the factor by which the next gradients are too large.
        """
        self._norm, self._loss_scale = None, loss_scale
        if self._unwrapped:
            for parameter in self._engine.module.parameters():
                parameter.grad = None

    def value(self) -> float | None:
        """Return the norm, computed here if DeepSpeed did not need it.

        Returns None if the step was skipped because of an fp16 overflow.
        """
        if compat.gradients_overflowed(self._engine.optimizer):
            return None
        if self._norm is None:
            norm = None if self._unwrapped else self._engine.get_global_grad_norm()
            if norm is not None:
                return float(norm)
            gradients = self._gradients() if self._unwrapped else self._buffers
            self._norm = self._total(gradients, self._stages) / self._loss_scale
        return float(self._norm)

    def _gradients(self) -> list[Tensor]:
        return [
            parameter.grad
            for parameter in self._engine.module.parameters()
            if parameter.grad is not None
        ]

    def _clip(self) -> None:
        self._norm = self._total(self._gradients(), self._stages)
        torch.nn.utils.clip_grads_with_norm_(
            self._engine.module.parameters(), self._max_norm or 0.0, self._norm
        )

    def _norm_of_partitions(self) -> Tensor:
        """Return the norm for ZeRO with pipeline stages.

        Each rank holds a different part of the gradient: its partition of its stage's gradient.
        """
        return self._total(compat.gradient_partitions(self._engine.optimizer), dist.group.WORLD)

    def _total(self, gradients: Iterable[Tensor], group: Any) -> Tensor:
        """Return the norm of ``gradients`` combined over the ranks of ``group``.

        ``group`` contains the ranks that hold other parts of the gradient; None if there are none.
        """
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = (
            torch.linalg.vector_norm(torch.stack(norms))
            if norms
            else torch.zeros((), device=self._engine.device)
        )
        if group is None:
            return norm
        squared = norm.square()
        dist.all_reduce(squared, group=group)
        return squared.sqrt()
