"""Layers that every family shares."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import UserError

Activation = Literal["relu", "tanh"]
Stem = Literal["imagenet", "small"]
HeadKind = Literal["tower", "average"]
Value = Tensor | tuple[Tensor, ...]
"""What passes from layer to layer: the image, and in training the logits of auxiliary heads that it has passed."""


def stack(layers: Iterable[tuple[str, nn.Module]]) -> nn.Sequential:
    """An ordered list of named layers."""
    model = nn.Sequential()
    for name, layer in layers:
        model.add_module(name, layer)
    return model


def normalize(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in channels-last layout; mean and std are those of pixels from 0 to 1."""
    images = pixels.permute(0, 3, 1, 2).float()
    return images.sub_(_grey_levels(tuple(mean), pixels.device)).div_(_grey_levels(tuple(std), pixels.device))


@lru_cache
def _grey_levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """[1, 3, 1, 1], in grey levels; kept, since a copy to a GPU of what was not pinned waits for all of its work."""
    return torch.tensor(values, device=device).view(1, 3, 1, 1) * 255


def nonlinearity(name: Activation) -> nn.Module:
    """The non-linearity; ReLU overwrites its input, which no layer before it needs for its gradient."""
    return nn.ReLU(inplace=True) if name == "relu" else nn.Tanh()


def scaled(channels: int, width: int | None, base: int, divisor: int = 1) -> int:
    """``channels`` of a network whose first stage has ``base``, when that stage gets ``width`` of them."""
    if width is None:
        return channels
    if width % divisor:
        raise UserError(f"model.width: {width} does not divide by {divisor}, the number of towers")
    return max(1, round(channels * width / base / divisor)) * divisor


def average_head(channels: int, num_classes: int, dropout: float) -> list[tuple[str, nn.Module]]:
    """In place of a tower of fully connected layers: average over the image, dropout and one layer (Szegedy et al. 2014, 5)."""
    return [
        ("avgpool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("drop7", nn.Dropout(dropout)),
        ("head", nn.Linear(channels, num_classes)),
    ]


def conv_norm(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, batch_norm: bool = True, eps: float = 1e-5
) -> tuple[nn.Conv2d, nn.Module]:
    """A convolution, padded to keep the size at stride 1, and its batch norm; without that a bias takes its place."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=not batch_norm)
    return conv, BatchNorm2d(out_channels, eps) if batch_norm else nn.Identity()


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics and arithmetic are fp32 in every precision; input and output keep their own type.

    A half-precision engine leaves buffers in fp32 and halves the weights, which plain batch norm refuses.
    """

    group: Any = None
    """Process group whose ranks share their statistics in training; all of them take part in each forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.group is not None:
            return self._synchronized(x)
        if self.weight.dtype == torch.float32:
            return super().forward(x)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        assert self.momentum is not None
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, self.weight.float(), self.bias.float(), self.training, self.momentum, self.eps)

    def _synchronized(self, x: Tensor) -> Tensor:
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        values = x.float()
        mean, var, count = _shared_statistics(values.detach(), self.group)
        with torch.no_grad():
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)  # without bias, as torch's
        out: Tensor = _NormalizeTogether.apply(
            values, self.weight.float(), self.bias.float(), mean, var, count, self.eps, self.group
        )  # type: ignore[no-untyped-call]
        return out.to(x.dtype)


def synchronize_batch_norm(model: nn.Module, group: Any) -> None:
    """Let the model's batch norms share their training statistics over the ranks of ``group``; alone they stay as they are."""
    if dist.get_world_size(group) > 1:
        for module in model.modules():
            if isinstance(module, BatchNorm2d):
                module.group = group


def _shared_statistics(x: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Each channel's mean and biased variance over all ranks' [N, C, H, W], and the number of values a channel.

    Means and squared distances from them are combined (Chan et al. 1979), since a difference of large sums would lose the variance.
    """
    channels = x.shape[1]
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    own = torch.cat([mean, var, mean.new_full((1,), x.numel() // channels)])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group)
    of_all = torch.stack(parts)
    means, variances, counts = of_all[:, :channels], of_all[:, channels:-1], of_all[:, -1:]
    shares = counts / counts.sum()
    mean = (means * shares).sum(0)
    return mean, ((variances + (means - mean).square()) * shares).sum(0), counts.sum()


class _NormalizeTogether(torch.autograd.Function):
    """Batch norm by statistics that all ranks share; its gradient passes through every rank's part in them.

    The gradient of weight and bias is this rank's own, since the engine averages gradients over ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: Tensor, eps: float, group: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.group = eps, group
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        inverse = (var + ctx.eps).rsqrt()
        # as if the statistics were constants
        to_x, to_weight, to_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([to_bias, to_weight])
        dist.all_reduce(sums, group=ctx.group)
        of_mean, of_deviation = sums / count
        slope, shift = (weight * inverse * inverse * of_deviation, weight * inverse * of_mean)
        through_statistics = (x - _channels(mean)).mul_(_channels(slope)).add_(_channels(shift))
        return to_x.sub_(through_statistics), to_weight, to_bias, None, None, None, None, None


def _channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


class LocalResponseNorm(nn.Module):
    """``b = a / (k + alpha * sum of a^2 over the size nearest channels)^beta`` (Krizhevsky et al. 2012, 3.3).

    [N, C, H, W] to the same. torch's own divides alpha by ``size``, which the paper does not. The squares are fp32 in
    every precision: those of half-precision activations above 255 would overflow.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        squares = F.pad(x.float().square(), (0, 0, 0, 0, self.size // 2, (self.size - 1) // 2))
        total = squares[:, :channels]
        for shift in range(1, self.size):
            total = total + squares[:, shift : shift + channels]
        return (x * (self.k + self.alpha * total).pow(-self.beta)).to(x.dtype)


class ShortcutA(nn.Module):
    """Identity by striding, new channels zero: no parameters (He et al. 2015, 3.3, option A)."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def on_image(layer: Callable[[Tensor], Tensor], value: Value) -> Value:
    """Apply ``layer`` to the image and let auxiliary logits, where the value holds them, travel along."""
    if isinstance(value, tuple):
        image, *auxiliary = value
        return (layer(image), *auxiliary)
    return layer(value)
