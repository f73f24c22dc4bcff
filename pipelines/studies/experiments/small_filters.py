"""Study: stacked 3x3 convolutions against one large filter with the same receptive field.

Source: Simonyan, Zisserman 2015, sections 2.3 and 4.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.studies.framework import measure, plots
from pipelines.studies.framework.runner import Runs
from pipelines.studies.framework.study import (
    Claim,
    Figures,
    Scale,
    Study,
    Training,
    differences_text,
    format_mean_std,
    mean_std,
    verdict_by_seeds,
    verdict_if,
)
from trainer.models import build_model
from trainer.models.model_info import forward_costs

KINDS = ("stacked", "single")
_STAGE = "3"  # the first stage of VGG-16 with three convolutions


def trainings(scale: Scale) -> list[Training]:
    keys = (
        "model.name=vgg16_bn",
        "model.stem=small",
        "model.width=8",
        f"train.epochs={scale.choose(3, 6)}",
    )
    return [
        Training(
            f"vgg16-{kind}",
            seed,
            scale.train_samples,
            scale.val_samples,
            (*keys, f"model.filters={kind}"),
        )
        for seed in range(scale.seeds)
        for kind in KINDS
    ]


def stage_layers(kind: str, width: int) -> nn.Sequential:
    """Return the convolutions and non-linearities of VGG-16's third stage.

    ``width``: channels in the first stage.
    """
    model = build_model("vgg16", 10, width=width, filters=kind)
    return nn.Sequential(
        *(
            layer
            for name, layer in model.named_children()
            if name.startswith((f"conv{_STAGE}_", f"act{_STAGE}_"))
        )
    )


def computed(kind: str) -> dict[str, Any]:
    """Return the measured and counted figures of the stage, and those of all of VGG-16 at 224
    pixels.
    """
    torch.manual_seed(0)
    layers = stage_layers(kind, 16)
    side = measure.receptive_field(layers, layers[0].in_channels, 15)  # type: ignore[arg-type]
    with torch.device("meta"):
        stage, network = stage_layers(kind, 64), build_model("vgg16", 1000, filters=kind)
        multiply_adds, _ = forward_costs(network, 224)
    square = sum(layer.weight[0, 0].numel() for layer in stage if isinstance(layer, nn.Conv2d))
    return {
        "receptive_field_pixels": side,
        "weights_per_channel_pair": square,
        "non_linearities": sum(isinstance(layer, nn.ReLU) for layer in stage),
        "vgg16_convolution_parameters": measure.parameter_share(network, nn.Conv2d),
        "vgg16_multiply_adds": multiply_adds,
    }


def measured(runs: Runs, scale: Scale) -> Figures:
    figures: Figures = {kind: computed(kind) for kind in KINDS}
    for kind in KINDS:
        by_seed = [training for training in trainings(scale) if training.name == f"vgg16-{kind}"]
        figures[kind]["top1_percent"] = mean_std([runs.top1(training) for training in by_seed])
    return figures


def judge(figures: Figures) -> list[Claim]:
    stacked, single = figures["stacked"], figures["single"]
    fields = (stacked["receptive_field_pixels"], single["receptive_field_pixels"])
    weights = (stacked["weights_per_channel_pair"], single["weights_per_channel_pair"])
    bends = (stacked["non_linearities"], single["non_linearities"])
    gains = [
        a - b
        for a, b in zip(
            stacked["top1_percent"]["each"], single["top1_percent"]["each"], strict=True
        )
    ]
    return [
        Claim(
            "I3",
            "three 3x3 convolutions have the receptive field of one 7x7",
            verdict_if(fields == (7, 7)),
            f"{fields[0]} and {fields[1]} pixels",
        ),
        Claim(
            "I3",
            "they have fewer weights",
            verdict_if(weights[0] < weights[1]),
            f"{weights[0]} C² and {weights[1]} C²",
        ),
        Claim(
            "I3",
            "they have more non-linearities",
            verdict_if(bends[0] > bends[1]),
            f"{bends[0]} and {bends[1]}",
        ),
        Claim(
            "I3",
            "a network of them is more accurate",
            verdict_by_seeds(gains),
            differences_text(gains, unit=" points"),
        ),
    ]


def plot(figures: Figures, file: Path) -> None:
    with plots.panels(
        3, "VGG-16: stages of 3x3 filters against one large filter per stage", file
    ) as (weights, size, accuracy):
        colours = (plots.BLUE, plots.ORANGE)
        for axes, key, scale, label in (
            (weights, "weights_per_channel_pair", 1, "weights in a stage / channels²"),
            (
                size,
                "vgg16_convolution_parameters",
                1e-6,
                "parameters of all convolutions (millions)",
            ),
        ):
            values = [
                {"mean": figures[kind][key] * scale, "each": [figures[kind][key] * scale]}
                for kind in KINDS
            ]
            plots.bars(
                axes, ("three 3x3", "one 7x7") if axes is weights else KINDS, values, colours
            )
            axes.set_ylabel(label)
        plots.points(accuracy, KINDS, [figures[kind]["top1_percent"] for kind in KINDS], colours)
        accuracy.set_ylabel("top-1 on Fashion-MNIST (%)")


def paragraph(figures: Figures) -> str:
    stacked, single = figures["stacked"], figures["single"]
    return (
        "The middle pixel of the output of three 3x3 convolutions depends on a square of "
        f"{stacked['receptive_field_pixels']} by {stacked['receptive_field_pixels']} input pixels "
        "(those with a nonzero gradient), that of one 7x7 convolution on "
        f"{single['receptive_field_pixels']} by {single['receptive_field_pixels']}. From C to C "
        f"channels, the former have {stacked['weights_per_channel_pair']} C² weights and "
        f"{stacked['non_linearities']} non-linearities, the latter "
        f"{single['weights_per_channel_pair']} C² and {single['non_linearities']}. The "
        "convolutions of VGG-16 have "
        f"{stacked['vgg16_convolution_parameters'] / 1e6:.1f}M parameters and "
        f"{stacked['vgg16_multiply_adds'] / 1e9:.1f}G multiply-adds; with one large filter per "
        f"stage, {single['vgg16_convolution_parameters'] / 1e6:.1f}M and "
        f"{single['vgg16_multiply_adds'] / 1e9:.1f}G. Trained with an eighth of the channels on "
        f"Fashion-MNIST: top-1 {format_mean_std(stacked['top1_percent'])}% and "
        f"{format_mean_std(single['top1_percent'])}%."
    )


STUDY = Study(
    name="small-filters",
    statements=("I3",),
    question="Do three 3x3 convolutions have the receptive field of one 7x7 with fewer weights and "
    "more non-linearities, and are they more accurate?",
    rule="Receptive field: borne out if both are measured as 7 pixels. Weights, non-linearities: "
    "borne out if there are fewer and more; they are counted. Accuracy: borne out if the stacked "
    "network has the higher top-1 in each of at least 3 seeds, not borne out if in none, else "
    "undecided.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
