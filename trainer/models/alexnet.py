"""AlexNet: five convolutions and three fully connected layers.

``alexnet2012`` is the network of Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep
Convolutional Neural Networks" (2012). The paper's two GPUs are the two groups of its convolutions.
``alexnet`` is the single-tower network of Krizhevsky, "One weird trick for parallelizing
convolutional neural networks" (2014), without response normalization, as in torchvision.
"""

from torch import nn

from trainer.config.model_options import Activation, Dropout, HeadKind, Stem, Width
from trainer.models.layers import LocalResponseNorm, average_head, nonlinearity, scaled, stack
from trainer.models.registry import LibraryWeights, ModelSpec, PublishedError, register
from trainer.models.state_dict_adapter import number_layers

_FULL = 4096
"""Outputs of a hidden fully connected layer."""


def alexnet(
    num_classes: int,
    channels: tuple[int, int, int, int, int],
    towers: int,
    *,
    width: Width | None = None,
    stem: Stem = "imagenet",
    activation: Activation = "relu",
    dropout: Dropout = 0.5,
    head: HeadKind = "tower",
) -> nn.Sequential:
    """Build AlexNet, from [N, 3, H, W] to [N, num_classes].

    Args:
        towers: 2 adds response normalization, and groups the convolutions at which the paper's two
            GPUs do not communicate (2, 4 and 5).
        stem: ``small`` has a 3x3 first convolution without stride, and one average pixel before the
            fully connected layers.
        width: Channels of the first convolution; all others, and the fully connected layers, scale
            in proportion.
        head: ``average`` is GoogLeNet's head.
    """
    c1, c2, c3, c4, c5 = (scaled(c, width, channels[0], towers) for c in channels)
    full = scaled(_FULL, width, channels[0])
    first = nn.Conv2d(3, c1, 11, 4, 2) if stem == "imagenet" else nn.Conv2d(3, c1, 3, 1, 1)
    convolutions = [
        first,
        nn.Conv2d(c1, c2, 5, 1, 2, groups=towers),
        nn.Conv2d(c2, c3, 3, 1, 1),
        nn.Conv2d(c3, c4, 3, 1, 1, groups=towers),
        nn.Conv2d(c4, c5, 3, 1, 1, groups=towers),
    ]
    layers: list[tuple[str, nn.Module]] = []
    for number, convolution in enumerate(convolutions, start=1):
        layers += [(f"conv{number}", convolution), (f"act{number}", nonlinearity(activation))]
        if number <= 2 and towers > 1:
            layers.append((f"norm{number}", LocalResponseNorm()))
        if number in (1, 2, 5):
            # overlapping windows: section 3.4 of the paper
            layers.append((f"pool{number}", nn.MaxPool2d(3, 2)))
    pooled = 6 if stem == "imagenet" else 1
    tower = [
        ("avgpool", nn.AdaptiveAvgPool2d(pooled)),  # the identity at 224 pixels
        ("flatten", nn.Flatten()),
        ("drop6", nn.Dropout(dropout)),
        ("fc6", nn.Linear(c5 * pooled**2, full)),
        ("act6", nonlinearity(activation)),
        ("drop7", nn.Dropout(dropout)),
        ("fc7", nn.Linear(full, full)),
        ("act7", nonlinearity(activation)),
        ("head", nn.Linear(full, num_classes)),
    ]
    model = stack(
        [*layers, *(tower if head == "tower" else average_head(c5, num_classes, dropout))]
    )
    if towers > 1:
        _initialize_2012(model)
    return model


def _initialize_2012(model: nn.Sequential) -> None:
    """Initialize weights with N(0, 0.01) and biases with 1 or 0 (2012, section 5).

    Biases are 1 in convolutions 2, 4, 5 and the hidden fully connected layers, and 0 elsewhere. The
    2014 paper specifies no initialization: the single tower keeps the framework's default, uniform
    within 1 / sqrt(fan-in).
    """
    for name, layer in model.named_children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert layer.bias is not None
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.constant_(
                layer.bias, 1.0 if name in ("conv2", "conv4", "conv5", "fc6", "fc7") else 0.0
            )


_SMALLEST = {"imagenet": 63, "small": 15}
register(
    ModelSpec(
        "alexnet",
        2012,
        "alexnet",
        alexnet,
        _SMALLEST,
        {"channels": (64, 192, 384, 256, 256), "towers": 1},
        libraries={
            "torchvision": LibraryWeights(number_layers, {"activation": "relu", "head": "tower"})
        },
    )
)
register(
    ModelSpec(
        "alexnet2012",
        2012,
        "alexnet",
        alexnet,
        _SMALLEST,
        {"channels": (96, 256, 384, 384, 256), "towers": 2},
        top5_error=PublishedError(18.2, "Krizhevsky et al. 2012, table 2: one network, validation"),
    )
)
