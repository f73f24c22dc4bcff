"""The update rules, from torch and timm, and which weights they decay."""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.schema import OptimizerConfig

Group = dict[str, Any]

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def weight_groups(model: nn.Module, config: OptimizerConfig) -> list[Group]:
    """The model's parameters as one group, or, with ``decay_norm_and_bias`` off, as those that
    decay and those that do not.

    Norms are told by the kind of layer: a name such as ``downsample.1`` does not say that it is
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
    """sgd: torch's, whose velocity does not hold the learning rate, so that a change of it needs no
    momentum correction (Goyal et al. 2017, 3, remark 2); adamw: torch's (Loshchilov and Hutter
    2019); lars and lamb: timm's (You et al. 2017, 2020), without trust ratio on weights that do not
    decay. torch's are fused: one pass over memory, not four.
    """
    groups = weight_groups(model, config)
    betas = (config.betas[0], config.betas[1])
    if config.name == "adamw":
        return _laying_out(torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True))
    if config.name == "lamb":
        from timm.optim.lamb import (
            Lamb,
        )  # here: timm imports torchvision, two seconds of every rank's start

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
    """A fused update walks through weights, gradients and state as they lie in memory, and is
    silently wrong where they do not lie alike, as do state that was restored beside channels-last
    weights, and contiguous fp32 masters beside the channels-last gradients of 16-bit weights.
    Before each step all are laid out as the weights are.
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
