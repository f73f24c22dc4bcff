"""Gradient norm, and the loss scale of fp16."""

from trainer.training.metrics.registry import MetricInputs, metric


@metric
def grad_norm(inputs: MetricInputs) -> dict[str, float]:
    """Return the norm of the last step's gradient before clipping; none if it was skipped."""
    norm = inputs.engine.grad_norm()
    return {} if norm is None else {"grad_norm": norm}


@metric
def loss_scale(inputs: MetricInputs) -> dict[str, float]:
    """Return the loss scale and the number of skipped steps so far; none but in fp16."""
    scale = inputs.engine.loss_scale()
    if scale is None:
        return {}
    return {"loss_scale": scale, "skipped_steps": inputs.state.skipped_steps}
