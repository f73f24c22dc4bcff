"""The reference loop: one process, fp32, plain torch, the same global batches and micro-batches.

It does not depend on ranks, stages or DeepSpeed. Clipping, AdamW, label smoothing and moving
averages are torch's; mixing is timm's; LARS and LAMB follow the algorithms of their papers.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.schema import RunConfig
from trainer.data.transforms.mixup import Mix
from trainer.engine.dropout_rng import dropout_seed


class Lars(torch.optim.Optimizer):
    """LARS (You et al. 2017, algorithm 1) with Nesterov momentum.

    Weights without weight decay have no trust ratio.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                decay, velocity = (
                    group["weight_decay"],
                    self.state[weight].setdefault("velocity", torch.zeros_like(weight)),
                )
                norm, gradient_norm = weight.norm(), weight.grad.norm()
                trust = 1.0
                if decay and norm > 0 and gradient_norm > 0:
                    trust = 0.001 * norm / (gradient_norm + decay * norm + 1e-8)
                update = trust * (weight.grad + decay * weight)
                velocity.mul_(0.9).add_(update)
                weight.sub_(group["lr"] * (update + 0.9 * velocity))


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, algorithm 2), without a trust ratio for weights without decay."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        self._steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self._steps += 1
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                first = (
                    state.setdefault("first", torch.zeros_like(weight))
                    .mul_(0.9)
                    .add_(0.1 * weight.grad)
                )
                second = (
                    state.setdefault("second", torch.zeros_like(weight))
                    .mul_(0.999)
                    .add_(0.001 * weight.grad.square())
                )
                deviation = (second / (1 - 0.999**self._steps)).sqrt() + 1e-6
                update = first / (1 - 0.9**self._steps) / deviation + group["weight_decay"] * weight
                norm, update_norm = weight.norm(), update.norm()
                trust = (
                    norm / update_norm
                    if group["weight_decay"] and norm > 0 and update_norm > 0
                    else 1.0
                )
                weight.sub_(group["lr"] * trust * update)


def optimizer_of(model: nn.Module, config: RunConfig) -> torch.optim.Optimizer:
    decay, rate = config.optimizer.weight_decay, config.optimizer.base_lr
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "weight_decay": decay}]
    # in these networks, all vectors are gains or biases
    if not config.optimizer.decay_norm_and_bias:
        groups = [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay},
            {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
    if config.optimizer.name == "lars":
        return Lars(groups, rate)
    if config.optimizer.name == "lamb":
        return Lamb(groups, rate)
    if config.optimizer.name == "adamw":
        return torch.optim.AdamW(groups, lr=rate)
    return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)


def mixed(images: Tensor, mix: Mix | None) -> tuple[Tensor, float]:
    """Mix a batch as timm's Mixup._mix_batch does, with a given lambda and box."""
    if mix is None:
        return images, 1.0
    if mix.box is None:
        return images * mix.lam + images.flip(0) * (1.0 - mix.lam), mix.lam
    yl, yh, xl, xh = mix.box
    pasted = images.clone()
    pasted[:, :, yl:yh, xl:xh] = images.flip(0)[:, :, yl:yh, xl:xh]
    return pasted, 1.0 - (yh - yl) * (xh - xl) / (images.shape[2] * images.shape[3])


def losses_of(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Return one loss per sample.

    ``target``: int64 labels [N], or timm's mixed targets [N, classes], which are already smoothed.
    """
    if target.dim() == 1:
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    return torch.sum(-target * F.log_softmax(logits, dim=-1), dim=-1)


def train(
    model: nn.Module,
    config: RunConfig,
    data: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    mix_of: Callable[[int, int], Mix | None],
    steps: int,
    micro_batches: int,
    synced_ranks: int,
    skipped: Iterable[int],
) -> dict[str, Any]:
    """Train, and return losses and gradient norms by step, the final state and moving averages.

    ``data``: returns a step's images [N, 3, H, W], labels [N] and weights [N]. ``synced_ranks``:
    number of neighbouring micro-batches that pass through the network as one batch and share their
    batch-norm statistics. ``skipped``: steps whose gradients overflow fp16, so that the weights are
    not updated.
    """
    from timm.data.mixup import mixup_target  # imported here: takes seconds, needed only by rank 0

    model.train()
    optimizer = optimizer_of(model, config)
    average = torch.optim.swa_utils.AveragedModel(
        model,
        multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema or 0.0),
        use_buffers=True,
    )
    average.update_parameters(model)  # the first one copies
    position = [0, 0]
    for number, layer in enumerate(
        module for module in model.modules() if isinstance(module, nn.Dropout)
    ):
        layer.register_forward_pre_hook(
            lambda layer, inputs, number=number: (
                torch.manual_seed(dropout_seed(0, *position, number)) and None
            )
        )
    smoothing = config.train.label_smoothing
    losses: dict[int, float] = {}
    norms: dict[int, float | None] = {}
    for step in range(steps):
        optimizer.zero_grad()
        all_images, labels, weights = data(step)
        total = 0.0
        for first in range(0, micro_batches, synced_ranks):
            position[:] = step, first
            parts = []
            for part in range(first, first + synced_ranks):
                mix, target = mix_of(step, part), labels[part::micro_batches]
                images, lam = mixed(all_images[part::micro_batches], mix)
                if config.augment.mixup or config.augment.cutmix:
                    target = mixup_target(target, 10, lam, smoothing)
                parts.append((images, target, weights[part::micro_batches]))
            images, target, weight = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            outputs = model(images)
            main, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
            each = losses_of(main, target, smoothing)
            for head in auxiliary:
                each = each + 0.3 * losses_of(head, target, smoothing)
            loss = (each * weight).sum() / weights.sum()
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), config.optimizer.clip_grad_norm or math.inf
        )
        norms[step] = None if step in skipped else float(norm)
        if step not in skipped:
            optimizer.step()
            average.update_parameters(model)
        losses[step] = total
    return {
        "losses": losses,
        "norms": norms,
        "state": model.state_dict(),
        "averages": average.module.state_dict(),
    }
