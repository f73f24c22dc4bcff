"""Study: plain and residual blocks that learn the identity, or a map close to it.

This is a regression of feature maps, which the trainer's classification cannot express. ``fit``
measures the trainer's blocks with its update rule, and trains no network.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.studies.framework import measure, plots
from pipelines.studies.framework.runner import Runs
from pipelines.studies.framework.study import (
    Claim,
    Figures,
    Scale,
    Study,
    differences_text,
    format_mean_std,
    mean_std,
    verdict_by_seeds,
    verdict_if,
)
from trainer.config.schema import OptimizerConfig
from trainer.models import build_model
from trainer.models.resnet import Block
from trainer.training.optimizers.build import build_optimizer

DEPTHS = {1: 8, 3: 20, 9: 56}
"""Number of blocks, and layers of the CIFAR network whose first stage has that many."""
CHANNELS = 8
RATES = (1e-3, 1e-2)
EXPLAINED = 0.9
PLAIN, RESIDUAL, ZERO_GAIN = "plain", "residual", "residual, last gain 0"
KINDS = {
    PLAIN: ("plain", {}),
    RESIDUAL: ("resnet", {}),
    ZERO_GAIN: ("resnet", {"zero_init_gamma": True}),
}


def stack_of(kind: str, blocks: int, seed: int) -> nn.Sequential:
    """Return ``blocks`` blocks of a network's first stage with their initial weights.

    They map [N, 8, H, W] to the same shape.
    """
    family, options = KINDS[kind]
    torch.manual_seed(seed)
    network = build_model(f"{family}{DEPTHS[blocks]}", 10, width=CHANNELS, **options)
    return nn.Sequential(
        *(layer for name, layer in network.named_children() if name.startswith("stage1_"))
    )


def feature_maps(images: Tensor) -> Tensor:
    """Return eight maps in [0.25, 1] of each image [N, 3, 28, 28].

    They are its four mirror images at half the size, and their negatives. Above 0 the last ReLU is
    active, which determines a block's residual branch; if y = 0, any negative branch would do.
    """
    grey = F.avg_pool2d(images.mean(1, keepdim=True), 2)
    grey = 0.25 + 0.75 * (grey - grey.amin()) / (grey.amax() - grey.amin())
    four = torch.cat([grey, grey.flip(2), grey.flip(3), grey.transpose(2, 3)], 1)
    return torch.cat([four, 1.25 - four], 1).contiguous()


def fit(blocks: nn.Module, x: Tensor, y: Tensor, steps: int, rate: float) -> list[float]:
    """Train ``blocks`` to map ``x`` to ``y``; return the error of each step.

    The error is the squared error divided by the variance of ``y``: the mean of ``y`` would give 1.
    """
    optimizer = build_optimizer(blocks, OptimizerConfig(name="adamw", weight_decay=0.0), rate)
    losses = []
    blocks.train()
    for step in range(steps):
        part = slice(step * 64 % len(x), step * 64 % len(x) + 64)
        loss = F.mse_loss(blocks(x[part]), y[part]) / y.var()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def _best(kind: str, blocks: int, seed: int, x: Tensor, steps: int) -> list[float]:
    """Return the curve of the learning rate that ends lowest: each kind gets its own rate."""
    curves = [fit(stack_of(kind, blocks, seed), x, x, steps, rate) for rate in RATES]
    return min(curves, key=lambda curve: sum(curve[-10:]))


def explained(kind: str, x: Tensor, seed: int, steps: int) -> float:
    """Return the fraction of H(x) - x that the residual branch F of one block learns.

    The target is H = the 3x3 mean of x.
    """
    target = F.avg_pool2d(x, 3, 1, 1)
    blocks = stack_of(kind, 1, seed)
    fit(blocks, x, target, steps, RATES[1])
    block = blocks[0]
    assert isinstance(block, Block)
    with torch.no_grad():
        rest = (block.residual(x) - (target - x)).square().mean() / (target - x).square().mean()
    return 1 - float(rest)


def measured(runs: Runs, scale: Scale) -> Figures:
    images, _ = measure.some_images(runs, 256)
    x, steps = feature_maps(images), scale.choose(60, 200)
    figures: Figures = {"steps": steps, "kinds": {}}
    for kind in KINDS:
        curves: dict[int, Any] = {
            n: [_best(kind, n, seed, x, steps) for seed in range(scale.seeds)] for n in DEPTHS
        }
        figures["kinds"][kind] = {
            "last_loss": {n: mean_std([sum(c[-10:]) / 10 for c in curves[n]], 6) for n in DEPTHS},
            "curves": {n: [[float(f"{v:.4g}") for v in c] for c in curves[n]] for n in DEPTHS},
        }
    figures["explained"] = {
        kind: mean_std([explained(kind, x, seed, 2 * steps) for seed in range(scale.seeds)])
        for kind in (RESIDUAL, ZERO_GAIN)
    }
    return figures


def judge(figures: Figures) -> list[Claim]:
    claims = []
    for n in map(str, DEPTHS):
        plain, residual = (
            figures["kinds"][kind]["last_loss"][n]["each"] for kind in (PLAIN, RESIDUAL)
        )
        ratios = [p / max(r, 1e-12) for p, r in zip(plain, residual, strict=True)]
        why = "relative to residual blocks: " + differences_text(ratios, 1)
        claims.append(
            Claim(
                "R1",
                f"the error of {n} plain block{'s' if n != '1' else ''} is more than twice as "
                "large",
                verdict_by_seeds(ratios, 2.0),
                why,
            )
        )
    starts = [
        curve[0] for curves in figures["kinds"][ZERO_GAIN]["curves"].values() for curve in curves
    ]
    text = "a residual block whose last gain is 0 is the identity before training"
    claims.append(
        Claim(
            "R1",
            text,
            verdict_if(max(starts) == 0),
            f"error of the first step {max(starts):g} for 1, 3 and 9 blocks",
        )
    )
    parts = figures["explained"][ZERO_GAIN]["each"]
    text = (
        "a residual block (last gain 0) trained to compute H learns more than "
        f"{EXPLAINED:.0%} of F(x) = H(x) - x"
    )
    return [*claims, Claim("R2", text, verdict_by_seeds(parts, EXPLAINED), differences_text(parts))]


def plot(figures: Figures, file: Path) -> None:
    deepest = str(max(DEPTHS))
    with plots.panels(2, "Blocks trained to be the identity", file) as (by_step, by_depth):
        for (kind, entry), colour in zip(
            figures["kinds"].items(), (plots.ORANGE, plots.BLUE, plots.GREEN), strict=True
        ):
            rows = [[value + 1e-9 for value in row] for row in entry["curves"][deepest]]
            plots.band(by_step, range(1, figures["steps"] + 1), rows, colour, kind)
            each = [
                [entry["last_loss"][n]["each"][i] + 1e-9 for n in entry["last_loss"]]
                for i in range(len(rows))
            ]
            plots.band(by_depth, list(DEPTHS), each, colour, kind, marker="o")
        by_step.set(
            title=f"{deepest} blocks",
            xlabel="optimizer step",
            ylabel="squared error / variance of x",
            yscale="log",
        )
        by_depth.set(
            title="At the end",
            xlabel="blocks",
            ylabel="squared error / variance of x",
            yscale="log",
            xticks=list(DEPTHS),
        )
        by_step.legend(frameon=False)


def paragraph(figures: Figures) -> str:
    cells = "; ".join(
        f"{kind}: "
        + ", ".join(
            f"{n} block{'s' if n != '1' else ''} {values['mean']:.2g}"
            for n, values in entry["last_loss"].items()
        )
        for kind, entry in figures["kinds"].items()
    )
    parts = figures["explained"]
    return (
        f"Error in reproducing the input, divided by its variance, after {figures['steps']} steps "
        f"of AdamW, each at the better of the rates {RATES[0]:g} and {RATES[1]:g}: {cells}. One "
        "residual block was trained to compute the 3x3 mean H of its input. Its branch F learned "
        f"{format_mean_std(parts[ZERO_GAIN], 3)} of H(x) - x (1: all of it) with an initial last "
        f"gain of 0, and {format_mean_std(parts[RESIDUAL], 1)} with the usual 1: a random F then "
        "closes the last ReLU of some maps permanently, and F is undetermined there. The blocks "
        "are those of the first stage of the CIFAR networks, with 8 channels and batch norm in "
        "training mode; the inputs are small Fashion-MNIST images."
    )


STUDY = Study(
    name="identity",
    statements=("R1", "R2"),
    question="How well, and how fast, do plain and residual blocks learn to reproduce their input?",
    rule="R1, for 1, 3 and 9 blocks: borne out if the final error of the plain stack is more than "
    "twice that of the residual one in each of at least 3 seeds, not borne out if in none, else "
    "undecided; F = 0: borne out if the error of the first step is 0. "
    f"R2: borne out if F explains more than {EXPLAINED:.0%} of H(x) - x in each of at least 3 "
    "seeds, not borne out if in none.",
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
