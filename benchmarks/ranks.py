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
    """Start ``file --rank TASK`` in so many ranks of one thread; what rank 0 wrote, as JSON, to the
    task's ``file``.
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
    """Bytes at the peak of a step that ``build`` makes. ``tensors``: as torch's allocator counts
    them; ``resident``: by how much resident memory has grown since before ``build``, with the
    libraries' code and what the C library does not give back.
    """
    nn.functional.conv2d(
        torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 3, 3)
    )  # the libraries' own memory
    before = status("VmRSS")
    step = build()
    step()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here: building is not training
    for _ in range(3):
        step()
    resident = status("VmHWM") - before
    del step
    gc.collect()  # else what goes of the first would be counted as given back by the second
    with _tracing() as trace:
        step = build()
        for _ in range(2):  # ZeRO 3 knows the order of layers from the second on
            step()
    built = sum(_changes(trace))
    with _tracing() as trace:
        step()
    return {"tensors": built + max(accumulate(_changes(trace))), "resident": resident}


def _tracing() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def _changes(trace: profile) -> list[int]:
    """Bytes taken, and given back as negative ones, one after another."""
    assert trace.profiler is not None
    events = [
        event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def status(key: str) -> int:
    """Bytes that the kernel tells of this process: VmRSS, VmHWM (its peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
