"""Study: VGG-16 and ResNet-152 on 1, 2 and 4 pipeline stages.

Computes the memory of each stage, the bubble, and which GPUs fit; checks that the curve is the
same.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipelines.studies.framework import plots
from pipelines.studies.framework.runner import Runs
from pipelines.studies.framework.study import (
    LEAST_FALL,
    SAME,
    Claim,
    Figures,
    Scale,
    Study,
    Training,
    fall_of,
    mean_std,
    same_curves,
    verdict_if,
)
from trainer.engine.partition import assign_layers, layer_costs
from trainer.models import build_model
from trainer.models.model_info import IMAGES_TRACED, saved_activation_bytes

NETWORKS = ("vgg16", "resnet152")
STAGES = (1, 2, 4)
MICRO, MICRO_BATCHES = 32, 8
"""Images per micro-batch, and micro-batches per optimizer step."""
BYTES_PER_PARAMETER = 12
"""Bytes of an fp32 weight, its gradient and its momentum."""
GPUS = {"GTX 580, 3 GiB": 3, "P100, 16 GiB": 16, "H100, 80 GiB": 80}


def training_of(scale: Scale, stages: int, seed: int) -> Training:
    keys = (
        "model.name=resnet8", "model.batch_norm=false", "optimizer.base_lr=0.02",
        "batch.global_size=128", "batch.micro_size=32", f"parallel.pipeline_stages={stages}",
        "train.epochs=3",
    )  # fmt: skip
    return Training(
        f"resnet8-stages-{stages}", seed, scale.choose(2048, 10_000), 2000, keys, procs=stages
    )


def trainings(scale: Scale) -> list[Training]:
    return [training_of(scale, stages, seed) for seed in range(scale.seeds) for stages in (1, 2)]


def stage_memory(
    name: str, stages: int, image_size: int = 224, micro: int = MICRO
) -> list[dict[str, Any]]:
    """Return the layers and parameters of each stage, and its MiB of weights and activations.

    Weights include their gradients and momentum. Stage s of S holds the activations of up to S - s
    micro-batches at a time (one forward, one backward: Narayanan et al. 2019, 3.2); a single stage
    holds those of one. The layers are split as the trainer splits them, by multiply-adds.
    """
    with torch.device("meta"):
        model = build_model(name, 1000, image_size)
    layers = dict(model.named_children())
    value: Any = torch.empty(IMAGES_TRACED, 3, image_size, image_size, device="meta")
    found = []
    for place, names in enumerate(assign_layers(layer_costs(model, image_size), stages)):
        part = nn.Sequential(*(layers[layer] for layer in names))
        kept, value = saved_activation_bytes(part, value)
        parameters = sum(p.numel() for p in part.parameters())
        found.append(
            {
                "layers": f"{names[0]} to {names[-1]}",
                "parameters": parameters,
                "weights_mib": round(parameters * BYTES_PER_PARAMETER / 2**20, 1),
                "activations_mib": round(
                    kept * micro * min(stages - place, MICRO_BATCHES) / 2**20, 1
                ),
            }
        )
        value = value.detach()
    return found


def bubble(stages: int, micro_batches: int = MICRO_BATCHES) -> float:
    """Return the fraction of the time that a stage waits: (S - 1) / (m + S - 1).

    All stages are assumed to take equally long (Huang et al. 2019, 2.3).
    """
    return (stages - 1) / (micro_batches + stages - 1)


def measured(runs: Runs, scale: Scale) -> Figures:
    networks = {
        name: {stages: stage_memory(name, stages) for stages in STAGES} for name in NETWORKS
    }
    max_diffs, fall = [], []
    for seed in range(scale.seeds):
        one, two = (runs.losses(training_of(scale, stages, seed)) for stages in (1, 2))
        max_diffs.append(float(abs(one - two).max()))
        fall.append(min(fall_of(one.tolist()), fall_of(two.tolist())))
    return {
        "networks": networks,
        "bubble": {stages: round(bubble(stages), 4) for stages in STAGES},
        "fullest_mib": {
            name: {stages: _fullest(rows) for stages, rows in by.items()}
            for name, by in networks.items()
        },
        "fullest_mib_small_micro": {
            name: {
                stages: _fullest(stage_memory(name, stages, micro=MICRO // stages))
                for stages in STAGES
            }
            for name in NETWORKS
        },
        "largest_difference_nats": mean_std(max_diffs, 6),
        "fall_nats": min(fall),
    }


def _fullest(rows: list[dict[str, Any]]) -> float:
    return max(float(row["weights_mib"]) + float(row["activations_mib"]) for row in rows)


def judge(figures: Figures) -> list[Claim]:
    claims = []
    for name, fullest in figures["fullest_mib"].items():
        one, four = fullest["1"], fullest["4"]
        why = f"{one / 1024:.1f} GiB on one GPU, {four / 1024:.1f} on the fullest of four"
        text = f"{name} in four stages needs less memory on the fullest GPU than in one"
        claims.append(Claim("T2", text, verdict_if(four < one), why))
        small = figures["fullest_mib_small_micro"][name]["4"]
        why = (
            f"{one / 1024:.1f} GiB on one GPU, {small / 1024:.1f} on the fullest of four with "
            f"micro-batches of {MICRO // 4}"
        )
        claims.append(
            Claim(
                "T2",
                f"{name} in four stages needs less memory if micro-batches are a quarter as large",
                verdict_if(small < one),
                why,
            )
        )
    max_diff = max(figures["largest_difference_nats"]["each"])
    return [
        *claims,
        same_curves("T2", "two stages give the same losses as one", max_diff, figures["fall_nats"]),
    ]


def plot(figures: Figures, file: Path) -> None:
    with plots.panels(
        len(NETWORKS), f"Memory by stage, {MICRO_BATCHES} micro-batches of {MICRO}, fp32", file, 4.8
    ) as row:
        for axes, (name, by_stages) in zip(row, figures["networks"].items(), strict=True):
            labels: list[str] = []
            for stages, rows in by_stages.items():
                for place, entry in enumerate(rows):
                    weights, activations = (
                        entry["weights_mib"] / 1024,
                        entry["activations_mib"] / 1024,
                    )
                    first = not labels
                    axes.bar(
                        len(labels),
                        weights,
                        color=plots.BLUE,
                        label="weights, gradients, momentum" if first else None,
                    )
                    axes.bar(
                        len(labels),
                        activations,
                        bottom=weights,
                        color=plots.ORANGE,
                        label="activations" if first else None,
                    )
                    labels.append(f"{place + 1}/{stages}")
            axes.set_xticks(range(len(labels)), labels)
            axes.set(title=name, xlabel="stage / number of stages", ylabel="memory (GiB)")
            axes.margins(y=0.25)  # space for the legend
            axes.legend(frameon=False)


def fits(gib: float) -> str:
    return ", ".join(name for name, size in GPUS.items() if gib <= size) or "none of these"


def paragraph(figures: Figures) -> str:
    cells = []
    for name, fullest in figures["fullest_mib"].items():
        each = "; ".join(
            f"{stages} stage{'s' if stages != '1' else ''}: {mib / 1024:.1f} GiB on the fullest "
            f"(fits {fits(mib / 1024)})"
            for stages, mib in fullest.items()
        )
        cells.append(f"{name}: {each}")
    bubbles = ", ".join(f"{stages}: {part:.0%}" for stages, part in figures["bubble"].items())
    return (
        f"Computed for fp32, SGD with momentum, {MICRO_BATCHES} micro-batches of {MICRO} images "
        f"of 224 pixels: {'. '.join(cells)}. An early stage keeps the activations of one "
        "micro-batch for itself and for each later stage, so memory falls by less than the number "
        "of stages, or rises; smaller micro-batches reduce it. Bubble, if all stages take equally "
        f"long: {bubbles}. ResNet-8 in one and in two stages of the trainer: the losses of a step "
        f"differ by at most {max(figures['largest_difference_nats']['each']):.2g} nats."
    )


STUDY = Study(
    name="model-parallel",
    statements=("T2",),
    question="How much memory does a GPU need if the layers of a network are split over 1, 2 or 4 "
    "GPUs, and does the split change the losses?",
    rule="Memory: borne out if the computed memory of the fullest of four stages is less than that "
    f"of a single GPU, else not. Curve: borne out if no step's loss differs by {SAME} nats or more "
    "between one stage and two in any seed, else not; undecided if the loss falls by less than "
    f"{LEAST_FALL}.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
