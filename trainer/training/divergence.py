"""Detects a training that diverged: losses or gradients that are NaN or Inf.

An fp16 overflow that a smaller loss scale can fix is not a divergence: the step is skipped and
counted.
"""

import math

from trainer.distributed.collectives import all_gather_list
from trainer.engine.engine import StepOutput
from trainer.errors import Diverged

_ADVICE = "training diverged; lower optimizer.base_lr or lengthen schedule.warmup_epochs"
_KEYS_SHOWN = 16


class DivergenceDetector:
    """Raises Diverged when a loss or gradients are NaN or Inf.

    ``max_skipped_steps`` is the number of consecutive fp16 overflows that ends the run.
    """

    def __init__(self, max_skipped_steps: int) -> None:
        self._max_skipped_steps = max_skipped_steps
        self._skipped_in_a_row = 0

    def check_gradients(self, step: int, output: StepOutput, loss_scale: float | None) -> None:
        """Count a skipped step. ``loss_scale`` is None unless the precision is fp16.

        All ranks call this after each step. Raises Diverged if the gradients are NaN or Inf and no
        smaller loss scale can help, or if too many steps in a row overflowed.
        """
        if not output.skipped:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        if loss_scale is None:
            raise Diverged(
                f"step {step}: gradients are NaN or Inf: {_ADVICE}; its samples: "
                f"{_sample_keys(output)}"
            )
        if self._skipped_in_a_row >= self._max_skipped_steps:
            raise Diverged(
                f"step {step}: the gradients overflowed fp16 {self._skipped_in_a_row} times in a "
                f"row, the last time at loss scale {loss_scale}; lower optimizer.base_lr or use "
                f"precision bf16; its samples: {_sample_keys(output)}"
            )

    def check_loss(self, step: int, loss: float, output: StepOutput) -> None:
        """Raise Diverged if the loss of a step that was not skipped is NaN or Inf."""
        if not math.isfinite(loss) and not output.skipped:
            raise Diverged(
                f"the loss of step {step} is {loss}: {_ADVICE}; its samples: {_sample_keys(output)}"
            )


def _sample_keys(output: StepOutput) -> str:
    """Return the keys of a step's samples on all ranks, which take part."""
    keys = all_gather_list(output.keys)
    more = len(keys) - _KEYS_SHOWN
    return ", ".join(keys[:_KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")
