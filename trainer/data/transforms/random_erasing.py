"""From a decoded image to the square that the network sees. Randomness comes in as numbers, so
every stage is a pure function.
"""

import math

import numpy as np

from trainer.data.transforms.auto_augment import FIRST, LAYERS

_ERASE = FIRST + 3 * LAYERS
UNIFORMS = _ERASE + 23
"""Random numbers that one training sample uses: flip, two for the place, two for each of ten tries
at a crop; one is left over; then three for each change of colour and shape; whether to erase, two
for the place, and two for each of ten tries.
"""


def erase(pixels: np.ndarray, probability: float, colour: np.ndarray, uniforms: np.ndarray) -> None:
    """Paint a rectangle of uint8 [side, side, 3] over with uint8 [3] (Zhong et al. 2017, 3.2): 2%
    to 33% of the area, aspect 0.3 to 3.3, ten tries.
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
