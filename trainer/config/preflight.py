"""Preflight checks on rank 0's machine before training: shapes, memory, outputs, disk space.

Importing this module does not import torch; ``check_run`` does.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.run_plan import RunPlan, tracking_uri
from trainer.data.storage.block_cache import CACHE_TOTAL
from trainer.data.storage.location import is_remote, local_path
from trainer.data.storage.store import open_store
from trainer.errors import ServiceUnreachable, UserError
from trainer.faults.disk_space import FileSystem, cannot_write, file_system, mib, probe_folder
from trainer.training.optimizers.registry import OPTIMIZERS

if TYPE_CHECKING:
    from torch import nn

PROBE_NAME = ".convoy-probe"
_FILES_OF_A_RUN = (
    *("model.safetensors", "model.json", "result.json", "tracking.jsonl"),
    *("recipe.yaml", "config.json", "environment.txt", "progress.json"),
)
_SMALL_FILES_BYTES = 128 * 1024  # recipe, configuration, environment and result
_SPOOL_BYTES_PER_STEP, _SPOOL_MAX_BYTES = 160, 2**30
_MANIFEST_BYTES = 64 * 1024
_FAILED_CHECKPOINTS = 3  # consecutive failures after which the result is at risk
_MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class ModelSize:
    """Size of a model in fp32, in bytes: its parameters alone, and its full state dict."""

    parameters: int
    state: int


@dataclass(frozen=True)
class _Need:
    """Disk space that the run will need below ``path``: ``bytes`` in addition to existing files."""

    key: str
    path: Path
    contents: str
    bytes: int
    files: int


def check_run(run: RunPlan, local_ranks: int) -> list[str]:
    """Finds everything that would make the run fail later.

    Returns messages for the user. ``local_ranks``: number of ranks on this machine.
    Leaves no files behind. Raises UserError, or RetryableError if the object store of the
    checkpoints was reached and then lost.
    """
    check_outputs(run)
    size = check_model(run)
    _check_memory(run, size, local_ranks)
    needs = list(_needs(run, size, local_ranks))
    _check_space(needs)
    return list(_warnings(run))


def check_outputs(run: RunPlan) -> None:
    """Creates and removes a file in each location that the run writes to.

    Needs no torch, so the launcher can call it before starting ranks. Raises UserError with one
    line per error.
    """
    _check_temporary_folder()
    _probe_outputs(run)


def check_model(run: RunPlan) -> ModelSize:
    """Builds the model on the meta device, without allocating memory.

    Raises UserError if the model does not support the options or the image size, or if batch norm
    would get a single value per channel in training.
    """
    import torch

    from trainer.export.exported_model import ModelMetadata
    from trainer.models.registry import build_model

    metadata = ModelMetadata.of(run.config, run.train.classes, run.num_classes)
    data = run.config.data
    side = data.size_in(0)  # the smallest side, because it never shrinks
    with torch.device("meta"):
        model = metadata.build()
        if side < data.image_size:
            try:
                build_model(metadata.name, metadata.num_classes, side, **metadata.options)
            except UserError as error:
                raise UserError(
                    str(error).replace("data.image_size", "data.initial_size")
                ) from None
    shared = run.batch.ranks if run.config.train.sync_batch_norm else 1
    if run.batch.micro_size * shared == 1:
        _check_batch_norm(model, run, side)
    weights = sum(parameter.numel() for parameter in model.parameters()) * 4
    state = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    return ModelSize(weights, state)


def _check_batch_norm(model: "nn.Module", run: RunPlan, side: int) -> None:
    """Raises UserError if a batch-norm layer sees a single pixel.

    Called for micro-batches of one sample.
    """
    import torch

    single: list[str] = []

    def record_single(name: str, shape: torch.Size) -> None:
        if shape[2:].numel() == 1:
            single.append(name)

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_pre_hook(
                lambda _, inputs, name=name: record_single(name, inputs[0].shape)
            )
    model.train()
    model(torch.empty(2, 3, side, side, device="meta"))
    if single:
        key = "data.initial_size" if side < run.config.data.image_size else "data.image_size"
        raise UserError(
            f"batch.micro_size: 1 sample at {key} {side} leaves batch norm ({single[0]} of "
            f"{run.config.model.name}) one value per channel, whose variance is undefined; "
            f"use batch.micro_size 2 or more, or larger images"
        )


def _check_memory(run: RunPlan, size: ModelSize, local_ranks: int) -> None:
    """Raises UserError if memory cannot hold even the weights and two micro-batches of pixels."""
    config = run.config
    side, largest = config.data.image_size, run.batch.micro_size
    if run.val is not None:
        largest = max(largest, min(config.batch.eval_size, -(-run.val.samples // run.world_size)))
    per_rank = 2 * size.state + 2 * largest * side * side * 3
    limit = _memory_limit()
    if per_rank * local_ranks > limit:
        raise UserError(
            f"memory: the run needs at least {mib(per_rank * local_ranks)} on this machine "
            f"({local_ranks} x {mib(2 * size.state)} for two copies of the weights and "
            f"{mib(per_rank - 2 * size.state)} for {largest} images of {side} x {side} pixels), "
            f"but it has {mib(limit)}; use a smaller model.width, model.num_classes, "
            "data.image_size, batch.micro_size or batch.eval_size"
        )


def _memory_limit() -> int:
    """Returns the memory of this container, or of the machine if that is smaller, in bytes."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _MEMORY_LIMITS:
        if Path(name).is_file() and (text := Path(name).read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def _check_temporary_folder() -> None:
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(
            f"TMPDIR: {error.strerror}; set it to a folder that can be written"
        ) from None


def _local(url: str) -> Path | None:
    return None if is_remote(url) else local_path(url)


def _probe_outputs(run: RunPlan) -> None:
    config, url = run.config, run.config.checkpoint_url
    folders = {"train.output_dir": config.output_dir}
    local = _local(url)
    if local is not None and config.checkpoint.url is not None:
        folders["checkpoint.url"] = local
    cache = config.data.cache_dir
    # A filled cache may be read-only.
    if cache is not None and not os.path.exists(Path(cache) / CACHE_TOTAL):
        folders["data.cache_dir"] = Path(cache)
    faults = []
    for key, folder in folders.items():
        try:
            probe_folder(folder)
        except OSError as error:
            faults.append(f"{key}: {cannot_write(folder, error)}; use another folder")
    for name in _FILES_OF_A_RUN:
        if os.path.isdir(config.output_dir / name):
            faults.append(
                f"train.output_dir: {config.output_dir / name} is a folder, but a file of "
                "this name will be written; use another folder"
            )
    if faults:
        raise UserError(*faults)
    if local is None:
        _probe_object_store(url)


def _probe_object_store(url: str) -> None:
    try:
        store = open_store(url, create=True)
        store.check_mutable()
        store.write(PROBE_NAME, b"")
        store.delete([PROBE_NAME])
    except ServiceUnreachable:
        raise
    except UserError as error:
        raise UserError(f"checkpoint.url: {error}") from None


def _needs(run: RunPlan, size: ModelSize, local_ranks: int) -> Iterator[_Need]:
    config = run.config
    output = config.output_dir
    yield _Need(
        "train.output_dir", output, "the trained model", size.state + _SMALL_FILES_BYTES, 10
    )
    if tracking_uri(config):
        spool = min(run.stop_step * _SPOOL_BYTES_PER_STEP, _SPOOL_MAX_BYTES)
        left = max(0, spool - _bytes_in(output, "*tracking.jsonl"))
        yield _Need("train.output_dir", output, "entries that MLflow has not accepted yet", left, 2)
    if config.data.log_keys:
        yield _Need(
            "train.output_dir", output, "data.log_keys", _key_bytes(run, local_ranks), local_ranks
        )
    if (folder := _local(run.config.checkpoint_url)) is not None:
        count, one = _most_checkpoints(run), _checkpoint_bytes(run, size)
        left = max(0, count * one - _bytes_in(folder, "step-*/*"))
        contents = f"{count} checkpoints of {mib(one)} (checkpoint.keep={config.checkpoint.keep})"
        yield _Need("checkpoint.url", folder, contents, left, 4 * count)


def _checkpoint_bytes(run: RunPlan, size: ModelSize) -> int:
    slots = len(OPTIMIZERS[run.config.optimizer.name].state_keys)
    averages = size.state if run.config.ema is not None else 0
    return size.state + slots * size.parameters + averages + _MANIFEST_BYTES


def _most_checkpoints(run: RunPlan) -> int:
    """Returns the maximum number of checkpoints that exist at once.

    These are the kept ones, the best one, and the one being written.
    """
    every = run.config.checkpoint.every_steps
    in_total = -(-run.stop_step // run.steps_per_epoch) + (run.stop_step // every if every else 0)
    return min(in_total, run.config.checkpoint.keep + (run.val is not None) + 1)


def _key_bytes(run: RunPlan, local_ranks: int) -> int:
    """Estimates the size of the sample key logs of this machine's ranks, in bytes.

    Uses the mean length of a key plus its quotes and comma.
    """
    shard = run.train.shards[0]
    key = sum(map(len, shard.keys)) / max(1, len(shard.keys)) + 4
    samples = run.stop_step * run.batch.global_size * local_ranks / run.world_size
    return max(0, int(samples * key) - _bytes_in(run.config.output_dir, "samples/*"))


def _bytes_in(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())


def _check_space(needs: list[_Need]) -> None:
    """Raises UserError if a file system has less free space than the run will write to it."""
    systems: dict[int, tuple[FileSystem, list[_Need]]] = {}
    for need in needs:
        found = file_system(need.path)
        systems.setdefault(found.device, (found, []))[1].append(need)
    for found, on_device in systems.values():
        space, files = sum(need.bytes for need in on_device), sum(need.files for need in on_device)
        listed = ", ".join(f"{mib(need.bytes)} for {need.contents}" for need in on_device)
        paths = " and ".join(dict.fromkeys(f"{need.key}: {need.path}" for need in on_device))
        if found.free_bytes is not None and space > found.free_bytes:
            raise UserError(
                f"{paths}: {mib(space)} needed, {mib(found.free_bytes)} free ({listed}); free some "
                "space, keep fewer checkpoints, or use another folder"
            )
        if found.free_files is not None and files > found.free_files:
            raise UserError(
                f"{paths}: {files} files needed, {found.free_files} inodes free; remove some "
                "files or use another folder"
            )


def check_result_fits(run: RunPlan, model: "nn.Module", failed_checkpoints: int) -> None:
    """Raises UserError if the disk is also too full for the trained model.

    Continuing would waste the rest of the training, because its result could not be written.
    """
    if failed_checkpoints < _FAILED_CHECKPOINTS:
        return
    folder = run.config.output_dir
    needed = sum(value.nbytes for value in model.state_dict().values())
    free = file_system(folder).free_bytes
    if free is not None and free < needed:
        raise UserError(
            f"train.output_dir: {folder}: {mib(needed)} needed, {mib(free)} free: neither the last "
            f"{failed_checkpoints} checkpoints nor the trained model can be written, so the run "
            "ends; free some space and start it again: it resumes from its newest checkpoint"
        )


def _warnings(run: RunPlan) -> Iterator[str]:
    data = run.config.data
    if run.val is not None and run.val.digest == run.train.digest:
        yield "data.val is the same data as data.train, so top1 does not measure generalization"
    if data.cache_dir is not None:
        folder = Path(data.cache_dir)
        total = run.train.bytes + (run.val.bytes if run.val is not None else 0)
        needed = int(min(data.cache_gb * 2**30, total)) - _bytes_in(folder, "*/*.convoy-block")
        free = file_system(folder).free_bytes
        if free is not None and needed > free:
            yield (
                f"data.cache_gb: the cache needs {mib(needed)} in {folder}, which has {mib(free)} "
                "free; once the disk is full, shards are read from the store"
            )
