"""Dropout masks that do not depend on the parallel topology."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

_DROPOUT = 3  # a random stream separate from those of the data order


class DropoutRNG:
    """Makes every dropout mask a function of (seed, step, micro-batch, layer).

    Masks are the same for any number of ranks and pipeline stages and after a resume, and no
    generator state has to be saved. ``first`` and ``stride`` select a rank's micro-batches in the
    global batch.
    """

    def __init__(self, model: nn.Module, seed: int, first: int, stride: int) -> None:
        self._seed, self._first, self._stride = seed, first, stride
        self.position = (0, 0)
        self._step = self._count = 0
        for number, layer in enumerate(
            module for module in model.modules() if isinstance(module, nn.Dropout)
        ):
            layer.register_forward_pre_hook(partial(self._before, number))

    def begin(self, step: int) -> None:
        """Begin optimizer step ``step`` (from 0); the next forward pass is this rank's first."""
        self._step, self._count = step, 0

    def advance(self) -> tuple[int, int]:
        """Return the step and micro-batch of the forward pass that starts now."""
        self.position = (self._step, self._first + self._count * self._stride)
        self._count += 1
        return self.position

    def _before(self, number: int, layer: nn.Dropout, inputs: Any) -> None:
        if layer.training and layer.p > 0:
            torch.manual_seed(dropout_seed(self._seed, *self.position, number))


def dropout_seed(seed: int, step: int, micro_batch: int, layer: int) -> int:
    """Return the seed of torch's generator before the ``layer``-th dropout of the model."""
    return int(
        np.random.SeedSequence([seed, _DROPOUT, step, micro_batch, layer]).generate_state(
            1, np.uint64
        )[0]
        >> 1
    )
