"""Compares a training step of our engine with a torch DistributedDataParallel reference loop.

    python benchmarks/step.py --json FILE [--rows 112 64 bf16 compile memory] [--processes 1 2]
                              [--rounds 9]

Same network (resnet18), images in memory as uint8, channels-last, SGD with momentum, gloo, one
thread per rank. All run in the same processes and take turns, one step each, in a different order
each round, so that other load on the machine slows all of them equally. A round's ratio is the
loop's time over the engine's in that round (above 1: the engine is faster), for the slowest rank.
Its median over rounds is reported with its quartiles. Memory is measured in separate processes; see
``memory_table``.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ranks import peak_of, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config.schema import RunConfig
from trainer.data.batch import Allocate, Batch
from trainer.distributed import process_group
from trainer.distributed.env import DistEnv
from trainer.engine.data_parallel import DataParallel
from trainer.engine.deepspeed.config import BUCKET_NUMEL, PARAM_PERSISTENCE_THRESHOLD
from trainer.engine.engine import Engine
from trainer.models import build_model
from trainer.training.batch_plan import plan_batches

NETWORK, CLASSES, RATE = "resnet18", 1000, 0.01
ROWS: dict[str, dict[str, Any]] = {
    "112": {"side": 112, "images": 32, "target_ratios": {0: 0.97, 1: 0.92}},
    "64": {"side": 64, "images": 16, "target_ratios": {0: 0.90, 1: 0.80}},
    "bf16": {"side": 64, "images": 16, "precision": "bf16", "target_ratios": {}},
    "compile": {"side": 64, "images": 16, "compile": True, "target_ratios": {}},
}
"""``images``: per rank. ``target_ratios``: by ZeRO stage.

The loop's bf16 is torch's autocast. The loop compiles the full network, the engine each layer.
"""

Step = Callable[[], torch.Tensor]


def config_of(row: dict[str, Any], stage: int, ranks: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": row.get("model", NETWORK)},
            "data": {"train": "none", "image_size": row["side"]},
            "batch": {"global_size": row["images"] * ranks},
            "optimizer": {"weight_decay": 1e-4, "momentum": 0.9},
            "precision": row.get("precision", "fp32"),
            "parallel": {"zero_stage": stage},
            "train": {
                "max_steps": 1,
                "compile": row.get("compile", False),
                "cuda_graphs": row.get("cuda_graphs", "auto"),
            },
        }
    )


def data_of(
    row: dict[str, Any], rank: int, allocate: Allocate = np.empty
) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(rank)
    pixels = allocate((row["images"], row["side"], row["side"], 3), np.uint8)
    pixels[:] = random.integers(0, 256, pixels.shape, dtype=np.uint8)
    return pixels, random.integers(0, CLASSES, row["images"])


def engine_of(
    row: dict[str, Any], stage: int, device: torch.device, allocate: Allocate = np.empty
) -> tuple[Engine, Step]:
    """Our engine, and a function that runs a step and returns its loss.

    ``allocate``: creates the array of pixels.
    """
    rank, ranks, images = dist.get_rank(), dist.get_world_size(), row["images"]
    config = config_of(row, stage, ranks)
    pixels, labels = data_of(row, rank, allocate)
    torch.manual_seed(0)
    model = build_model(config.model.name, CLASSES)
    engine: Engine = DataParallel(
        model, config, plan_batches(images * ranks, images, ranks, 10**6), device
    )

    def batches() -> Iterator[Batch]:
        yield Batch(pixels, labels, np.ones(images, np.float32), float(images * ranks), [])

    return engine, lambda: engine.step(batches(), row.get("rate", RATE)).loss


def loop_step(row: dict[str, Any]) -> Step:
    """A step of the DistributedDataParallel reference loop."""
    pixels, labels = (torch.from_numpy(array) for array in data_of(row, dist.get_rank()))
    torch.manual_seed(0)
    model = DistributedDataParallel(
        build_model(NETWORK, CLASSES).to(memory_format=torch.channels_last)
    )
    if row.get("compile"):
        model.compile()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=1e-4)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) * 255
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    bf16 = row.get("precision") == "bf16"

    def step() -> torch.Tensor:
        model.train()
        optimizer.zero_grad()
        images = (pixels.permute(0, 3, 1, 2).float() - mean) / std
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outputs = model(images)
        loss = nn.functional.cross_entropy(outputs.float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def forward_pass(row: dict[str, Any]) -> Callable[[], None]:
    """A forward pass in plain torch that saves activations and discards its result."""
    pixels, labels = (torch.from_numpy(array) for array in data_of(row, dist.get_rank()))
    model = build_model(NETWORK, CLASSES).to(memory_format=torch.channels_last)

    def run() -> None:
        images = pixels.permute(0, 3, 1, 2).float()
        nn.functional.cross_entropy(model(images), labels)

    return run


# --- in the ranks ---------------------------------------------------------------------------------


def timed(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step on the slowest rank, after two warmup steps."""
    names = list(steps)
    seconds = torch.zeros(rounds, len(names), dtype=torch.float64)
    for _ in range(2):
        losses = [float(steps[name]()) for name in names]
    for number in range(rounds):
        turns = range(len(names)) if number % 2 == 0 else reversed(range(len(names)))
        for turn in turns:
            dist.barrier()
            started = time.perf_counter()
            steps[names[turn]]()
            seconds[number, turn] = time.perf_counter() - started
    assert max(losses) - min(losses) < 0.2, f"the losses differ: {losses}"
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return {name: seconds[:, turn].tolist() for turn, name in enumerate(names)}


def rank_main(task: dict[str, Any]) -> None:
    """Measure the speed or memory of a row as one rank."""
    torch.set_num_threads(1)
    ranks = DistEnv.from_env()
    device = process_group.init_distributed(ranks)
    row = ROWS[task["row"]]
    if "memory_of" in task:
        makers: dict[Any, Callable[[], Any]] = {
            "loop": lambda: loop_step(row),
            "forward": lambda: forward_pass(row),
        }
        result: Any = peak_of(
            makers.get(task["memory_of"], lambda: engine_of(row, task["memory_of"], device)[1])
        )
    else:
        result = timed(
            {"loop": loop_step(row)} | {f"{n}": engine_of(row, n, device)[1] for n in (0, 1)},
            task["rounds"],
        )
    if ranks.is_rank_zero:
        Path(task["file"]).write_text(json.dumps(result))
    dist.barrier()
    process_group.cleanup()


# --- in the main process --------------------------------------------------------------------------


def speed_table(names: list[str], processes: list[int], rounds: int) -> list[dict[str, Any]]:
    print(
        f"{'row':8} {'processes':>9} {'ZeRO':>4} {'ours, ms':>9} {'loop, ms':>9} {'ratio':>7} "
        f"{'quartiles':>14} {'target':>7}"
    )
    results = []
    for name in names:
        for count in processes if name != "compile" else [min(processes)]:
            many = rounds if ROWS[name]["side"] > 64 else 3 * rounds
            seconds = run_ranks(__file__, count, row=name, rounds=many)
            for stage in (0, 1):
                ratios = [
                    loop / ours
                    for loop, ours in zip(seconds["loop"], seconds[str(stage)], strict=True)
                ]
                low, middle, high = statistics.quantiles(ratios, n=4)
                ours, loop = (
                    statistics.median(seconds[str(stage)]),
                    statistics.median(seconds["loop"]),
                )
                target = ROWS[name]["target_ratios"].get(stage)
                results.append(
                    {
                        "row": name,
                        "processes": count,
                        "zero_stage": stage,
                        "ours_seconds": ours,
                        "loop_seconds": loop,
                    }
                    | {"ratio": middle, "quartiles": [low, high], "target_ratio": target}
                )
                print(
                    f"{name:8} {count:9} {stage:4} {ours * 1e3:9.0f} {loop * 1e3:9.0f} "
                    f"{middle:7.3f} {low:7.3f}-{high:.3f} "
                    f"{target or '':>6}",
                    flush=True,
                )
    return results


def predicted(stage: int, ranks: int, sizes: list[int], activations: int) -> int:
    """Predicted peak bytes of a rank during a step in fp32.

    Counted are weights, gradients, momentum and master weights (Rajbhandari et al. 2020, 3),
    buckets, and activations. ``sizes``: number of elements of each weight.

    At stage 1, gradients are complete until the step, and the weights are the master weights; from
    stage 2 on, master weights are copies. There DeepSpeed fills a bucket with gradients and reduces
    a copy of it; at stage 3, one bucket of weights is prefetched while another is in use, and each
    is copied out. The backward pass of the largest convolution needs its gradient and two copies in
    other layouts; the forward pass has one. During the update there are no activations, but a
    second flat copy of the gradients.
    """
    total, part = sum(sizes), sum(sizes) / ranks
    bucket = max(BUCKET_NUMEL, max(sizes))
    passing = 2 * max(sizes)
    reduced = bucket + max(bucket, passing)
    kept = sum(size for size in sizes if size < PARAM_PERSISTENCE_THRESHOLD)
    backward, update = {
        0: (3 * total + passing, 3 * total),
        1: (2 * total + part + passing, 2 * total + part),
        2: (total + 3 * part + reduced, total + 4 * part),
        3: (kept + 4 * part + 4 * bucket + reduced, kept + 5 * part),
    }[stage]
    return max(int(4 * backward) + activations, int(4 * update))


def memory_table(processes: int = 2) -> list[dict[str, Any]]:
    """Compare the measured peak memory per rank with its prediction, by ZeRO stage.

    Activations are what a forward pass needs in addition to the weights.
    """
    sizes = [p.numel() for p in build_model(NETWORK, CLASSES).parameters()]
    row = "64"
    loop = run_ranks(__file__, processes, row=row, memory_of="loop")
    activations = run_ranks(__file__, processes, row=row, memory_of="forward")["tensors"] - 4 * sum(
        sizes
    )
    mib = 2**20
    print(
        f"\npeak memory per rank in MiB, {processes} ranks, {NETWORK}, fp32, row {row}; "
        f"activations {activations / mib:.0f}"
    )
    print(f"{'':8} {'predicted':>9} {'tensors':>9} {'ratio':>6} {'resident':>9}")
    print(f"{'loop':8} {'':9} {loop['tensors'] / mib:9.0f} {'':6} {loop['resident'] / mib:9.0f}")
    results = []
    for stage in range(4):
        expected = predicted(stage, processes, sizes, activations)
        found = run_ranks(__file__, processes, row=row, memory_of=stage)
        results.append({"zero_stage": stage, "predicted_bytes": expected, **found})
        ratio = found["tensors"] / expected
        print(
            f"ZeRO {stage:3} {expected / mib:9.0f} {found['tensors'] / mib:9.0f} {ratio:6.2f} "
            f"{found['resident'] / mib:9.0f}",
            flush=True,
        )
    return [{"loop": loop, "activation_bytes": activations, "ranks": processes}, *results]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--rows", nargs="+", default=[*ROWS, "memory"], choices=[*ROWS, "memory"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument(
        "--rounds", type=int, default=9, help="small images get three times as many"
    )
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(arguments.rank)
        return
    print(f"{NETWORK}, 1 thread per rank, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    names = [name for name in arguments.rows if name != "memory"]
    results: dict[str, Any] = {"speed": speed_table(names, arguments.processes, arguments.rounds)}
    if "memory" in arguments.rows:
        results["memory"] = memory_table()
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
