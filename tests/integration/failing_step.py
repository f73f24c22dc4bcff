"""One rank of a training in which a real step fails.

Usage: ``failing_step.py KIND RANK RECIPE key=value ...``. torch's global forward hook raises in the
third step of the given rank.
"""

import os
import sys

import torch
from torch import nn

from trainer.__main__ import main

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


if __name__ == "__main__":
    kind, rank, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank:
        fail_in_third_step(kind)
    sys.exit(main(arguments))
