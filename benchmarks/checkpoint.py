"""Measures the cost of a checkpoint relative to a training step.

    python benchmarks/checkpoint.py --json FILE [--processes 1 2] [--every 20] [--rounds 4]

resnet18 at 64 px, 16 images per rank, ZeRO 0 and 1; the momentum is saved too. Steps run back to
back. After every N steps the state is gathered and passed to the writer, whose thread serializes,
hashes and writes it to a folder while training continues.

Two figures are reported: the pause itself relative to a step, and the mean step time of an interval
with a checkpoint divided by that of an interval without one, minus one. The latter includes the CPU
time that the writer takes from the same cores. The two kinds of interval alternate. Target: at most
0.05 of a step over the interval.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import run_ranks
from step import ROWS, engine_of

from trainer.distributed import process_group
from trainer.distributed.env import DistEnv
from trainer.training.checkpoint import Checkpoint, CheckpointManager


def rank_main(task: dict[str, Any]) -> None:
    """Measure as one rank; rank 0 writes the results to the task's ``file``."""
    torch.set_num_threads(1)
    ranks = DistEnv.from_env()
    device = process_group.init_distributed(ranks)
    engine, step = engine_of(ROWS["64"], task["zero_stage"], device)
    for _ in range(3):
        step()
    pauses, plain, written = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        kept = CheckpointManager(folder, 2) if ranks.is_rank_zero else None
        for number in range(2 * task["rounds"]):
            dist.barrier()
            started = time.perf_counter()
            if number % 2:
                state = engine.training_state()
                if kept is not None:
                    kept.save(Checkpoint(state, {}, {}, None))
                pauses.append(time.perf_counter() - started)
            for _ in range(task["every"]):
                step()
            (written if number % 2 else plain).append(
                (time.perf_counter() - started) / task["every"]
            )
            if kept is not None:
                kept.wait()
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    if ranks.is_rank_zero:
        result = {
            "pause_seconds": pauses,
            "plain_step_seconds": plain,
            "step_seconds": written,
            "bytes": size // 2,
        }
        Path(task["file"]).write_text(json.dumps(result))
    dist.barrier()
    process_group.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--rank", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_main(arguments.rank)
        return
    print(
        f"resnet18 at 64 px, 16 images per rank, a checkpoint every {arguments.every} steps, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    print(
        f"{'processes':>9} {'ZeRO':>4} {'step, ms':>9} {'pause, ms':>9} {'pause/step':>12} "
        f"{'slower by':>9} {'MB':>5}"
    )
    results = []
    for count in arguments.processes:
        for stage in (0, 1):
            figures = run_ranks(
                __file__, count, zero_stage=stage, every=arguments.every, rounds=arguments.rounds
            )
            step, pause = (
                statistics.median(figures["plain_step_seconds"]),
                statistics.median(figures["pause_seconds"]),
            )
            pairs = zip(figures["step_seconds"], figures["plain_step_seconds"], strict=True)
            slower = (
                statistics.median(with_checkpoint / plain for with_checkpoint, plain in pairs) - 1
            )
            share = pause / step / arguments.every
            results.append(
                {
                    "processes": count,
                    "zero_stage": stage,
                    "pause_share": share,
                    "slower_by": slower,
                    **figures,
                }
            )
            size = figures["bytes"] / 1e6
            print(
                f"{count:9} {stage:4} {step * 1e3:9.0f} {pause * 1e3:9.0f} {share:12.4f} "
                f"{slower:9.3f} {size:5.0f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
