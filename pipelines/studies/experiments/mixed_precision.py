"""Study: loss curve, speed and memory in fp32, bf16 and fp16.

Also measures which gradients fp16 would lose without loss scaling.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

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
from trainer.models.model_info import IMAGES_TRACED, saved_activation_bytes

PRECISIONS = ("fp32", "bf16", "fp16")
NEAR = 0.1
"""Maximum difference of the final training loss from fp32's, nats."""
LEAST_FP16 = 2.0**-25
"""Largest value that fp16 rounds to 0: half of its smallest number, 2^-24."""
SCALE = 2.0**16
KINDS = ("weights", "activations")
"""The tensors for which gradients of the loss are counted."""
BINS = list(range(-44, 5))
"""Powers of two that separate the bins of the gradient histogram."""


def training_of(scale: Scale, precision: str, seed: int) -> Training:
    """Return one training.

    The network is small, because few processors compute in fp16. All use ZeRO-1, which fp16 needs
    for its fp32 master weights.
    """
    keys = (
        "model.name=resnet8", "model.width=4", f"precision={precision}", "parallel.zero_stage=1",
        f"train.epochs={scale.choose(2, 4)}", "optimizer.base_lr=0.05",
    )  # fmt: skip
    return Training(
        f"resnet8-{precision}", seed, scale.choose(1024, 8192), scale.choose(500, 2000), keys
    )


def trainings(scale: Scale) -> list[Training]:
    return [
        training_of(scale, precision, seed)
        for seed in range(scale.seeds)
        for precision in PRECISIONS
    ]


def activation_mib(name: str, dtype: torch.dtype) -> float:
    """Return the activations saved for the backward pass of a 224-pixel image, MiB.

    ``dtype``: the type of weights and images.
    """
    with torch.device("meta"):
        model = build_model(name, 1000, 224)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return (
        saved_activation_bytes(
            model, torch.empty(IMAGES_TRACED, 3, 224, 224, device="meta", dtype=dtype)
        )[0]
        / 2**20
    )


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the absolute values, in fp32, of the gradients that are not 0.

    They are the gradients of the loss in all weights, and in the output of each convolution and
    fully connected layer (Micikevicius et al. 2018, figure 3).
    """
    outputs = measure.output_gradients(model, images, labels)
    weights = [p.grad for p in model.parameters() if p.grad is not None]
    found = {"weights": weights, "activations": outputs}
    flat = {
        kind: torch.cat([value.flatten().abs() for value in values])
        for kind, values in found.items()
    }
    return {kind: values[values > 0] for kind, values in flat.items()}


def lost(values: Tensor, factor: float) -> float:
    """Return the fraction of the gradients that become 0 in fp16 if the loss is scaled by
    ``factor``.

    It counts only the loss of the conversion itself.
    """
    return float(((values * factor).half() == 0).float().mean())


def measured(runs: Runs, scale: Scale) -> Figures:
    figures: Figures = {"precisions": {}, "bins": BINS}
    for precision in PRECISIONS:
        by_seed = [training_of(scale, precision, seed) for seed in range(scale.seeds)]
        losses = [runs.losses(training) for training in by_seed]
        window = max(1, len(losses[0]) // 10)
        smoothed = [plots.thinned(plots.smooth(row.tolist(), window)) for row in losses]
        figures["precisions"][precision] = {
            "last_loss": mean_std([float(row[-window:].mean()) for row in losses]),
            "top1_percent": mean_std([runs.top1(training) for training in by_seed], 2),
            "images_per_second": mean_std(
                [runs.outcome(training)["images_per_second"] for training in by_seed], 1
            ),
            "steps": smoothed[0][0],
            "losses": [values for _, values in smoothed],
        }
    images, labels = measure.some_images(runs, 64)
    trained = [
        measure.trained(runs, training_of(scale, "fp32", seed)) for seed in range(scale.seeds)
    ]
    found = [gradients(model, images, labels) for model in trained]
    figures["histogram_percent"], figures["lost_percent"] = {}, {}
    for kind in KINDS:
        each = [values[kind] for values in found]
        counts = [
            torch.histc(values.log2().clamp(BINS[0], BINS[-1]), len(BINS) - 1, BINS[0], BINS[-1])
            for values in each
        ]
        figures["histogram_percent"][kind] = [
            [round(float(100 * n / row.sum()), 3) for n in row] for row in counts
        ]
        figures["lost_percent"][kind] = {
            "without": mean_std([100 * lost(values, 1.0) for values in each]),
            "with": mean_std([100 * lost(values, SCALE) for values in each]),
        }
    figures["resnet50_activation_mib"] = {
        "fp32": round(activation_mib("resnet50", torch.float32), 1),
        "fp16": round(activation_mib("resnet50", torch.float16), 1),
    }
    return figures


def judge(figures: Figures) -> list[Claim]:
    by = figures["precisions"]
    claims = []
    for precision in PRECISIONS[1:]:
        pairs = zip(
            by[precision]["last_loss"]["each"], by["fp32"]["last_loss"]["each"], strict=True
        )
        margins = [NEAR - abs(a - b) for a, b in pairs]
        why = f"margin to {NEAR} nats: " + differences_text(margins, 3)
        claims.append(
            Claim(
                "T3",
                f"{precision} ends within {NEAR} nats of fp32's training loss",
                verdict_by_seeds(margins),
                why,
            )
        )
    memory = figures["resnet50_activation_mib"]
    why = f"ResNet-50: {memory['fp32']} and {memory['fp16']} MiB of activations per image, computed"
    claims.append(
        Claim(
            "T3",
            "16-bit floats need less memory",
            verdict_if(memory["fp16"] < 0.7 * memory["fp32"]),
            why,
        )
    )
    faster = [
        a / b - 1
        for a, b in zip(
            by["bf16"]["images_per_second"]["each"],
            by["fp32"]["images_per_second"]["each"],
            strict=True,
        )
    ]
    why = differences_text([100 * value for value in faster], 0, "%") + "; on a CPU, not a GPU"
    claims.append(Claim("T3", "bf16 is faster on this machine", verdict_by_seeds(faster), why))
    without, with_ = (
        figures["lost_percent"]["activations"][key]["mean"] for key in ("without", "with")
    )
    why = f"{without:.2f}% become 0 without, {with_:.2f}% with a scale of {SCALE:,.0f}"
    text = "fp16 loses gradients of activations that loss scaling keeps"
    return [*claims, Claim("T3", text, verdict_if(without > 0.1 and with_ < without / 10), why)]


def plot(figures: Figures, file: Path) -> None:
    with plots.panels(2, "Mixed precision: ResNet-8, a quarter of its channels", file, 4.6) as (
        curve,
        histogram,
    ):
        for (precision, entry), colour, line in zip(
            figures["precisions"].items(), plots.COLOURS, ("-", "--", ":"), strict=False
        ):
            plots.band(curve, entry["steps"], entry["losses"], colour, precision, linestyle=line)
        curve.set(xlabel="optimizer step (64 images)", ylabel="training loss, cross-entropy (nats)")
        curve.legend(frameon=False)
        for (kind, rows), colour in zip(
            figures["histogram_percent"].items(), (plots.BLUE, plots.ORANGE), strict=True
        ):
            heights = [sum(column) / len(column) for column in zip(*rows, strict=True)]
            histogram.stairs(
                heights, figures["bins"], fill=True, alpha=0.6, color=colour, label=f"in {kind}"
            )
        histogram.axvline(-25, color=plots.BLACK, linestyle=":")
        histogram.annotate(
            "fp16 rounds to 0",
            (-25, 1),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(-4, -12),
            ha="right",
        )
        histogram.set(xlabel="log2 of the gradient's size", ylabel="gradients that are not 0 (%)")
        histogram.legend(frameon=False)


def paragraph(figures: Figures) -> str:
    cells = "; ".join(
        f"{precision}: training loss {format_mean_std(e['last_loss'], 3)}, top-1 "
        f"{format_mean_std(e['top1_percent'])}%, "
        f"{e['images_per_second']['mean']:,.0f} images/s"
        for precision, e in figures["precisions"].items()
    )
    lost_, memory = figures["lost_percent"]["activations"], figures["resnet50_activation_mib"]
    return (
        f"On this CPU, with fp32 master weights in all trainings: {cells}. This speed does not "
        "predict that of a GPU with 16-bit units. For ResNet-50 at 224 pixels, the activations of "
        f"an image need {memory['fp32']} MiB in fp32 and {memory['fp16']} MiB in fp16, computed "
        "(weights, gradients, master weights and momentum together need 12 bytes per parameter in "
        "either). Of the nonzero gradients in the activations of the trained network, "
        f"{format_mean_std(lost_['without'], 2)}% become 0 in fp16 without loss scaling and "
        f"{format_mean_std(lost_['with'], 2)}% with the loss multiplied by {SCALE:,.0f}; of those "
        f"in its weights, {format_mean_std(figures['lost_percent']['weights']['without'], 2)}% and "
        f"{format_mean_std(figures['lost_percent']['weights']['with'], 2)}%."
    )


STUDY = Study(
    name="mixed-precision",
    statements=("T3",),
    question="Do 16-bit floats train like 32-bit floats, in less memory and time, and what does "
    "loss scaling keep?",
    rule=f"Curve: borne out if the final training loss is within {NEAR} nats of fp32's in each of "
    "at least 3 seeds, not borne out if in none. Memory: borne out if activations need less than "
    "0.7 of fp32's. Speed: borne out if bf16 is faster on this machine in each of at least 3 "
    "seeds, not borne out if in none. Loss scaling: borne out if more than 0.1% of the gradients "
    "in activations become 0 without it, and less than a tenth of that with it.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
