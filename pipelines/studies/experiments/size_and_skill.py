"""Study: published accuracy against size, for all families.

Also measures how much of a small difference is due to the seed and the protocol.
"""

import math
from pathlib import Path

from pipelines.studies.framework import measure, plots
from pipelines.studies.framework.runner import Runs
from pipelines.studies.framework.study import (
    LEAST_SEEDS,
    UNDECIDED,
    Claim,
    Figures,
    Scale,
    Study,
    Training,
    mean_std,
    verdict_if,
)
from trainer.models import list_models
from trainer.models.model_info import model_info

SMALL = {
    "alexnet": (
        "model.name=alexnet",
        "model.stem=small",
        "model.width=8",
        "optimizer.base_lr=0.02",
    ),
    "vgg11_bn": ("model.name=vgg11_bn", "model.stem=small", "model.width=8"),
    "resnet8": ("model.name=resnet8", "model.width=8"),
}
PROTOCOLS = ("one view", "two views")
"""One view: the image. Two views: the mean of the probabilities of the image and its mirror image,
as papers average crops.
"""


def training_of(scale: Scale, name: str, seed: int) -> Training:
    return Training(
        f"size-{name}",
        seed,
        scale.choose(2048, 12_000),
        scale.val_samples,
        (*SMALL[name], f"train.epochs={scale.choose(2, 3)}"),
    )


def seeds(scale: Scale) -> range:
    """Return the seeds. A full run uses at least five, since the spread is the question."""
    return range(scale.choose(scale.seeds, max(5, scale.seeds)))


def trainings(scale: Scale) -> list[Training]:
    return [training_of(scale, name, seed) for seed in seeds(scale) for name in SMALL]


def published() -> dict[str, dict[str, float | int | None]]:
    """Return the networks whose top-5 error on ImageNet a paper or torchvision published, percent.

    Parameters and multiply-adds are computed.
    """
    found: dict[str, dict[str, float | int | None]] = {}
    for spec in list_models():
        entry = model_info(spec.name)
        if entry.top5_error is None and entry.torchvision_top5 is None:
            continue
        theirs = None if entry.torchvision_top5 is None else round(100 - entry.torchvision_top5, 3)
        found[spec.name] = {
            "parameters": entry.parameters,
            "multiply_adds": entry.multiply_adds,
            "paper_top5_error": entry.top5_error,
            "torchvision_top5_error": theirs,
        }
    return found


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Return Spearman's correlation, that of the ranks. The values should have hardly any ties."""

    def ranks(values: list[float]) -> list[int]:
        order = sorted(range(len(values)), key=lambda i: values[i])
        return [order.index(i) for i in range(len(values))]

    x, y = ranks(a), ranks(b)
    mean = (len(a) - 1) / 2
    covariance = sum((i - mean) * (j - mean) for i, j in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((i - mean) ** 2 for i in x) * sum((j - mean) ** 2 for j in y))


def measured(runs: Runs, scale: Scale) -> Figures:
    small = {}
    for name in SMALL:
        by_seed = [training_of(scale, name, seed) for seed in seeds(scale)]
        small[name] = {
            "parameters": measure.count_parameters(measure.trained(runs, by_seed[0])),
            "top1_percent": {
                "one view": mean_std([runs.top1(training) for training in by_seed], 2),
                "two views": mean_std(
                    [measure.mirrored_top1(runs, training) for training in by_seed], 2
                ),
            },
        }
    table = published()
    theirs = {name: row for name, row in table.items() if row["torchvision_top5_error"] is not None}
    sizes, errors = (
        [float(row[key] or 0) for row in theirs.values()]
        for key in ("parameters", "torchvision_top5_error")
    )
    return {
        "published": table,
        "rank_correlation": round(rank_correlation(sizes, errors), 3),
        "small": small,
    }


def judge(figures: Figures) -> list[Claim]:
    table = figures["published"]
    vgg, google = table["vgg16"], table["googlenet2014"]
    ratio = vgg["parameters"] / google["parameters"]
    correlation = figures["rank_correlation"]
    why = f"Spearman's rho {correlation:+.2f} between parameters and error; -1: only size matters"
    claims = [
        Claim(
            "P1",
            "the order by parameters is not the order by accuracy",
            verdict_if(abs(correlation) < 0.5),
            why,
        ),
        Claim(
            "P1",
            "GoogLeNet is better than VGG-16 as a single network, with a 35th of the parameters",
            verdict_if(google["paper_top5_error"] < vgg["paper_top5_error"] and ratio >= 35),
            f"top-5 error {google['paper_top5_error']}% (one crop) and "
            f"{vgg['paper_top5_error']}% (one scale); {ratio:.0f} times "
            "fewer",
        ),
    ]
    forms = [(n, t["paper_top5_error"], t["torchvision_top5_error"]) for n, t in table.items()]
    protocols = {n: abs(a - b) for n, a, b in forms if a is not None and b is not None}
    name, max_diff = max(protocols.items(), key=lambda item: item[1])
    text = "the published errors of a network differ by more than half a point between sources"
    claims.append(
        Claim(
            "P5",
            text,
            verdict_if(max_diff > 0.5),
            f"{name}: {max_diff:.2f} points of top-5 between paper and torchvision",
        )
    )
    spreads = [entry["top1_percent"]["one view"] for entry in figures["small"].values()]
    ranges = [max(values["each"]) - min(values["each"]) for values in spreads]
    enough = len(spreads[0]["each"]) >= LEAST_SEEDS
    verdict = verdict_if(max(ranges) > 0.3) if enough else UNDECIDED
    why = (
        "range over seeds "
        + ", ".join(f"{r:.2f}" for r in ranges)
        + " points"
        + ("" if enough else "; too few seeds")
    )
    return [
        *claims,
        Claim("P5", "seeds of one small network differ by more than 0.3 points", verdict, why),
    ]


def plot(figures: Figures, file: Path) -> None:
    with plots.panels(3, "Size and skill", file, 4.8) as (size, work, small):
        for axes, key, label in (
            (size, "parameters", "parameters (millions)"),
            (work, "multiply_adds", "multiply-adds (millions)"),
        ):
            for source, colour in (
                ("paper_top5_error", plots.ORANGE),
                ("torchvision_top5_error", plots.BLUE),
            ):
                rows = [
                    (n, row[key] / 1e6, row[source])
                    for n, row in figures["published"].items()
                    if row[source] is not None
                ]
                axes.plot(
                    [x for _, x, _ in rows],
                    [y for _, _, y in rows],
                    "o",
                    color=colour,
                    label=source.partition("_")[0],
                )
                for name, x, y in rows if source == "torchvision_top5_error" else []:
                    if not name.endswith("_bn"):
                        axes.annotate(
                            name, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=6.5
                        )
            axes.set(xscale="log", xlabel=label, ylabel="published top-5 error on ImageNet (%)")
            axes.legend(frameon=False)
        for place, entry in enumerate(figures["small"].values()):
            for shift, protocol, colour in (
                (-0.12, "one view", plots.BLUE),
                (0.12, "two views", plots.GREEN),
            ):
                each = entry["top1_percent"][protocol]["each"]
                small.plot(
                    [place + shift] * len(each),
                    each,
                    "o",
                    color=colour,
                    label=protocol if place == 0 else None,
                )
            small.annotate(
                f"{entry['parameters']:,}\nparameters",
                (place, min(each)),
                textcoords="offset points",
                xytext=(0, -34),
                ha="center",
            )
        small.set_xticks(range(len(SMALL)), list(SMALL))
        small.set(title="Small forms, one dot per seed", ylabel="top-1 on Fashion-MNIST (%)")
        small.margins(x=0.3, y=0.35)
        small.legend(frameon=False)


def paragraph(figures: Figures) -> str:
    cells = []
    for name, entry in figures["small"].items():
        one, two = (entry["top1_percent"][protocol] for protocol in PROTOCOLS)
        cells.append(
            f"{name}, {entry['parameters']:,} parameters: {one['mean']:.2f}% with one view, "
            f"{two['mean']:.2f}% with two"
        )
    count = sum(row["torchvision_top5_error"] is not None for row in figures["published"].values())
    return (
        f"Over the {count} networks whose error torchvision publishes, measured with the same "
        "protocol, parameters and top-5 error have a rank correlation of "
        f"{figures['rank_correlation']:+.2f}. GoogLeNet's published error is that of one crop and "
        "VGG's that of one scale, so they do not show which network is better; the winners of 2014 "
        f"were ensembles. Small forms, mean over seeds: {'; '.join(cells)}. Both protocols use the "
        "same weights."
    )


STUDY = Study(
    name="size-and-skill",
    statements=("P1", "P5"),
    question="Do more parameters mean more accuracy, and how precise are the published figures?",
    rule="P1: borne out if the rank correlation of parameters and torchvision's published top-5 "
    "error is between -0.5 and 0.5; GoogLeNet and VGG-16 are compared by the errors of the papers' "
    "single networks and by the ratio of computed parameters. P5: borne out if the error of a "
    "network differs by more than half a point between paper and torchvision; and if at least 3 "
    "seeds of a small network range over more than 0.3 points of top-1.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
