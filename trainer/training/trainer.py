"""The training loop. It is given data, an engine and a tracker, and knows nothing of where they come from."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trainer.data.batch import Batch
from trainer.distributed.collectives import all_gather_list, all_reduce_mean
from trainer.engine.deepspeed.optimizer_state import TrainingState
from trainer.engine.engine import Engine, StepOutput
from trainer.errors import CollectiveUserError, Diverged, Preempted
from trainer.process.console import TrainingProgress
from trainer.tracking import Tracker
from trainer.training.batch_plan import BatchPlan
from trainer.training.evaluator import evaluate
from trainer.training.metrics import MetricsMeter, TrainState
from trainer.training.preemption import PreemptionSignal


@dataclass(frozen=True)
class Job:
    """What a run does. ``train_batches(epoch, step)`` yields the micro-batches of an epoch from its ``step`` on."""

    batch: BatchPlan
    steps_per_epoch: int
    stop_step: int
    log_every_steps: int
    learning_rate: Callable[[int], float]
    train_batches: Callable[[int, int], Iterator[Batch]]
    eval_batches: Callable[[], Iterator[Batch]] | None
    mean: list[float]
    std: list[float]
    device: torch.device
    model: torch.nn.Module
    """The whole network in fp32, for evaluation and export, whatever form it is trained in."""
    max_skipped_steps: int
    save_every_steps: int | None
    """Beside the end of each epoch."""
    save: Callable[[TrainingState, dict[str, Any]], None]
    """Keeps a checkpoint with the figures so far; returns while that is still being written."""
    stop: PreemptionSignal
    alive: Callable[[], None] = lambda: None
    """Is called after each step and each batch of evaluation."""
    max_bad_samples: int | None = None
    """How many samples that cannot be decoded are passed over, on all ranks; None: the first stops the run, where it is met."""
    took: Callable[[int, list[str]], None] | None = None
    """Is told after each step which samples' keys this rank took for it."""


def fit(job: Job, engine: Engine, tracker: Tracker, progress: TrainingProgress, result: TrainState) -> TrainState:
    """Train to ``stop_step`` from where ``result`` ends, evaluating after each epoch and at the end. All ranks take part.

    Raises Terminated, after a checkpoint, where any rank was told to stop.
    """
    meter = MetricsMeter()
    if result.steps and _ends_epoch(job, result.steps) and result.evaluated_step != result.steps:
        _end_epoch(job, engine, tracker, progress, result)  # the stop came between the epoch's end and its evaluation
    elif result.steps >= job.stop_step:
        progress.note("nothing is left to train; checkpoint.resume=never begins anew")
        _load_whole(job, engine)
    while result.steps < job.stop_step:
        epoch, first = divmod(result.steps, job.steps_per_epoch)
        batches = job.train_batches(epoch, first)
        try:
            _train_epoch(job, engine, tracker, progress, meter, result, batches)
        finally:
            batches.close()  # type: ignore[attr-defined]  # a generator; one that was not exhausted holds threads
        _end_epoch(job, engine, tracker, progress, result)
    return result


def _ends_epoch(job: Job, step: int) -> bool:
    return step % job.steps_per_epoch == 0 or step == job.stop_step


def _train_epoch(
    job: Job,
    engine: Engine,
    tracker: Tracker,
    progress: TrainingProgress,
    meter: MetricsMeter,
    result: TrainState,
    batches: Iterator[Batch],
) -> None:
    while True:
        started = time.perf_counter()
        job.stop.ask()
        outcome = engine.step(meter.timed(batches), job.learning_rate(result.steps))
        told = job.stop.agreed()
        job.alive()
        meter.seconds += time.perf_counter() - started
        meter.took(outcome)
        result.steps += 1
        result.skipped_steps += outcome.skipped
        if job.took is not None and outcome.keys:
            job.took(result.steps - 1, outcome.keys)
        _check_overflow(job, engine, meter, result.steps)
        ended = _ends_epoch(job, result.steps)
        saves = told or (job.save_every_steps is not None and result.steps % job.save_every_steps == 0 and not ended)
        if saves or ended or result.steps % job.log_every_steps == 0:
            _log(job, engine, tracker, progress, meter, result)
        if saves:
            _save(job, engine, result)
        if told:
            progress.note(f"told to stop: checkpoint of step {result.steps:,}")
            raise Preempted
        if ended:
            return


def _save(job: Job, engine: Engine, result: TrainState) -> None:
    job.save(engine.snapshot(), asdict(result))


def _load_whole(job: Job, engine: Engine) -> None:
    job.model.load_state_dict(engine.averaged_state() or engine.state())


def _end_epoch(job: Job, engine: Engine, tracker: Tracker, progress: TrainingProgress, result: TrainState) -> None:
    """Evaluate and keep a checkpoint."""
    _load_whole(job, engine)
    epoch = -(-result.steps // job.steps_per_epoch)
    if job.eval_batches is not None:
        bad: list[str] = []
        try:
            result.top1, result.top5, result.val_samples = evaluate(
                job.model, _noting(job.eval_batches(), bad), job.device, job.mean, job.std, job.stop, job.alive
            )
        except Preempted:
            _save(job, engine, result)  # the run that resumes from it evaluates first
            progress.note(f"told to stop: checkpoint of step {result.steps:,}, not evaluated")
            raise
        if job.max_bad_samples is not None:
            for line in all_gather_list(bad):
                progress.note(f"not evaluated: {line}")
        tracker.log_metrics({"top1": result.top1, "top5": result.top5, "epoch": epoch}, result.steps)
        progress.note(f"epoch {epoch}: top1 {result.top1:.4f}, top5 {result.top5:.4f} of {result.val_samples:,} images")
    result.evaluated_step = result.steps
    _save(job, engine, result)


def _noting(batches: Iterator[Batch], bad: list[str]) -> Iterator[Batch]:
    for batch in batches:
        bad += batch.bad
        yield batch


_ADVICE = "training diverged; lower optimizer.base_lr or lengthen schedule.warmup_epochs"


def _check_overflow(job: Job, engine: Engine, meter: MetricsMeter, step: int) -> None:
    if meter.skipped_in_a_row and engine.loss_scale() is None:
        raise Diverged(f"step {step}: its gradients are no numbers: {_ADVICE}; its samples: {_samples(meter.steps[-1])}")
    if meter.skipped_in_a_row >= job.max_skipped_steps:
        raise Diverged(
            f"step {step}: the gradients overflowed fp16 {meter.skipped_in_a_row} times in a row, at last at a loss scale of "
            f"{engine.loss_scale()}; lower optimizer.base_lr or use precision bf16; its samples: {_samples(meter.steps[-1])}"
        )


def _samples(step: StepOutput, most: int = 16) -> str:
    """The keys of a step's samples on all ranks, which take part."""
    keys = all_gather_list(step.keys)
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _log(job: Job, engine: Engine, tracker: Tracker, progress: TrainingProgress, meter: MetricsMeter, result: TrainState) -> None:
    """Read the losses of the last steps from the device (a synchronization), average them over ranks and log each."""
    losses = all_reduce_mean(torch.stack([taken.loss for taken in meter.steps])).tolist()
    step = result.steps
    first = step - len(losses) + 1
    values = meter.read(result)
    norm, scale = engine.grad_norm(), engine.loss_scale()
    values |= {"grad_norm": norm} if norm is not None else {}
    values |= {"loss_scale": scale, "skipped_steps": result.skipped_steps} if scale is not None else {}
    values |= _passed_over(job, meter, progress, result)
    for number, loss in enumerate(losses, start=first):
        # step 1 is the first update, so that a curve's last step is the number of updates made
        rates = values if number == step else {}
        tracker.log_metrics({"loss": loss, "learning_rate": job.learning_rate(number - 1), **rates}, number)
    for number, loss, taken in zip(range(first, step + 1), losses, meter.steps, strict=True):
        if not math.isfinite(loss) and not taken.skipped:  # an overflow that fp16 recovers from is no divergence
            raise Diverged(f"the loss of step {number} is {loss}: {_ADVICE}; its samples: {_samples(taken)}")
    meter.steps.clear()
    result.loss = float(losses[-1])
    progress.update(
        step,
        f"epoch {step / job.steps_per_epoch:.2f} loss {result.loss:.4f} lr {job.learning_rate(step - 1):.4g} "
        f"{values['images_per_second']:,.0f} images/s, waiting for data {values['data_wait_fraction']:.1%}",
    )


def _passed_over(job: Job, meter: MetricsMeter, progress: TrainingProgress, result: TrainState) -> dict[str, float]:
    """Tell the samples that could not be decoded since the last time, on any rank. Raises FoundByAll where they are too many."""
    if job.max_bad_samples is None:
        return {}
    for line in dict.fromkeys(all_gather_list(meter.bad)):
        progress.note(f"a bad sample counts for nothing: {line}")
        result.bad_samples += 1
    meter.bad.clear()
    if result.bad_samples > job.max_bad_samples:
        raise CollectiveUserError(
            f"data.max_bad_samples: {result.bad_samples} samples could not be decoded up to step {result.steps:,}, more than "
            f"{job.max_bad_samples}; `convoy verify` names them all"
        )
    return {"bad_samples": result.bad_samples}
