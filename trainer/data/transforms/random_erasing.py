"""Random erasing, and the layout of the random numbers that augment one training sample.

Random numbers are passed in as arguments, so every stage from the decoded image to the network's
input is a pure function.
"""

import math

import numpy as np

from trainer.data.transforms.auto_augment import FIRST, LAYERS

_ERASE = FIRST + 3 * LAYERS
UNIFORMS = _ERASE + 23
"""Random numbers per training sample.

In order: one for the flip; two for the crop's position; two for each of ten crop attempts; one
unused; three for each auto-augment operation; one for whether to erase; two for the position of the
erased rectangle; two for each of ten erase attempts.
"""


def erase(pixels: np.ndarray, probability: float, colour: np.ndarray, uniforms: np.ndarray) -> None:
    """Fills a random rectangle of an image in place (Zhong et al. 2017, section 3.2).

    ``pixels``: uint8 [side, side, 3]. ``colour``: uint8 [3]. The rectangle covers 2% to 33% of the
    area with an aspect ratio of 0.3 to 3.3; ten attempts are made to fit one.
    """
    draws = uniforms[_ERASE:].tolist()
    if draws[0] >= probability:
        return
    side = len(pixels)
    for u_area, u_ratio in zip(draws[3::2], draws[4::2], strict=True):
        area = side * side * (0.02 + 0.31 * u_area)
        ratio = math.exp(math.log(0.3) + u_ratio * math.log(11))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w < side and 0 < h < side:
            top, left = int(draws[1] * (side - h + 1)), int(draws[2] * (side - w + 1))
            pixels[top : top + h, left : left + w] = colour
            return
