"""Learning rate as a pure function of the optimizer step; a resume needs no scheduler state."""

import math
from collections.abc import Callable

from trainer.config.schema import OptimizerConfig, ScheduleConfig
from trainer.errors import UserError


def scaled_learning_rate(optimizer: OptimizerConfig, global_size: int) -> float:
    """Return ``base_lr * global_size / base_batch``, the linear scaling rule.

    Source: Goyal et al. 2017, 2.1.
    """
    return optimizer.base_lr * global_size / optimizer.base_batch


def learning_rate_schedule(
    schedule: ScheduleConfig,
    optimizer: OptimizerConfig,
    global_size: int,
    steps_per_epoch: int,
    total_steps: int,
) -> Callable[[int], float]:
    """Return a function that maps an optimizer step to its learning rate.

    Steps are 0, 1, ... ``total_steps - 1``. The peak follows the linear scaling rule.

    Gradual warmup increases linearly and reaches the peak at its last step. Constant warmup stays
    at the low learning rate and then jumps to the peak (Goyal et al. 2017, 2.2).

    After warmup, ``cosine`` decays from the peak to 0 at ``total_steps`` (Loshchilov and Hutter
    2016, eq. 5). ``polynomial`` decays to 0 as ``(1 - progress)^power``. ``step`` multiplies by
    ``gamma`` at each milestone, in epochs.

    Raises UserError if warmup is at least as long as the run, or starts above the peak.
    """
    peak = scaled_learning_rate(optimizer, global_size)
    warmup = round(schedule.warmup_epochs * steps_per_epoch)
    if warmup >= total_steps > 0 and warmup > 0:
        raise UserError(
            f"schedule.warmup_epochs: {schedule.warmup_epochs} epochs are {warmup} steps, but "
            f"the run has {total_steps}; use less than {total_steps / steps_per_epoch:.3g}"
        )
    low = schedule.warmup_lr
    if low is None:
        low = 0.0 if schedule.warmup == "gradual" else min(optimizer.base_lr, peak)
    if warmup and low > peak:
        raise UserError(
            f"schedule.warmup_lr: {low} is above the peak learning rate of {peak:.6g}; use at most "
            "the peak"
        )
    drops = [round(epoch * steps_per_epoch) for epoch in schedule.milestones]

    def learning_rate(step: int) -> float:
        if step < warmup:
            return low + (peak - low) * (step + 1) / warmup if schedule.warmup == "gradual" else low
        progress = (step - warmup) / (total_steps - warmup)
        if schedule.name == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        if schedule.name == "polynomial":
            return float(peak * (1 - progress) ** schedule.power)
        if schedule.name == "step":
            return peak * schedule.gamma ** sum(step >= drop for drop in drops)
        return peak

    return learning_rate
