"""One rank of a training in which a real step fails.

Usage: ``failing_step.py KIND RANK RECIPE key=value ...``. torch's global forward hook raises in the
third step of the given rank. With KIND ``running`` no step fails, but collectives are still running
when the ranks exit.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from trainer.__main__ import main
from trainer.distributed import process_group

ERRORS = {
    "ecc": lambda: torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    "memory": lambda: torch.empty(2**50),
}


def fail_in_third_step(kind: str) -> None:
    calls = 0

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal calls
        if isinstance(module, nn.Linear) and module.training:
            calls += 1
            if calls == 3:
                raise ERRORS[kind]()

    nn.modules.module.register_module_forward_hook(hook)


def leave_collectives_running() -> None:
    cleanup, groups = process_group.cleanup, list[dist.ProcessGroup]()

    def start_and_clean_up() -> None:
        if dist.is_initialized():
            groups.append(dist.new_group(backend="gloo"))
            for _ in range(100):
                dist.all_reduce(torch.zeros(1000), group=groups[0], async_op=True)
        cleanup()

    process_group.cleanup = start_and_clean_up


if __name__ == "__main__":
    kind, rank, *arguments = sys.argv[1:]
    if kind == "running":
        leave_collectives_running()
    elif os.environ.get("RANK", "0") == rank:
        fail_in_third_step(kind)
    main(arguments)
