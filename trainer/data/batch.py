"""What passes from stage to stage of the loader."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from trainer.data.shards.tar import Sample
from trainer.data.transforms.mixup import Mix


@dataclass(frozen=True)
class MicroBatch:
    """Sample numbers of one micro-batch, what stands at each, and what augments it."""

    samples: np.ndarray  # int64 [micro]
    weights: np.ndarray  # float32 [micro]; 0: padding
    global_weight: float  # samples with weight 1 in the whole global batch
    side: int  # pixels
    uniforms: np.ndarray | None  # float64 [micro, UNIFORMS]; None in evaluation
    mix: Mix | None = None


@dataclass(frozen=True)
class Batch:
    """What a forward pass gets."""

    pixels: np.ndarray  # uint8 [micro, side, side, 3]
    labels: np.ndarray  # int64 [micro]
    weights: np.ndarray  # float32 [micro]; 0: padding, or a bad sample
    global_weight: float
    keys: list[str]  # of all but padding
    mix: Mix | None = None  # of pixels and labels, left to the engine
    bad: list[str] = field(default_factory=list)  # a line for each sample that could not be decoded

    @property
    def lam(self) -> float | None:
        """The part of each target that is the sample's own label, where samples are mixed."""
        return self.mix.lam if self.mix else None


Window = list[MicroBatch]
"""Micro-batches whose bytes are fetched together."""


Fetched = tuple[MicroBatch, list[Sample]]


Allocate = Callable[[tuple[int, ...], type[np.uint8]], np.ndarray]
"""An array of a shape and type, with anything in it."""
