"""Study: dropout in AlexNet's fully connected layers, with 2,000 training images.

Measures the gap between training and test accuracy.
"""

from pathlib import Path

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
)

SAMPLES = 2000
KINDS = {"without": 0.0, "with": 0.5}


def training_of(scale: Scale, kind: str, seed: int) -> Training:
    """Return one training.

    Without weight decay and augmentation, only dropout counters overfitting.
    """
    keys = (
        "model.name=alexnet", "model.stem=small", "model.width=16", f"model.dropout={KINDS[kind]}",
        "optimizer.base_lr=0.02", "optimizer.weight_decay=0.0",
        f"train.epochs={scale.choose(15, 40)}",
    )  # fmt: skip
    return Training(f"alexnet-{kind}-dropout", seed, SAMPLES, scale.choose(2000, 5000), keys)


def trainings(scale: Scale) -> list[Training]:
    return [training_of(scale, kind, seed) for seed in range(scale.seeds) for kind in KINDS]


def measured(runs: Runs, scale: Scale) -> Figures:
    figures: Figures = {}
    for kind in KINDS:
        by_seed = [training_of(scale, kind, seed) for seed in range(scale.seeds)]
        train = [measure.top1(runs, training, "train") for training in by_seed]
        test = [runs.top1(training) for training in by_seed]
        curves = [runs.history(training, "top1") for training in by_seed]
        figures[kind] = {
            "train_top1_percent": mean_std(train, 2),
            "test_top1_percent": mean_std(test, 2),
            "gap_points": mean_std([a - b for a, b in zip(train, test, strict=True)], 2),
            "test_steps": curves[0][0].tolist(),
            "test_curves": [
                [round(100 * float(value), 2) for value in values] for _, values in curves
            ],
        }
    return figures


def judge(figures: Figures) -> list[Claim]:
    def gains(key: str) -> list[float]:
        return [
            a - b
            for a, b in zip(
                figures["with"][key]["each"], figures["without"][key]["each"], strict=True
            )
        ]

    narrower, better = [-value for value in gains("gap_points")], gains("test_top1_percent")
    return [
        Claim(
            "I2",
            "the gap is narrower with dropout",
            verdict_by_seeds(narrower),
            differences_text(narrower, unit=" points"),
        ),
        Claim(
            "I2",
            "the test accuracy is higher with dropout",
            verdict_by_seeds(better),
            differences_text(better, unit=" points"),
        ),
    ]


def plot(figures: Figures, file: Path) -> None:
    with plots.panels(
        2, f"AlexNet's small form on {SAMPLES:,} training images, with and without dropout", file
    ) as (gap, curve):
        for kind, colour in (("without", plots.ORANGE), ("with", plots.BLUE)):
            plots.band(
                curve,
                figures[kind]["test_steps"],
                figures[kind]["test_curves"],
                colour,
                f"{kind} dropout",
            )
        plots.bars(
            gap,
            list(KINDS),
            [figures[kind]["gap_points"] for kind in KINDS],
            (plots.ORANGE, plots.BLUE),
        )
        gap.set(xlabel="dropout", ylabel="training accuracy - test accuracy (points)")
        curve.set(xlabel="optimizer step (64 images)", ylabel="test top-1 (%)")
        curve.legend(frameon=False)


def paragraph(figures: Figures) -> str:
    cells = "; ".join(
        f"{kind} dropout: training {format_mean_std(figures[kind]['train_top1_percent'])}%, test "
        f"{format_mean_std(figures[kind]['test_top1_percent'])}%, gap "
        f"{format_mean_std(figures[kind]['gap_points'])} points"
        for kind in KINDS
    )
    return (
        "AlexNet's small form, whose three fully connected layers hold most of its parameters, "
        f"trained on {SAMPLES:,} images, with half or none of the inputs of the first two of these "
        f"layers dropped: {cells}. Training accuracy is measured in evaluation mode, without "
        "dropout, on the training images."
    )


STUDY = Study(
    name="dropout",
    statements=("I2",),
    question="Does dropout in the fully connected layers counter overfitting with few images?",
    rule="Gap: borne out if training minus test accuracy is smaller with dropout in each of at "
    "least 3 seeds, not borne out if in none, else undecided. Test accuracy: the same for a higher "
    "accuracy.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
