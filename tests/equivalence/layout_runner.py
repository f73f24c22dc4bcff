"""Trains channels-last weights with ZeRO 0 and 1: ``torchrun layout_runner.py FILE``.

Rank 0 writes the differences from a reference loop to FILE.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from update_error import relative_update_error

from trainer.config.schema import RunConfig
from trainer.data.batch import Batch
from trainer.distributed import process_group
from trainer.distributed.env import DistEnv
from trainer.engine.data_parallel import DataParallel
from trainer.engine.deepspeed.optimizer_state import Fp32State
from trainer.models import build_model
from trainer.models.layers import normalize
from trainer.training.batch_plan import BatchPlan

STEPS, MICRO, RANKS, ACCUMULATION, SIZE, RATE = 4, 4, 2, 2, 16, 0.001
GLOBAL = MICRO * RANKS * ACCUMULATION


def model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return build_model("resnet8", 10, SIZE, width=8)


def data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    shape = (STEPS, RANKS * ACCUMULATION, MICRO)
    return random.integers(0, 256, (*shape, SIZE, SIZE, 3), dtype=np.uint8), random.integers(
        0, 10, shape
    )


def train_reference(config: RunConfig) -> tuple[dict, float]:
    """Return the weights after all steps, and the norm of the last gradient."""
    net, (pixels, labels) = model().to(memory_format=torch.channels_last).train(), data()
    optimizer = torch.optim.SGD(net.parameters(), RATE, momentum=0.9, weight_decay=1e-4)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(RANKS * ACCUMULATION):
            images = normalize(
                torch.from_numpy(pixels[step, part]), config.data.mean, config.data.std
            )
            (
                F.cross_entropy(net(images), torch.from_numpy(labels[step, part]))
                / (RANKS * ACCUMULATION)
            ).backward()
        optimizer.step()
    return net.state_dict(), float(
        torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
    )


def not_restored(masters: Fp32State) -> list[str]:
    """Return the weights and slots that are read back with other values than were set."""
    random = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(value.shape, generator=random)
        for name, value in masters.weights().items()
    }
    momentum = {name: torch.randn(value.shape, generator=random) for name, value in weights.items()}
    masters.set_weights(weights)
    masters.set_slots({f"momentum_buffer/{name}": value for name, value in momentum.items()}, 0)
    pairs = ((weights, masters.weights()), (momentum, masters.slot("momentum_buffer")))
    return [
        name
        for want, got in pairs
        for name, value in want.items()
        if not torch.equal(got[name], value)
    ]


def with_engine(stage: int, precision: str, device: torch.device, rank: int) -> dict:
    config = RunConfig.model_validate(
        {
            "model": {"name": "resnet8", "width": 8},
            "data": {"train": "none", "image_size": SIZE},
            "parallel": {"zero_stage": stage},
            "precision": precision,
            "optimizer": {"decay_norm_and_bias": True},
            "train": {"max_steps": 1},
        }
    )
    engine = DataParallel(model(), config, BatchPlan(GLOBAL, MICRO, RANKS, ACCUMULATION), device)
    pixels, labels = data()
    for step in range(STEPS):
        parts = range(rank * ACCUMULATION, (rank + 1) * ACCUMULATION)
        engine.step(
            (
                Batch(
                    pixels[step, i], labels[step, i], np.ones(MICRO, np.float32), float(GLOBAL), []
                )
                for i in parts
            ),
            RATE,
        )
    module = engine._engine.module
    convolutions = [p for p in module.parameters() if p.dim() == 4]
    got, norm = engine.full_state_dict(), engine.grad_norm()
    want, want_norm = train_reference(config)
    return {
        "stage": stage,
        "precision": precision,
        "max_abs_diff": max(
            float((got[k] - v).abs().max())
            for k, v in want.items()
            if v.is_floating_point() and "running" not in k
        ),
        "update_error": relative_update_error(got, want, model().state_dict()),
        "norm": norm,
        "want_norm": want_norm,
        "channels_last": all(
            p.is_contiguous(memory_format=torch.channels_last) for p in convolutions
        ),
        "not_restored": not_restored(engine._fp32_state),
    }


def main(file: Path) -> None:
    torch.set_num_threads(1)
    ranks = DistEnv.from_env()
    device = process_group.init_distributed(ranks, fp16=True)
    cases = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (1, "bf16"), (1, "fp16")]
    results = [with_engine(stage, precision, device, ranks.rank) for stage, precision in cases]
    if ranks.is_rank_zero:
        file.write_text(json.dumps(results))
    process_group.cleanup()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
