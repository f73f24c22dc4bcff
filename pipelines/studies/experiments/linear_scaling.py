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
    plot_groups(figures, GROUPS, "Linear scaling: batches of 64 and 512, by samples seen", file)


def paragraph(figures: Figures) -> str:
    cells = "; ".join(
        f"{recipe} (batch {figures[recipe]['batch']}, rate {figures[recipe]['peak_rate']:g}"
        + (", warmup" if figures[recipe]["warmup_epochs"] else "")
        + f") {format_mean_std(figures[recipe]['top1_percent'], 2)}%"
        for recipe in RECIPES
    )
    return (
        f"ResNet-8 with half its channels, 4 epochs, top-1: {cells}. Batch norm sees 64 images "
        "at a time in all trainings, so the loss is the same function of the weights and only the "
        "optimizer differs. A last batch that is not full is dropped."
    )


STUDY = Study(
    name="linear-scaling",
    statements=("T6",),
    question="Does eight times the batch at eight times the learning rate train as well as the "
    "small batch?",
    rule="As well as: borne out if the differences of top-1 have both signs over at least 3 seeds, "
    "not borne out if all have the same sign. Better than the unscaled rate: borne out if it is "
    "better in each of at least 3 seeds, not borne out if in none, else undecided.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
