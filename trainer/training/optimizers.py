"""Optimizers from torch and timm, and the weights to which they apply weight decay."""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.schema import OptimizerConfig

Group = dict[str, Any]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)


def weight_groups(model: nn.Module, config: OptimizerConfig) -> list[Group]:
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
    """Build the optimizer of the recipe.

    - ``sgd``: torch's, whose momentum buffer does not contain the learning rate, so that changing
      it needs no momentum correction (Goyal et al. 2017, 3, remark 2)
    - ``adamw``: torch's (Loshchilov and Hutter 2019)
    - ``lars`` and ``lamb``: timm's (You et al. 2017, 2020), without trust ratio for weights that
      are not decayed

    torch's optimizers are fused: one pass over memory instead of four.
    """
    groups = weight_groups(model, config)
    betas = (config.betas[0], config.betas[1])
    if config.name == "adamw":
        return _laying_out(torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True))
    if config.name == "lamb":
        # imported here: timm imports torchvision, which adds two seconds to every rank's start
        from timm.optim.lamb import Lamb

        return Lamb(groups, lr=learning_rate, betas=betas, max_grad_norm=None)
    if config.name == "lars":
        from timm.optim.lars import Lars

        return Lars(groups, lr=learning_rate, momentum=config.momentum, nesterov=config.nesterov)
    return _laying_out(
        torch.optim.SGD(
            groups, lr=learning_rate, momentum=config.momentum, nesterov=config.nesterov, fused=True
        )
    )


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
