"""Trains cells of the reference grid in one set of processes: ``torchrun grid_runner.py FILE``.

FILE contains a list of cells; digits.npz in the same folder contains the images. Each cell is
trained for some steps by the project's engine and, on rank 0, by ``reference_loop.py``. Rank 0
writes the differences between the two to FILE.out.

A cell's options are those of ``grid_options.py``. A cell may ``save`` a checkpoint in a folder
after half of the steps, or ``load`` one and resume from it.
"""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import reference_loop
import torch
from grid_options import OPTIONS, option_of, recipe_keys
from torch.distributed import distributed_c10d
from update_error import relative_error, relative_update_error

from trainer.config.schema import RunConfig
from trainer.data.batch import Batch
from trainer.data.random_streams import LATEST_VERSION, RandomStreams
from trainer.data.sampler import micro_batch_slots
from trainer.data.transforms.mixup import Mix, Mixup
from trainer.distributed import process_group
from trainer.distributed.collectives import all_reduce_mean
from trainer.distributed.env import DistEnv
from trainer.engine.data_parallel import DataParallel
from trainer.engine.deepspeed import config as deepspeed_config
from trainer.engine.engine import Engine
from trainer.engine.partition import assign_layers, layer_costs
from trainer.engine.pipeline_parallel import PipelineParallel
from trainer.models import build_model
from trainer.training.batch_plan import BatchPlan, plan_batches
from trainer.training.checkpoint import Checkpoint, resume_or_start

GLOBAL, STEPS, SIZE = 16, 20, 16
# so that even these networks fill several buckets, and have layers larger than a bucket
deepspeed_config.BUCKET_NUMEL = 2**12
deepspeed_config.PARAM_PERSISTENCE_THRESHOLD = 100
NETWORKS = {
    "no batch norm": ("resnet8", {"width": 8, "batch_norm": False}),
    "batch norm": ("resnet8", {"width": 8}),
    "auxiliary heads": ("googlenet2014", {"width": 8, "stem": "small"}),
}


RATES = {"no batch norm": 0.0003, "batch norm": 0.0001, "auxiliary heads": 0.0003}
"""Learning rates at which 20 steps do not amplify rounding errors beyond the tolerances.

At higher ones, batch norm over one image does.
"""


def images_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """Return real digits, uint8 [steps, batch, 16, 16, 3], and their labels.

    The last batch has 11 samples; the rest is padding.
    """
    digits = np.load(Path(sys.argv[1]).with_name("digits.npz"))
    pixels = (
        (digits["images"][: GLOBAL * STEPS] * (255 / 16))
        .astype(np.uint8)
        .repeat(2, axis=1)
        .repeat(2, axis=2)
    )
    pixels = np.stack([pixels] * 3, axis=-1).reshape(STEPS, GLOBAL, SIZE, SIZE, 3)
    return pixels, digits["target"][: GLOBAL * STEPS].reshape(STEPS, GLOBAL).astype(np.int64)


def weights_of(step: int, short: bool) -> np.ndarray:
    """Return the sample weights of a step: 1 for a sample, 0 for padding.

    ``short``: every fifth batch is short, one of them with a single sample, not only the last one.
    """
    samples = {9: 1, 4: 7, 14: 13, STEPS - 1: 11} if short else {STEPS - 1: 11}
    return (np.arange(GLOBAL) < samples.get(step, GLOBAL)).astype(np.float32)


def config_of(cell: dict) -> RunConfig:
    name, options = NETWORKS[cell["network"]]
    values: dict = {
        "model": {"name": name, **options},
        "data": {"train": "none", "image_size": SIZE},
        "batch": {"global_size": GLOBAL, "micro_size": cell["micro"]},
        "optimizer": {
            "base_lr": RATES[cell["network"]],
            "base_batch": GLOBAL,
            "nesterov": True,
            "weight_decay": 5e-4,
        },
        "precision": cell["precision"],
        "parallel": {
            "pipeline_stages": cell["stages"],
            "zero_stage": cell["zero"],
            "split": cell.get("split"),
        },
        "train": {"max_steps": STEPS},
    }
    for key, value in recipe_keys(cell).items():
        *section, name = key.split(".")
        (values.setdefault(section[0], {}) if section else values)[name] = value
    return RunConfig.model_validate(values)


def mix_of(config: RunConfig, step: int, micro_batch: int) -> Mix | None:
    mixup = Mixup.from_config(config.augment)
    if not mixup.enabled:
        return None
    streams = RandomStreams(LATEST_VERSION, 0, 0)
    return mixup.draw(streams.generator(mixup.stream, step, micro_batch), SIZE)


def network_of(config: RunConfig) -> torch.nn.Sequential:
    torch.manual_seed(0)
    options = config.model.model_dump(exclude={"name", "num_classes", "init"}, exclude_none=True)
    return build_model(config.model.name, 10, SIZE, **options)


def with_engine(
    cell: dict, config: RunConfig, batch: BatchPlan, device: torch.device, rank: int
) -> dict:
    """Train with the engine.

    Returns losses and gradient norms by step, the final state, the moving averages, and the steps
    that fp16 skipped.
    """
    pixels, labels = images_and_labels()
    model = network_of(config)
    folder = cell.get("save") or cell.get("load")
    found = None
    if folder:
        checkpoints, found, _ = resume_or_start(folder, 1, "load" in cell, {}, device)
        assert ("load" in cell) == (found is not None)
    if found:
        torch.nn.init.zeros_(next(model.parameters()))
        model.load_state_dict(found.state.model)
    stages = config.parallel.pipeline_stages
    engine: Engine
    if stages > 1:
        engine = PipelineParallel(
            model,
            config,
            batch,
            device,
            assign_layers(layer_costs(model, SIZE), stages, config.parallel.split),
        )
    else:
        engine = DataParallel(model, config, batch, device)
    if found:
        engine.restore(found.state)
    replica = rank % batch.ranks
    slots = micro_batch_slots(GLOBAL, batch.ranks, replica, batch.accumulation_steps)
    losses, norms = {}, {}
    skipped: list[int] = found.result["skipped"] if found else []
    for step in range(found.state.step if found else 0, STEPS):
        weights = weights_of(step, option_of(cell, "short"))

        def batches(step: int = step, weights: np.ndarray = weights) -> Iterator[Batch]:
            for number, chosen in enumerate(slots):
                keys = [str(i) for i in chosen]
                mix = mix_of(config, step, number * batch.ranks + replica)
                yield Batch(
                    pixels[step, chosen],
                    labels[step, chosen],
                    weights[chosen],
                    float(weights.sum()),
                    keys,
                    mix,
                )

        output = engine.step(batches(), config.optimizer.base_lr)
        losses[step] = all_reduce_mean(output.loss.float()).item()
        skipped += [step] if output.skipped else []
        norms[step] = engine.grad_norm()
        if cell.get("save") and step + 1 == STEPS // 2:
            state = engine.training_state()
            if checkpoints:
                checkpoints.save(Checkpoint(state, {}, {"skipped": skipped}, None))
                checkpoints.wait()
    return {
        "losses": losses,
        "state": engine.full_state_dict(),
        "averages": engine.ema_state_dict(),
        "skipped": skipped,
        "norms": norms,
    }


def with_reference_loop(
    cell: dict,
    config: RunConfig,
    micro_batches: int,
    synced_ranks: int,
    skipped: list[int],
    device: torch.device,
) -> dict:
    pixels, labels = images_and_labels()
    mean, std = (
        torch.tensor(config.data.mean).view(3, 1, 1),
        torch.tensor(config.data.std).view(3, 1, 1),
    )

    def data(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images = (torch.from_numpy(pixels[step]).permute(0, 3, 1, 2) / 255 - mean) / std
        weights = torch.from_numpy(weights_of(step, option_of(cell, "short")))
        return images.to(device), torch.from_numpy(labels[step]).to(device), weights.to(device)

    model = network_of(config).to(device)
    return reference_loop.train(
        model,
        config,
        data,
        lambda *at: mix_of(config, *at),
        STEPS,
        micro_batches,
        synced_ranks,
        skipped,
    )


def digest(state: dict) -> str:
    """Return a SHA-256 digest of all parameters."""
    content = b"".join(
        value.cpu().contiguous().numpy().tobytes() for name, value in sorted(state.items())
    )
    return hashlib.sha256(content).hexdigest()


def max_relative_norm_diff(
    got: dict[int, float | None], want: dict[int, float | None], steps: range
) -> float:
    """Return the largest relative difference between two gradient norms of a step.

    Returns infinity if only one of the two is reported.
    """
    pairs = [(norm, want[step]) for step, norm in got.items() if step in steps]
    if any((a is None) != (b is None) for a, b in pairs):
        return math.inf
    return max((abs(a - b) / b for a, b in pairs if a is not None and b is not None), default=0.0)


def main(path: Path) -> None:
    torch.set_num_threads(1)
    # cells with pipeline stages last: a pipeline leaves its grid in DeepSpeed
    cells = sorted(json.loads(path.read_text()), key=lambda cell: cell["stages"])
    ranks = DistEnv.from_env()
    device = process_group.init_distributed(ranks, fp16=True)
    # the rounding errors of TF32 and of transform-based convolutions exceed the tolerances
    (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    ) = False, False, True
    references: dict[tuple, dict] = {}
    results = []
    permanent: set = set()
    for cell in cells:
        config = config_of(cell)
        deepspeed_config.LOSS_SCALE_WINDOW = cell.get("window", 1000)
        batch = plan_batches(GLOBAL, cell["micro"], ranks.world_size // cell["stages"], 10_000)
        started = time.monotonic()
        got = with_engine(cell, config, batch, device, ranks.rank)
        # DeepSpeed keeps the first process groups until the process ends; a pipeline creates more,
        # each with a polling thread
        permanent = permanent or set(distributed_c10d._world.pg_map)
        for group in set(distributed_c10d._world.pg_map) - permanent:
            torch.distributed.destroy_process_group(group)
        if ranks.is_rank_zero:
            micro_batches = GLOBAL // cell["micro"]
            synced_ranks = batch.ranks if config.train.sync_batch_norm else 1
            skipped = got["skipped"]
            key = (
                cell["network"],
                micro_batches,
                synced_ranks,
                *skipped,
                *(option_of(cell, option) for option in OPTIONS),
            )
            if key not in references:
                references[key] = with_reference_loop(
                    cell, config, micro_batches, synced_ranks, skipped, device
                )
            want = references[key]
            loss_errors = {
                step: abs(loss - want["losses"][step]) / want["losses"][step]
                for step, loss in got["losses"].items()
            }
            measured = {
                "first5": max(
                    (value for step, value in loss_errors.items() if step < 5), default=0.0
                ),
                "all20": max(loss_errors.values()),
                "weights": relative_error(got["state"], want["state"]),
                "update": relative_update_error(
                    got["state"], want["state"], network_of(config).state_dict()
                ),
                "running": relative_error(got["state"], want["state"], running=True),
                "averages": relative_error(got["averages"], want["averages"])
                if got["averages"]
                else 0.0,
                "skipped": len(skipped),
                "norms5": max_relative_norm_diff(got["norms"], want["norms"], range(5)),
                "norms20": max_relative_norm_diff(got["norms"], want["norms"], range(STEPS)),
                "seconds": time.monotonic() - started,
                "digest": digest(got["state"]),
                "losses": list(got["losses"].values()),
            }
            results.append(cell | measured)
    if ranks.is_rank_zero:
        path.with_suffix(".out").write_text(json.dumps(results))
    process_group.cleanup()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
