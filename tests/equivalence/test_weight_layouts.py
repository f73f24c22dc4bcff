"""Flat gradient buffers and fused updates with channels-last weights."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from trainer.config.schema import OptimizerConfig
from trainer.engine.deepspeed.grad_reducer import _build_buckets
from trainer.training.optimizers.build import build_optimizer


def test_channels_last_weights_match_the_reference_loop(tmp_path: Path) -> None:
    script, file = Path(__file__).with_name("layout_runner.py"), tmp_path / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(script), str(file)]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for result in json.loads(file.read_text()):
        assert result["channels_last"], result
        exact = result["precision"] == "fp32"
        assert result["max_abs_diff"] < (1e-6 if exact else 1e-3), result
        assert result["update_error"] < (1e-5 if exact else 0.1), result
        assert abs(result["norm"] / result["want_norm"] - 1) < (1e-4 if exact else 0.02), result
        assert not result["not_restored"], result


def test_buckets_contain_each_gradient_once_starting_with_the_last() -> None:
    parameters = [nn.Parameter(torch.zeros(n)) for n in (5, 300_000, 7, 8_000_000, 20, 200_000)]
    places, size = {}, 0
    for parameter in parameters:
        places[parameter] = size
        size += parameter.numel()
    buckets = _build_buckets(torch.zeros(size), places)
    assert [len(bucket.parameters) for bucket in buckets] == [3, 3]
    assert [id(p) for bucket in buckets for p in bucket.parameters] == [
        id(p) for p in reversed(parameters)
    ]
    assert sum(bucket.part.numel() for bucket in buckets) == size


def test_momentum_in_another_memory_layout_gives_the_same_update() -> None:
    first = nn.Conv2d(4, 8, 3, bias=False)
    second = copy.deepcopy(first).to(memory_format=torch.channels_last)
    optimizers = [build_optimizer(model, OptimizerConfig(), 0.1) for model in (first, second)]
    for step in range(3):
        images = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((first, second), optimizers, strict=True):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()
            optimizer.state[model.weight]["momentum_buffer"] = optimizer.state[model.weight][
                "momentum_buffer"
            ].contiguous()
    torch.testing.assert_close(first.weight, second.weight)
