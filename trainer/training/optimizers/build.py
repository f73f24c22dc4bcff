"""Builds the optimizer of a recipe, with the weights to which it applies weight decay."""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.schema import OptimizerConfig
from trainer.training.optimizers.registry import OPTIMIZERS, Groups

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)


def weight_groups(model: nn.Module, config: OptimizerConfig) -> Groups:
    """Return the optimizer's parameter groups.

    This is one group, or, with ``decay_norm_and_bias`` off, one group with weight decay and one
    without.

    Norms are recognized by layer type, because a name such as ``downsample.1`` does not identify
    one.
    """
    parameters = dict(model.named_parameters())
    if config.decay_norm_and_bias or not config.weight_decay:
        return [{"params": list(parameters.values()), "weight_decay": config.weight_decay}]
    norms = {name for name, module in model.named_modules() if isinstance(module, _NORMS)}
    free = {
        name
        for name in parameters
        if name.rpartition(".")[0] in norms or name.rpartition(".")[2] == "bias"
    }
    return [
        {
            "params": [p for name, p in parameters.items() if name not in free],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for name, p in parameters.items() if name in free], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, config: OptimizerConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """Build the optimizer of the recipe."""
    spec = OPTIMIZERS[config.name]
    options = {name: getattr(config, name) for name in spec.options}
    optimizer = spec.builder(weight_groups(model, config), learning_rate, **options)
    return _laying_out(optimizer) if spec.fused else optimizer


def _laying_out(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Register a hook that gives gradients and state the memory layout of their parameters.

    Fused optimizers assume that parameter, gradient and state share one memory layout, and are
    silently wrong otherwise. Layouts differ when state was restored for channels-last weights, and
    when contiguous fp32 masters get the channels-last gradients of 16-bit weights. The hook runs
    before each step.
    """

    def laid_out(value: Any, parameter: Tensor) -> Any:
        if value is None or value.shape != parameter.shape or value.stride() == parameter.stride():
            return value
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def lay_out(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = laid_out(parameter.grad, parameter)
                state = optimizer.state[parameter]
                for key, value in state.items():
                    state[key] = laid_out(value, parameter)

    optimizer.register_step_pre_hook(lay_out)
    return optimizer
