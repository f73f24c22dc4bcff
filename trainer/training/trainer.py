"""The training loop of one rank."""

import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from trainer.config.run_plan import RunPlan
from trainer.data.batch import Allocate, Batch
from trainer.data.loader import eval_loader, train_loader
from trainer.data.storage.cache import with_cache
from trainer.distributed.collectives import all_gather_list, all_reduce_mean
from trainer.distributed.env import DistEnv
from trainer.engine.deepspeed.optimizer_state import TrainingState
from trainer.engine.engine import Engine
from trainer.engine.input_transfer import pinned_array
from trainer.errors import CollectiveUserError, Preempted
from trainer.process.console import TrainingProgress
from trainer.progress.progress_publisher import ProgressPublisher
from trainer.tracking import Tracker
from trainer.training.divergence import DivergenceDetector
from trainer.training.evaluator import evaluate
from trainer.training.lr_schedule import learning_rate_schedule
from trainer.training.metrics.meter import MetricsMeter, TrainState
from trainer.training.metrics.registry import MetricInputs, compute_metrics
from trainer.training.preemption import PreemptionSignal


class Trainer:
    """Training loop of one rank, up to the last step of a run.

    All ranks construct a Trainer and call ``fit``.

    Args:
        eval_model: The full model in fp32, for evaluation and export, however the engine
            distributes it.
        save: Writes a checkpoint of a training state and the metrics so far. It returns while the
            checkpoint is still being written.
        heartbeat: Called after each step and each evaluation batch.
        streams_version: Version of the random streams that augment the samples.
        on_samples_consumed: Called after each step with its number and the keys of the samples that
            this rank used.
    """

    def __init__(
        self,
        plan: RunPlan,
        env: DistEnv,
        device: torch.device,
        engine: Engine,
        eval_model: torch.nn.Module,
        state: TrainState,
        tracker: Tracker,
        progress: TrainingProgress,
        publisher: ProgressPublisher,
        preemption: PreemptionSignal,
        save: Callable[[TrainingState, dict[str, Any]], None],
        heartbeat: Callable[[], None],
        streams_version: int,
        on_samples_consumed: Callable[[int, list[str]], None] | None = None,
    ) -> None:
        self.plan, self.env, self.device = plan, env, device
        self.engine, self.eval_model, self.state = engine, eval_model, state
        self.tracker, self.progress, self.preemption = tracker, progress, preemption
        self.publisher = publisher
        self._save, self._heartbeat = save, heartbeat
        self._streams_version = streams_version
        self._on_samples_consumed = on_samples_consumed
        config, data = plan.config, plan.config.data
        self._meter = MetricsMeter()
        self._divergence = DivergenceDetector(config.train.max_skipped_steps)
        self._learning_rate = learning_rate_schedule(
            config.schedule,
            config.optimizer,
            plan.batch.global_size,
            plan.steps_per_epoch,
            plan.total_steps,
        )
        self._train_store = with_cache(plan.train_store, plan.train, data.cache_dir, data.cache_gb)
        self._val_store = None
        if plan.val is not None and plan.val_store is not None:
            self._val_store = with_cache(plan.val_store, plan.val, data.cache_dir, data.cache_gb)
        self._skips_bad_samples = data.bad_samples == "skip"
        self._allocate: Allocate = pinned_array if device.type == "cuda" else np.empty

    def fit(self) -> TrainState:
        """Train from ``state`` to the last step and evaluate after each epoch.

        Raises Preempted, after writing a checkpoint, if any rank received a stop signal.
        """
        if self._was_stopped_before_evaluation():
            self._end_epoch()
        elif self.state.steps >= self.plan.stop_step:
            self.progress.note(
                "already trained to the last step; set checkpoint.resume=never to start over"
            )
            self._update_eval_model()
        while self.state.steps < self.plan.stop_step:
            # a loader that is not exhausted keeps its threads until it is closed
            with closing(self._train_batches()) as batches:
                self._train_epoch(batches)
            self._end_epoch()
        return self.state

    def _train_epoch(self, batches: Iterator[Batch]) -> None:
        while True:
            preempted = self._train_step(batches)
            epoch_ended = self._is_epoch_end(self.state.steps)
            saves = preempted or (self._is_checkpoint_step(self.state.steps) and not epoch_ended)
            if (
                saves
                or epoch_ended
                or self.state.steps % self.plan.config.train.log_every_steps == 0
            ):
                self._log()
            if saves:
                self._save_checkpoint()
            if preempted:
                self.progress.note(f"stop signal received: checkpoint of step {self.state.steps:,}")
                raise Preempted
            if epoch_ended:
                return

    def _train_step(self, batches: Iterator[Batch]) -> bool:
        """Run one optimizer step; return whether any rank received a stop signal."""
        started = time.perf_counter()
        self.preemption.start_all_reduce()
        output = self.engine.step(
            self._meter.time_batches(batches), self._learning_rate(self.state.steps)
        )
        preempted = self.preemption.any_rank_received()
        self._heartbeat()
        self._meter.update(output, time.perf_counter() - started)
        self.state.steps += 1
        self.state.skipped_steps += output.skipped
        if self._on_samples_consumed is not None and output.keys:
            self._on_samples_consumed(self.state.steps - 1, output.keys)
        self._divergence.check_gradients(self.state.steps, output, self.engine.loss_scale())
        return preempted

    def _end_epoch(self) -> None:
        self._update_eval_model()
        self._evaluate()
        self.state.evaluated_step = self.state.steps
        self._save_checkpoint()

    def _evaluate(self) -> None:
        if self._val_store is None:
            return
        state, data, bad = self.state, self.plan.config.data, list[str]()
        self.publisher.update(phase="evaluating")
        try:
            state.top1, state.top5, state.val_samples = evaluate(
                self.eval_model,
                self._eval_batches(bad),
                self.device,
                data.mean,
                data.std,
                self.preemption,
                self._heartbeat,
            )
        except Preempted:
            self._save_checkpoint()  # the run that resumes from it evaluates first
            self.progress.note(
                f"stop signal received: checkpoint of step {state.steps:,}, not evaluated"
            )
            raise
        if self._skips_bad_samples:
            for line in all_gather_list(bad):
                self.progress.note(f"bad sample excluded from evaluation: {line}")
        epoch = math.ceil(state.steps / self.plan.steps_per_epoch)
        self.tracker.log_metrics(
            {"top1": state.top1, "top5": state.top5, "epoch": epoch}, state.steps
        )
        self.progress.note(
            f"epoch {epoch}: top1 {state.top1:.4f}, top5 {state.top5:.4f} of "
            f"{state.val_samples:,} images"
        )

    def _save_checkpoint(self) -> None:
        self._save(self.engine.training_state(), asdict(self.state))

    def _update_eval_model(self) -> None:
        self.eval_model.load_state_dict(
            self.engine.ema_state_dict() or self.engine.full_state_dict()
        )

    # --- step predicates ----------------------------------------------------------------------

    def _is_epoch_end(self, step: int) -> bool:
        return step % self.plan.steps_per_epoch == 0 or step == self.plan.stop_step

    def _is_checkpoint_step(self, step: int) -> bool:
        every = self.plan.config.checkpoint.every_steps
        return every is not None and step % every == 0

    def _was_stopped_before_evaluation(self) -> bool:
        """Return whether the checkpoint is at the end of an epoch that was not evaluated."""
        steps = self.state.steps
        return steps > 0 and self._is_epoch_end(steps) and self.state.evaluated_step != steps

    # --- data ---------------------------------------------------------------------------------

    def _train_batches(self) -> Generator[Batch, None, None]:
        """Return this rank's micro-batches of the current epoch, from the current step on."""
        epoch, start_step = divmod(self.state.steps, self.plan.steps_per_epoch)
        batch, rank = self.plan.batch, self.env.rank
        # the last pipeline stage needs labels only, unless it must know which samples are corrupt
        labels_only = rank >= batch.ranks and not self._skips_bad_samples
        return train_loader(
            self.plan.config,
            self.plan.train,
            self._train_store,
            epoch,
            batch.ranks,
            rank % batch.ranks,
            batch.accumulation_steps,
            start_step,
            labels_only,
            self._allocate,
            self._streams_version,
        )

    def _eval_batches(self, bad: list[str]) -> Iterator[Batch]:
        """Yield this rank's part of the validation split.

        Adds a line to ``bad`` for each corrupt sample.
        """
        val, store, env = self.plan.val, self._val_store, self.env
        assert val is not None
        assert store is not None
        for batch in eval_loader(
            self.plan.config, val, store, env.world_size, env.rank, self._allocate
        ):
            bad += batch.bad
            yield batch

    # --- metrics and checks -------------------------------------------------------------------

    def _collect_metrics(self) -> dict[str, float]:
        """Return the metrics logged every ``train.log_every_steps``."""
        values = self._meter.compute(self.state)
        values |= compute_metrics(MetricInputs(self.engine, self.state))
        if self._skips_bad_samples:
            values["bad_samples"] = self._count_bad_samples()
        return values

    def _log(self) -> None:
        """Log the loss of each step since the last call, averaged over ranks.

        This reads the losses from the device, which is a device synchronization.
        """
        outputs, last = self._meter.take_outputs(), self.state.steps
        losses = all_reduce_mean(torch.stack([output.loss for output in outputs])).tolist()
        metrics = self._collect_metrics()
        steps = range(last - len(losses) + 1, last + 1)  # step 1 is the first update
        for step, loss in zip(steps, losses, strict=True):
            values = {"loss": loss, "learning_rate": self._learning_rate(step - 1)}
            self.tracker.log_metrics(values | (metrics if step == last else {}), step)
        for step, loss, output in zip(steps, losses, outputs, strict=True):
            self._divergence.check_loss(step, loss, output)
        self.state.loss = float(losses[-1])
        self.publisher.update(
            phase="training",
            step=last,
            epoch=last / self.plan.steps_per_epoch,
            loss=self.state.loss,
            images_per_second=metrics["images_per_second"],
            eta_seconds=self.progress.seconds_left(last),
        )
        self.progress.update(
            last,
            f"epoch {last / self.plan.steps_per_epoch:.2f} loss {self.state.loss:.4f} lr "
            f"{self._learning_rate(last - 1):.4g} "
            f"{metrics['images_per_second']:,.0f} images/s, waiting for data "
            f"{metrics['data_wait_fraction']:.1%}",
        )

    def _count_bad_samples(self) -> int:
        """Report new corrupt samples of all ranks and return the total.

        Raises CollectiveUserError if there are more than ``data.max_bad_samples``.
        """
        for line in dict.fromkeys(all_gather_list(self._meter.take_bad_samples())):
            self.progress.note(f"bad sample skipped: {line}")
            self.state.bad_samples += 1
        limit = self.plan.config.data.max_bad_samples
        if self.state.bad_samples > limit:
            raise CollectiveUserError(
                f"data.max_bad_samples: {self.state.bad_samples} samples could not be decoded "
                f"up to step {self.state.steps:,}, more than {limit}; `convoy verify` lists all of "
                "them"
            )
        return self.state.bad_samples
