"""Layers that all model families share."""

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.config.model_options import Activation
from trainer.errors import UserError
from trainer.models.batch_norm import BatchNorm2d

Value = Tensor | tuple[Tensor, ...]
"""The value passed from layer to layer.

It is the image, or in training a tuple of the image and the logits of the auxiliary heads passed so
far.
"""


def stack(layers: Iterable[tuple[str, nn.Module]]) -> nn.Sequential:
    """Return the named layers as an ordered ``nn.Sequential``."""
    model = nn.Sequential()
    for name, layer in layers:
        model.add_module(name, layer)
    return model


def normalize(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Convert uint8 [N, H, W, 3] to float32 [N, 3, H, W] in channels-last layout.

    ``mean`` and ``std`` apply to pixel values from 0 to 1.
    """
    images = pixels.permute(0, 3, 1, 2).float()
    return images.sub_(_grey_levels(tuple(mean), pixels.device)).div_(
        _grey_levels(tuple(std), pixels.device)
    )


@lru_cache
def _grey_levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return ``values`` as a tensor [1, 3, 1, 1], multiplied by 255.

    It is cached, because copying unpinned memory to a GPU waits for all of the GPU's work.
    """
    return torch.tensor(values, device=device).view(1, 3, 1, 1) * 255


def nonlinearity(name: Activation) -> nn.Module:
    """Return the activation layer.

    ReLU overwrites its input, which no layer before it needs for its gradient.
    """
    return nn.ReLU(inplace=True) if name == "relu" else nn.Tanh()


def scaled(channels: int, width: int | None, base: int, divisor: int = 1) -> int:
    """Scale the number of channels of a layer to a network of a different width.

    The network's first stage has ``base`` channels; it gets ``width`` instead, unless ``width`` is
    None. Raises UserError if ``width`` is not divisible by ``divisor``.
    """
    if width is None:
        return channels
    if width % divisor:
        raise UserError(f"model.width: {width} is not divisible by {divisor}, the number of towers")
    return max(1, round(channels * width / base / divisor)) * divisor


def average_head(channels: int, num_classes: int, dropout: float) -> list[tuple[str, nn.Module]]:
    """Return a head of average pooling over the image, dropout and one linear layer.

    It replaces the stack of fully connected layers (Szegedy et al. 2014, 5).
    """
    return [
        ("avgpool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("drop7", nn.Dropout(dropout)),
        ("head", nn.Linear(channels, num_classes)),
    ]


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    batch_norm: bool = True,
    eps: float = 1e-5,
) -> tuple[nn.Conv2d, nn.Module]:
    """Return a convolution and its batch norm.

    The convolution is padded to keep the size at stride 1. Without batch norm it has a bias
    instead.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=not batch_norm)
    return conv, BatchNorm2d(out_channels, eps) if batch_norm else nn.Identity()


class LocalResponseNorm(nn.Module):
    """Local response normalization (Krizhevsky et al. 2012, 3.3).

    ``b = a / (k + alpha * sum of a^2 over the size nearest channels)^beta``, from [N, C, H, W] to
    the same shape. torch's own layer divides alpha by ``size``, which the paper does not. The
    squares are fp32 in every precision, because those of half-precision activations above 255 would
    overflow.
    """

    def __init__(
        self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0
    ) -> None:
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
    """Strided identity shortcut with zeros for new channels (He et al. 2015, 3.3, option A).

    It has no parameters.
    """

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))


def on_image(layer: Callable[[Tensor], Tensor], value: Value) -> Value:
    """Apply ``layer`` to the image and pass auxiliary logits on, if the value has any."""
    if isinstance(value, tuple):
        image, *auxiliary = value
        return (layer(image), *auxiliary)
    return layer(value)
