"""Study: does an eight times larger batch with an eight times higher rate match the small batch?

Source: Goyal et al. 2017, 2.1 and figure 3.
"""

from pathlib import Path

from pipelines.studies.experiments.scaling import (
    FAST,
    GROUPS,
    SLOW,
    better,
    measured_of,
    plot_groups,
    same,
    trainings_of,
)
from pipelines.studies.framework.runner import Runs
from pipelines.studies.framework.study import (
    Claim,
    Figures,
    Scale,
    Study,
    Training,
    format_mean_std,
)

SMALL, LARGE, UNSCALED = GROUPS[SLOW]
FAST_SMALL, FAST_LARGE, _ = GROUPS[FAST]
RECIPES = tuple(recipe for group in GROUPS.values() for recipe in group)


def trainings(scale: Scale) -> list[Training]:
    """Return the trainings; those of ``warmup`` are not run twice."""
    return trainings_of(RECIPES, scale)


def measured(runs: Runs, scale: Scale) -> Figures:
    return measured_of(RECIPES, runs, scale)


def judge(figures: Figures) -> list[Claim]:
    return [
        same("T6", figures, LARGE, SMALL),
        better("T6", figures, LARGE, UNSCALED),
        same("T6", figures, FAST_LARGE, FAST_SMALL),
    ]


def plot(figures: Figures, file: Path) -> None:
    plot_groups(figures, GROUPS, "Linear scaling: batches of 64 and of 512, sample by sample", file)


def paragraph(figures: Figures) -> str:
    cells = "; ".join(
        f"{recipe} (batch {figures[recipe]['batch']}, rate {figures[recipe]['peak_rate']:g}"
        + (", warmup" if figures[recipe]["warmup_epochs"] else "")
        + f") {format_mean_std(figures[recipe]['top1_percent'], 2)}%"
        for recipe in RECIPES
    )
    return (
        f"ResNet-8 with half its channels, 4 epochs, top-1: {cells}. Batch norm sees 64 images "
        "at a time in all, so that the loss "
        "is the same function of the weights and what is compared is the optimizer alone; "
        "images that fill no batch are left out."
    )


STUDY = Study(
    name="linear-scaling",
    statements=("T6",),
    question="Does eight times the batch at eight times the learning rate learn what the small batch learns?",
    rule="The same: borne out where the differences of top-1 have both signs over at least 3 seeds, not borne out where all have "
    "one. Better than the unscaled rate: borne out where it is in each of at least 3 seeds, not "
    "borne out where in none, else "
    "undecided.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
