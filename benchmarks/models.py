"""Compares the speed and memory of our models with those of torchvision and timm.

Measured are forward and backward passes in fp32, channels-last.

    python benchmarks/models.py --json FILE [--models alexnet vgg16 googlenet resnet50]
                                [--rounds 9] [--batch 4] [--threads 2]

All models of a name run in one process and take turns, one step each, so that other load on the
machine slows all of them equally. A round's ratio is the baseline's time over ours in that round
(above 1: ours is faster). The median over rounds is reported with its quartiles. Peak memory is the
resident memory of a separate process per model; its ratio is ours over theirs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.models import build_model

NAMES = ("alexnet", "vgg16", "googlenet", "resnet50")
SIDE = 224


def ours(name: str) -> nn.Module:
    return build_model(name, 1000)


def torchvisions(name: str) -> nn.Module:
    import torchvision

    options = {"init_weights": False} if name.startswith(("vgg", "googlenet")) else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


def timms(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name)
    return model


BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "ours": ours,
    "torchvision": torchvisions,
    "timm": timms,
}


def libraries(name: str) -> list[str]:
    import timm

    return [library for library in BUILDERS if library != "timm" or timm.is_model(name)]


def trainer_of(library: str, name: str, batch: int) -> Callable[[], None]:
    """A function that runs one forward and backward pass, including any auxiliary heads."""
    torch.manual_seed(0)
    model = BUILDERS[library](name).to(memory_format=torch.channels_last).train()
    images = torch.randn(batch, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch)

    def step() -> None:
        result = model(images)
        outputs: list[Tensor] = list(result) if isinstance(result, tuple) else [result]
        loss = sum(nn.functional.cross_entropy(output, labels) for output in outputs)
        model.zero_grad(set_to_none=False)
        assert isinstance(loss, Tensor)
        loss.backward()

    return step


def timed(name: str, rounds: int, batch: int) -> dict[str, Any]:
    """Seconds per step by library, and the ratios of the baselines' to ours."""
    steps = {library: trainer_of(library, name, batch) for library in libraries(name)}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {library: [] for library in steps}
    for number in range(rounds):
        order = list(steps) if number % 2 == 0 else list(steps)[::-1]
        for library in order:
            started = time.perf_counter()
            steps[library]()
            seconds[library].append(time.perf_counter() - started)
    baselines = {}
    for baseline in list(steps)[1:]:
        pairs = zip(seconds[baseline], seconds["ours"], strict=True)
        ratios = [theirs / ours for theirs, ours in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        best = min(seconds[baseline]) / min(seconds["ours"])
        baselines[baseline] = {
            "speed_ratio": middle,
            "quartiles": [low, high],
            "ratio_of_fastest_steps": best,
        }
    medians = {library: statistics.median(values) for library, values in seconds.items()}
    return {"seconds": medians, "baselines": baselines}


def peak_memory(library: str, name: str, batch: int) -> int:
    """Peak resident bytes of three steps, in a new process that loads all libraries."""
    command = [sys.executable, __file__, "--measure", library, name, "--batch", str(batch)]
    return int(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    )


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _measure(library: str, name: str, batch: int) -> None:
    import timm  # noqa: F401  # all processes import the same libraries
    import torchvision  # noqa: F401

    step = trainer_of(library, name, batch)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak after construction
    for _ in range(3):
        step()
    print(_status("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--models", nargs="+", default=NAMES)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        _measure(*arguments.measure, arguments.batch)
        return
    results = {}
    sizes = (
        f"batch {arguments.batch} of {SIDE} px, {arguments.threads} threads, "
        f"{arguments.rounds} rounds"
    )
    print(f"{sizes}, torch {torch.__version__}")
    print(
        f"{'model':10} {'baseline':12} {'ours, ms':>9} {'theirs, ms':>10} {'speed ratio':>12} "
        f"{'quartiles':>14} {'memory':>8}"
    )
    for name in arguments.models:
        result = results[name] = timed(name, arguments.rounds, arguments.batch)
        result["peak_bytes"] = {
            library: peak_memory(library, name, arguments.batch) for library in libraries(name)
        }
        for baseline, figures in result["baselines"].items():
            figures["memory_ratio"] = result["peak_bytes"]["ours"] / result["peak_bytes"][baseline]
            low, high = figures["quartiles"]
            print(
                f"{name:10} {baseline:12} {result['seconds']['ours'] * 1e3:9.0f} "
                f"{result['seconds'][baseline] * 1e3:10.0f} "
                f"{figures['speed_ratio']:12.3f} {low:7.3f}-{high:.3f} "
                f"{figures['memory_ratio']:9.3f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
