"""Layers that every family shares."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalize(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """uint8 [N, H, W, 3] to float32 [N, 3, H, W] in channels-last layout; mean and std are those of pixels from 0 to 1."""
    images = pixels.permute(0, 3, 1, 2).float()
    shift = torch.tensor(mean, device=pixels.device).view(1, 3, 1, 1) * 255
    scale = torch.tensor(std, device=pixels.device).view(1, 3, 1, 1) * 255
    return images.sub_(shift).div_(scale)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics and arithmetic are fp32 in every precision; input and output keep their own type.

    A half-precision engine leaves buffers in fp32 and halves the weights, which plain batch norm refuses.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == torch.float32:
            return super().forward(x)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        assert self.momentum is not None
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(
            x.float(), mean, var, self.weight.float(), self.bias.float(), self.training, self.momentum, self.eps
        ).to(x.dtype)


class ShortcutA(nn.Module):
    """Identity by striding, new channels zero: no parameters (He et al. 2015, 3.3, option A)."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
