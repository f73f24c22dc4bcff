"""Study: fully connected layers against an average over the image (GoogLeNet).

Counts where the parameters are, and how many the average saves.
"""

from pathlib import Path

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

HEADS = ("tower", "average")
NETWORKS = ("alexnet2012", "vgg16")
TOLERANCE = 0.5
"""Points of top-1 by which the average may be worse and still "replace" the fully connected layers.
"""


def trainings(scale: Scale) -> list[Training]:
    keys = (
        "model.name=vgg11_bn",
        "model.stem=small",
        "model.width=8",
        f"train.epochs={scale.choose(3, 6)}",
    )
    return [
        Training(
            f"vgg11-{head}",
            seed,
            scale.train_samples,
            scale.val_samples,
            (*keys, f"model.head={head}"),
        )
        for seed in range(scale.seeds)
        for head in HEADS
    ]


def parameters(name: str, **options: object) -> dict[str, int]:
    """Return the parameters in convolutions and in fully connected layers, for ImageNet's 1,000
    classes.
    """
    with torch.device("meta"):
        model = build_model(name, 1000, 224, **options)
    return {
        "convolutions": measure.parameter_share(model, nn.Conv2d),
        "fully_connected": measure.parameter_share(model, nn.Linear),
        "all": measure.count_parameters(model),
    }


def measured(runs: Runs, scale: Scale) -> Figures:
    tops = {head: [t for t in trainings(scale) if t.name == f"vgg11-{head}"] for head in HEADS}
    return {
        "parameters": {
            name: {head: parameters(name, head=head) for head in HEADS} for name in NETWORKS
        },
        "trained_parameters": {
            head: measure.count_parameters(measure.trained(runs, tops[head][0])) for head in HEADS
        },
        "top1_percent": {
            head: mean_std([runs.top1(training) for training in tops[head]]) for head in HEADS
        },
    }


def judge(figures: Figures) -> list[Claim]:
    claims = []
    for name in NETWORKS:
        tower, average = (
            figures["parameters"][name]["tower"],
            figures["parameters"][name]["average"],
        )
        share, saved = tower["fully_connected"] / tower["all"], tower["all"] - average["all"]
        why = (
            f"{share:.1%} of {tower['all'] / 1e6:.2f}M are in the fully connected layers; "
            f"{saved / 1e6:.2f}M fewer without them"
        )
        claims.append(
            Claim(
                "I5",
                f"{name}: the average saves millions of parameters",
                verdict_if(share > 0.5 and saved >= 2e6),
                why,
            )
        )
    tops = figures["top1_percent"]
    gains = [a - b for a, b in zip(tops["average"]["each"], tops["tower"]["each"], strict=True)]
    text = f"the average costs at most {TOLERANCE} points of top-1"
    claims.append(
        Claim(
            "I5", text, verdict_by_seeds(gains, -TOLERANCE), differences_text(gains, unit=" points")
        )
    )
    return claims


def plot(figures: Figures, file: Path) -> None:
    with plots.panels(2, "Fully connected layers against an average over the image", file) as (
        sizes,
        accuracy,
    ):
        labels = []
        for place, (name, head) in enumerate((n, h) for n in NETWORKS for h in HEADS):
            values = figures["parameters"][name][head]
            convolutions, full = values["convolutions"] / 1e6, values["fully_connected"] / 1e6
            sizes.bar(
                place, convolutions, color=plots.BLUE, label="convolutions" if place == 0 else None
            )
            sizes.bar(
                place,
                full,
                bottom=convolutions,
                color=plots.ORANGE,
                label="fully connected" if place == 0 else None,
            )
            sizes.annotate(
                f"{convolutions + full:.1f}M",
                (place, convolutions + full),
                ha="center",
                va="bottom",
            )
            labels.append(f"{name}\n{head}")
        sizes.set_xticks(range(len(labels)), labels)
        sizes.set_ylabel("parameters (millions), 1,000 classes")
        sizes.legend(frameon=False)
        plots.points(
            accuracy,
            HEADS,
            [figures["top1_percent"][head] for head in HEADS],
            (plots.ORANGE, plots.BLUE),
        )
        accuracy.set_ylabel("top-1 on Fashion-MNIST (%), small VGG-11")


def paragraph(figures: Figures) -> str:
    vgg, alexnet = figures["parameters"]["vgg16"], figures["parameters"]["alexnet2012"]
    small, tops = figures["trained_parameters"], figures["top1_percent"]
    return (
        f"{vgg['tower']['fully_connected'] / 1e6:.1f}M of VGG-16's "
        f"{vgg['tower']['all'] / 1e6:.1f}M parameters are in its three fully connected layers, and "
        f"{alexnet['tower']['fully_connected'] / 1e6:.1f}M of AlexNet's "
        f"{alexnet['tower']['all'] / 1e6:.1f}M. With an average over the image and a single fully "
        f"connected layer, as in GoogLeNet, {vgg['average']['all'] / 1e6:.1f}M and "
        f"{alexnet['average']['all'] / 1e6:.1f}M remain. VGG-11 with an eighth of the channels, "
        f"trained on Fashion-MNIST with three fully connected layers: {small['tower']:,} "
        f"parameters, top-1 {format_mean_std(tops['tower'])}%; with the average: "
        f"{small['average']:,}, {format_mean_std(tops['average'])}%. (At 28 pixels the last "
        "feature map has a single pixel, so only the fully connected layers differ.)"
    )


STUDY = Study(
    name="pool-head",
    statements=("I5",),
    question="Which layers hold AlexNet's and VGG's parameters, and what does an average over the "
    "image instead of the fully connected layers cost?",
    rule="Parameters: borne out if more than half are in the fully connected layers and the "
    "average saves at least 2 million. Accuracy: borne out if the network with the average loses "
    f"at most {TOLERANCE} points of top-1 in each of at least 3 seeds, not borne out if it loses "
    "more in each, else undecided.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
