"""Study: a large batch at a large rate, with and without warmup.

Source: Goyal et al. 2017, 2.2 and figure 2.
"""

from pathlib import Path

from pipelines.studies.experiments.scaling import (
    FAST,
    GROUPS,
    better,
    measured_of,
    plot_groups,
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

RECIPES = GROUPS[FAST]
SMALL, WARM, COLD = RECIPES


def trainings(scale: Scale) -> list[Training]:
    return trainings_of(RECIPES, scale)


def measured(runs: Runs, scale: Scale) -> Figures:
    return measured_of(RECIPES, runs, scale)


def judge(figures: Figures) -> list[Claim]:
    return [better("T5", figures, WARM, COLD)]


def plot(figures: Figures, file: Path) -> None:
    plot_groups(
        figures, {FAST: RECIPES}, "Warmup: a batch of 512 at 8 times the rate of one of 64", file
    )


def paragraph(figures: Figures) -> str:
    warm, cold = figures[WARM], figures[COLD]
    return (
        f"ResNet-8 with half its channels, 4 epochs, batch {warm['batch']} at rate "
        f"{warm['peak_rate']:g}. With one epoch of gradual warmup: highest loss in the first "
        f"quarter {format_mean_std(warm['first_loss'], 2)} nats, top-1 "
        f"{format_mean_std(warm['top1_percent'], 2)}%; at the full rate from the first step: "
        f"{format_mean_std(cold['first_loss'], 2)} nats, "
        f"{format_mean_std(cold['top1_percent'], 2)}%. With batch {figures[SMALL]['batch']}: "
        f"{format_mean_std(figures[SMALL]['top1_percent'], 2)}%."
    )


STUDY = Study(
    name="warmup",
    statements=("T5",),
    question="Does a large batch at a large rate train better if the rate is reached gradually?",
    rule=f"Borne out if {WARM} has a higher top-1 than {COLD} in each of at least 3 seeds, not "
    "borne out if in none, else undecided.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
