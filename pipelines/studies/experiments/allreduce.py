"""Time of a gloo all-reduce of several sizes, written as JSON.

``python -m pipelines.studies.experiments.allreduce FILE`` runs on each rank.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

SIZES = (4, 2**16, 2**20, 2**24)
"""Bytes."""
_ROUNDS = 15


def main(file: Path) -> None:
    """The first rank writes the median seconds of each size."""
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
