"""Runs one rank: ``python -m trainer RECIPE key=value ...``.

This is the only file that wires the components together.
"""

import copy
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from trainer.config.preflight import check_result_fits, check_run
from trainer.config.run_plan import RunPlan, build_run_plan, tracking_uri
from trainer.data.decode.decoder import decoder_in_use
from trainer.data.index import check_digests
from trainer.data.loader import prefetch_hint
from trainer.data.random_streams import LATEST_VERSION
from trainer.dependencies.process_patches import pillow_warnings_ignored
from trainer.distributed import process_group
from trainer.distributed.collectives import broadcast_from_rank0
from trainer.distributed.env import DistEnv
from trainer.distributed.process_group import describe_gpu
from trainer.engine.data_parallel import DataParallel
from trainer.engine.deepspeed.optimizer_state import TrainingState
from trainer.engine.engine import Engine
from trainer.engine.partition import assign_layers, layer_costs, validate_stage_boundaries
from trainer.engine.pipeline_parallel import PipelineParallel
from trainer.errors import EXIT_PREEMPTED, CollectiveUserError, Preempted, UserError, report
from trainer.export.exported_model import ModelMetadata, save_model
from trainer.faults.hardware_errors import (
    HardwareFault,
    LostPeer,
    check_gpus,
    classify_fault,
    describe_place,
    memory_advice,
)
from trainer.faults.node_fault_log import record_fault
from trainer.locks.run_lock import RunLocks
from trainer.process.console import TrainingProgress
from trainer.process.launch_environment import LAUNCHER_PID, become_only_rank
from trainer.process.proxies import bypass_proxies_for_local_services
from trainer.process.standard_streams import secure_standard_streams
from trainer.process.stop_signals import StopSignals
from trainer.process.supervisor import STOP_SECONDS, report_finished
from trainer.progress.progress_publisher import ProgressPublisher
from trainer.secrets.credentials import take_credentials
from trainer.secrets.redaction import redact_credentials
from trainer.tracking import SystemMetrics, Tracker
from trainer.tracking.run_record import SampleKeyLogger, finalize_run, start_tracking
from trainer.tracking.run_status import UnfinishedRun
from trainer.training.checkpoint import Checkpoint, resume_or_start
from trainer.training.metrics.meter import TrainState
from trainer.training.preemption import PreemptionSignal
from trainer.training.trainer import Trainer
from trainer.training.watchdog import Watchdog
from trainer.weights.pretrained import load_weights


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one rank and end the process with its exit code.

    ``arguments`` default to those of the command line.
    """
    secure_standard_streams()
    bypass_proxies_for_local_services(os.environ)
    _STOP.install()
    with pillow_warnings_ignored():
        code = _run(sys.argv[1:] if arguments is None else arguments)
    _STOP.ignore()
    if code == 0:
        report_finished()
    _exit_without_finalization(code)


def _exit_without_finalization(code: int) -> NoReturn:
    """End the process without finalizing the interpreter.

    A gloo thread that releases a tensor while the interpreter is being finalized aborts the
    process: it needs the interpreter's lock, and Python ends a thread that asks for it.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or nothing reads it
            stream.flush()
    os._exit(code)


def _run(arguments: list[str]) -> int:
    ranks = DistEnv(0, 1, 0)
    try:
        _follow_launcher()
        ranks = DistEnv.from_env()
        if ranks.world_size == 1 and not _has_launcher():
            become_only_rank()
        if not arguments or arguments[0].startswith("-"):
            raise UserError("usage: python -m trainer RECIPE [key=value ...]")
        procs = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        check_gpus(torch.cuda.device_count(), procs)
        check_storage = ranks.is_rank_zero and not _has_launcher()
        run = build_run_plan(
            arguments[0], take_credentials(arguments[1:]), ranks.world_size, check_storage
        )
        messages = check_run(run, procs) if ranks.is_rank_zero else []
        built = build_network(run)
    except (Exception, Preempted) as error:
        # every rank finds the same error
        return report(
            classify_fault(error, describe_place()), "convoy", quiet=not ranks.is_rank_zero
        )
    locks = RunLocks()
    publisher = ProgressPublisher(run.config.name, run.stop_step, quiet=not ranks.is_rank_zero)
    try:
        if run.config.data.check == "sha256":
            check_bytes(run, ranks)
        train(run, built, arguments[0], ranks, locks, publisher, messages)
        publisher.end(0)
    except (Exception, Preempted) as error:
        found = classify_rank_error(error, run, ranks)
        if _STOP.received is not None and isinstance(found, Preempted | LostPeer):
            # a peer that was stopped before all ranks agreed on a step is not a failure
            found = Preempted(_STOP.received)
        program = "convoy" if ranks.world_size == 1 else f"convoy: rank {ranks.rank}"
        code = report(
            found, program, quiet=isinstance(found, CollectiveUserError) and not ranks.is_rank_zero
        )
        publisher.end(code, found)
        return code
    finally:
        _STOP.ignore()  # the outcome is decided
        locks.release()
        process_group.cleanup()
    return 0


def classify_rank_error(error: BaseException, run: RunPlan, ranks: DistEnv) -> BaseException:
    """Return the error to report for ``error``.

    A hardware fault is recorded next to the run's checkpoints.
    """
    place = describe_place(describe_gpu(ranks))
    found = classify_fault(error, place, memory_advice(run.config, run.batch.micro_size))
    if isinstance(found, HardwareFault):
        advice = record_fault(run.config.checkpoint_url, ranks.rank, found.fault)
        if advice:
            return HardwareFault(place, f"{found.fault}; {advice}")
    return found


_STOP = StopSignals()


def _has_launcher() -> bool:
    return LAUNCHER_PID in os.environ


def _follow_launcher() -> None:
    """Stop this rank if the launcher or torchrun is killed before it can end the rank.

    Raises Preempted if it is already gone.
    """
    launcher = int(os.environ.get(LAUNCHER_PID) or os.getppid())
    if _has_launcher() and os.getppid() != launcher:
        raise Preempted
    if _has_launcher() or "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(
            target=_exit_with_parent, args=(launcher,), name="launcher", daemon=True
        ).start()


def _exit_with_parent(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os._exit(EXIT_PREEMPTED)  # nothing else would end a rank that hangs


def check_bytes(run: RunPlan, ranks: DistEnv) -> None:
    """Verify this rank's share of all shards against the indexes. Raises UserError."""
    for index, store in ((run.train, run.train_store), (run.val, run.val_store)):
        if index is not None and store is not None:
            check_digests(index, store, range(ranks.rank, len(index.shards), ranks.world_size))


@dataclass(frozen=True)
class BuiltModel:
    """A model with its initial weights.

    ``messages`` are lines to print. ``stage_layers`` holds the layer names of each pipeline stage.
    """

    model: nn.Sequential
    metadata: ModelMetadata
    messages: list[str]
    stage_layers: list[list[str]]


def build_network(run: RunPlan) -> BuiltModel:
    """Build the model, with the same initial weights on every rank.

    The weights are random with seed ``train.seed``, or those of ``model.init``. Raises UserError.
    """
    config = run.config
    metadata = ModelMetadata.of(config, run.train.classes, run.num_classes)
    torch.manual_seed(config.train.seed)
    model = metadata.build()
    init, messages = config.model.init, []
    if init:
        messages = load_weights(model, config.model.name, init, data=run.train).notes
    stages = config.parallel.pipeline_stages
    stage_layers = (
        assign_layers(layer_costs(model, config.data.image_size), stages, config.parallel.split)
        if stages > 1
        else []
    )
    validate_stage_boundaries(model, stage_layers, config.parallel.split)
    messages += [
        f"stage {number}: {names[0]} to {names[-1]}" for number, names in enumerate(stage_layers)
    ]
    return BuiltModel(model, metadata, messages, stage_layers)


def train(
    run: RunPlan,
    built: BuiltModel,
    recipe: str,
    ranks: DistEnv,
    locks: RunLocks,
    publisher: ProgressPublisher,
    checked: Sequence[str] = (),
) -> None:
    """Join the other ranks, lock the run's output folder and checkpoints, and train.

    ``locks`` make this run the only writer; the caller releases them. All ranks must take part.
    ``checked`` holds the messages of earlier checks.
    """
    device = process_group.init_distributed(ranks, fp16=run.config.precision == "fp16")
    broadcast_from_rank0(
        lambda: locks.acquire(
            str(run.config.output_dir),
            run.config.checkpoint_url,
            run.config.name,
            publisher.waiting,
        )
    )
    _train(run, built, recipe, ranks, device, locks, publisher, checked)


def _train(
    run: RunPlan,
    built: BuiltModel,
    recipe: str,
    ranks: DistEnv,
    device: torch.device,
    locks: RunLocks,
    publisher: ProgressPublisher,
    checked: Sequence[str],
) -> None:
    """Build the components, resume from the newest checkpoint, train, save and register the model.

    All ranks must take part.
    """
    config = run.config
    fingerprint, resume = run.config_fingerprint, config.checkpoint.resume == "auto"
    checkpoints, found, resume_messages = resume_or_start(
        config.checkpoint_url, config.checkpoint.keep, resume, fingerprint, device, locks.check
    )
    streams_version = found.streams_version if found is not None else LATEST_VERSION
    if found is not None:
        built.model.load_state_dict(found.state.model)
    eval_model = copy.deepcopy(built.model).to(device)
    if config.train.channels_last:
        eval_model = eval_model.to(memory_format=torch.channels_last)
    engine = build_engine(run, built, device)
    if found is not None:
        engine.restore(found.state)
    preemption = PreemptionSignal()
    # from here on there is state to save and an MLflow run to end
    _STOP.defer(preemption.receive)
    unfinished = UnfinishedRun(ranks.is_rank_zero)
    started: list[tuple[Tracker, SystemMetrics | None]] = []
    # all ranks end if tracking is refused
    broadcast_from_rank0(
        lambda: started.append(start_tracking(run, recipe, ranks, found, locks.check_output))
    )
    tracker, system = (
        started[0] if ranks.is_rank_zero else start_tracking(run, recipe, ranks, found)
    )
    unfinished.set_run_id(tracker.run_id)
    publisher.open_file(config.output_dir, locks.check_output)
    publisher.update(
        phase="starting",
        message=None,
        step=found.state.step if found else 0,
        mlflow_run_id=tracker.run_id,
        mlflow_tracking_uri=tracking_uri(config),
    )
    progress = TrainingProgress(run.stop_step, quiet=not ranks.is_rank_zero)
    decoder = f"JPEGs are decoded by {decoder_in_use()}"
    memory_hint = prefetch_hint(config, run.train, run.batch.ranks)
    for message in (
        _headline(run, tracker),
        *built.messages,
        decoder,
        *([memory_hint] if memory_hint else []),
        *checked,
        *resume_messages,
        f"augmentations use version {streams_version} of the random streams",
    ):
        progress.note(message)

    def save(state: TrainingState, metrics: dict[str, Any]) -> None:
        if checkpoints is not None:
            check_result_fits(run, eval_model, checkpoints.failures_in_a_row)
            checkpoints.save(
                Checkpoint(
                    state,
                    fingerprint,
                    metrics,
                    tracker.run_id,
                    tracker.run_key,
                    streams_version,
                )
            )

    watchdog = Watchdog(config.train.hang_minutes, ranks.rank)
    keys = (
        SampleKeyLogger(config.output_dir / "samples", run, ranks.rank)
        if config.data.log_keys
        else None
    )

    def publish() -> None:
        step, url = checkpoints.newest if checkpoints and checkpoints.newest else (None, None)
        publisher.update(mlflow_run_id=tracker.run_id, checkpoint_step=step, checkpoint_url=url)

    def heartbeat() -> None:
        locks.check()
        watchdog.heartbeat()
        unfinished.set_run_id(tracker.run_id)
        publish()

    status, result = "FAILED", TrainState(**found.result) if found else TrainState()
    trainer = Trainer(
        run,
        ranks,
        device,
        engine,
        eval_model,
        result,
        tracker,
        progress,
        publisher,
        preemption,
        save,
        heartbeat,
        streams_version,
        on_samples_consumed=keys.write if keys else None,
    )
    try:
        if not resume:
            broadcast_from_rank0(lambda: checkpoints.clear() if checkpoints is not None else None)
        trainer.fit()
        if ranks.is_rank_zero:
            locks.check()
            save_model(config.output_dir, eval_model, built.metadata)
            status = "FINISHED"
    except BaseException:
        status = (
            "FAILED"
            if _STOP.received is None and not isinstance(sys.exception(), Preempted)
            else "KILLED"
        )
        raise
    finally:
        watchdog.close()
        progress.close()
        if keys is not None:
            keys.close()
        if checkpoints is not None:
            checkpoints.wait()
            if checkpoints.failures:
                tracker.log_metrics({"failed_checkpoints": checkpoints.failures}, result.steps)
        publish()
        publisher.update(step=result.steps, epoch=result.steps / run.steps_per_epoch)
        if system is not None:
            system.close()
        tracker.close(status)
        unfinished.clear()
        process_group.cleanup()
    _STOP.resume()
    if ranks.is_rank_zero:
        locks.check()
        finalize_run(run, result, tracker, checkpoints.failures if checkpoints else 0)


def build_engine(run: RunPlan, built: BuiltModel, device: torch.device) -> Engine:
    """Distribute the model over the ranks as the recipe says. All ranks must take part."""
    if run.config.parallel.pipeline_stages > 1:
        return PipelineParallel(built.model, run.config, run.batch, device, built.stage_layers)
    return DataParallel(built.model, run.config, run.batch, device)


def _headline(run: RunPlan, tracker: Tracker) -> str:
    batch = run.batch
    mlflow = (
        f", MLflow run {tracker.run_id} at {redact_credentials(tracking_uri(run.config) or '')}"
        if tracker.run_id
        else ""
    )
    stages = run.config.parallel.pipeline_stages
    ranks = f"{batch.ranks} ranks" if stages == 1 else f"{batch.ranks} replicas of {stages} stages"
    return (
        f"{run.config.name}: {run.config.model.name} on {run.train.samples:,} images, "
        f"{run.stop_step:,} steps of "
        f"{batch.global_size} = {ranks} x {batch.accumulation_steps} accumulation steps x "
        f"{batch.micro_size}{mlflow}"
    )


if __name__ == "__main__":
    main()
