"""Dynamic loss scale for fp16 (Micikevicius et al. 2018, 3.2)."""

from typing import Any


def grow_after_update(optimizer: Any) -> None:
    """Increase the loss scale of a ZeRO optimizer after an update instead of before it.

    After ``loss_scale_window`` steps without overflow, DeepSpeed first doubles the scale and then
    divides the gradients by it, although they were computed with the old scale. That update uses
    half of the gradient.
    """
    scaler, step = optimizer.loss_scaler, optimizer.step

    def update_scale(has_overflow: bool = False) -> None:
        if has_overflow:
            scaler.update_scale(has_overflow)

    def step_and_grow(closure: Any = None) -> None:
        step(closure)
        if not optimizer.overflow:
            scaler.update_scale(False)

    optimizer._update_scale, optimizer.step = update_scale, step_and_grow
