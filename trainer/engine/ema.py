"""The exponential moving average (EMA) of the weights and of batch norm's running statistics."""

from collections.abc import Iterable

from torch import Tensor

from trainer.engine.deepspeed.optimizer_state import EMA, Fp32State


class ExponentialMovingAverage:
    """Averages the fp32 weights and the floating-point buffers of one rank's module.

    ``decay`` is the part of the average that an optimizer step keeps. The averages of the weights
    are a slot of the optimizer's state, which ZeRO partitions like the momentum. ``buffers`` holds
    those of the buffers, by the names that the module gives them.
    """

    def __init__(self, weights: Fp32State, buffers: Iterable[tuple[str, Tensor]], decay: float):
        self._weights, self._decay = weights, decay
        weights.add_average(EMA)
        self.buffers = {name: buffer.clone() for name, buffer in buffers}

    def update(self, buffers: Iterable[tuple[str, Tensor]]) -> None:
        """Move the averages towards the current values; without communication."""
        self._weights.update_average(EMA, 1 - self._decay)
        for name, buffer in buffers:
            self.buffers[name].lerp_(buffer, 1 - self._decay)
