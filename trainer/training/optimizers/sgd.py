"""SGD with momentum, as in torch.

Its momentum buffer does not contain the learning rate, so that changing the rate needs no momentum
correction (Goyal et al. 2017, 3, remark 2).
"""

from typing import TYPE_CHECKING

from trainer.training.optimizers.options import Momentum, Nesterov, check_nesterov
from trainer.training.optimizers.registry import Groups, OptimizerSpec, register

if TYPE_CHECKING:
    import torch


def sgd(
    groups: Groups, learning_rate: float, *, momentum: Momentum = 0.9, nesterov: Nesterov = False
) -> "torch.optim.Optimizer":
    """Build SGD. It is fused: one pass over memory instead of four."""
    import torch

    return torch.optim.SGD(
        groups, lr=learning_rate, momentum=momentum, nesterov=nesterov, fused=True
    )


register(OptimizerSpec("sgd", sgd, ("momentum_buffer",), fused=True, validate=check_nesterov))
