"""Checkpoints: everything a run needs to resume.

The format is independent of ranks, pipeline stages and precision, and does not use pickle. A
checkpoint is a folder such as ``step-000001200`` below the checkpoint URL. It contains:

- ``model.safetensors``: fp32 master weights and batch norm statistics
- ``optimizer.safetensors``: the optimizer's tensors by ``slot/parameter``
- ``checkpoint.json``: the manifest, with scalar state and the size and SHA-256 of the other files

The manifest is written last. A folder without a manifest is not a checkpoint, so a partial write is
never loaded, on a disk and in an object store alike.
"""

import hashlib
import json
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trainer.config.schema import default_values
from trainer.data.random_streams import LATEST_VERSION
from trainer.data.storage.location import local_path
from trainer.data.storage.store import is_remote, open_store
from trainer.distributed.collectives import broadcast_from_rank0, broadcast_tensors_from_rank0
from trainer.engine.deepspeed.optimizer_state import TrainingState
from trainer.errors import RetryableError, UserError
from trainer.faults.disk_space import file_system, mib
from trainer.locks.run_lock import LockLost

MANIFEST = "checkpoint.json"
_FORMAT = 2
_MODEL, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_MAX_LISTED_KEYS = 5
"""Number of differing recipe keys that an error lists."""


class CorruptCheckpoint(Exception):
    """Raised for a corrupt checkpoint; the message says what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A training state and the metadata of its run.

    ``config_fingerprint`` holds the recipe keys that shape the training; a resumed run must have
    the same values. ``result`` holds the metrics of the run so far. ``run_id`` is the run's ID in
    MLflow. ``run_key`` names the run in its tracker's spool. ``streams_version`` is the version of
    the random streams that augment its samples; a resumed run continues with it.
    """

    state: TrainingState
    config_fingerprint: dict[str, Any]
    result: dict[str, Any]
    run_id: str | None
    run_key: str | None = None
    streams_version: int = LATEST_VERSION


def resume_or_start(
    url: str,
    keep: int,
    resume: bool,
    fingerprint: Mapping[str, Any],
    device: torch.device,
    check_lock: Callable[[], None] = lambda: None,
) -> tuple["CheckpointManager | None", Checkpoint | None, list[str]]:
    """Open the checkpoint URL and, if ``resume``, load the newest valid checkpoint.

    Returns the checkpoint manager (rank 0 only, None on other ranks), the checkpoint on every rank
    (None to start from scratch), and messages to print.

    All ranks must take part. Raises UserError on every rank, reported by rank 0, if the URL is not
    writable or the checkpoint belongs to a different recipe.
    """
    manager = loaded = None

    def load_newest() -> tuple[Checkpoint | None, list[str]]:
        nonlocal manager, loaded
        manager = CheckpointManager(url, keep, check_lock)
        if not resume:
            # existing checkpoints are deleted later, by ``clear``, when no check can fail any more
            return None, []
        messages: list[str] = []
        loaded = manager.load_latest(fingerprint, messages.append)
        if loaded is None:
            return None, messages
        messages.append(f"resuming from {url}/{_folder(loaded.state.step)}")
        return replace(loaded, state=replace(loaded.state, model={}, slots={})), messages

    found, messages = broadcast_from_rank0(load_newest)
    if found is not None:
        state = loaded.state if loaded is not None else None
        model = broadcast_tensors_from_rank0(state.model if state else None, device)
        slots = broadcast_tensors_from_rank0(state.slots if state else None, device)
        found = replace(found, state=replace(found.state, model=model, slots=slots))
    return manager, found, messages


class CheckpointManager:
    """Manager of the checkpoints of one run below one URL, for rank 0 only.

    ``check_lock`` is called before each change and raises LockLost if another run may write there.
    """

    def __init__(self, url: str, keep: int, check_lock: Callable[[], None] = lambda: None) -> None:
        self._check_lock = check_lock
        self._store = open_store(url, create=True)
        self._keep = keep
        self.failures = self.failures_in_a_row = 0
        """Checkpoints that could not be written: in total, and since the last successful write."""
        self.newest: tuple[int, str] | None = None
        """Step and URL of the newest valid checkpoint."""
        self._writer: threading.Thread | None = None
        self._top1: dict[int, float] = {}
        """Top-1 accuracy by step, for checkpoints that contain it."""

    def load_latest(
        self, fingerprint: Mapping[str, Any], report: Callable[[str], None]
    ) -> Checkpoint | None:
        """Return the newest valid checkpoint, or None if there is none.

        Corrupt or modified checkpoints are skipped and passed to ``report``. Raises UserError if
        the checkpoint belongs to a different recipe or needs a newer version of Convoy,
        RetryableError if the store cannot be read.
        """
        found = None
        for step in sorted(self._steps(), reverse=True):
            try:
                manifest = self._manifest(step)
                self._record_top1(step, manifest)
                found = found or self._read(step, manifest)
            except CorruptCheckpoint as error:
                report(f"skipping checkpoint {self._name(step)}: {error}")
        if found is not None:
            self.newest = found.state.step, self._name(found.state.step)
            _check_streams_version(self._name(found.state.step), found.streams_version)
            _check_fingerprint(self._name(found.state.step), found.config_fingerprint, fingerprint)
        return found

    def clear(self) -> None:
        """Delete every checkpoint."""
        self.newest = None
        for step in self._steps():
            self._delete(step)

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy the checkpoint and write it from a background thread.

        Waits for the previous write first. A failed write is reported on stderr and leaves the
        existing checkpoints in place.
        """
        self.wait()
        state = checkpoint.state
        model, slots = _copy_to_cpu(state.model), _copy_to_cpu(state.slots)
        self._writer = threading.Thread(
            target=self._write, args=(checkpoint, model, slots), name="checkpoint"
        )
        self._writer.start()

    def wait(self) -> None:
        """Wait until the last write has finished or failed."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None

    def _write(
        self, checkpoint: Checkpoint, model: dict[str, Tensor], slots: dict[str, Tensor]
    ) -> None:
        state, step = checkpoint.state, checkpoint.state.step
        try:
            files = {}
            for name, tensors in ((_MODEL, model), (_OPTIMIZER, slots)):
                content = save(tensors)
                files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                self._check_lock()
                self._store.write(f"{_folder(step)}/{name}", content)
            manifest = {
                "format": _FORMAT,
                "step": step,
                "updates": state.updates,
                "scaler": state.scaler,
                "result": checkpoint.result,
                "mlflow_run_id": checkpoint.run_id,
                "run_key": checkpoint.run_key,
                "random_streams": checkpoint.streams_version,
                "config_fingerprint": checkpoint.config_fingerprint,
                "files": files,
            }
            self._check_lock()
            self._store.write(
                f"{_folder(step)}/{MANIFEST}", (json.dumps(manifest, indent=1) + "\n").encode()
            )
            self.failures_in_a_row = 0
            self.newest = step, self._name(step)
            self._record_top1(step, manifest)
            self._prune(step)
        except LockLost:
            return  # the training loop ends with the same error
        except (UserError, RetryableError, OSError) as error:
            self.failures += 1
            self.failures_in_a_row += 1
            print(
                f"convoy: the checkpoint of step {step} could not be written, training continues: "
                f"{error}{self._space(model, slots)}",
                file=sys.stderr,
                flush=True,
            )
            self._discard(step)

    def _prune(self, newest: int) -> None:
        """Delete old checkpoints except the last ``keep`` and the best by top-1 accuracy.

        Partial checkpoints are deleted as well.
        """
        steps = sorted((step for step in self._steps() if step <= newest), reverse=True)
        kept = set(steps[: self._keep])
        if self._top1:
            kept.add(max(self._top1, key=lambda step: (self._top1[step], step)))
        for step in set(self._folders()) - kept:
            if step < newest:
                self._discard(step)

    def _space(self, *tensors: Mapping[str, Tensor]) -> str:
        """Return needed and free space of a local disk, for the message of a failed write."""
        if is_remote(self._store.url):
            return ""
        needed = sum(value.nbytes for part in tensors for value in part.values())
        free = file_system(local_path(self._store.url)).free_bytes
        return "" if free is None else f" ({mib(needed)} needed, {mib(free)} free)"

    def _discard(self, step: int) -> None:
        # a leftover is a partial checkpoint, or one more than needed
        with suppress(UserError, RetryableError, OSError):
            self._delete(step)

    def _delete(self, step: int) -> None:
        self._check_lock()
        self._top1.pop(step, None)
        self._store.delete([f"{_folder(step)}/{name}" for name in (MANIFEST, _MODEL, _OPTIMIZER)])
        self._store.remove_empty_folder(_folder(step))

    def _folders(self) -> dict[int, set[str]]:
        """Return the file names in each step's folder."""
        folders: dict[int, set[str]] = {}
        for name in self._store.sizes():
            folder, _, file = name.partition("/")
            number = folder.removeprefix("step-")
            if file and folder != number and number.isdigit():
                folders.setdefault(int(number), set()).add(file)
        return folders

    def _steps(self) -> list[int]:
        return [step for step, files in self._folders().items() if MANIFEST in files]

    def _name(self, step: int) -> str:
        return f"{self._store.url}/{_folder(step)}"

    def _record_top1(self, step: int, manifest: Mapping[str, Any]) -> None:
        result = manifest["result"]
        if result.get("top1") is not None and result.get("evaluated_step") == step:
            self._top1[step] = result["top1"]

    def _manifest(self, step: int) -> dict[str, Any]:
        content = self._store.read_small(f"{_folder(step)}/{MANIFEST}") or b""
        try:
            manifest = json.loads(content)
            if manifest["format"] not in (1, _FORMAT) or manifest["step"] != step:
                raise CorruptCheckpoint(
                    f"{MANIFEST} has format {manifest['format']} and step {manifest['step']}"
                )
            if manifest["format"] == 1:  # written before version 0.2
                manifest["config_fingerprint"] = manifest.pop("course")
            manifest["random_streams"] = int(manifest.get("random_streams", 1))
            if not {
                "updates",
                "scaler",
                "result",
                "mlflow_run_id",
                "config_fingerprint",
                "files",
            } <= set(manifest):
                raise CorruptCheckpoint(f"keys are missing in {MANIFEST}")
        except (ValueError, KeyError, TypeError):
            raise CorruptCheckpoint(f"{MANIFEST} cannot be read") from None
        else:
            return dict(manifest)

    def _read(self, step: int, manifest: Mapping[str, Any]) -> Checkpoint:
        tensors = []
        for name in (_MODEL, _OPTIMIZER):
            content, expected = (
                self._store.read_small(f"{_folder(step)}/{name}"),
                manifest["files"].get(name, {}),
            )
            if content is None:
                raise CorruptCheckpoint(f"{name} is missing")
            if len(content) != expected.get("bytes"):
                raise CorruptCheckpoint(
                    f"{name} has {len(content):,} bytes instead of {expected.get('bytes'):,}"
                )
            if hashlib.sha256(content).hexdigest() != expected.get("sha256"):
                raise CorruptCheckpoint(f"the SHA-256 of {name} differs from that in {MANIFEST}")
            try:
                tensors.append(load(content))
            except SafetensorError as error:
                raise CorruptCheckpoint(f"{name}: {error}") from None
        model, slots = tensors
        state = TrainingState(model, slots, step, manifest["updates"], manifest["scaler"])
        return Checkpoint(
            state,
            manifest["config_fingerprint"],
            manifest["result"],
            manifest["mlflow_run_id"],
            manifest.get("run_key"),
            manifest["random_streams"],
        )


def _folder(step: int) -> str:
    return f"step-{step:09d}"


def _copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU, which further training does not modify."""
    plain = torch.contiguous_format
    return {
        name: torch.empty_like(value, device="cpu", memory_format=plain).copy_(value)
        for name, value in tensors.items()
    }


def _check_streams_version(name: str, version: int) -> None:
    """Raise UserError if the version of the random streams is newer than the known ones."""
    if version > LATEST_VERSION:
        raise UserError(
            f"checkpoint {name} uses version {version} of the random streams, but this version of "
            f"Convoy supports versions up to {LATEST_VERSION}; use a newer version of Convoy, "
            "another checkpoint.url, or checkpoint.resume=never"
        )


def _check_fingerprint(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise UserError that lists the recipe keys that differ.

    A key that one of them lacks has its default there: the checkpoint may be older than the key.
    """
    known = default_values()
    defaults = {key: known.get(key) for key in [*theirs, *ours]}
    theirs, ours = {**defaults, **theirs}, {**defaults, **ours}
    differing = [key for key in defaults if theirs[key] != ours[key]]
    if differing:
        listed = [
            f"{key} is {theirs[key]!r} in the checkpoint and {ours[key]!r} in the recipe"
            for key in differing[:_MAX_LISTED_KEYS]
        ]
        if (more := len(differing) - _MAX_LISTED_KEYS) > 0:
            listed.append(f"and {more} more keys")
        raise UserError(
            f"checkpoint {name} belongs to a different recipe: {', '.join(listed)}; use another "
            "checkpoint.url, or set checkpoint.resume=never to start over"
        )
