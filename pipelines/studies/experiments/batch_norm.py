"""Study: the range of learning rates that train VGG-11, with and without batch norm."""

import math
from pathlib import Path

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
)

KINDS = {"with": "vgg11_bn", "without": "vgg11"}
LEARNED = math.log(10) / 2
"""Training loss below which a network has learned something, nats: half that of guessing."""


def rates(scale: Scale) -> tuple[float, ...]:
    return scale.choose((0.01, 0.1, 1.0), (0.003, 0.01, 0.03, 0.1, 0.3, 1.0))


def training_of(scale: Scale, kind: str, rate: float, seed: int) -> Training:
    keys = (
        f"model.name={KINDS[kind]}", "model.stem=small", "model.width=8", "model.dropout=0.0",
        f"optimizer.base_lr={rate}", "schedule.name=constant",
        f"train.epochs={scale.choose(2, 3)}",
    )  # fmt: skip
    return Training(
        f"vgg11-{kind}-norm-{rate:g}", seed, scale.choose(2048, 4096), 2000, keys, may_diverge=True
    )


def trainings(scale: Scale) -> list[Training]:
    return [
        training_of(scale, kind, rate, seed)
        for seed in range(scale.seeds)
        for kind in KINDS
        for rate in rates(scale)
    ]


def last_loss(runs: Runs, training: Training) -> float | None:
    """Return the mean loss of the last fifth of the steps, or None if the training diverged."""
    if runs.outcome(training)["diverged"]:
        return None
    losses = runs.losses(training)
    return round(float(losses[-max(1, len(losses) // 5) :].mean()), 4)


def decades(tried: list[float], losses: list[float | None]) -> float:
    """Return the orders of magnitude from the lowest to the highest rate that works.

    One step of the grid is added, so that a single rate counts as one step; no rate counts as 0.
    """
    good = [
        rate
        for rate, loss in zip(tried, losses, strict=True)
        if loss is not None and loss < LEARNED
    ]
    step = math.log10(tried[-1] / tried[0]) / (len(tried) - 1)
    return round(math.log10(max(good) / min(good)) + step, 3) if good else 0.0


def measured(runs: Runs, scale: Scale) -> Figures:
    tried = list(rates(scale))
    figures: Figures = {"rates": tried}
    for kind in KINDS:
        losses = [
            [last_loss(runs, training_of(scale, kind, rate, seed)) for rate in tried]
            for seed in range(scale.seeds)
        ]
        figures[kind] = {
            "losses": losses,
            "decades": mean_std([decades(tried, row) for row in losses], 3),
        }
    return figures


def judge(figures: Figures) -> list[Claim]:
    wider = [
        a - b
        for a, b in zip(
            figures["with"]["decades"]["each"], figures["without"]["decades"]["each"], strict=True
        )
    ]
    text = "the range of rates that work is wider with batch norm"
    return [
        Claim(
            "I7", text, verdict_by_seeds(wider), differences_text(wider, 2, " orders of magnitude")
        )
    ]


def plot(figures: Figures, file: Path) -> None:
    highest = 2 * LEARNED * 1.3
    with plots.panels(1, "VGG-11's small form: training loss by learning rate", file, 4.6) as (
        axes,
    ):
        for kind, colour in (("with", plots.BLUE), ("without", plots.ORANGE)):
            rows = [
                [highest if loss is None else min(loss, highest) for loss in row]
                for row in figures[kind]["losses"]
            ]
            plots.band(axes, figures["rates"], rows, colour, f"{kind} batch norm", marker="o")
        axes.axhline(LEARNED, color=plots.BLACK, linestyle=":", linewidth=0.9)
        axes.annotate(
            "below: the rate works",
            (figures["rates"][0], LEARNED),
            textcoords="offset points",
            xytext=(0, -12),
            fontsize=9,
        )
        axes.set(
            xscale="log",
            xlabel="learning rate (batch 64)",
            ylabel="training loss at the end (nats); at the top: diverged",
        )
        axes.legend(frameon=False)


def paragraph(figures: Figures) -> str:
    cells = []
    for kind in KINDS:
        rows = figures[kind]["losses"]
        good = [
            r
            for i, r in enumerate(figures["rates"])
            if all(row[i] is not None and row[i] < LEARNED for row in rows)
        ]
        diverged = [
            r for i, r in enumerate(figures["rates"]) if any(row[i] is None for row in rows)
        ]
        named = f"{min(good):g} to {max(good):g}" if good else "none"
        end = f", diverged at {', '.join(f'{rate:g}' for rate in diverged)}" if diverged else ""
        cells.append(
            f"{kind} batch norm {named} in every seed "
            f"({format_mean_std(figures[kind]['decades'])} orders of magnitude){end}"
        )
    return (
        "VGG-11's small form (8 to 64 channels, no dropout) on Fashion-MNIST at "
        f"{len(figures['rates'])} rates from {figures['rates'][0]:g} to "
        f"{figures['rates'][-1]:g}. Rates that work, that is, with a training loss below half of "
        f"that of guessing ({LEARNED:.2f} nats): {'; '.join(cells)}. If only one rate works, the "
        "range is one step of the grid."
    )


STUDY = Study(
    name="batch-norm",
    statements=("I7",),
    question="Does batch norm widen the range of learning rates that work?",
    rule="A rate works if the mean training loss of the last fifth of the steps is below ln(10)/2. "
    "The range is the orders of magnitude from the lowest such rate to the highest, plus one step "
    "of the grid. Borne out if it is wider with batch norm in each of at least 3 seeds, not borne "
    "out if in none, else undecided.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
