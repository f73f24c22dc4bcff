"""Shared code of the multi-rank benchmarks: starting ranks and measuring their memory."""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def run_ranks(file: str, processes: int, **task: Any) -> Any:
    """Run ``file --rank TASK`` in ``processes`` ranks with one thread each.

    Returns the JSON that rank 0 writes to the task's ``file``.
    """
    with tempfile.TemporaryDirectory() as folder:
        task["file"] = f"{folder}/result.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
        ]
        command += [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "127.0.0.1:0",
            file,
            "--rank",
            json.dumps(task),
        ]
        done = subprocess.run(
            command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(done.stderr[-4000:])
        return json.loads(Path(task["file"]).read_text())


def peak_of(build: Callable[[], Callable[[], Any]]) -> dict[str, int]:
    """Peak bytes of the step that ``build`` returns.

    ``tensors``: as counted by torch's allocator. ``resident``: growth of the resident memory since
    before ``build``, including the libraries' code and what the C library does not release.
    """
    # loads the libraries first
    nn.functional.conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3))
    before = status("VmRSS")
    step = build()
    step()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak after construction
    for _ in range(3):
        step()
    resident = status("VmHWM") - before
    del step
    gc.collect()  # otherwise the next trace would count the memory of this step as freed
    with _tracing() as trace:
        step = build()
        for _ in range(2):  # ZeRO 3 learns the order of layers in the first step
            step()
    built = sum(_changes(trace))
    with _tracing() as trace:
        step()
    return {"tensors": built + max(accumulate(_changes(trace))), "resident": resident}


def _tracing() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _changes(trace: profile) -> list[int]:
    """Allocated bytes in order of time; freed bytes are negative."""
    assert trace.profiler is not None
    events = [
        event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def status(key: str) -> int:
    """Bytes in a field of this process's kernel status, such as VmRSS or VmHWM (the peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
