"""The data types passed between the stages of the loader."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from trainer.data.shards.tar import Sample
from trainer.data.transforms.mixup import Mix


@dataclass(frozen=True)
class MicroBatch:
    """Sample numbers of one micro-batch, with their weights and augmentation parameters."""

    samples: np.ndarray  # int64 [micro]
    weights: np.ndarray  # float32 [micro]; 0: padding
    global_weight: float  # number of samples with weight 1 in the global batch
    side: int  # pixels
    uniforms: Mapping[str, np.ndarray]  # by random stream: float64 [micro, num_uniforms]
    mix: Mix | None = None


@dataclass(frozen=True)
class Batch:
    """The input of one forward pass."""

    pixels: np.ndarray  # uint8 [micro, side, side, 3]
    labels: np.ndarray  # int64 [micro]
    weights: np.ndarray  # float32 [micro]; 0: padding, or a bad sample
    global_weight: float
    keys: list[str]  # of all samples except padding
    mix: Mix | None = None  # applied to pixels and labels by the engine
    bad: list[str] = field(default_factory=list)  # one line per sample that could not be decoded

    @property
    def lam(self) -> float | None:
        """Weight of a sample's own label in its target; None if samples are not mixed."""
        return self.mix.lam if self.mix else None


Window = list[MicroBatch]
"""Micro-batches whose bytes are fetched together."""


Fetched = tuple[MicroBatch, list[Sample]]


Allocate = Callable[[tuple[int, ...], type[np.uint8]], np.ndarray]
"""Returns an uninitialized array of the given shape and dtype."""
