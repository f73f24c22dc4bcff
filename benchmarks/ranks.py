"""What the benchmarks of several ranks share: starting them, and measuring their memory."""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def run_ranks(file: str, processes: int, **task: Any) -> Any:
    """Start ``file --rank TASK`` in so many ranks of one thread; what rank 0 wrote, as JSON, to the task's ``file``."""
    with tempfile.TemporaryDirectory() as folder:
        task["file"] = f"{folder}/result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", file, "--rank", json.dumps(task)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        return json.loads(Path(task["file"]).read_text())


def peak_of(build: Callable[[], Callable[[], Any]]) -> int:
    """Bytes by which resident memory grows, from before ``build`` to the peak of three calls, after one, of what it made."""
    nn.functional.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))  # the libraries' own memory
    before = status("VmRSS")
    step = build()
    step()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here: building is not training
    for _ in range(3):
        step()
    return status("VmHWM") - before


def status(key: str) -> int:
    """Bytes that the kernel tells of this process: VmRSS, VmHWM (its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
