"""Study: the gradient of the loss at each block of plain and residual networks.

It is measured at the start and after training.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipelines.studies.experiments.depth import DEEP, FAMILIES, SHALLOW, training_of
from pipelines.studies.framework import measure, plots
from pipelines.studies.framework.runner import Runs
from pipelines.studies.framework.study import (
    Claim,
    Figures,
    Scale,
    Study,
    Training,
    differences_text,
    mean_std,
    verdict_by_seeds,
    verdict_if,
)
from trainer.models.resnet import Block

IMAGES = 128
STARTS = 5
"""Number of initial weights that are measured; this needs no training."""


def trainings(scale: Scale) -> list[Training]:
    """Return the trainings of ``depth``, which are not run twice."""
    return [
        training_of(scale, family, depth, seed)
        for seed in range(scale.seeds)
        for family in FAMILIES
        for depth in (SHALLOW, DEEP)
    ]


def only_shortcuts(model: nn.Sequential) -> nn.Sequential:
    """Block the gradient through the convolutions of all blocks, in place; return the network.

    To the gradient, the output of the residual branches is a constant.
    """
    for block in model.modules():
        if isinstance(block, Block):
            block.residual = _constant(block.residual)  # type: ignore[method-assign, assignment]
    return model


def _constant(branch: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: branch(x).detach()


def _norms(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    return [
        float(f"{value:.5g}")
        for value in measure.gradients_at_blocks(model, images, labels).values()
    ]


def measured(runs: Runs, scale: Scale) -> Figures:
    images, labels = measure.some_images(runs, IMAGES)
    figures: Figures = {}
    for family in FAMILIES:
        for depth in (SHALLOW, DEEP):
            by_seed = [training_of(scale, family, depth, seed) for seed in range(scale.seeds)]
            config = runs.run_of(by_seed[0]).config()
            starts = [
                config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
                for seed in range(STARTS)
            ]
            alone = only_shortcuts(measure.untrained(config))
            figures[f"{family}{depth}"] = {
                "start": [_norms(measure.untrained(start), images, labels) for start in starts],
                "trained": [
                    _norms(measure.trained(runs, training), images, labels) for training in by_seed
                ],
                "shortcuts_alone": _alone(alone, images, labels) if family == "resnet" else 0.0,
            }
    return figures


def _alone(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of the last block's gradient that shortcuts alone carry to the first."""
    norms = _norms(model, images, labels)
    return norms[0] / norms[-1]


def orders(norms: list[float]) -> float:
    """Return the orders of magnitude between the gradients at the first and the last block.

    Above 0, the first block gets more.
    """
    return math.log10(norms[0] / norms[-1])


def judge(figures: Figures) -> list[Claim]:
    def closer(when: str) -> list[float]:
        plain, residual = (figures[f"{family}{DEEP}"][when] for family in FAMILIES)
        return [abs(orders(p)) - abs(orders(r)) for p, r in zip(plain, residual, strict=True)]

    alone = figures[f"resnet{DEEP}"]["shortcuts_alone"]
    claims = [
        Claim(
            "R3",
            f"through the {DEEP // 2 - 1} shortcuts alone the gradient reaches the first block",
            verdict_if(alone >= 0.1),
            f"{alone:.2f} of its norm at the last block; a plain network has no such path",
        )
    ]
    for when, text in (("start", "at the start"), ("trained", "after training")):
        values = closer(when)
        why = differences_text(values, 2, " orders of magnitude")
        text = (
            f"{text}, the gradient at the first block is closer to that at the last block in "
            f"res-{DEEP} than in plain-{DEEP}"
        )
        claims.append(Claim("R3", text, verdict_by_seeds(values), why))
    return claims


def plot(figures: Figures, file: Path) -> None:
    styles: dict[str, Any] = {
        f"plain{SHALLOW}": (plots.YELLOW, "--"),
        f"plain{DEEP}": (plots.ORANGE, "-"),
    }
    styles |= {f"resnet{SHALLOW}": (plots.SKY, "--"), f"resnet{DEEP}": (plots.BLUE, "-")}
    with plots.panels(2, f"Gradient that reaches each block ({IMAGES} images)", file) as row:
        for axes, when, title in zip(
            row, ("start", "trained"), ("at the start", "after training"), strict=True
        ):
            for name, (colour, line) in styles.items():
                rows = figures[name][when]
                places = [100 * i / (len(rows[0]) - 1) for i in range(len(rows[0]))]
                plots.band(
                    axes,
                    places,
                    rows,
                    colour,
                    name.replace("resnet", "res-").replace("plain", "plain-"),
                    linestyle=line,
                )
            axes.set(
                title=title,
                yscale="log",
                xlabel="block: first (0%) to last (100%)",
                ylabel="norm of the gradient, mean over images",
            )
            axes.legend(frameon=False)


def paragraph(figures: Figures) -> str:
    cells = []
    for name in (f"plain{SHALLOW}", f"plain{DEEP}", f"resnet{SHALLOW}", f"resnet{DEEP}"):
        start, trained = (
            mean_std([10 ** orders(norms) for norms in figures[name][when]], 3)["mean"]
            for when in ("start", "trained")
        )
        cells.append(f"{name}: {start:.3g} at the start, {trained:.3g} after training")
    alone = figures[f"resnet{DEEP}"]["shortcuts_alone"]
    return (
        "Norm of the gradient of the loss in the output of the first block, as a multiple of that "
        "at the last block: "
        + "; ".join(cells)
        + ". If the convolutions of all blocks are excluded from the backward pass, "
        f"{alone:.2f} of it arrives through the shortcuts of the residual network, and nothing in "
        "the plain one. With batch norm, which all of these networks have, the gradient of a plain "
        "network need not vanish, as He et al. 2015 (4.1) also state."
    )


STUDY = Study(
    name="gradient-path",
    statements=("R3",),
    question="Does the gradient reach the first layers of a residual network unimpeded, but not "
    "those of a plain one?",
    rule="Shortcuts alone: borne out if at least a tenth of the last block's gradient norm arrives "
    "at the first. Otherwise by the orders of magnitude between first and last block: borne out if "
    "they are fewer in the residual network in each of at least 3 seeds (5 at the start), not "
    "borne out if in none, else undecided.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
