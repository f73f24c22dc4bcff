"""Random erasing."""

import math
from typing import ClassVar

import numpy as np

from trainer.config.field_types import Fraction
from trainer.data.transforms.augmentation import ImageAugmentation, register


@register
class RandomErasing(ImageAugmentation):
    """Fills a random rectangle of an image (Zhong et al. 2017, section 3.2).

    The rectangle covers 2% to 33% of the area with an aspect ratio of 0.3 to 3.3; ten attempts are
    made to fit one. Random numbers: one for whether to erase, two for the position, then two for
    each attempt.
    """

    stream: ClassVar[str] = "random_erasing"
    num_uniforms: ClassVar[int] = 23

    erase: Fraction = 0.0
    """Probability of filling a rectangle of an image with data.mean (random erasing, Zhong et al.
    2017).
    """

    @property
    def enabled(self) -> bool:
        return self.erase > 0

    def apply(self, pixels: np.ndarray, uniforms: np.ndarray, fill: np.ndarray) -> None:
        draws = uniforms.tolist()
        if draws[0] >= self.erase:
            return
        side = len(pixels)
        for u_area, u_ratio in zip(draws[3::2], draws[4::2], strict=True):
            area = side * side * (0.02 + 0.31 * u_area)
            ratio = math.exp(math.log(0.3) + u_ratio * math.log(11))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w < side and 0 < h < side:
                top, left = int(draws[1] * (side - h + 1)), int(draws[2] * (side - w + 1))
                pixels[top : top + h, left : left + w] = fill
                return
