"""Dynamic loss scale for fp16 (Micikevicius et al. 2018, 3.2)."""

from typing import Any

from trainer.engine.deepspeed import compat


def grow_after_update(optimizer: Any) -> None:
    """Increase the loss scale of a ZeRO optimizer after an update instead of before it.

    After ``loss_scale_window`` steps without overflow, DeepSpeed first doubles the scale and then
    divides the gradients by it, although they were computed with the old scale. That update uses
    half of the gradient.
    """
    step, grow = optimizer.step, compat.separate_loss_scale_growth(optimizer)

    def step_and_grow(closure: Any = None) -> None:
        step(closure)
        if not compat.gradients_overflowed(optimizer):
            grow()

    optimizer.step = step_and_grow
