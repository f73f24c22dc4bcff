"""Random horizontal flip."""

from typing import ClassVar

import numpy as np

from trainer.data.transforms.augmentation import Augmentation, register


@register
class RandomFlip(Augmentation):
    """Horizontal flip with probability 1/2.

    The decoder mirrors the image, which costs less than a second pass over the pixels.
    """

    stream: ClassVar[str] = "flip"
    num_uniforms: ClassVar[int] = 1

    flip: bool = True
    """Flip images horizontally with probability 1/2."""

    @property
    def enabled(self) -> bool:
        return self.flip

    def is_flipped(self, uniforms: np.ndarray) -> bool:
        """Returns whether to flip a sample. ``uniforms``: float64 [1]."""
        return bool(uniforms[0] < 0.5)
