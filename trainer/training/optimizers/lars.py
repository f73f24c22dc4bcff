"""LARS (You et al. 2017), as in timm: no trust ratio for weights that are not decayed."""

from typing import TYPE_CHECKING

from trainer.training.optimizers.options import Momentum, Nesterov, check_nesterov
from trainer.training.optimizers.registry import (
    NEEDS_LAYER_NORMS,
    Groups,
    OptimizerSpec,
    register,
)

if TYPE_CHECKING:
    import torch


def lars(
    groups: Groups, learning_rate: float, *, momentum: Momentum = 0.9, nesterov: Nesterov = False
) -> "torch.optim.Optimizer":
    """Build LARS."""
    # imported here: timm imports torchvision, which adds two seconds to every rank's start
    from timm.optim.lars import Lars

    return Lars(groups, lr=learning_rate, momentum=momentum, nesterov=nesterov)


register(
    OptimizerSpec(
        "lars",
        lars,
        ("momentum_buffer",),
        zero_stages=(0,),
        precisions=("fp32",),
        limitation=NEEDS_LAYER_NORMS,
        validate=check_nesterov,
    )
)
