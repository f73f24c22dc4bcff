"""Study: inception modules with and without the 1x1 convolutions before their large filters.

Source: Szegedy et al. 2014, figure 2.
"""

from pathlib import Path
from typing import Any

import torch

from pipelines.studies.framework import plots
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
from trainer.models.state_dict_adapter import auxiliary_names

WIDTH, NARROW = 16, 11
"""Channels of the first convolution.

WIDTH: of the two networks that differ only in reduction. NARROW: of the network without reduction
that is narrowed to the multiply-adds of the network with it.
"""
SIDE = 28
NETWORKS = {
    "reduced": ("model.reduction=true", f"model.width={WIDTH}"),
    "unreduced": ("model.reduction=false", f"model.width={WIDTH}"),
    "unreduced, narrow": ("model.reduction=false", f"model.width={NARROW}"),
}


def _name(network: str) -> str:
    return "googlenet-" + network.replace(", ", "-")


def trainings(scale: Scale) -> list[Training]:
    """Return the trainings. They are the most expensive ones, so they use fewer images."""
    keys = ("model.name=googlenet", "model.stem=small", "train.epochs=2")
    return [
        Training(_name(network), seed, scale.choose(4096, 8192), scale.val_samples, (*keys, *more))
        for seed in range(scale.seeds)
        for network, more in NETWORKS.items()
    ]


def costs(name: str, classes: int, side: int, **options: Any) -> dict[str, int]:
    """Return the parameters (without auxiliary heads) and the multiply-adds per image."""
    with torch.device("meta"):
        model = build_model(name, classes, side, **options)
        auxiliary = set(auxiliary_names(model))
        parameters = sum(p.numel() for key, p in model.named_parameters() if key not in auxiliary)
        return {"parameters": parameters, "multiply_adds": forward_costs(model, side)[0]}


def measured(runs: Runs, scale: Scale) -> Figures:
    small = {"stem": "small"}
    options = {network: small | {"reduction": network == "reduced"} for network in NETWORKS}
    figures: Figures = {
        "googlenet2014": {
            network: costs("googlenet2014", 1000, 224, reduction=network == "reduced")
            for network in ("reduced", "unreduced")
        },
        "trained": {},
    }
    for network in NETWORKS:
        by_seed = [training for training in trainings(scale) if training.name == _name(network)]
        width = NARROW if network.endswith("narrow") else WIDTH
        figures["trained"][network] = costs(
            "googlenet", 10, SIDE, width=width, **options[network]
        ) | {
            "top1_percent": mean_std([runs.top1(training) for training in by_seed]),
            "images_per_second": mean_std(
                [runs.outcome(training)["images_per_second"] for training in by_seed], 1
            ),
        }
    return figures


def judge(figures: Figures) -> list[Claim]:
    paper, trained = figures["googlenet2014"], figures["trained"]
    claims = []
    for key, unit in (("multiply_adds", "multiply-adds"), ("parameters", "parameters")):
        with_, without = paper["reduced"][key], paper["unreduced"][key]
        why = f"{with_ / 1e6:,.0f}M and {without / 1e6:,.0f}M, {without / with_:.1f} times"
        claims.append(
            Claim(
                "I4",
                f"GoogLeNet with 1x1 reduction needs fewer {unit}",
                verdict_if(with_ < without),
                why,
            )
        )
    reduced = trained["reduced"]["top1_percent"]["each"]
    gains = [
        a - b
        for a, b in zip(reduced, trained["unreduced, narrow"]["top1_percent"]["each"], strict=True)
    ]
    text = (
        "GoogLeNet with 1x1 reduction is more accurate than a narrower one without, at about as "
        "many multiply-adds"
    )
    claims.append(
        Claim("I4", text, verdict_by_seeds(gains), differences_text(gains, unit=" points"))
    )
    return claims


def plot(figures: Figures, file: Path) -> None:
    with plots.panels(2, "Inception modules with and without 1x1 reduction", file) as (
        work,
        accuracy,
    ):
        paper = figures["googlenet2014"]
        values = [paper[n]["multiply_adds"] / 1e9 for n in ("reduced", "unreduced")]
        plots.bars(
            work,
            ("with", "without"),
            [{"mean": v, "each": [v]} for v in values],
            (plots.BLUE, plots.ORANGE),
            "{:.2f}",
        )
        work.set_ylabel("multiply-adds per image (billions), GoogLeNet, 224 pixels")
        for (network, entry), colour in zip(
            figures["trained"].items(), plots.COLOURS, strict=False
        ):
            top1, cost = entry["top1_percent"], entry["multiply_adds"] / 1e6
            accuracy.plot([cost] * len(top1["each"]), top1["each"], ".", color=colour, markersize=5)
            accuracy.plot(
                cost,
                top1["mean"],
                "o",
                color=colour,
                markersize=9,
                label=f"{network}: {entry['parameters']:,} parameters",
            )
        accuracy.set(
            xlabel="multiply-adds per image (millions)",
            ylabel="top-1 on Fashion-MNIST (%)",
            xlim=(0, None),
        )
        accuracy.legend(frameon=False)
        accuracy.margins(y=0.3)


def paragraph(figures: Figures) -> str:
    paper, trained = figures["googlenet2014"], figures["trained"]
    ratio = paper["unreduced"]["multiply_adds"] / paper["reduced"]["multiply_adds"]
    cells = "; ".join(
        f"{network}: {e['multiply_adds'] / 1e6:.1f}M multiply-adds, {e['parameters']:,} "
        "parameters, top-1 "
        f"{format_mean_std(e['top1_percent'])}%, {e['images_per_second']['mean']:,.0f} images/s"
        for network, e in trained.items()
    )
    return (
        "Without the 1x1 convolutions before its 3x3 and 5x5 filters, GoogLeNet would need "
        f"{ratio:.1f} times the multiply-adds "
        f"({paper['unreduced']['multiply_adds'] / 1e9:.2f}G instead of "
        f"{paper['reduced']['multiply_adds'] / 1e9:.2f}G) and "
        f"{paper['unreduced']['parameters'] / 1e6:.1f}M parameters instead of "
        f"{paper['reduced']['parameters'] / 1e6:.1f}M. (The pooling branch keeps its 1x1 "
        "projection in both; without it, the number of channels would grow from module to "
        f"module.) Small forms, trained on Fashion-MNIST: {cells}."
    )


STUDY = Study(
    name="inception",
    statements=("I4",),
    question="What do the 1x1 reductions of an inception module save, and what do they cost in "
    "accuracy?",
    rule="Multiply-adds and parameters: borne out if there are fewer with reduction; they are "
    "counted. Accuracy: borne out if the network with reduction has a higher top-1 than a narrower "
    "one without, at about as many multiply-adds, in each of at least 3 seeds, not borne out if in "
    "none.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
