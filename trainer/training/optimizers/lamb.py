"""LAMB (You et al. 2020), as in timm: no trust ratio for weights that are not decayed."""

from typing import TYPE_CHECKING

from trainer.training.optimizers.options import BETAS, Betas
from trainer.training.optimizers.registry import (
    NEEDS_LAYER_NORMS,
    Groups,
    OptimizerSpec,
    register,
)

if TYPE_CHECKING:
    import torch


def lamb(groups: Groups, learning_rate: float, *, betas: Betas = BETAS) -> "torch.optim.Optimizer":
    """Build LAMB, without its own clipping of gradients."""
    # imported here: timm imports torchvision, which adds two seconds to every rank's start
    from timm.optim.lamb import Lamb

    return Lamb(groups, lr=learning_rate, betas=(betas[0], betas[1]), max_grad_norm=None)


register(
    OptimizerSpec(
        "lamb",
        lamb,
        ("exp_avg", "exp_avg_sq"),
        step_counter="group",
        zero_stages=(0,),
        precisions=("fp32",),
        limitation=NEEDS_LAYER_NORMS,
    )
)
