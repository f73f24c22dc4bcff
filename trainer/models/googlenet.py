"""GoogLeNet: nine inception modules.

Source: Szegedy et al. 2014, "Going Deeper with Convolutions", table 1 and figure 3.

``googlenet2014`` is the paper's network: true 5x5 branches, response normalization, no batch norm.
``googlenet`` is torchvision's variant, with two quirks: batch norm everywhere, and 3x3 convolutions
where the paper has 5x5 (pytorch/vision#906).

Both have the paper's two auxiliary heads, which are active in training only. An auxiliary head
passes the image on and adds its logits: from there on, the value between two layers is a tuple
``(image, logits1[, logits2])``, and the network returns ``(logits, logits1, logits2)``. In
evaluation the value is always a plain tensor. The list of layers can therefore be split anywhere,
and the value at the split is a tensor or a tuple of tensors, as a pipeline engine requires.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Doc

from trainer.config.model_options import Activation, BatchNorm, Dropout, Stem, Width
from trainer.models.layers import (
    LocalResponseNorm,
    Value,
    conv_norm,
    nonlinearity,
    on_image,
    scaled,
    stack,
)
from trainer.models.registry import LibraryWeights, ModelSpec, PublishedError, register
from trainer.models.state_dict_adapter import substitute

_WIDTH = 64
_INCEPTIONS = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}
"""Channels: input, 1x1, 3x3 reduced and full, 5x5 reduced and full, pool projection (table 1)."""
_AUXILIARY_AFTER = {"4a": 1, "4d": 2}


class ConvUnit(nn.Module):
    """Convolution, optional batch norm, activation."""

    weight_layers = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        batch_norm: bool,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.conv, self.bn = conv_norm(
            in_channels, out_channels, kernel, stride, batch_norm, eps=1e-3
        )
        self.act = nonlinearity(activation)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class Inception(nn.Module):
    """Parallel 1x1, 3x3, 5x5 and pooling branches, with 1x1 reductions before the large ones.

    [N, in, H, W] to [N, out, H, W].
    """

    weight_layers = 2

    def __init__(
        self,
        channels: tuple[int, ...],
        five: int,
        batch_norm: bool,
        activation: Activation,
        reduction: bool = True,
    ) -> None:
        super().__init__()
        x, one, three_reduced, three, five_reduced, five_channels, pool = channels

        def unit(in_channels: int, out_channels: int, kernel: int) -> ConvUnit:
            return ConvUnit(in_channels, out_channels, kernel, 1, batch_norm, activation)

        self.branch1 = unit(x, one, 1)
        self.reduce3: nn.Module
        self.reduce5: nn.Module
        if reduction:
            self.reduce3, self.branch3 = unit(x, three_reduced, 1), unit(three_reduced, three, 3)
            self.reduce5, self.branch5 = (
                unit(x, five_reduced, 1),
                unit(five_reduced, five_channels, five),
            )
        else:
            self.weight_layers = 1
            self.reduce3, self.branch3 = nn.Identity(), unit(x, three, 3)
            self.reduce5, self.branch5 = nn.Identity(), unit(x, five_channels, five)
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.project = unit(x, pool, 1)

    def forward(self, value: Value) -> Value:
        return on_image(self._branches, value)

    def _branches(self, x: Tensor) -> Tensor:
        branches = [
            self.branch1(x),
            self.branch3(self.reduce3(x)),
            self.branch5(self.reduce5(x)),
            self.project(self.pool(x)),
        ]
        return torch.cat(branches, 1)


class Pool(nn.MaxPool2d):
    """Max pooling with stride 2 whose last window may cross the border.

    The sizes in the paper need this.
    """

    def __init__(self, kernel: int) -> None:
        super().__init__(kernel, 2, ceil_mode=True)

    def forward(self, value: Value) -> Value:  # type: ignore[override]
        return on_image(super().forward, value)


class AuxiliaryHead(nn.Module):
    """Auxiliary classifier, active in training only (section 5).

    It adds its logits [N, num_classes] to the value and passes the image on unchanged. With
    ``adaptive``, it uses torchvision's average pooling to 4x4 from any size. Otherwise it uses the
    paper's 5x5 average pooling with stride 3, which gives the same size at 224 pixels; smaller
    images are averaged to 4x4 too.
    """

    weight_layers = 0  # not on the longest path

    def __init__(
        self,
        channels: tuple[int, int, int],
        num_classes: int,
        adaptive: bool,
        batch_norm: bool,
        dropout: float,
        activation: Activation,
    ) -> None:
        super().__init__()
        in_channels, reduced, hidden = channels
        self.adaptive = adaptive
        self.conv = ConvUnit(in_channels, reduced, 1, 1, batch_norm, activation)
        self.fc1 = nn.Linear(reduced * 16, hidden)
        self.act = nonlinearity(activation)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, num_classes)

    def forward(self, value: Value) -> Value:
        if not self.training:
            return value
        image, *auxiliary = value if isinstance(value, tuple) else (value,)
        return (image, *auxiliary, self.logits(image))

    def logits(self, x: Tensor) -> Tensor:
        if not self.adaptive and min(x.shape[-2:]) >= 5:
            x = F.avg_pool2d(x, 5, 3)
        x = self.conv(F.adaptive_avg_pool2d(x, 4))
        x = self.dropout(self.act(self.fc1(x.flatten(1))))
        out: Tensor = self.fc2(x)
        return out


class Head(nn.Module):
    """Average pooling over the image, dropout and one fully connected layer (section 5)."""

    weight_layers = 1

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, value: Value) -> Value:
        return on_image(lambda x: self.fc(self.dropout(self.pool(x).flatten(1))), value)


def googlenet(
    num_classes: int,
    paper: bool,
    *,
    width: Width | None = None,
    stem: Stem = "imagenet",
    activation: Activation = "relu",
    batch_norm: BatchNorm = True,
    dropout: Dropout | None = None,
    reduction: Annotated[
        bool,
        Doc(
            "Whether 1x1 convolutions reduce the channels before the large filters of an inception "
            "module."
        ),
    ] = True,
) -> nn.Sequential:
    """Build GoogLeNet, from [N, 3, H, W] to [N, num_classes].

    In training it returns a tuple of those logits and the logits of both auxiliary heads.

    Args:
        paper: True for 5x5 convolutions, response normalization, 3x3 pooling before 5a and dropout
            0.4; False for torchvision's 3x3 convolutions, no response normalization, 2x2 pooling
            and dropout 0.2.
        stem: ``small`` has a 3x3 first convolution without stride or pooling.
        dropout: Dropout of the main head; the auxiliary heads keep 0.7.
        width: Channels of the first convolution; all others scale in proportion.
        reduction: If off, 3x3 and 5x5 filters see all channels. This is figure 2a, except that the
            pooled channels are still projected, so that modules keep their sizes.
    """

    def units(*channels: int) -> tuple[int, ...]:
        return tuple(scaled(c, width, _WIDTH) for c in channels)

    def unit(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> ConvUnit:
        return ConvUnit(in_channels, out_channels, kernel, stride, batch_norm, activation)

    def local_norm(name: str) -> list[tuple[str, nn.Module]]:
        return [(name, LocalResponseNorm(k=1.0, alpha=2e-5))] if paper else []

    first, third = units(64, 192)
    large = stem == "imagenet"
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", unit(3, first, 7, 2) if large else unit(3, first, 3))
    ]
    layers += [("pool1", Pool(3))] if large else []
    layers += [
        *local_norm("norm1"),
        ("conv2", unit(first, first, 1)),
        ("conv3", unit(first, third, 3)),
        *local_norm("norm2"),
    ]
    layers.append(("pool2", Pool(3)))
    x = third
    for name, channels in _INCEPTIONS.items():
        if name == "4a":
            layers.append(("pool3", Pool(3)))
        elif name == "5a":
            layers.append(("pool4", Pool(3 if paper else 2)))
        _, *inner = units(*channels)
        layers.append(
            (
                f"inception{name}",
                Inception((x, *inner), 5 if paper else 3, batch_norm, activation, reduction),
            )
        )
        x = inner[0] + inner[2] + inner[4] + inner[5]
        if name in _AUXILIARY_AFTER:
            reduced, hidden = units(128, 1024)
            head = AuxiliaryHead(
                (x, reduced, hidden), num_classes, not paper, batch_norm, 0.7, activation
            )
            layers.append((f"aux{_AUXILIARY_AFTER[name]}", head))
    default_dropout = 0.4 if paper else 0.2
    layers.append(("head", Head(x, num_classes, default_dropout if dropout is None else dropout)))
    model = stack(layers)
    (_initialize_glorot if paper else _initialize_normal)(model)
    return model


def _initialize_glorot(model: nn.Module) -> None:
    """Initialize with Glorot weights and biases 0.2, or 0 in the last layers.

    The paper specifies none; these values are those of its Caffe version (bvlc_googlenet).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.constant_(module.bias, 0.0 if name.endswith((".fc", ".fc2")) else 0.2)


def _initialize_normal(model: nn.Module) -> None:
    """Initialize with N(0, 0.01), as usual for the batch norm variants.

    The scale of a convolution before batch norm does not matter.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


_TORCHVISION_NAMES = [
    (r"\.reduce3\.", ".branch2.0."),
    (r"\.branch3\.", ".branch2.1."),
    (r"\.reduce5\.", ".branch3.0."),
    (r"\.branch5\.", ".branch3.1."),
    (r"\.project\.", ".branch4.1."),
    (r"^head\.fc\.", "fc."),
]
register(
    ModelSpec(
        "googlenet",
        2014,
        "googlenet",
        googlenet,
        {"imagenet": 15, "small": 4},
        {"paper": False},
        libraries={
            "torchvision": LibraryWeights(
                substitute(_TORCHVISION_NAMES),
                {"activation": "relu", "reduction": True},
                half_range=True,
            )
        },
    )
)
register(
    ModelSpec(
        "googlenet2014",
        2014,
        "googlenet",
        googlenet,
        {"imagenet": 31, "small": 8},
        {"paper": True, "batch_norm": False},
        top5_error=PublishedError(
            10.07, "Szegedy et al. 2014, table 3: one network, one crop, validation"
        ),
    )
)
