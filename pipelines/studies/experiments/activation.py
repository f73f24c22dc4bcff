"""Study: ReLU against tanh in a plain network.

Measures the steps to 25% training error (Krizhevsky et al. 2012, figure 1), and the gradients by
layer.
"""

from pathlib import Path
from typing import Any

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

KINDS = ("relu", "tanh")
GOAL = 25.0
"""Training error, percent."""
STARTS = 5


def rates(scale: Scale) -> tuple[float, ...]:
    return scale.choose((0.01, 0.05), (0.003, 0.01, 0.03, 0.1))


def training_of(scale: Scale, kind: str, rate: float, seed: int) -> Training:
    """Return one training of seven convolutions without shortcuts or batch norm.

    There is no weight decay and the learning rate is constant, so that only the non-linearity and
    the rate differ. An epoch is short, so that the training error is measured often.
    """
    keys = (
        "model.name=plain8", "model.width=8", "model.batch_norm=false", f"model.activation={kind}",
        f"optimizer.base_lr={rate}", "optimizer.weight_decay=0.0", "schedule.name=constant",
        f"train.epochs={scale.choose(14, 20)}",
    )  # fmt: skip
    return Training(
        f"plain8-{kind}-{rate:g}",
        seed,
        scale.choose(1024, 2048),
        scale.val_samples,
        keys,
        "train",
        may_diverge=True,
    )


def trainings(scale: Scale) -> list[Training]:
    return [
        training_of(scale, kind, rate, seed)
        for seed in range(scale.seeds)
        for kind in KINDS
        for rate in rates(scale)
    ]


def steps_to_goal(steps: list[int], errors: list[float]) -> int:
    """Return the first step with a measured error of at most the goal, else twice the last step."""
    return next(
        (step for step, error in zip(steps, errors, strict=True) if error <= GOAL), 2 * steps[-1]
    )


def _errors(runs: Runs, training: Training) -> tuple[list[int], list[float]]:
    """Return steps, and the training error in percent at each.

    A training that diverged has the error of guessing, at its last step.
    """
    if runs.outcome(training)["diverged"]:
        return [runs.run_of(training).steps()], [90.0]
    steps, values = runs.history(training, "top1")
    return [int(step) for step in steps], [round(100 - 100 * float(value), 2) for value in values]


def _kind(runs: Runs, scale: Scale, kind: str) -> dict[str, Any]:
    by_rate: dict[str, dict[str, Any]] = {}
    for rate in rates(scale):
        by_seed = [training_of(scale, kind, rate, seed) for seed in range(scale.seeds)]
        rows = [_errors(runs, training) for training in by_seed]
        by_rate[f"{rate:g}"] = {
            "steps": rows[0][0],
            "errors": [errors for _, errors in rows],
            "steps_to_goal": mean_std([steps_to_goal(steps, errors) for steps, errors in rows], 1),
        }
    best = min(by_rate, key=lambda rate: float(by_rate[rate]["steps_to_goal"]["mean"]))
    images, labels = measure.some_images(runs, 128)
    config = runs.run_of(training_of(scale, kind, float(best), 0)).config()
    starts = [
        config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
        for seed in range(STARTS)
    ]
    ended = [training_of(scale, kind, float(best), seed) for seed in range(scale.seeds)]
    return {
        "by_rate": by_rate,
        "best_rate": best,
        "gradient_at_start": [
            measure.gradient_norms(measure.untrained(start), images, labels) for start in starts
        ],
        "gradient_trained": [
            measure.gradient_norms(measure.trained(runs, training), images, labels)
            for training in ended
        ],
    }


def measured(runs: Runs, scale: Scale) -> Figures:
    return {kind: _kind(runs, scale, kind) for kind in KINDS}


def first_to_last(norms: dict[str, float]) -> float:
    """Return the first layer's gradient norm as a fraction of the last layer's."""
    each = list(norms.values())
    return each[0] / each[-1]


def judge(figures: Figures) -> list[Claim]:
    relu, tanh = (_best(figures, kind)["steps_to_goal"]["each"] for kind in KINDS)
    saved = [b - a for a, b in zip(relu, tanh, strict=True)]
    claims = [
        Claim(
            "I1",
            f"ReLU reaches {GOAL:.0f}% training error in fewer steps, each at its best rate",
            verdict_by_seeds(saved),
            differences_text(saved, 0, " steps"),
        )
    ]
    for when, text in (
        ("gradient_at_start", "at the start"),
        ("gradient_trained", "after training"),
    ):
        rows = [[first_to_last(norms) for norms in figures[kind][when]] for kind in KINDS]
        ratios = [a / b for a, b in zip(*rows, strict=True)]
        why = "relative to tanh: " + differences_text(ratios, 2)
        text = (
            f"{text}, more of the gradient reaches the first layer with ReLU (norm in the first / "
            "in the last layer)"
        )
        claims.append(Claim("I1", text, verdict_by_seeds(ratios, 1.0), why))
    return claims


def _best(figures: Figures, kind: str) -> dict[str, Any]:
    best: dict[str, Any] = figures[kind]["by_rate"][figures[kind]["best_rate"]]
    return best


def plot(figures: Figures, file: Path) -> None:
    with plots.panels(2, "Plain-8 without batch norm, with ReLU and with tanh", file) as (
        errors,
        gradient,
    ):
        for kind, colour in zip(KINDS, (plots.BLUE, plots.ORANGE), strict=True):
            best = _best(figures, kind)
            plots.band(
                errors,
                best["steps"],
                best["errors"],
                colour,
                f"{kind}, rate {figures[kind]['best_rate']}",
            )
            for when, line in (("gradient_at_start", "--"), ("gradient_trained", "-")):
                rows = [list(norms.values()) for norms in figures[kind][when]]
                label = f"{kind}, {'start' if line == '--' else 'trained'}"
                plots.band(
                    gradient, range(len(rows[0])), rows, colour, label, linestyle=line, marker="."
                )
        errors.axhline(GOAL, color=plots.BLACK, linewidth=0.8, linestyle=":")
        errors.set(xlabel="optimizer step (64 images)", ylabel="training error (%)", ylim=(0, 100))
        names = list(figures["relu"]["gradient_at_start"][0])
        gradient.set(ylabel="norm of the gradient in the layer's weights", yscale="log")
        gradient.set_xticks(range(len(names)), names, rotation=30)
        for axes in (errors, gradient):
            axes.legend(frameon=False)


def paragraph(figures: Figures) -> str:
    relu, tanh = (_best(figures, kind)["steps_to_goal"] for kind in KINDS)
    rows = {
        kind: [
            mean_std([first_to_last(n) for n in figures[kind][w]])["mean"]
            for w in ("gradient_at_start", "gradient_trained")
        ]
        for kind in KINDS
    }
    return (
        "Plain-8 (seven convolutions and a fully connected layer) without batch norm. Each at its "
        f"best rate ({figures['relu']['best_rate']} and {figures['tanh']['best_rate']}, from the "
        f"same candidates), the network with ReLU reached {GOAL:.0f}% training error after "
        f"{format_mean_std(relu, 0)} steps, the network with tanh after "
        f"{format_mean_std(tanh, 0)}: {tanh['mean'] / relu['mean']:.1f} times as many (Krizhevsky "
        "et al.: six times, four layers, CIFAR-10). The error is measured only at the end of each "
        "epoch; a network that never reaches it counts as twice the number of its steps. Gradient "
        f"in the first layer relative to the last: ReLU {rows['relu'][0]:.3g} at the start and "
        f"{rows['relu'][1]:.3g} after training, tanh {rows['tanh'][0]:.3g} and "
        f"{rows['tanh'][1]:.3g}."
    )


STUDY = Study(
    name="activation",
    statements=("I1",),
    question="Does ReLU train faster than tanh, and does more of the gradient reach the first "
    "layer?",
    rule=f"Steps to {GOAL:.0f}% training error, each non-linearity at its fastest rate: borne out "
    "if ReLU needs fewer in each of at least 3 seeds, not borne out if in none, else undecided. "
    "Gradient of the first layer relative to the last: the same, with 5 initial weights at the "
    "start.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
