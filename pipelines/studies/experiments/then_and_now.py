"""Study: the cost of 90 epochs of each network in 2012 and today.

It is computed from published machines, peaks and times.
"""

from dataclasses import dataclass
from pathlib import Path

from pipelines.studies.framework import plots
from pipelines.studies.framework.runner import Runs
from pipelines.studies.framework.study import Claim, Figures, Scale, Study, verdict_if
from trainer.models.model_info import model_info

IMAGES, EPOCHS = (
    1_281_167,
    90,
)  # training images; Krizhevsky et al. 2012, section 5: "roughly 90 cycles"
FLOPS_PER_MULTIPLY_ADD = 6
"""2 operations, once in the forward pass and twice in the backward pass: for the gradients of the
weights and of the inputs.
"""
UTILIZATION_TODAY = 0.3
"""Assumed fraction of the peak; close to that of Goyal's one-hour training below."""
NETWORKS = ("alexnet2012", "googlenet2014", "vgg16", "resnet50", "resnet152")


@dataclass(frozen=True)
class Machine:
    """An accelerator.

    ``peak``: floating-point operations per second, as stated by its maker for the precision used.
    """

    name: str
    peak: float


GTX580 = Machine("GTX 580", 1.581e12)  # NVIDIA: 512 cores x 2 x 1.544 GHz, fp32
TITAN_BLACK = Machine("Titan Black", 5.121e12)  # NVIDIA: 2,880 cores x 2 x 0.889 GHz, fp32
P100 = Machine("P100", 10.6e12)  # NVIDIA: SXM2, fp32
H100 = Machine("H100", 989.4e12)  # NVIDIA: SXM, bf16 and fp16, dense


@dataclass(frozen=True)
class Report:
    """A training with a published time. ``hours``: a range if the source gives one."""

    network: str
    model: str
    epochs: int
    count: int
    machine: Machine
    hours: tuple[float, float]
    source: str


REPORTS = (
    Report(
        "AlexNet",
        "alexnet2012",
        90,
        2,
        GTX580,
        (120, 144),
        "Krizhevsky et al. 2012, 1 and 5: five to six days",
    ),
    Report(
        "VGG-16",
        "vgg16",
        74,
        4,
        TITAN_BLACK,
        (336, 504),
        "Simonyan, Zisserman 2015, 3.1 and 3.3: two to three weeks",
    ),
    Report("ResNet-50", "resnet50", 90, 256, P100, (1, 1), "Goyal et al. 2017, abstract: one hour"),
)
MLPERF = {8: 13.466, 64: 2.664, 512: 0.509, 768: 0.369, 3584: 0.183}
"""Minutes of ResNet-50 to 75.90% top-1, by number of H100s.

Source: MLPerf Training 3.0, closed, entries 3.0-2053, -2071, -2068, -2075, -2002.
"""


def training_flops(model: str, epochs: int = EPOCHS) -> float:
    """Return the operations of ``epochs`` passes over ImageNet at 224 pixels."""
    return float(model_info(model).multiply_adds) * FLOPS_PER_MULTIPLY_ADD * IMAGES * epochs


def utilization(report: Report) -> tuple[float, float]:
    """Return the lowest and highest fraction of the machines' total peak that the time allows."""
    peak_hour = report.count * report.machine.peak * 3600
    low, high = (
        training_flops(report.model, report.epochs) / (peak_hour * hours)
        for hours in reversed(report.hours)
    )
    return low, high


def hours_on(model: str, count: int, machine: Machine, used: float) -> float:
    return training_flops(model) / (count * machine.peak * used * 3600)


def measured(runs: Runs, scale: Scale) -> Figures:
    in_2012 = sum(utilization(REPORTS[0])) / 2
    return {
        "flops": {name: training_flops(name) for name in NETWORKS},
        "hours_2_gtx580": {name: round(hours_on(name, 2, GTX580, in_2012), 1) for name in NETWORKS},
        "hours_8_h100": {
            name: round(hours_on(name, 8, H100, UTILIZATION_TODAY), 4) for name in NETWORKS
        },
        "published": {
            report.network: {
                "machines": f"{report.count} {report.machine.name}",
                "hours": report.hours,
                "utilization": [round(value, 3) for value in utilization(report)],
                "source": report.source,
            }
            for report in REPORTS
        },
        "mlperf_minutes": MLPERF,
        "mlperf_efficiency": {
            n: round(MLPERF[8] * 8 / (minutes * n), 3) for n, minutes in MLPERF.items()
        },
    }


def judge(figures: Figures) -> list[Claim]:
    published = figures["published"]
    low, high = published["AlexNet"]["utilization"]
    minutes = figures["mlperf_minutes"]
    efficiency = figures["mlperf_efficiency"]["3584"]
    speed = figures["hours_2_gtx580"]["resnet50"] * 60 / minutes["3584"]
    why = f"ResNet-50 in {minutes['3584']} min on 3,584 H100s, in {minutes['8']} min on 8"
    return [
        Claim(
            "S1",
            "two GPUs could train AlexNet in 5 to 6 days",
            verdict_if(high < 1),
            f"at {low:.0%} to {high:.0%} of their peak",
        ),
        Claim(
            "S1",
            "today's clusters are a thousand times as fast as two GPUs of 2012",
            verdict_if(speed >= 1000),
            f"ResNet-50 to 75.9%: {speed:,.0f} times as fast as 90 epochs on the two GPUs; "
            f"{efficiency:.0%} of the speed per GPU of 8 GPUs",
        ),
        Claim(
            "S1",
            "such a network now takes weeks on hundreds to thousands of accelerators",
            verdict_if(minutes["512"] > 7 * 1440),
            why,
        ),
    ]


def plot(figures: Figures, file: Path) -> None:
    with plots.panels(2, "Then and now", file, 4.8) as (hours, scaling):
        places = range(len(NETWORKS))
        for key, offset, colour, label in (
            ("hours_2_gtx580", -0.2, plots.ORANGE, "2 GTX 580 (2012), AlexNet's utilization"),
            ("hours_8_h100", 0.2, plots.BLUE, f"8 H100, {UTILIZATION_TODAY:.0%} of peak (assumed)"),
        ):
            values = [figures[key][name] for name in NETWORKS]
            hours.bar([place + offset for place in places], values, 0.4, color=colour, label=label)
            for place, value in zip(places, values, strict=True):
                hours.annotate(
                    f"{value:,.0f}" if value >= 10 else f"{value:.2g}",
                    (place + offset, value),
                    ha="center",
                    va="bottom",
                    fontsize=9,
                )
        hours.set_xticks(list(places), NETWORKS, rotation=15)
        hours.set(yscale="log", ylabel=f"hours for {EPOCHS} epochs of ImageNet")
        hours.legend(frameon=False, loc="upper left")
        hours.set_ylim(top=1e5)
        counts = [int(n) for n in figures["mlperf_minutes"]]
        minutes = list(figures["mlperf_minutes"].values())
        scaling.plot(counts, minutes, "o-", color=plots.BLUE, label="published, MLPerf 3.0")
        scaling.plot(
            counts,
            [minutes[0] * counts[0] / n for n in counts],
            "--",
            color=plots.BLACK,
            label="perfect scaling",
        )
        scaling.set(
            xscale="log", yscale="log", xlabel="H100s", ylabel="minutes of ResNet-50 to 75.9% top-1"
        )
        scaling.set_xticks(counts, [f"{n:,}" for n in counts])
        scaling.minorticks_off()
        scaling.legend(frameon=False)


def paragraph(figures: Figures) -> str:
    published = "; ".join(
        f"{name} on {entry['machines']} in "
        f"{'-'.join(f'{h:g}' for h in dict.fromkeys(entry['hours']))} h: "
        f"{'-'.join(f'{u:.0%}' for u in dict.fromkeys(entry['utilization']))} of their peak "
        f"({entry['source']})"
        for name, entry in figures["published"].items()
    )
    return (
        f"{EPOCHS} epochs of AlexNet are {figures['flops']['alexnet2012']:.2g} operations, of "
        f"ResNet-50 {figures['flops']['resnet50']:.2g}, of VGG-16 "
        f"{figures['flops']['vgg16']:.2g} (multiply-adds of `convoy models` x "
        f"{FLOPS_PER_MULTIPLY_ADD} x images). Utilization by published times: {published}. Eight "
        f"H100s at an assumed {UTILIZATION_TODAY:.0%} would need "
        f"{figures['hours_8_h100']['alexnet2012'] * 60:.1f} min for AlexNet's 90 epochs and "
        f"{figures['hours_8_h100']['resnet50'] * 60:.0f} min for ResNet-50's. MLPerf's entries "
        "stop at 75.9%, before 90 epochs, so they do not give a utilization here. The weeks in the "
        "statement apply to far larger networks: these take minutes."
    )


STUDY = Study(
    name="then-and-now",
    statements=("S1",),
    question="What did these networks cost in 2012, and what do they cost today?",
    rule="2012: borne out if the published days need less than the GPUs' full peak, else not. A "
    "thousand times: borne out if the published time of ResNet-50 on 3,584 H100s is at most a "
    "thousandth of the time of two GTX 580 at AlexNet's utilization, else not. Weeks: borne out if "
    "ResNet-50's published time on 512 H100s is more than a week, else not.",
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
    seeded=False,
)
