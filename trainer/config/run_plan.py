"""Turns a recipe into a RunPlan and reports every user error before the first rank starts.

This module does not import torch.
"""

import os
import shutil
from dataclasses import dataclass
from typing import Any

from trainer.config.schema import RunConfig, load_config
from trainer.data.index import Index, check_shards, open_index
from trainer.data.sampler import steps_per_epoch
from trainer.data.storage.store import Store, parse_storage_url
from trainer.data.transforms.mixup import Mixup
from trainer.engine.deepspeed.config import validate_parallelism
from trainer.errors import UserError
from trainer.tracking.server import validate_tracking_uri
from trainer.training.batch_plan import BatchPlan, plan_batches
from trainer.training.lr_schedule import learning_rate_schedule

_SHAPING = (
    *(
        f"data.{key}"
        for key in ("image_size", "initial_size", "grow_from", "grow_until", "size_step")
    ),
    *(f"data.{key}" for key in ("shuffle_window", "seed", "tail", "mean", "std")),
    "batch.global_size",
    *(f"train.{key}" for key in ("seed", "label_smoothing", "sync_batch_norm")),
)


@dataclass(frozen=True)
class RunPlan:
    """A recipe with every derived number resolved.

    ``stop_step``: number of optimizer steps that the run makes; ``total_steps``: number of steps
    that the learning-rate schedule spans.
    """

    config: RunConfig
    train: Index
    train_store: Store
    val: Index | None
    val_store: Store | None
    world_size: int
    batch: BatchPlan
    steps_per_epoch: int
    total_steps: int
    stop_step: int
    num_classes: int

    @property
    def config_fingerprint(self) -> dict[str, Any]:
        """The keys and values that determine the training result.

        A checkpoint and the run that resumes from it must agree on them. Parallelism, precision and
        storage locations are not included.
        """
        shaping = ("model.", "optimizer.", "schedule.", "augment.", "ema", *_SHAPING)
        keys = {
            key: value
            for key, value in self.config.flat().items()
            if key.startswith(shaping) and key != "model.init"
        }
        return keys | {
            "model.num_classes": self.num_classes,
            "data.train": self.train.digest,
            "train.total_steps": self.total_steps,
        }


def build_run_plan(
    recipe: str, overrides: list[str], world_size: int, check_storage: bool
) -> RunPlan:
    """Reads the recipe and the indexes, and derives the remaining values. Raises UserError.

    ``check_storage``: also compare the presence and size of every shard. This takes one listing, so
    only one rank of a job does it.
    """
    config = load_config(recipe, overrides)
    check_config(config)
    if config.train.compile and not shutil.which(compiler := os.environ.get("CXX") or "g++"):
        raise UserError(
            f"train.compile: needs a C++ compiler, but {compiler} was not found; install it, or "
            "set train.compile=false"
        )
    train, train_store = open_index(config.data.train)
    val, val_store = open_index(config.data.val) if config.data.val else (None, None)
    num_classes = config.model.num_classes or len(train.classes)
    for url, index in ((config.data.train, train), (config.data.val, val)):
        if index is not None and len(index.classes) > num_classes:
            raise UserError(
                f"model.num_classes: {num_classes} is less than the {len(index.classes)} "
                f"classes of {url}"
            )
    _check_splits(config, train, val, num_classes)
    batch = split_ranks(config, world_size, train.samples)
    per_epoch, total, stop = run_length(config, batch.global_size, train.samples)
    learning_rate_schedule(config.schedule, config.optimizer, batch.global_size, per_epoch, total)
    if uri := tracking_uri(config):
        named = "tracking.uri" if config.tracking.uri else "MLFLOW_TRACKING_URI"
        validate_tracking_uri(uri, named)
    if config.tracking.register_as and not uri:
        raise UserError("tracking.register_as: needs a server: tracking.uri or MLFLOW_TRACKING_URI")
    if check_storage:
        check_shards(train, train_store)
        if val is not None and val_store is not None:
            check_shards(val, val_store)
    return RunPlan(
        config,
        train,
        train_store,
        val,
        val_store,
        world_size,
        batch,
        per_epoch,
        total,
        stop,
        num_classes,
    )


def run_length(config: RunConfig, global_size: int, samples: int) -> tuple[int, int, int]:
    """Returns the steps per epoch, the steps of the learning-rate schedule and the stop step.

    All three are numbers of optimizer steps; the run stops after the last one.
    """
    per_epoch = steps_per_epoch(samples, global_size, config.data.tail)
    epochs, max_steps = config.train.epochs, config.train.max_steps
    total = epochs * per_epoch if epochs is not None else max_steps
    assert total is not None, "RunConfig rejects a run without epochs and max_steps"
    return per_epoch, total, total if max_steps is None else min(total, max_steps)


def check_config(config: RunConfig) -> None:
    """Runs the checks that need neither data nor a machine.

    Raises UserError with one line per error.
    """
    validate_parallelism(config)
    outputs = {
        "train.output_dir": str(config.output_dir),
        "checkpoint.url": config.checkpoint.url,
        "data.cache_dir": config.data.cache_dir,
    }
    faults = [
        f"{output}: {place} is inside {split} ({url}), which must not change; use another location"
        for split, url in (("data.train", config.data.train), ("data.val", config.data.val))
        for output, place in outputs.items()
        if url is not None and place is not None and _is_inside(place, url)
    ]
    if faults:
        raise UserError(*faults)


def _is_inside(place: str, url: str) -> bool:
    """Returns whether ``place`` equals ``url`` or is below it."""
    return parse_storage_url(url).contains(parse_storage_url(place))


def _check_splits(config: RunConfig, train: Index, val: Index | None, num_classes: int) -> None:
    """Raises UserError if nothing can be learned or measured, or if splits name classes
    differently.
    """
    if num_classes < 2:
        raise UserError(
            f"model.num_classes: a classifier needs 2 classes or more, but {config.data.train} has "
            f"{len(train.classes)}; pack a folder for each class, or set model.num_classes"
        )
    if val is None:
        return
    if val.class_ids != train.class_ids[: len(val.class_ids)]:
        raise UserError(
            f"data.val: the classes of {config.data.val} differ from those of {config.data.train}"
        )
    for ours, theirs, name in zip(train.classes, val.classes, val.class_ids, strict=False):
        if ours != theirs and name not in (ours, theirs):
            raise UserError(
                f"data.val: class {name!r} is named {theirs!r} in {config.data.val} and "
                f"{ours!r} in {config.data.train}; index both splits with the same class names"
            )


def split_ranks(config: RunConfig, world_size: int, samples: int) -> BatchPlan:
    """Plans how ``world_size`` ranks share the batches.

    ``samples``: number of samples in the training split. Raises UserError that suggests values that
    divide evenly.
    """
    stages = config.parallel.pipeline_stages
    if world_size % stages:
        raise UserError(
            f"parallel.pipeline_stages: {world_size} ranks are not divisible by {stages} stages; "
            f"use a multiple of {stages} ranks"
        )
    batch = plan_batches(
        config.batch.global_size, config.batch.micro_size, world_size // stages, samples
    )
    mixup = Mixup.from_config(config.augment)
    if mixup.enabled and batch.micro_size < 2:
        key = "mixup" if mixup.mixup else "cutmix"
        raise UserError(
            f"augment.{key}: mixes the samples of a micro-batch, which has only 1 sample; use "
            "batch.micro_size 2 or more"
        )
    return batch


def tracking_uri(config: RunConfig) -> str | None:
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or None
