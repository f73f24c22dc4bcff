"""VGG: stacked 3x3 convolutions and 2x2 pooling.

Source: Simonyan, Zisserman 2015, "Very Deep Convolutional Networks", table 1.
"""

from typing import Annotated, Literal, cast

from torch import nn
from typing_extensions import Doc

from trainer.config.model_options import Activation, BatchNorm, Dropout, HeadKind, Stem, Width
from trainer.models.batch_norm import BatchNorm2d
from trainer.models.layers import average_head, nonlinearity, scaled, stack
from trainer.models.registry import LibraryWeights, ModelSpec, PublishedError, register
from trainer.models.state_dict_adapter import number_layers

_FULL = 4096
"""Outputs of a hidden fully connected layer."""
_CHANNELS = (64, 128, 256, 512, 512)
_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Number of convolutions in each stage, by depth: the paper's columns A, B, D, E."""


def vgg(
    num_classes: int,
    depth: int,
    *,
    width: Width | None = None,
    stem: Stem = "imagenet",
    activation: Activation = "relu",
    batch_norm: BatchNorm = False,
    dropout: Dropout = 0.5,
    head: HeadKind = "tower",
    filters: Annotated[
        Literal["stacked", "single"],
        Doc(
            "Convolutions of a stage: `stacked` is a sequence of 3x3 convolutions; `single` is one "
            "large convolution with the same receptive field."
        ),
    ] = "stacked",
) -> nn.Sequential:
    """Build VGG, from [N, 3, H, W] to [N, num_classes].

    Args:
        stem: ``small`` omits the first pooling and passes one average pixel to the fully connected
            layers.
        width: Channels of the first stage; all others, and the fully connected layers, scale in
            proportion.
        head: ``average`` is GoogLeNet's head.
        filters: ``single`` replaces each stage's n convolutions of 3x3 by one of 2n + 1, which has
            the same receptive field, as in the paper's shallow net of 5x5 filters (section 4).
    """
    layers: list[tuple[str, nn.Module]] = []
    channels = 3
    for stage, (base, count) in enumerate(
        zip(_CHANNELS, _CONVOLUTIONS[depth], strict=True), start=1
    ):
        out = scaled(base, width, _CHANNELS[0])
        kernels = (3,) * count if filters == "stacked" else (2 * count + 1,)
        for number, kernel in enumerate(kernels, start=1):
            layers.append(
                (f"conv{stage}_{number}", nn.Conv2d(channels, out, kernel, 1, kernel // 2))
            )
            if batch_norm:
                layers.append((f"bn{stage}_{number}", BatchNorm2d(out)))
            layers.append((f"act{stage}_{number}", nonlinearity(activation)))
            channels = out
        if stage > 1 or stem == "imagenet":
            layers.append((f"pool{stage}", nn.MaxPool2d(2, 2)))
    full, pooled = scaled(_FULL, width, _CHANNELS[0]), 7 if stem == "imagenet" else 1
    tower = [
        ("avgpool", nn.AdaptiveAvgPool2d(pooled)),  # the identity at 224 pixels
        ("flatten", nn.Flatten()),
        ("fc6", nn.Linear(channels * pooled**2, full)),
        ("act6", nonlinearity(activation)),
        ("drop6", nn.Dropout(dropout)),
        ("fc7", nn.Linear(full, full)),
        ("act7", nonlinearity(activation)),
        ("drop7", nn.Dropout(dropout)),
        ("head", nn.Linear(full, num_classes)),
    ]
    model = stack(
        [*layers, *(tower if head == "tower" else average_head(channels, num_classes, dropout))]
    )
    _initialize(model)
    return model


def _initialize(model: nn.Sequential) -> None:
    """Initialize weights as in Glorot, Bengio (2010) and biases with zeros.

    With this initialization the paper (3.1) trains every depth without first training a shallower
    net.
    """
    for layer in model.children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.bias is not None
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


_TIMM_NAMES = {
    "classifier.0.": "pre_logits.fc1.",
    "classifier.3.": "pre_logits.fc2.",
    "classifier.6.": "head.fc.",
}


def _timm_key_map(model: nn.Sequential) -> dict[str, str]:
    names = number_layers(model)
    for name, theirs in names.items():
        for torchvisions, timms in _TIMM_NAMES.items():
            if theirs.startswith(torchvisions):
                names[name] = theirs.replace(torchvisions, timms)
    return names


def _timm_convolutions(model: nn.Sequential) -> dict[str, int]:
    """Return the kernels of timm's fully connected layers, which cover the full image."""
    side = cast(nn.AdaptiveAvgPool2d, model.get_submodule("avgpool")).output_size
    assert isinstance(side, int)
    return {"pre_logits.fc1.weight": side, "pre_logits.fc2.weight": 1}


_THEIR_OPTIONS = {"activation": "relu", "head": "tower", "filters": "stacked"}
_TOP5_ERROR = {11: 10.4, 13: 9.9, 16: 8.1, 19: 8.0}
_SOURCE = "Simonyan, Zisserman 2015, table 3: one network, one scale, validation"
for _batch_norm in (False, True):
    for _depth in _CONVOLUTIONS:
        register(
            ModelSpec(
                f"vgg{_depth}{'_bn' if _batch_norm else ''}",
                2014,
                "vgg",
                vgg,
                {"imagenet": 32, "small": 16},
                {"depth": _depth, "batch_norm": _batch_norm},
                top5_error=(None if _batch_norm else PublishedError(_TOP5_ERROR[_depth], _SOURCE)),
                libraries={
                    "torchvision": LibraryWeights(number_layers, _THEIR_OPTIONS),
                    "timm": LibraryWeights(_timm_key_map, _THEIR_OPTIONS, _timm_convolutions),
                },
            )
        )
