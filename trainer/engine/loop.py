"""The training loop. It is given data, an engine and a tracker, and knows nothing of where they come from."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.console import TrainingProgress
from trainer.data.loader import Batch
from trainer.engine.batch import BatchPlan
from trainer.engine.objective import count_correct, weighted_loss
from trainer.engine.parallel import average_batch_norm, summed
from trainer.errors import Diverged
from trainer.models.layers import normalize
from trainer.tracking import Tracker


@dataclass(frozen=True)
class Job:
    """What a run does. ``train_batches(epoch)`` yields ``steps_per_epoch x accumulation_steps`` micro-batches."""

    batch: BatchPlan
    steps_per_epoch: int
    stop_step: int
    log_every_steps: int
    learning_rate: Callable[[int], float]
    train_batches: Callable[[int], Iterator[Batch]]
    eval_batches: Callable[[], Iterator[Batch]] | None
    mean: list[float]
    std: list[float]
    device: torch.device


@dataclass
class Result:
    """Figures of a finished run. ``top1`` and ``top5`` are fractions of the validation split, None without one."""

    steps: int = 0
    loss: float = math.nan
    top1: float | None = None
    top5: float | None = None
    images_per_second: float = 0.0
    data_wait_fraction: float = 0.0
    train_seconds: float = 0.0
    val_samples: int = 0


@dataclass
class _Meter:
    """Time and images since the last reading, and over the run; evaluation does not count."""

    images: int = 0
    waited: float = 0.0
    seconds: float = 0.0
    total_images: int = 0
    total_waited: float = 0.0
    total_seconds: float = 0.0
    losses: list[Tensor] = field(default_factory=list)

    def read(self) -> dict[str, float]:
        values = {
            "images_per_second": self.images / max(self.seconds, 1e-9),
            "data_wait_fraction": self.waited / max(self.seconds, 1e-9),
        }
        self.total_images += self.images
        self.total_waited += self.waited
        self.total_seconds += self.seconds
        self.images, self.waited, self.seconds = 0, 0.0, 0.0
        return values


def fit(job: Job, engine: Any, tracker: Tracker, progress: TrainingProgress) -> Result:
    """Train to ``stop_step``, evaluating after each epoch and at the end. All ranks take part."""
    result, meter = Result(), _Meter()
    step, epoch = 0, 0
    while step < job.stop_step:
        batches = job.train_batches(epoch)
        engine.train()
        stop = min(job.stop_step, (epoch + 1) * job.steps_per_epoch)
        while step < stop:
            started = time.perf_counter()
            images = _step(job, engine, batches, step, meter)
            meter.seconds += time.perf_counter() - started
            meter.images += images
            step += 1
            if step % job.log_every_steps == 0 or step == stop:
                result.loss = _log(job, tracker, progress, meter, step)
        batches.close()  # type: ignore[attr-defined]  # a generator; one that was not exhausted holds threads
        epoch += 1
        if job.eval_batches is not None:
            result.top1, result.top5, result.val_samples = evaluate(engine.module, job, job.eval_batches())
            tracker.log_metrics({"top1": result.top1, "top5": result.top5, "epoch": epoch}, step)
            progress.note(f"epoch {epoch}: top1 {result.top1:.4f}, top5 {result.top5:.4f} of {result.val_samples:,} images")
    average_batch_norm(engine.module)
    result.steps = step
    result.train_seconds = meter.total_seconds
    result.images_per_second = meter.total_images / max(meter.total_seconds, 1e-9)
    result.data_wait_fraction = meter.total_waited / max(meter.total_seconds, 1e-9)
    return result


def _step(job: Job, engine: Any, batches: Iterator[Batch], step: int, meter: _Meter) -> int:
    """One optimizer step; returns the images of all ranks in it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = job.learning_rate(step)
    micro_batches = job.batch.ranks * job.batch.accumulation_steps
    total = torch.zeros((), device=job.device)
    for _ in range(job.batch.accumulation_steps):
        asked = time.perf_counter()
        batch = next(batches)
        meter.waited += time.perf_counter() - asked
        logits = engine(normalized(batch, job))
        loss = weighted_loss(
            logits, _to(batch.labels, job.device), _to(batch.weights, job.device), batch.global_weight, micro_batches
        )
        engine.backward(loss)
        engine.step()
        total += loss.detach() / job.batch.accumulation_steps
    meter.losses.append(total)
    return int(batch.global_weight)


def _log(job: Job, tracker: Tracker, progress: TrainingProgress, meter: _Meter, step: int) -> float:
    """Read the losses of the last steps from the device (a synchronization), average them over ranks and log each."""
    losses = (summed(torch.stack(meter.losses)) / job.batch.ranks).tolist()
    meter.losses.clear()
    first = step - len(losses) + 1
    values = meter.read()
    for number, loss in enumerate(losses, start=first):
        rates = values if number == step else {}
        # step 1 is the first update, so that a curve's last step is the number of updates made
        tracker.log_metrics({"loss": loss, "learning_rate": job.learning_rate(number - 1), **rates}, number)
    for number, loss in enumerate(losses, start=first):
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss of step {number} is {loss}: training diverged; "
                "lower optimizer.base_lr or lengthen schedule.warmup_epochs"
            )
    progress.update(
        step,
        f"epoch {step / job.steps_per_epoch:.2f} loss {losses[-1]:.4f} lr {job.learning_rate(step - 1):.4g} "
        f"{values['images_per_second']:,.0f} images/s, waiting for data {values['data_wait_fraction']:.1%}",
    )
    return float(losses[-1])


@torch.inference_mode()
def evaluate(model: torch.nn.Module, job: Job, batches: Iterator[Batch]) -> tuple[float, float, int]:
    """top1, top5 (fractions) and the number of samples, counted exactly over all ranks, all of which take part."""
    average_batch_norm(model)
    model.eval()
    counts = torch.zeros(3, dtype=torch.int64, device=job.device)
    for batch in batches:
        counts += count_correct(model(normalized(batch, job)), _to(batch.labels, job.device))
    model.train()
    top1, top5, samples = summed(counts).tolist()
    return top1 / samples, top5 / samples, samples


def normalized(batch: Batch, job: Job) -> Tensor:
    """float32 [N, 3, size, size], made on the device."""
    return normalize(_to(batch.pixels, job.device), job.mean, job.std)


def _to(array: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
