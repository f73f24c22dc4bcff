"""``python -m trainer RECIPE key=value ...``: one rank of a run. The only file that wires the parts together."""

import copy
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.checkpoint import Checkpoint, begin
from trainer.console import TrainingProgress
from trainer.data.cache import cached
from trainer.data.decode import decoder_in_use
from trainer.data.index import check_digests
from trainer.data.loader import eval_loader, room_wanted, train_loader
from trainer.data.stages import Allocate
from trainer.engine import parallel
from trainer.engine.base import Engine, pinned
from trainer.engine.data_parallel import DataParallel
from trainer.engine.loop import Job, Result, fit
from trainer.engine.parallel import Ranks, StopRequest, is_lost_peer, ranks_from_environment
from trainer.engine.pipeline_parallel import PipelineParallel, check_stages, layer_costs, split
from trainer.engine.schedule import learning_rate_schedule
from trainer.engine.state import TrainingState
from trainer.errors import FoundByAll, ServiceLost, Terminated, UserError, report
from trainer.export import ModelFacts, save_model
from trainer.records import KeyLog, finish, start_tracking
from trainer.resolve import Resolved, resolve, tracking_uri
from trainer.tracking import Tracker
from trainer.watchdog import Watchdog
from trainer.weights import load_weights


def main(arguments: list[str]) -> int:
    """Run one rank; returns its exit code."""
    ranks = ranks_from_environment()
    signal.signal(signal.SIGTERM, _TERMINATION)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_follow, args=(os.getppid(),), name="launcher", daemon=True).start()
    try:
        if not arguments or arguments[0].startswith("-"):
            raise UserError("usage: python -m trainer RECIPE [key=value ...]")
        run = resolve(arguments[0], arguments[1:], ranks.world_size, check_storage=ranks.is_first)
        network = build_network(run)
    except (Exception, Terminated) as error:
        return report(error, "convoy", quiet=not ranks.is_first)  # every rank finds the same
    try:
        if run.config.data.check == "sha256":
            check_bytes(run, ranks)
        train(run, network, arguments[0], ranks)
    except KeyboardInterrupt:
        return 130
    except (Exception, Terminated) as error:
        if is_lost_peer(error):
            error = ServiceLost(f"another rank is gone ({str(error).splitlines()[0][:120]})")
        program = "convoy" if ranks.world_size == 1 else f"convoy: rank {ranks.rank}"
        return report(error, program, quiet=isinstance(error, FoundByAll) and not ranks.is_first)
    finally:
        parallel.leave()  # its threads would abort a process that ends around them
    return 0


class _Termination:
    """SIGTERM ends the run as an error does, MLflow told; while ``request`` is set, in order: after a checkpoint.

    A second one does not disturb that.
    """

    request: StopRequest | None = None

    def __call__(self, number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self.request is None:
            raise Terminated
        self.request.told = True


_TERMINATION = _Termination()


def _follow(launcher: int) -> None:
    """End in order where the launcher was killed, which can then tell nobody."""
    while os.getppid() == launcher:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


def check_bytes(run: Resolved, ranks: Ranks) -> None:
    """Compare this rank's share of all shards with the indexes. Raises UserError."""
    for index, store in ((run.train, run.train_store), (run.val, run.val_store)):
        if index is not None and store is not None:
            check_digests(index, store, range(ranks.rank, len(index.shards), ranks.world_size))


@dataclass(frozen=True)
class Network:
    """A network with its first weights. ``notes``: what is to be said of it, a line each. ``parts``: the names of each stage's
    layers."""

    model: nn.Sequential
    facts: ModelFacts
    notes: list[str]
    parts: list[list[str]]


def build_network(run: Resolved) -> Network:
    """The same on every rank: initial weights by ``train.seed``, or those of ``model.init``. Raises UserError."""
    config = run.config
    facts = ModelFacts.of(config, run.train.classes, run.num_classes)
    torch.manual_seed(config.train.seed)
    model = facts.build()
    notes = load_weights(model, config.model.name, config.model.init).notes if config.model.init else []
    stages = config.parallel.pipeline_stages
    parts = split(layer_costs(model, config.data.image_size), stages, config.parallel.split) if stages > 1 else []
    check_stages(model, parts, config.parallel.split)
    notes += [f"stage {number}: {names[0]} to {names[-1]}" for number, names in enumerate(parts)]
    return Network(model, facts, notes, parts)


def train(run: Resolved, network: Network, recipe: str, ranks: Ranks) -> None:
    """Wire, go on from the newest checkpoint, fit, save, register. All ranks take part."""
    config = run.config
    device = parallel.join(ranks, fp16=config.precision == "fp16")
    kept, course = config.checkpoint, run.course
    url = kept.url or str(config.output_dir / "checkpoints")
    checkpoints, found, notes = begin(url, kept.keep, kept.resume == "auto", course, device)
    if found is not None:
        network.model.load_state_dict(found.state.model)
    whole = copy.deepcopy(network.model).to(device)
    if config.train.channels_last:
        whole = whole.to(memory_format=torch.channels_last)
    engine = build_engine(run, network, device)
    if found is not None:
        engine.restore(found.state)
    tracker, system = start_tracking(run, recipe, ranks, found)
    progress = TrainingProgress(run.stop_step, quiet=not ranks.is_first)
    decoder = f"JPEGs are decoded by {decoder_in_use()}"
    room = room_wanted(config, run.train, run.batch.ranks)
    for note in (_headline(run, tracker), *network.notes, decoder, *([room] if room else []), *notes):
        progress.note(note)
    stop = _TERMINATION.request = StopRequest()

    def save(state: TrainingState, figures: dict[str, Any]) -> None:
        if checkpoints is not None:
            checkpoints.save(Checkpoint(state, course, figures, tracker.run_id))

    watchdog = Watchdog(config.train.hang_minutes, ranks.rank)
    job = make_job(run, ranks, device, whole, save, stop, watchdog.alive)
    status = "FAILED"
    try:
        result = fit(job, engine, tracker, progress, Result(**found.result) if found else Result())
        _TERMINATION.request = None
        if ranks.is_first:
            save_model(config.output_dir, whole, network.facts)
            status = "FINISHED"
    except Terminated:
        status = "KILLED"
        raise
    finally:
        watchdog.close()
        progress.close()
        if checkpoints is not None:
            checkpoints.wait()
        if system is not None:
            system.close()
        delivered = tracker.close(status)
        parallel.leave()
    if ranks.is_first:
        finish(run, result, tracker, delivered)


def build_engine(run: Resolved, network: Network, device: torch.device) -> Engine:
    """The network spread over the ranks as the recipe says. All ranks take part."""
    if run.config.parallel.pipeline_stages > 1:
        return PipelineParallel(network.model, run.config, run.batch, device, network.parts)
    return DataParallel(network.model, run.config, run.batch, device)


def make_job(
    run: Resolved,
    ranks: Ranks,
    device: torch.device,
    whole: nn.Module,
    save: Callable[[TrainingState, dict[str, Any]], None],
    stop: StopRequest,
    alive: Callable[[], None] = lambda: None,
) -> Job:
    """What the loop is to do on this rank."""
    config, val, data = run.config, run.val, run.config.data
    world, rank = ranks.world_size, ranks.rank
    train_source = cached(run.train_store, run.train, data.cache_dir, data.cache_gb)
    val_source = cached(run.val_store, val, data.cache_dir, data.cache_gb) if val and run.val_store else None
    copies, steps = run.batch.ranks, run.batch.accumulation_steps
    skips = data.bad_samples == "skip"
    labels_only = rank >= copies and not skips  # a pipeline's last stage; it must know which samples are bad
    allocate: Allocate = pinned if device.type == "cuda" else np.empty
    return Job(
        batch=run.batch,
        steps_per_epoch=run.steps_per_epoch,
        stop_step=run.stop_step,
        log_every_steps=config.train.log_every_steps,
        max_skipped_steps=config.train.max_skipped_steps,
        learning_rate=learning_rate_schedule(
            config.schedule, config.optimizer, run.batch.global_size, run.steps_per_epoch, run.total_steps
        ),
        train_batches=lambda epoch, start: train_loader(
            config, run.train, train_source, epoch, copies, rank % copies, steps, start, labels_only, allocate
        ),
        eval_batches=(lambda: eval_loader(config, val, val_source, world, rank, allocate)) if val and val_source else None,
        mean=data.mean,
        std=data.std,
        device=device,
        model=whole,
        save_every_steps=config.checkpoint.every_steps,
        save=save,
        stop=stop,
        alive=alive,
        max_bad_samples=data.max_bad_samples if skips else None,
        took=KeyLog(config.output_dir / "samples", run, rank).write if data.log_keys else None,
    )


def _headline(run: Resolved, tracker: Tracker) -> str:
    batch = run.batch
    where = f", MLflow run {tracker.run_id} at {_public(tracking_uri(run.config))}" if tracker.run_id else ""
    stages = run.config.parallel.pipeline_stages
    ranks = f"{batch.ranks} ranks" if stages == 1 else f"{batch.ranks} copies of {stages} stages"
    return (
        f"{run.config.name}: {run.config.model.name} on {run.train.samples:,} images, {run.stop_step:,} steps of "
        f"{batch.global_size} = {ranks} x {batch.accumulation_steps} accumulation steps x {batch.micro_size}{where}"
    )


def _public(uri: str | None) -> str:
    """Without the name and the password that an address may hold."""
    return re.sub(r"//[^/@]*@", "//", uri or "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
