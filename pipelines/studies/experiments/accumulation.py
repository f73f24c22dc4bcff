"""Study: gradient accumulation.

The same batch in one micro-batch or in many gives the same loss curve in less memory.
"""

from pathlib import Path

import torch

from pipelines.studies.framework import plots
from pipelines.studies.framework.runner import Runs
from pipelines.studies.framework.study import (
    SAME,
    Claim,
    Figures,
    Scale,
    Study,
    Training,
    fall_of,
    format_mean_std,
    mean_std,
    same_curves,
    verdict_if,
)
from trainer.models import build_model
from trainer.models.model_info import forward_costs

BATCH = 512
MICRO = (512, 128, 32)
KINDS = {"without batch norm": "false", "with batch norm": "true"}


def training_of(scale: Scale, kind: str, micro: int, seed: int) -> Training:
    """Return one training. The learning rate of a full run is small, as in data_parallel.py."""
    keys = (
        "model.name=resnet8", f"model.batch_norm={KINDS[kind]}",
        f"optimizer.base_lr={scale.choose(0.01, 0.00125)}", f"batch.global_size={BATCH}",
        f"batch.micro_size={micro}", f"train.epochs={scale.choose(3, 5)}",
        "train.log_every_steps=1",
    )  # fmt: skip
    return Training(
        f"resnet8-{kind.replace(' ', '-')}-micro-{micro}",
        seed,
        scale.choose(4096, 6144),
        2000,
        keys,
    )


def micro_sizes(kind: str, scale: Scale) -> tuple[int, ...]:
    """Return the micro-batch sizes. With batch norm the curve differs; two sizes show that."""
    ends = (MICRO[0], MICRO[-1])
    return scale.choose(ends, MICRO) if kind == "without batch norm" else scale.choose((), ends)


def trainings(scale: Scale) -> list[Training]:
    return [
        training_of(scale, kind, micro, seed)
        for seed in range(scale.seeds)
        for kind in KINDS
        for micro in micro_sizes(kind, scale)
    ]


def activation_mib(micro: int) -> float:
    """Return the MiB saved for the backward pass of a micro-batch, computed from the network."""
    with torch.device("meta"):
        model = build_model("resnet8", 10, 28, batch_norm=False)
    return forward_costs(model, 28)[1] * micro / 2**20


def measured(runs: Runs, scale: Scale) -> Figures:
    figures: Figures = {
        "activation_mib": {micro: round(activation_mib(micro), 1) for micro in MICRO},
        "kinds": {},
    }
    for kind in KINDS:
        entry = {}
        for micro in micro_sizes(kind, scale):
            by_seed = [training_of(scale, kind, micro, seed) for seed in range(scale.seeds)]
            losses = [runs.losses(training) for training in by_seed]
            undivided = [
                runs.losses(training_of(scale, kind, MICRO[0], seed)) for seed in range(scale.seeds)
            ]
            entry[micro] = {
                "losses": [[round(float(v), 5) for v in row] for row in losses],
                "largest_difference_nats": max(
                    float(abs(a - b).max()) for a, b in zip(losses, undivided, strict=True)
                ),
                "fall_nats": min(fall_of(row.tolist()) for row in losses),
                "peak_mib": mean_std(
                    [runs.outcome(training)["peak_mib"] for training in by_seed], 1
                ),
                "images_per_second": mean_std(
                    [runs.outcome(training)["images_per_second"] for training in by_seed], 1
                ),
            }
        figures["kinds"][kind] = entry
    return figures


def judge(figures: Figures) -> list[Claim]:
    entry, computed = figures["kinds"]["without batch norm"], figures["activation_mib"]
    max_diff = max(values["largest_difference_nats"] for values in entry.values())
    fall = min(values["fall_nats"] for values in entry.values())
    first, last = str(MICRO[0]), str(MICRO[-1])
    saved = entry[first]["peak_mib"]["mean"] - entry[last]["peak_mib"]["mean"]
    expected = computed[first] - computed[last]
    why = (
        f"peak memory {saved:,.0f} MiB lower at {last} than at {first}; activations computed: "
        f"{expected:,.0f} MiB"
    )
    return [
        same_curves("T4", "any micro-batch gives the same losses", max_diff, fall),
        Claim(
            "T4", "a smaller micro-batch needs less memory", verdict_if(saved >= expected / 2), why
        ),
    ]


def plot(figures: Figures, file: Path) -> None:
    entry = figures["kinds"]["without batch norm"]
    with plots.panels(2, f"A batch of {BATCH} in micro-batches", file) as (curve, memory):
        lines = ("-", "--", ":")
        for (micro, values), colour, line in zip(entry.items(), plots.COLOURS, lines, strict=False):
            label = f"{BATCH // int(micro)} x {micro}"
            plots.band(
                curve,
                range(1, len(values["losses"][0]) + 1),
                values["losses"],
                colour,
                label,
                linestyle=line,
            )
        plots.bars(
            memory,
            [f"{BATCH // int(m)} x {m}" for m in entry],
            [v["peak_mib"] for v in entry.values()],
            plots.COLOURS,
            "{:,.0f}",
        )
        for place, micro in enumerate(entry):
            memory.plot(
                place,
                figures["activation_mib"][micro],
                "D",
                color=plots.BLACK,
                label="activations, computed" if not place else None,
            )
        curve.set(xlabel="optimizer step", ylabel="training loss, cross-entropy (nats)")
        memory.set(
            xlabel="accumulation steps x micro-batch", ylabel="peak memory of the process (MiB)"
        )
        for axes in (curve, memory):
            axes.legend(frameon=False)


def paragraph(figures: Figures) -> str:
    entry, other = figures["kinds"]["without batch norm"], figures["kinds"]["with batch norm"]
    cells = "; ".join(
        f"{BATCH // int(micro)} x {micro}: {format_mean_std(values['peak_mib'], 0)} MiB, "
        f"{values['images_per_second']['mean']:,.0f} images/s"
        for micro, values in entry.items()
    )
    max_diff = max(values["largest_difference_nats"] for values in entry.values())
    norm = (
        " With batch norm, whose statistics are those of a micro-batch, the losses differ by "
        "up to "
        f"{max(values['largest_difference_nats'] for values in other.values()):.2g} nats, because "
        "the result then depends on the micro-batch size."
        if other
        else ""
    )
    return (
        f"ResNet-8 without batch norm, with batches of {BATCH} as accumulation steps x "
        f"micro-batch. Peak memory of the process, including the program: {cells}. The losses of a "
        f"step differ by at most {max_diff:.2g} nats between them.{norm}"
    )


STUDY = Study(
    name="accumulation",
    statements=("T4",),
    question="Does a batch divided into micro-batches train like an undivided one, in less memory?",
    rule=f"Curve: borne out if, without batch norm, no step's loss differs by {SAME} nats or more "
    "in any seed, else not. Memory: borne out if the peak memory of the process falls by at least "
    "half of the computed reduction of the activations, else not.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
