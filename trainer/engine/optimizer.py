"""The update rules, from torch."""

import torch
from torch import nn

from trainer.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
    """SGD with momentum; weight decay on every parameter, as in He et al. 2015."""
    return torch.optim.SGD(
        model.parameters(),
        lr=learning_rate,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
