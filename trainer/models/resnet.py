"""Residual networks and the plain networks that they were compared with.

Source: He et al. 2015, "Deep Residual Learning", 3.3 and 4.
"""

from typing import Annotated, Any, Literal

from torch import Tensor, nn
from typing_extensions import Doc

from trainer.config.model_options import Activation, BatchNorm, Stem, Width
from trainer.errors import UserError
from trainer.models.batch_norm import BatchNorm2d
from trainer.models.layers import ShortcutA, conv_norm, nonlinearity, stack
from trainer.models.registry import LibraryWeights, ModelSpec, PublishedError, register
from trainer.models.state_dict_adapter import substitute

StrideIn = Literal["1x1", "3x3"]


class Projection(nn.Sequential):
    """1x1 convolution and batch norm: the shortcut at a change of shape (3.3, option B)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv, self.bn = conv_norm(in_channels, out_channels, 1, stride, batch_norm)


class Block(nn.Module):
    """Residual block, ``y = relu(F(x) + x)`` with convolutions F.

    Without a shortcut it is the plain ``y = relu(F(x))``. [N, in, H, W] to [N, out, H / stride, W /
    stride].
    """

    weight_layers: int

    def __init__(self, shortcut: nn.Module | None, activation: Activation) -> None:
        super().__init__()
        self.act = nonlinearity(activation)
        self.shortcut = shortcut

    def residual(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def last_norm(self) -> nn.Module:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        if self.shortcut is not None:
            out += self.shortcut(x)
        activated: Tensor = self.act(out)
        return activated


class BasicBlock(Block):
    """Block of two 3x3 convolutions."""

    weight_layers = 2
    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        stride_in: StrideIn,
        batch_norm: bool,
        **block: Any,
    ) -> None:
        super().__init__(**block)
        self.conv1, self.bn1 = conv_norm(in_channels, channels, 3, stride, batch_norm)
        self.conv2, self.bn2 = conv_norm(channels, channels, 3, 1, batch_norm)

    def residual(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        out: Tensor = self.bn2(self.conv2(x))
        return out

    @property
    def last_norm(self) -> nn.Module:
        return self.bn2


class Bottleneck(Block):
    """Block of a 1x1 convolution to a quarter of the channels, a 3x3, and a 1x1 back.

    The paper has the stride in the first 1x1. "v1.5" (Gross, Wilber 2016, and torchvision) has it
    in the 3x3, which skips no input.
    """

    weight_layers = 3
    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        stride_in: StrideIn,
        batch_norm: bool,
        **block: Any,
    ) -> None:
        super().__init__(**block)
        first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
        self.conv1, self.bn1 = conv_norm(in_channels, channels, 1, first, batch_norm)
        self.conv2, self.bn2 = conv_norm(channels, channels, 3, second, batch_norm)
        self.conv3, self.bn3 = conv_norm(channels, channels * self.expansion, 1, 1, batch_norm)

    def residual(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.bn2(self.conv2(x)))
        out: Tensor = self.bn3(self.conv3(x))
        return out

    @property
    def last_norm(self) -> nn.Module:
        return self.bn3


def resnet(
    num_classes: int,
    block: type[BasicBlock] | type[Bottleneck],
    blocks: tuple[int, ...],
    first_channels: int,
    residual: bool,
    *,
    width: Width | None = None,
    stem: Stem = "imagenet",
    activation: Activation = "relu",
    batch_norm: BatchNorm = True,
    stride_in: Annotated[
        Literal["1x1", "3x3"],
        Doc(
            "Convolution of a bottleneck block that has the stride: 1x1 as in the paper, 3x3 as in "
            '"v1.5".'
        ),
    ]
    | None = None,
    zero_init_gamma: Annotated[
        bool, Doc("Initialize every residual block to its shortcut (Goyal et al. 2017, 5.1).")
    ] = False,
) -> nn.Sequential:
    """Build a residual or plain network, from [N, 3, H, W] to [N, num_classes].

    Args:
        blocks: Number of blocks in each stage.
        stem: ``imagenet`` is a 7x7 convolution with stride 2 and pooling; ``small`` is a 3x3
            convolution only (4.2).
        width: Channels of the first stage; each further stage doubles them.
        stride_in: The convolution of a bottleneck that has the stride; the default is 3x3.
        zero_init_gamma: Initialize each block as its shortcut (Goyal et al. 2017, 5.1).

    Raises UserError for an option that does not apply to the network.
    """
    if stride_in is not None and block is BasicBlock:
        raise UserError(
            "model.stride_in: only networks of bottleneck blocks have it (depths 50, 101 and 152)"
        )
    if zero_init_gamma and not (residual and batch_norm):
        raise UserError(
            "model.zero_init_gamma: needs shortcuts and batch norm, else every block would output "
            "zeros"
        )
    channels = first_channels if width is None else width
    kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
    conv, norm = conv_norm(3, channels, kernel, stride, batch_norm)
    layers: list[tuple[str, nn.Module]] = [
        ("conv", conv),
        ("bn", norm),
        ("act", nonlinearity(activation)),
    ]
    if stem == "imagenet":
        layers.append(("maxpool", nn.MaxPool2d(3, 2, 1)))
    projection = len(blocks) == 4  # on ImageNet; option A on CIFAR (4.2)
    x, kind = channels, stride_in or "3x3"
    for stage, count in enumerate(blocks):
        inner = channels * 2**stage
        out = inner * block.expansion
        for number in range(count):
            stride = 2 if stage > 0 and number == 0 else 1
            shortcut = _shortcut(x, out, stride, projection, batch_norm) if residual else None
            made = block(
                x, inner, stride, kind, batch_norm, shortcut=shortcut, activation=activation
            )
            layers.append((f"stage{stage + 1}_{number}", made))
            x = out
    layers += [
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(x, num_classes)),
    ]
    model = stack(layers)
    _initialize(model, zero_init_gamma)
    return model


def _shortcut(
    in_channels: int, out_channels: int, stride: int, projection: bool, batch_norm: bool
) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    if projection:
        return Projection(in_channels, out_channels, stride, batch_norm)
    return ShortcutA(out_channels - in_channels, stride)


def _initialize(model: nn.Module, zero_init_gamma: bool) -> None:
    """Initialize convolutions from a normal distribution of variance 2 / fan-out; biases are 0.

    Source: He et al. 2015, "Delving deep into rectifiers".
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
        elif isinstance(module, Block) and zero_init_gamma:
            assert isinstance(module.last_norm, BatchNorm2d)
            nn.init.zeros_(module.last_norm.weight)


_CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
_IMAGENET_BLOCKS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
_TOP5_SOURCE = "He et al. 2015, table 3: one network, 10 crops, validation"
_TOP5_ERROR = {
    "resnet34": PublishedError(7.46, f"{_TOP5_SOURCE}, option B"),
    "resnet50": PublishedError(6.71, _TOP5_SOURCE),
    "resnet101": PublishedError(6.05, _TOP5_SOURCE),
    "resnet152": PublishedError(5.71, _TOP5_SOURCE),
    "plain34": PublishedError(10.02, _TOP5_SOURCE),
}
_CIFAR10_ERROR = {
    f"resnet{depth}": PublishedError(percent, "He et al. 2015, table 6: CIFAR-10 test, top-1")
    for depth, percent in {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.43}.items()
}
_THEIR_WEIGHTS = LibraryWeights(
    substitute(
        [
            (r"^conv\.", "conv1."),
            (r"^bn\.", "bn1."),
            (r"^stage(\d)_(\d+)\.", r"layer\1.\2."),
            (r"\.shortcut\.conv\.", ".downsample.0."),
            (r"\.shortcut\.bn\.", ".downsample.1."),
            (r"^head\.", "fc."),
        ]
    ),
    {"activation": "relu"},
)
"""torchvision and timm use the same names."""


def _register() -> None:
    """Register every depth, residual and plain.

    Because of padding no input size is an error by itself. Below the smallest input, a layer with
    stride has a single pixel as its input.
    """
    for family, residual in (("resnet", True), ("plain", False)):
        for depth in _CIFAR_DEPTHS:
            name = f"{family}{depth}"
            arguments = {
                "block": BasicBlock,
                "blocks": ((depth - 2) // 6,) * 3,
                "first_channels": 16,
            }
            arguments |= {"residual": residual, "stem": "small"}
            register(
                ModelSpec(
                    name,
                    2015,
                    family,
                    resnet,
                    {"imagenet": 9, "small": 3},
                    arguments,
                    cifar10_error=_CIFAR10_ERROR.get(name),
                )
            )
        for depth, (block, blocks) in _IMAGENET_BLOCKS.items():
            name = f"{family}{depth}"
            arguments = {
                "block": block,
                "blocks": blocks,
                "first_channels": 64,
                "residual": residual,
            }
            register(
                ModelSpec(
                    name,
                    2015,
                    family,
                    resnet,
                    {"imagenet": 17, "small": 5},
                    arguments,
                    top5_error=_TOP5_ERROR.get(name),
                    libraries=(
                        {"torchvision": _THEIR_WEIGHTS, "timm": _THEIR_WEIGHTS} if residual else {}
                    ),
                )
            )


_register()
