"""CIFAR-style residual networks (He et al. 2015, section 4.2): 6n+2 layers of 3x3 convolutions on small images."""

import torch
from torch import Tensor, nn

from trainer.models.layers import BatchNorm2d, ShortcutA
from trainer.models.registry import Variant, register


class BasicBlock(nn.Module):
    """Two 3x3 convolutions F and the shortcut: ``y = relu(F(x) + x)``. [N, in, H, W] to [N, out, H/stride, W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm2d(out_channels)
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else ShortcutA(out_channels - in_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def cifar_resnet(depth: int, num_classes: int, width: int = 16) -> nn.Sequential:
    """An ordered list of layers: [N, 3, H, W] images to [N, num_classes] logits."""
    blocks = (depth - 2) // 6
    layers: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(3, width, 3, 1, 1, bias=False)),
        ("bn", BatchNorm2d(width)),
        ("relu", nn.ReLU()),
    ]
    channels = width
    for stage in range(3):
        for block in range(blocks):
            out = width * 2**stage
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append((f"stage{stage + 1}_{block}", BasicBlock(channels, out, stride)))
            channels = out
    layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("head", nn.Linear(channels, num_classes))]
    model = nn.Sequential()
    for name, layer in layers:
        model.add_module(name, layer)
    _initialize(model)
    return model


def _initialize(model: nn.Module) -> None:
    """Normal with variance 2 / fan-out for convolutions (He et al. 2015, "Delving deep into rectifiers"), zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)


for _depth in (8, 14, 20, 32, 44, 56, 110):
    register(Variant(f"resnet{_depth}", 2015, cifar_resnet, {"depth": _depth}, smallest_input=4))
