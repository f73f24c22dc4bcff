"""One set of processes, many ways to train the same network: ``torchrun cells.py FILE``.

FILE holds a list of cells, digits.npz beside it their images. Each cell is trained for some steps by the project's engine and, by
rank 0, by a plain loop: one process, fp32, torch's optimizer, the same global batches in the same micro-batches. Rank 0 writes what
came of it to FILE.out.

A cell's "options" are recipe keys. It may ``save`` a checkpoint below a folder after half of the steps, or go on from one that it
``load``s.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from distances import distance
from torch.distributed import distributed_c10d

from trainer.checkpoint import Checkpoint, begin
from trainer.config import RunConfig
from trainer.data.augment import Mix, draw_mix
from trainer.data.order import mix_generator, rank_slots
from trainer.data.stages import Batch
from trainer.engine import deepspeed_config, parallel
from trainer.engine.base import Engine
from trainer.engine.batch import BatchPlan, plan_batches
from trainer.engine.data_parallel import DataParallel
from trainer.engine.pipeline_parallel import PipelineParallel, layer_costs, split
from trainer.engine.stage import dropout_seed
from trainer.models import build_model

GLOBAL, STEPS, SIZE = 16, 20, 16
deepspeed_config.BUCKET = 2**12  # so that even these networks fill several, and have layers that exceed one
deepspeed_config.KEPT = 100
NETWORKS = {
    "no batch norm": ("resnet8", {"width": 8, "batch_norm": False}),
    "batch norm": ("resnet8", {"width": 8}),
    "auxiliary heads": ("googlenet2014", {"width": 8, "stem": "small"}),
}


RATES = {"no batch norm": 0.0003, "batch norm": 0.0001, "auxiliary heads": 0.0003}
"""Learning rates at which 20 steps do not make more of a rounding than they may: batch norm over one image does at more."""


def images_and_labels() -> tuple[np.ndarray, np.ndarray]:
    """Real digits, uint8 [steps, batch, 16, 16, 3], and their labels; the last batch holds only 11 samples, the rest padding."""
    digits = np.load(Path(sys.argv[1]).with_name("digits.npz"))
    pixels = (digits["images"][: GLOBAL * STEPS] * (255 / 16)).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    pixels = np.stack([pixels] * 3, axis=-1).reshape(STEPS, GLOBAL, SIZE, SIZE, 3)
    return pixels, digits["target"][: GLOBAL * STEPS].reshape(STEPS, GLOBAL).astype(np.int64)


def weights_of(step: int) -> np.ndarray:
    return (np.arange(GLOBAL) < (11 if step == STEPS - 1 else GLOBAL)).astype(np.float32)


def config_of(cell: dict) -> RunConfig:
    name, options = NETWORKS[cell["network"]]
    values: dict = {
        "model": {"name": name, **options},
        "data": {"train": "none", "image_size": SIZE},
        "batch": {"global_size": GLOBAL, "micro_size": cell["micro"]},
        "optimizer": {"base_lr": RATES[cell["network"]], "base_batch": GLOBAL, "nesterov": True, "weight_decay": 5e-4},
        "precision": cell["precision"],
        "parallel": {"pipeline_stages": cell["stages"], "zero_stage": cell["zero"]},
        "train": {"max_steps": STEPS},
    }
    for key, value in cell.get("options", {}).items():
        *section, name = key.split(".")
        (values.setdefault(section[0], {}) if section else values)[name] = value
    return RunConfig.model_validate(values)


def mix_of(config: RunConfig, step: int, micro_batch: int) -> Mix | None:
    return draw_mix(mix_generator(0, 0, step, micro_batch), config.augment.mixup, config.augment.cutmix, SIZE)


def network_of(config: RunConfig) -> torch.nn.Sequential:
    torch.manual_seed(0)
    options = config.model.model_dump(exclude={"name", "num_classes", "init"}, exclude_none=True)
    return build_model(config.model.name, 10, SIZE, **options)


def with_engine(cell: dict, config: RunConfig, batch: BatchPlan, device: torch.device, rank: int) -> dict:
    """Losses by step, the final state, that of the moving averages, and the steps that fp16 skipped."""
    pixels, labels = images_and_labels()
    model = network_of(config)
    folder = cell.get("save") or cell.get("load")
    found = None
    if folder:
        checkpoints, found, _ = begin(folder, 1, "load" in cell, {}, device)
        assert ("load" in cell) == (found is not None)
    if found:
        torch.nn.init.zeros_(next(model.parameters()))
        model.load_state_dict(found.state.model)
    stages = config.parallel.pipeline_stages
    engine: Engine
    if stages > 1:
        engine = PipelineParallel(model, config, batch, device, split(layer_costs(model, SIZE), stages))
    else:
        engine = DataParallel(model, config, batch, device)
    if found:
        engine.restore(found.state)
    copy_of_model = rank % batch.ranks
    slots = rank_slots(GLOBAL, batch.ranks, copy_of_model, batch.accumulation_steps)
    losses = {}
    skipped: list[int] = found.result["skipped"] if found else []
    for step in range(found.state.step if found else 0, STEPS):
        weights = weights_of(step)

        def batches(step: int = step, weights: np.ndarray = weights) -> Iterator[Batch]:
            for number, chosen in enumerate(slots):
                keys = [str(i) for i in chosen]
                mix = mix_of(config, step, number * batch.ranks + copy_of_model)
                yield Batch(pixels[step, chosen], labels[step, chosen], weights[chosen], float(weights.sum()), keys, mix)

        outcome = engine.step(batches(), config.optimizer.base_lr)
        losses[step] = parallel.averaged(outcome.loss.float()).item()
        skipped += [step] if outcome.skipped else []
        if cell.get("save") and step + 1 == STEPS // 2:
            state = engine.snapshot()
            if checkpoints:
                checkpoints.save(Checkpoint(state, {}, {"skipped": skipped}, None))
                checkpoints.wait()
    return {"losses": losses, "state": engine.state(), "averages": engine.averaged_state(), "skipped": skipped}


def mixed_by_timms_formulas(images: torch.Tensor, mix: Mix | None) -> tuple[torch.Tensor, float]:
    """timm's Mixup._mix_batch, given its lambda and box."""
    if mix is None:
        return images, 1.0
    if mix.box is None:
        return images * mix.lam + images.flip(0) * (1.0 - mix.lam), mix.lam
    yl, yh, xl, xh = mix.box
    pasted = images.clone()
    pasted[:, :, yl:yh, xl:xh] = images.flip(0)[:, :, yl:yh, xl:xh]
    return pasted, 1.0 - (yh - yl) * (xh - xl) / (SIZE * SIZE)


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """timm's SoftTargetCrossEntropy, a sample."""
    return torch.sum(-targets * F.log_softmax(logits, dim=-1), dim=-1)


def with_plain_torch(config: RunConfig, micro_batches: int, together: int, skipped: list[int], device: torch.device) -> dict:
    """``together``: neighbouring micro-batches that pass through the network as one, and share their batch-norm statistics.

    ``skipped``: steps that leave the weights as they are, as gradients that overflow fp16 do.
    """
    from timm.data.mixup import mixup_target  # seconds, which the other ranks need not spend

    pixels, labels = images_and_labels()
    model = network_of(config).to(device).train()
    if config.optimizer.name == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.base_lr, weight_decay=5e-4)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=config.optimizer.base_lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema or 0.0), use_buffers=True
    )
    average.update_parameters(model)  # the first one copies
    position = [0, 0]
    for number, layer in enumerate(module for module in model.modules() if isinstance(module, torch.nn.Dropout)):
        layer.register_forward_pre_hook(
            lambda layer, inputs, number=number: torch.manual_seed(dropout_seed(0, *position, number)) and None
        )
    mean, std = torch.tensor(config.data.mean).view(3, 1, 1), torch.tensor(config.data.std).view(3, 1, 1)
    losses = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        weights = torch.from_numpy(weights_of(step))
        total = 0.0
        for first in range(0, micro_batches, together):
            position[:] = step, first
            parts = []
            for part in range(first, first + together):
                images = (torch.from_numpy(pixels[step, part::micro_batches]).permute(0, 3, 1, 2) / 255 - mean) / std
                images, lam = mixed_by_timms_formulas(images, mix_of(config, step, part))
                target = torch.from_numpy(labels[step, part::micro_batches])
                target = mixup_target(target, 10, lam, config.train.label_smoothing)
                parts.append((images, target, weights[part::micro_batches]))
            images, target, weight = (torch.cat(of_parts).to(device) for of_parts in zip(*parts, strict=True))
            outputs = model(images)
            main, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
            each = soft_cross_entropy(main, target)
            for head in auxiliary:
                each = each + 0.3 * soft_cross_entropy(head, target)
            loss = (each * weight).sum() / weights.sum()
            loss.backward()
            total += loss.item()
        if step not in skipped:
            optimizer.step()
            average.update_parameters(model)
        losses[step] = total
    return {"losses": losses, "state": model.state_dict(), "averages": average.module.state_dict()}


def digest(state: dict) -> str:
    """Of every bit of the parameters."""
    content = b"".join(value.cpu().contiguous().numpy().tobytes() for name, value in sorted(state.items()))
    return hashlib.sha256(content).hexdigest()


def main(path: Path) -> None:
    torch.set_num_threads(1)
    cells = sorted(json.loads(path.read_text()), key=lambda cell: cell["stages"])  # a pipeline leaves its grid in DeepSpeed
    ranks = parallel.ranks_from_environment()
    device = parallel.join(ranks, fp16=True)
    # TF32, and convolutions by transforms, round more than these tests allow
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, False, True
    references: dict[tuple, dict] = {}
    results = []
    standing: set = set()
    for cell in cells:
        config = config_of(cell)
        batch = plan_batches(GLOBAL, cell["micro"], ranks.world_size // cell["stages"], 10_000)
        got = with_engine(cell, config, batch, device, ranks.rank)
        standing = standing or set(distributed_c10d._world.pg_map)  # DeepSpeed keeps the first ones for good
        for group in set(distributed_c10d._world.pg_map) - standing:  # a pipeline makes its own, each with a thread that polls
            torch.distributed.destroy_process_group(group)
        if ranks.is_first:
            micro_batches = GLOBAL // cell["micro"]
            together = batch.ranks if config.train.sync_batch_norm else 1
            skipped = got["skipped"]
            key = (cell["network"], micro_batches, together, *skipped, *sorted(cell.get("options", {}).items()))
            if key not in references:
                references[key] = with_plain_torch(config, micro_batches, together, skipped, device)
            want = references[key]
            apart = {step: abs(loss - want["losses"][step]) / want["losses"][step] for step, loss in got["losses"].items()}
            figures = {
                "first5": max((value for step, value in apart.items() if step < 5), default=0.0),
                "all20": max(apart.values()),
                "weights": distance(got["state"], want["state"]),
                "way": distance(got["state"], want["state"], network_of(config).state_dict()),
                "running": distance(got["state"], want["state"], running=True),
                "averages": distance(got["averages"], want["averages"]) if got["averages"] else 0.0,
                "skipped": len(skipped),
                "digest": digest(got["state"]),
                "losses": list(got["losses"].values()),
            }
            results.append(cell | figures)
    if ranks.is_first:
        path.with_suffix(".out").write_text(json.dumps(results))
    parallel.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
