"""Measures the time of gloo all-reduces of several sizes, and writes it as JSON.

Run ``python -m pipelines.studies.experiments.allreduce FILE`` on each rank.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

SIZES = (4, 2**16, 2**20, 2**24)
"""Sizes of the all-reduced tensor, bytes."""
_ROUNDS = 15


def main(file: Path) -> None:
    """Measure the median seconds of each size; rank 0 writes them to ``file``."""
    dist.init_process_group("gloo")
    seconds = {}
    for size in SIZES:
        values = torch.zeros(size // 4)
        taken = []
        for _ in range(_ROUNDS):
            dist.barrier()
            started = time.perf_counter()
            dist.all_reduce(values)
            taken.append(time.perf_counter() - started)
        seconds[size] = statistics.median(taken)
    if dist.get_rank() == 0:
        file.write_text(json.dumps(seconds))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
