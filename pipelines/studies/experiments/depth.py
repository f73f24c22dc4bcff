"""Study: plain and residual networks of growing depth (He et al. 2015, figures 1 and 6).

Which of them benefit from more layers?
"""

import inspect
from pathlib import Path

import torch
from torch import nn

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
    verdict_if,
)
from trainer.models import build_model
from trainer.models.resnet import Block

FAMILIES = ("plain", "resnet")
SHALLOW, DEEP = 20, 56


def networks(scale: Scale) -> dict[tuple[str, int], int]:
    """Return the number of seeds by family and depth.

    110 layers are trained only with shortcuts, as in the paper's figure 6, and only once: no claim
    depends on them.
    """
    both = {(family, depth): scale.seeds for family in FAMILIES for depth in (SHALLOW, DEEP)}
    return both | scale.choose({}, {("resnet", 110): 1})


def training_of(scale: Scale, family: str, depth: int, seed: int) -> Training:
    """Return one training, with half of the paper's channels and its learning rate, 0.1 for 128."""
    keys = (f"model.name={family}{depth}", "model.width=8", f"train.epochs={scale.choose(3, 4)}")
    return Training(f"{family}{depth}", seed, scale.choose(2048, 10_000), scale.val_samples, keys)


def trainings(scale: Scale) -> list[Training]:
    return [
        training_of(scale, family, depth, seed)
        for seed in range(scale.seeds)
        for (family, depth), seeds in networks(scale).items()
        if seed < seeds
    ]


def block_difference() -> dict[str, object]:
    """Return what the shortcut adds to a block: code, parameters, output for the same weights."""
    with torch.device("meta"):
        parameters = [
            measure.count_parameters(build_model(f"{family}{DEEP}", 10)) for family in FAMILIES
        ]
    plain, residual = (
        build_model(f"{family}8", 10, width=4).eval().get_submodule("stage1_0")
        for family in FAMILIES
    )
    assert isinstance(plain, Block)
    assert isinstance(residual, Block)
    plain.load_state_dict(residual.state_dict())
    x = torch.randn(2, 4, 8, 8)
    with torch.inference_mode():
        sums = nn.functional.relu(residual.residual(x) + x)
        equal = torch.equal(residual(x), sums) and torch.equal(
            plain(x), nn.functional.relu(plain.residual(x))
        )
    lines = [line.strip() for line in inspect.getsource(Block.forward).splitlines()]
    return {
        "lines_of_code": [line for line in lines if "self.shortcut(x)" in line],
        "more_parameters": parameters[1] - parameters[0],
        "output_is_f_plus_x": equal,
    }


def measured(runs: Runs, scale: Scale) -> Figures:
    figures: Figures = {
        "depths": sorted({depth for _, depth in networks(scale)}),
        "block": block_difference(),
        "networks": {},
    }
    for (family, depth), seeds in networks(scale).items():
        by_seed = [training_of(scale, family, depth, seed) for seed in range(seeds)]
        losses = [runs.losses(training) for training in by_seed]
        width = len(losses[0]) // 10
        smoothed = [plots.thinned(plots.smooth(loss.tolist(), width)) for loss in losses]
        tests = [runs.history(training, "top1") for training in by_seed]
        figures["networks"][f"{family}{depth}"] = {
            "last_loss": mean_std([float(loss[-width:].mean()) for loss in losses]),
            "test_error_percent": mean_std([100 - runs.top1(training) for training in by_seed], 2),
            "steps": smoothed[0][0],
            "losses": [values for _, values in smoothed],
            "test_steps": tests[0][0].tolist(),
            "test_errors": [
                [round(100 - 100 * float(value), 2) for value in values] for _, values in tests
            ],
        }
    return figures


def judge(figures: Figures) -> list[Claim]:
    def growth(family: str) -> list[float]:
        shallow, deep = (
            figures["networks"][f"{family}{depth}"]["last_loss"]["each"]
            for depth in (SHALLOW, DEEP)
        )
        return [b - a for a, b in zip(shallow, deep, strict=True)]

    plain, residual = growth("plain"), growth("resnet")
    extra_growth = [p - r for p, r in zip(plain, residual, strict=True)]
    block = figures["block"]
    added = (
        f"{len(block['lines_of_code'])} line (`{block['lines_of_code'][0]}`), "
        f"{block['more_parameters']} parameters"
    )
    same = (
        len(block["lines_of_code"]) == 1
        and block["more_parameters"] == 0
        and block["output_is_f_plus_x"]
    )

    def claim(statement: str, text: str, values: list[float]) -> Claim:
        return Claim(
            statement, text, verdict_by_seeds(values), differences_text(values, 3, " nats")
        )

    return [
        claim("P2", f"plain-{DEEP} ends with a higher training loss than plain-{SHALLOW}", plain),
        claim(
            "P2",
            f"res-{DEEP} ends with a lower training loss than res-{SHALLOW}",
            [-value for value in residual],
        ),
        claim(
            "I6",
            "depth increases the training loss of the residual network less than that of the "
            "plain one",
            extra_growth,
        ),
        Claim("P3", "the residual block is the plain block plus x", verdict_if(bool(same)), added),
    ]


def plot(figures: Figures, file: Path) -> None:
    colours = dict(zip(figures["depths"], (plots.BLUE, plots.ORANGE, plots.GREEN), strict=False))
    highest = max(max(row) for entry in figures["networks"].values() for row in entry["losses"])
    lowest = min(min(row) for entry in figures["networks"].values() for row in entry["losses"])
    with plots.panels(
        2, "Depth: thick, training loss; dashed, test error (right)", file, 5.0
    ) as row:
        for axes, family, title in zip(row, FAMILIES, ("plain", "residual: + x"), strict=True):
            right = axes.twinx()
            for depth, colour in colours.items():
                entry = figures["networks"].get(f"{family}{depth}")
                if entry is None:
                    continue
                plots.band(axes, entry["steps"], entry["losses"], colour, f"{depth} layers")
                plots.band(
                    right,
                    entry["test_steps"],
                    entry["test_errors"],
                    colour,
                    "",
                    linestyle="--",
                    marker=".",
                )
            axes.set(
                title=title,
                xlabel="optimizer step",
                ylabel="training loss, cross-entropy (nats)",
                ylim=(lowest * 0.9, highest),
            )
            right.set(ylabel="test error (%)", ylim=(0, 100))
            right.spines[["top"]].set_visible(False)
            axes.legend(frameon=False)


def paragraph(figures: Figures) -> str:
    cells = "; ".join(
        f"{name.replace('resnet', 'res-').replace('plain', 'plain-')}: training loss "
        f"{format_mean_std(entry['last_loss'], 3)}, "
        "test error "
        f"{format_mean_std(entry['test_error_percent'])}%"
        for name, entry in figures["networks"].items()
    )
    return (
        f"At the end of training (mean of the last tenth of the steps): {cells}. The two "
        "families differ in one line of "
        f"`trainer/models/resnet.py`, `{figures['block']['lines_of_code'][0]}`, and in no "
        "parameter. Such a short training shows how fast a network learns, not its result after "
        "the paper's 64,000 steps."
    )


STUDY = Study(
    name="depth",
    statements=("I6", "P2", "P3"),
    question="Do more layers make a network better, and does that change with the shortcut?",
    rule=f"By the training loss (mean of the last tenth of the steps) of {SHALLOW} and {DEEP} "
    "layers: each claim is borne out if it holds in each of at least 3 seeds, not borne out if in "
    "none, else undecided. P3: one line of code, no additional parameter, and the block's output "
    "equals relu(F(x) + x) bit for bit.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
