"""Compares the pipeline bubble with its formula, and measures memory by number of stages.

    python benchmarks/pipeline.py --json FILE [--micro-batches 1 2 4 8] [--micro-size 8]
                                  [--rounds 11]

Two stages of equal cost (the same convolutions), one rank per stage with one thread, M
micro-batches per step. The measured bubble is the fraction of a step in which a rank is in neither
a forward nor a backward pass, for the rank that spends more time in them. It therefore includes
waiting for the other rank, transfers and the update.

The formula is (S - 1) / (M + S - 1) (Huang et al. 2019, 2.3), which assumes that transfers take no
time and all passes are equal. ``least`` is the minimum bubble for the measured passes in their
order: no two take the same time, and each micro-batch waits for the slower of the two. ``lost`` is
the additional time per micro-batch. The median over rounds and its quartiles are reported. To show
whether running both ranks at once is slower, the passes of a micro-batch in a single stage are
reported too.
"""

import argparse
import json
import os
import statistics
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import peak_of, run_ranks
from torch import nn

from trainer.config.schema import RunConfig
from trainer.data.batch import Batch
from trainer.distributed import process_group
from trainer.distributed.env import DistEnv
from trainer.engine.data_parallel import DataParallel
from trainer.engine.dropout_rng import DropoutRNG
from trainer.engine.engine import Engine
from trainer.engine.model_chunk import ModelChunk
from trainer.engine.pipeline_parallel import PipelineParallel
from trainer.training.batch_plan import BatchPlan

CHANNELS, SIDE, CLASSES, RATE = 128, 16, 10, 1e-6
TIMED, MEASURED = 96, 24
"""Numbers of convolutions for timing and for memory.

For timing there are so many that the transfers of a micro-batch are small in comparison.
"""

Passes = list[tuple[str, float]]
"""Kind, ``forward`` or ``backward``, and seconds."""


def network(convolutions: int, stages: int) -> tuple[nn.Sequential, list[list[str]]]:
    """A network of convolutions of equal cost, and the names of the layers of each stage.

    ``stages``: 1, 2 or 4. The first and the last layer cost almost nothing.
    """
    torch.manual_seed(0)
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=nn.Conv2d(3, CHANNELS, 1))
    for number in range(convolutions):
        conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        # with the default, deep outputs are denormal numbers, which are slow
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers[f"block{number}"] = nn.Sequential(conv, nn.ReLU(inplace=True))
    layers["head"] = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, CLASSES)
    )
    names = list(layers)
    bounds = [0, *(1 + number * convolutions // stages for number in range(1, stages)), len(names)]
    return nn.Sequential(layers), [names[start:stop] for start, stop in pairwise(bounds)]


def config_of(stages: int, micro_size: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": "resnet18"},  # replaced by ``network``
            "data": {"train": "none", "image_size": SIDE},
            "batch": {"micro_size": micro_size},
            "parallel": {"pipeline_stages": stages},
            "train": {"max_steps": 1},
        }
    )


def engine_step(
    convolutions: int, stages: int, micro_batches: int, micro_size: int, device: torch.device
) -> Callable[[], Any]:
    """A function that runs one step."""
    model, parts = network(convolutions, stages)
    batch = BatchPlan(micro_size * micro_batches, micro_size, 1, micro_batches)
    config = config_of(stages, micro_size)
    engine: Engine = (
        DataParallel(model, config, batch, device)
        if stages == 1
        else PipelineParallel(model, config, batch, device, parts)
    )
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (micro_size, SIDE, SIDE, 3), dtype=np.uint8)
    labels = random.integers(0, CLASSES, micro_size)

    def batches() -> Iterator[Batch]:
        for _ in range(micro_batches):
            yield Batch(
                pixels, labels, np.ones(micro_size, np.float32), float(batch.global_size), []
            )

    return lambda: engine.step(batches(), RATE)


def stage_alone(micro_size: int) -> Callable[[], None]:
    """A function that runs one micro-batch through this rank's stage, without communication."""
    model, parts = network(TIMED, 2)
    rank = dist.get_rank()
    layers = OrderedDict(
        (name, layer) for name, layer in model.named_children() if name in parts[rank]
    )
    stage = ModelChunk(layers, config_of(2, micro_size).train, DropoutRNG(model, 0, 0, 1))
    images = torch.randn(micro_size, 3 if rank == 0 else CHANNELS, SIDE, SIDE)
    gradient = torch.randn(micro_size, CHANNELS, SIDE, SIDE)
    labels = torch.zeros(micro_size, dtype=torch.long)

    def run() -> None:
        if rank == 0:
            stage(images).backward(gradient)
        else:
            nn.functional.cross_entropy(stage(images.detach().requires_grad_()), labels).backward()

    return run


# --- in the ranks ---------------------------------------------------------------------------------


def record_passes(passes: Passes) -> None:
    """Record all forward and backward passes of pipelines in ``passes``, from now on."""
    from deepspeed.runtime.pipe.engine import PipelineEngine
    from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass

    def timing(kind: str, execute: Callable[..., None]) -> Callable[..., None]:
        def run(engine: Any, *arguments: Any, **named: Any) -> None:
            started = time.perf_counter()
            execute(engine, *arguments, **named)
            passes.append((kind, time.perf_counter() - started))

        return run

    table = PipelineEngine._INSTRUCTION_MAP
    for kind, command in (("forward", ForwardPass), ("backward", BackwardPass)):
        table[command] = timing(kind, table[command])


def timed(
    micro_batches: int, micro_size: int, rounds: int, device: torch.device
) -> list[list[tuple[float, Passes, float]]]:
    """Time steps with and without communication.

    Returns for each rank and round: seconds of a step, its passes, and seconds of as many passes
    without communication.
    """
    passes: Passes = []
    record_passes(passes)
    step, one = engine_step(TIMED, 2, micro_batches, micro_size, device), stage_alone(micro_size)
    for work in (step, one, step):
        work()
    mine = []
    for _ in range(rounds):
        passes.clear()
        dist.barrier()
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        dist.barrier()
        started = time.perf_counter()
        one()
        mine.append((seconds, passes.copy(), (time.perf_counter() - started) * micro_batches))
    both: list[Any] = [None, None]
    dist.all_gather_object(both, mine)
    return both


def reference_step(micro_size: int) -> Callable[[], None]:
    """A step of the full network in plain torch, for the memory of its activations."""
    model = network(MEASURED, 1)[0].to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    images = torch.randn(micro_size, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            model(images), torch.zeros(micro_size, dtype=torch.long)
        ).backward()
        optimizer.step()

    return step


def rank_main(task: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    ranks = DistEnv.from_env()
    device = process_group.init_distributed(ranks)
    size = task["micro_size"]
    result: Any
    if "memory_of" in task:
        stages, number = task["memory_of"], task["micro_batches"]
        peak = peak_of(
            lambda: (
                reference_step(size)
                if stages == 0
                else engine_step(MEASURED, stages, number, size, device)
            )
        )
        result = [None] * dist.get_world_size()
        dist.all_gather_object(result, peak)
    else:
        result = timed(task["micro_batches"], size, task["rounds"], device)
    if ranks.is_rank_zero:
        Path(task["file"]).write_text(json.dumps(result))
    dist.barrier()
    process_group.cleanup()


# --- in the main process --------------------------------------------------------------------------


def shortest(stages: list[Passes]) -> float:
    """Minimum seconds of a step: passes keep their order and wait only for each other."""
    ends: dict[tuple[str, int, int], float] = {}
    clocks, queues = [0.0] * len(stages), []
    for passes in stages:
        numbers = {"forward": count(), "backward": count()}
        queues.append(deque((kind, next(numbers[kind]), seconds) for kind, seconds in passes))
    while any(queues):
        for stage, queue in enumerate(queues):
            while queue:
                kind, number, seconds = queue[0]
                before = stage - 1 if kind == "forward" else stage + 1
                ready = ends.get((kind, number, before)) if 0 <= before < len(stages) else 0.0
                if ready is None:
                    break
                ends[kind, number, stage] = clocks[stage] = max(clocks[stage], ready) + seconds
                queue.popleft()
    return max(clocks)


def bubble_table(micro_batches: list[int], micro_size: int, rounds: int) -> list[dict[str, Any]]:
    print(
        f"{'M':>3} {'passes, ms':>14} {'alone, ms':>14} {'step, ms':>9} {'lost, ms':>9} "
        f"{'bubble':>7} {'quartiles':>13} "
        f"{'formula':>8} {'error':>7} {'least':>7} {'error':>7}"
    )
    results = []
    for number in micro_batches:
        ranks = run_ranks(__file__, 2, micro_batches=number, micro_size=micro_size, rounds=rounds)
        busy = [[sum(seconds for _, seconds in passes) for _, passes, _ in rank] for rank in ranks]
        passes = [statistics.median(rank) / number for rank in busy]
        alone = [statistics.median(seconds for _, _, seconds in rank) / number for rank in ranks]
        busiest = passes.index(max(passes))
        steps = [max(one[0], other[0]) for one, other in zip(*ranks, strict=True)]
        bests = [shortest([one[1], other[1]]) for one, other in zip(*ranks, strict=True)]
        bubbles = [1 - seconds / step for seconds, step in zip(busy[busiest], steps, strict=True)]
        least = statistics.median(
            1 - seconds / best for seconds, best in zip(busy[busiest], bests, strict=True)
        )
        low, middle, high = statistics.quantiles(bubbles, n=4)
        formula, step = 1 / (number + 1), statistics.median(steps)
        lost = (
            statistics.median(step - best for step, best in zip(steps, bests, strict=True)) / number
        )
        results.append(
            {
                "micro_batches": number,
                "passes_seconds": passes,
                "alone_seconds": alone,
                "step_seconds": step,
                "lost_seconds": lost,
            }
            | {
                "bubble": middle,
                "quartiles": [low, high],
                "formula": formula,
                "relative_error": middle / formula - 1,
            }
            | {"least_bubble": least, "relative_to_least": middle / least - 1}
        )
        print(
            f"{number:3} {passes[0] * 1e3:6.0f} {passes[1] * 1e3:7.0f} {alone[0] * 1e3:6.0f} "
            f"{alone[1] * 1e3:7.0f} "
            f"{step * 1e3:9.0f} {lost * 1e3:9.1f} {middle:7.3f} {low:6.3f}-{high:.3f} "
            f"{formula:8.3f} {middle / formula - 1:+7.1%} "
            f"{least:7.3f} {middle / least - 1:+7.1%}",
            flush=True,
        )
    return results


def memory_table(micro_batches: int, micro_size: int) -> list[dict[str, Any]]:
    """Compare the measured peak memory of each rank with a prediction.

    The prediction is the sum of

    - weights, gradients and momentum of the rank's layers;
    - their outputs, for as many micro-batches as there are stages from this one to the last (one
      forward, one backward: Narayanan et al. 2019, 3.2);
    - what the backward pass needs in addition, as measured for the full network;
    - what crosses a stage boundary: one receive buffer, the outputs that are sent, the inputs as
      received and in the layout for convolutions, and DeepSpeed's clone of one input.
    """
    layers = dict(network(MEASURED, 1)[0].named_children())
    crossing = 4 * micro_size * CHANNELS * SIDE**2

    def state(names: Iterable[str]) -> int:
        return 3 * 4 * sum(p.numel() for name in names for p in layers[name].parameters())

    def outputs(names: Iterable[str]) -> int:
        return crossing * sum(name != "head" for name in names)

    reference = run_ranks(__file__, 1, memory_of=0, micro_batches=1, micro_size=micro_size)[0][
        "tensors"
    ]
    extra = reference - state(layers) - outputs(layers)
    mib = 2**20
    print(
        f"\npeak memory per rank in MiB, {micro_batches} micro-batches of {micro_size}; backward "
        f"pass, in addition to outputs: {extra / mib:.0f}"
    )
    print(f"{'stages':>6} {'rank':>4} {'predicted':>9} {'tensors':>9} {'ratio':>6} {'resident':>9}")
    results = []
    for stages in (1, 2, 4):
        measured = run_ranks(
            __file__, stages, memory_of=stages, micro_batches=micro_batches, micro_size=micro_size
        )
        for rank, (found, names) in enumerate(
            zip(measured, network(MEASURED, stages)[1], strict=True)
        ):
            in_flight = min(stages - rank, micro_batches)
            sent, received = in_flight * (rank < stages - 1), (2 * in_flight + 1) * (rank > 0)
            transfers = ((stages > 1) + sent + received) * crossing
            predicted = state(names) + in_flight * outputs(names) + extra + transfers
            results.append({"stages": stages, "rank": rank, "predicted_bytes": predicted, **found})
            print(
                f"{stages:6} {rank:4} {predicted / mib:9.0f} {found['tensors'] / mib:9.0f} "
                f"{found['tensors'] / predicted:6.2f} "
                f"{found['resident'] / mib:9.0f}",
                flush=True,
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument(
        "--micro-batches",
        nargs="*",
        type=int,
        default=[1, 2, 4, 8],
        help="none: measure only memory",
    )
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--micro-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(arguments.rank)
        return
    results = {}
    if arguments.micro_batches:
        print(
            f"2 stages, micro-batches of {arguments.micro_size}, torch {torch.__version__}, "
            f"load {os.getloadavg()[0]:.1f}"
        )
        results["bubble"] = bubble_table(
            arguments.micro_batches, arguments.micro_size, arguments.rounds
        )
    if not arguments.no_memory:
        results["memory"] = memory_table(4, 64)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
