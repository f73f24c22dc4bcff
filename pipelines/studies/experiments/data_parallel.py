"""Study: data parallelism on one, two and four ranks.

The loss curves must be the same. Step times are compared with a model of compute and all-reduce,
which is extrapolated to 512 ranks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    differences_text,
    fall_of,
    format_mean_std,
    mean_std,
    same_curves,
    verdict_by_seeds,
    verdict_if,
)
from trainer.errors import RetryableError
from trainer.models.model_info import model_info

RANKS = (1, 2, 4)
BATCH, MICRO = 128, 32
"""The micro-batch has the same size on any number of ranks; accumulation makes up the difference.
"""
LEAST_SPEEDUP = 1.6
"""Minimum speed-up of two ranks on two cores."""

# Goyal et al. 2017: 29 hours on 8 P100s, one hour on 256 (8 per server, 50 Gbit/s Ethernet), 32
# images per GPU, fp32 gradients
GOYAL_HOURS = {8: 29.0, 256: 1.0}
GOYAL_BANDWIDTH, GPUS_PER_SERVER, IMAGES_PER_GPU = 50e9 / 8, 8, 32
LATENCY = 20e-6
"""Assumed latency of Ethernet, seconds per message."""
DLE = ("8 A100, NVIDIA DeepLearningExamples, ResNet-50", 8, 6.72)
"""Machine, GPUs, published speed-up over one GPU."""


def training_of(scale: Scale, ranks: int, seed: int) -> Training:
    """Return one training.

    A full run is long enough for a large learning rate to amplify rounding differences
    (docs/log.md), so its rate is small.
    """
    keys = (
        "model.name=resnet8", "model.batch_norm=false",
        f"optimizer.base_lr={scale.choose(0.02, 0.0025)}", f"batch.global_size={BATCH}",
        f"batch.micro_size={MICRO}", "train.epochs=3",
    )  # fmt: skip
    return Training(
        f"resnet8-ranks-{ranks}", seed, scale.choose(2048, 6000), 2000, keys, procs=ranks
    )


def trainings(scale: Scale) -> list[Training]:
    return [training_of(scale, ranks, seed) for seed in range(scale.seeds) for ranks in RANKS]


def ring(ranks: int, size: float, latency: float, bandwidth: float) -> float:
    """Return the seconds of a ring all-reduce of ``size`` bytes.

    It consists of 2 (N - 1) messages, which carry 2 (N - 1) / N of the bytes (Patarasu, Yuan 2009).
    """
    return 2 * (ranks - 1) * latency + 2 * (ranks - 1) / ranks * size / bandwidth


def link_of(seconds: dict[int, float]) -> tuple[float, float]:
    """Return latency (s) and bandwidth (bytes/s) of a link.

    ``seconds``: all-reduce time of two ranks by size; the smallest and largest sizes are used.
    """
    small, large = min(seconds), max(seconds)
    return seconds[small] / 2, large / max(seconds[large] - seconds[small], 1e-9)


def measure_link(folder: Path) -> tuple[float, float]:
    """Measure latency (s) and bandwidth (bytes/s) between two processes on this machine."""
    file = folder / "allreduce.json"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
    ]
    command += [
        "--rdzv-endpoint",
        "127.0.0.1:0",
        "-m",
        "pipelines.studies.experiments.allreduce",
        str(file),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RetryableError(
            f"the all-reduce of two processes failed: {done.stderr.strip().splitlines()[-1][:200]}"
        )
    return link_of({int(size): seconds for size, seconds in json.loads(file.read_text()).items()})


def efficiency(ranks: int) -> dict[str, float]:
    """Return the scaling efficiency of ResNet-50 on P100s, as in Goyal et al.

    It is images per GPU and second relative to 8 GPUs, with the all-reduce after the backward pass
    and fully overlapped with it. Communication inside a server is assumed to be free; the servers
    form a ring.
    """
    images = 90 * 1_281_167
    compute = IMAGES_PER_GPU / (images / (GOYAL_HOURS[8] * 3600 * 8))
    servers = max(1, ranks // GPUS_PER_SERVER)
    wire = ring(servers, 4 * model_info("resnet50").parameters, LATENCY, GOYAL_BANDWIDTH)
    return {
        "after": round(compute / (compute + wire), 4),
        "under": round(compute / max(compute, wire), 4),
    }


def measured(runs: Runs, scale: Scale) -> Figures:
    latency, bandwidth = measure_link(runs.folder)
    by_ranks = {
        ranks: [training_of(scale, ranks, seed) for seed in range(scale.seeds)] for ranks in RANKS
    }
    losses = {
        ranks: [runs.losses(training) for training in by_seed]
        for ranks, by_seed in by_ranks.items()
    }
    speeds = {
        ranks: [runs.outcome(training)["images_per_second"] for training in by_seed]
        for ranks, by_seed in by_ranks.items()
    }
    size = 4 * num_parameters()
    seconds = {
        ranks: mean_std([BATCH / speed for speed in each], 5) for ranks, each in speeds.items()
    }
    return {
        "losses": {
            ranks: [[round(float(v), 5) for v in row] for row in rows]
            for ranks, rows in losses.items()
        },
        "largest_difference_nats": max(
            float(abs(one - many).max())
            for rows in losses.values()
            for one, many in zip(losses[1], rows, strict=True)
        ),
        "fall_nats": min(fall_of(row.tolist()) for rows in losses.values() for row in rows),
        "step_seconds": seconds,
        "speedup_of_two": mean_std([b / a for a, b in zip(speeds[1], speeds[2], strict=True)], 3),
        "link": {"latency_seconds": latency, "bytes_per_second": bandwidth},
        "model_step_seconds": {
            ranks: seconds[1]["mean"] / ranks + ring(ranks, size, latency, bandwidth)
            for ranks in RANKS
        },
        "gradient_bytes": size,
        "efficiency": {ranks: efficiency(ranks) for ranks in (8, 16, 32, 64, 128, 256, 512)},
        "goyal_efficiency": round(GOYAL_HOURS[8] * 8 / (GOYAL_HOURS[256] * 256), 4),
        "cores": os.cpu_count(),
    }


def num_parameters() -> int:
    """Return the number of parameters of the network that is trained here."""
    import torch

    from trainer.models import build_model

    with torch.device("meta"):
        return sum(p.numel() for p in build_model("resnet8", 10, 28, batch_norm=False).parameters())


def judge(figures: Figures) -> list[Claim]:
    max_diff = figures["largest_difference_nats"]
    gains = figures["speedup_of_two"]["each"]
    bounds, published = figures["efficiency"]["256"], figures["goyal_efficiency"]
    why = f"published {published:.1%}, model {bounds['after']:.1%} to {bounds['under']:.1%}"
    within = bounds["after"] <= published <= bounds["under"]
    far = figures["efficiency"]["512"]
    return [
        same_curves("P4", "1, 2 and 4 ranks give the same losses", max_diff, figures["fall_nats"]),
        Claim(
            "T1",
            f"two ranks on this machine are more than {LEAST_SPEEDUP} times as fast as one",
            verdict_by_seeds(gains, LEAST_SPEEDUP),
            differences_text(gains),
        ),
        Claim(
            "T1",
            "8 to 256 GPUs scale as the model of compute and all-reduce predicts",
            verdict_if(within),
            why,
        ),
        Claim(
            "T1",
            "the model's scaling is nearly linear up to 512 GPUs",
            verdict_if(far["after"] >= 0.8),
            f"at least {far['after']:.1%} of the speed per GPU of 8 GPUs",
        ),
    ]


def plot(figures: Figures, file: Path) -> None:
    with plots.panels(3, "Data parallelism", file, 4.6) as (curve, step, far):
        for (ranks, rows), colour, line in zip(
            figures["losses"].items(), plots.COLOURS, ("-", "--", ":"), strict=False
        ):
            plots.band(
                curve,
                range(1, len(rows[0]) + 1),
                rows,
                colour,
                f"{ranks} rank{'s' if ranks != '1' else ''}",
                linestyle=line,
            )
        curve.set(
            xlabel=f"optimizer step ({BATCH} images)", ylabel="training loss, cross-entropy (nats)"
        )
        plots.bars(
            step,
            list(figures["step_seconds"]),
            [_ms(v) for v in figures["step_seconds"].values()],
            [plots.BLUE] * 3,
            "{:.0f}",
        )
        model = [1e3 * seconds for seconds in figures["model_step_seconds"].values()]
        step.plot(
            range(len(model)),
            model,
            "D",
            color=plots.ORANGE,
            label="compute / ranks + all-reduce, one core per rank",
        )
        step.set(xlabel=f"ranks, on {figures['cores']} cores", ylabel="step time (ms)")
        counts = [int(n) for n in figures["efficiency"]]
        low, high = (
            [100 * entry[key] for entry in figures["efficiency"].values()]
            for key in ("after", "under")
        )
        far.fill_between(
            counts,
            low,
            high,
            color=plots.SKY,
            alpha=0.4,
            label="model: all-reduce after the backward pass, to fully overlapped",
        )
        far.plot(
            [256],
            [100 * figures["goyal_efficiency"]],
            "o",
            color=plots.ORANGE,
            label="Goyal et al. 2017: 8 to 256 P100",
        )
        far.plot(
            [DLE[1]],
            [100 * DLE[2] / DLE[1]],
            "s",
            color=plots.GREEN,
            label="NVIDIA DLE: 1 to 8 A100",
        )
        far.set(
            xscale="log",
            xlabel="GPUs",
            ylabel="speed per GPU, relative to 8 GPUs (DLE: to 1) (%)",
            ylim=(0, 105),
        )
        far.set_xticks(counts, [str(n) for n in counts])
        far.minorticks_off()
        for axes in (curve, step, far):
            axes.legend(frameon=False, fontsize=8)


def _ms(values: dict[str, Any]) -> dict[str, Any]:
    return {"mean": 1e3 * values["mean"], "each": [1e3 * value for value in values["each"]]}


def paragraph(figures: Figures) -> str:
    steps = ", ".join(
        f"{ranks}: {1e3 * values['mean']:.0f} ms (model "
        f"{1e3 * figures['model_step_seconds'][ranks]:.0f})"
        for ranks, values in figures["step_seconds"].items()
    )
    link, far = figures["link"], figures["efficiency"]["512"]
    return (
        f"ResNet-8 without batch norm, {figures['gradient_bytes'] / 2**20:.1f} MiB of "
        f"gradients, batch size {BATCH}: the losses of a step differ by at most "
        f"{figures['largest_difference_nats']:.2g} nats between 1, 2 and 4 ranks. An all-reduce "
        f"between two processes on this machine: {1e6 * link['latency_seconds']:.0f} us and "
        f"{link['bytes_per_second'] / 1e6:,.0f} MB/s. Step time by number of ranks: {steps}. The "
        "model assumes one core per rank; this machine has "
        f"{figures['cores']}. Two ranks are {format_mean_std(figures['speedup_of_two'], 2)} times "
        "as fast as one. For ResNet-50 on P100s in servers of 8 with 50 Gbit/s, "
        f"{1e6 * LATENCY:.0f} us per message (assumed) and no cost inside a server (assumed), the "
        "model predicts, for each of 256 GPUs, "
        f"{figures['efficiency']['256']['after']:.1%} of the speed of each of 8 GPUs if the "
        "all-reduce follows the backward pass, and "
        f"{figures['efficiency']['256']['under']:.1%} if it fully overlaps with it. The published "
        f"value is {figures['goyal_efficiency']:.1%} (29 hours on 8, one on 256: Goyal et al. "
        f"2017). At 512: {far['after']:.1%} to {far['under']:.1%}. {DLE[0]}: "
        f"{DLE[2] / DLE[1]:.0%}, which this model does not explain, because it assumes no cost "
        "inside a server."
    )


STUDY = Study(
    name="data-parallel",
    statements=("T1", "P4"),
    question="Do more ranks compute the same, and how much faster are they?",
    rule=f"P4: borne out if no step's loss differs by {SAME} nats or more between 1, 2 and 4 "
    f"ranks, else not; undecided if the loss falls by less than {LEAST_FALL}. T1: borne out if two "
    f"ranks are more than {LEAST_SPEEDUP} times as fast as one in each of at least 3 seeds, not "
    "borne out if in none; if Goyal's published efficiency is between the model's efficiencies "
    "without and with overlap; and if the former is at least 80% at 512 GPUs.",
    trainings=trainings,
    measure=measured,
    judge=judge,
    plot=plot,
    paragraph=paragraph,
)
