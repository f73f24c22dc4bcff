"""fp16's dynamic loss scale (Micikevicius et al. 2018, 3.2)."""

from typing import Any


def grow_after_update(optimizer: Any) -> None:
    """Raise the loss scale of a ZeRO optimizer after an update instead of before it.

    DeepSpeed first doubles the scale when ``loss_scale_window`` steps did not overflow, and then
    divides the gradients, which were computed with the old scale, by the new one: that update is
    made with half of the gradient.
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
