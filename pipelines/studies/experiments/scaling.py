"""The recipes ``warmup-*``.

They are a small batch, one eight times as large at the scaled rate, and the same with one thing
missing. They differ only in batch, rate and warmup; batch norm sees 64 images at a time in all of
them (Goyal et al. 2017, 2.1 to 2.3).
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.studies.framework import plots
from pipelines.studies.framework.runner import Runs
from pipelines.studies.framework.study import (
    BORNE_OUT,
    LEAST_SEEDS,
    NOT_BORNE_OUT,
    UNDECIDED,
    Claim,
    Figures,
    Scale,
    Training,
    differences_text,
    mean_std,
    verdict_by_seeds,
)
from trainer.config.schema import load_config

SLOW, FAST = "0.025 for 64 (0.1 for 256)", "0.1 for 64 (0.4 for 256)"
GROUPS = {
    SLOW: ("warmup-64", "warmup-512", "warmup-512-unscaled"),
    FAST: ("warmup-64-fast", "warmup-512-fast", "warmup-512-cold"),
}
_WINDOW = 8192
"""Number of samples over which the plot averages the loss."""


def train_samples(scale: Scale) -> int:
    """Return the number of training images.

    A full run uses all of them: the recipes' warmup lasts one such epoch.
    """
    return scale.choose(4096, 60_000)


def trainings_of(recipes: Sequence[str], scale: Scale) -> list[Training]:
    """Return the trainings, seed by seed, so that an interrupted study has complete seeds."""
    samples = train_samples(scale), scale.choose(2000, 10_000)
    return [
        Training(recipe, seed, *samples, recipe=recipe)
        for seed in range(scale.seeds)
        for recipe in recipes
    ]


def measured_of(recipes: Sequence[str], runs: Runs, scale: Scale) -> Figures:
    """Return batch, peak rate, top-1 and losses of each seed, by recipe."""
    figures: Figures = {}
    for recipe in recipes:
        by_seed = [training for training in trainings_of(recipes, scale) if training.name == recipe]
        config = load_config(recipe)
        batch = config.batch.global_size
        losses = [runs.losses(training).tolist() for training in by_seed]
        window = min(_WINDOW, train_samples(scale) // 4)
        smoothed = [plots.thinned(plots.smooth(row, window // batch)) for row in losses]
        figures[recipe] = {
            "batch": batch,
            "peak_rate": float(runs.history(by_seed[0], "learning_rate")[1].max()),
            "warmup_epochs": config.schedule.warmup_epochs,
            "top1_percent": mean_std([runs.top1(training) for training in by_seed], 2),
            "first_loss": mean_std([max(row[: len(row) // 4]) for row in losses]),
            "last_loss": mean_std([statistics.mean(row[-(len(row) // 4) :]) for row in losses]),
            "samples": [place * batch for place in smoothed[0][0]],
            "losses": [values for _, values in smoothed],
        }
    return figures


def differences(figures: Figures, one: str, other: str) -> list[float]:
    """Return the differences of top-1 in points, seed by seed."""
    pairs = zip(
        figures[one]["top1_percent"]["each"], figures[other]["top1_percent"]["each"], strict=True
    )
    return [round(a - b, 2) for a, b in pairs]


def better(statement: str, figures: Figures, one: str, other: str) -> Claim:
    values = differences(figures, one, other)
    return Claim(
        statement,
        f"{one} is better than {other}",
        verdict_by_seeds(values),
        differences_text(values, unit=" points"),
    )


def same(statement: str, figures: Figures, one: str, other: str) -> Claim:
    """Compare two recipes that should be equally good.

    The claim is borne out if the differences have both signs, and not borne out if all have one.
    Between equal recipes, three of three seeds have the same sign by chance one time in four.
    """
    values = differences(figures, one, other)
    verdict = UNDECIDED
    if len(values) >= LEAST_SEEDS:
        verdict = BORNE_OUT if min(values) <= 0 <= max(values) else NOT_BORNE_OUT
    return Claim(
        statement,
        f"{one} is as good as {other}",
        verdict,
        differences_text(values, unit=" points"),
    )


def plot_groups(
    figures: Figures, groups: Mapping[str, tuple[str, ...]], title: str, file: Path
) -> None:
    """Plot the training loss over samples seen, with a panel per rate."""
    with plots.panels(len(groups), title, file, 5.0) as row:
        for axes, (rate, recipes) in zip(row, groups.items(), strict=True):
            for recipe, colour in zip(
                recipes, (plots.BLACK, plots.BLUE, plots.ORANGE), strict=True
            ):
                entry: dict[str, Any] = figures[recipe]
                label = f"{recipe}: top-1 {entry['top1_percent']['mean']:.2f}%"
                plots.band(
                    axes, [n / 1e3 for n in entry["samples"]], entry["losses"], colour, label
                )
            axes.set(
                title=f"Rate {rate}",
                xlabel="samples seen (thousands)",
                ylabel="training loss, cross-entropy (nats)",
                yscale="log",
            )
            axes.yaxis.set_major_formatter("{x:.1f}")
            axes.yaxis.set_minor_formatter("{x:.1f}")
            axes.legend(frameon=False)
