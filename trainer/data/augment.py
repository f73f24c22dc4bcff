"""From a decoded image to the square that the network sees. Randomness comes in as numbers, so every stage is a pure function."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from trainer.data.randaugment import FIRST, LAYERS

_LARGEST_RESIZED = 16
"""Pixels of a whole resized image, in squares of its short side, above which only the crop is made."""

_ERASE = FIRST + 3 * LAYERS
UNIFORMS = _ERASE + 23
"""Random numbers that one training sample uses: flip, two for the place, two for each of ten tries at a crop; one is left over;
then three for each change of colour and shape; whether to erase, two for the place, and two for each of ten tries."""


def eval_transform(image: Image.Image, size: int, crop: float) -> Image.Image:
    """Resize the short side to ``size / crop`` (bilinear, antialiased) and take the centre, as torchvision's presets do.

    The whole resized image is made first, so that results equal torchvision's, unless it is much
    longer than high: of a 4,000 x 1 image it would have 262 million pixels. Then only the centre is
    made, which differs by two grey levels of rounding at most.
    """
    short = round(size / crop)
    width, height = image.size
    new_width, new_height = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    if new_width * new_height > _LARGEST_RESIZED * short * short:
        across, down = width / new_width, height / new_height
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if min(width, height) != short:
        image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size)) if image.size != (size, size) else image


def crop_box(width: int, height: int, min_area: float, uniforms: np.ndarray) -> tuple[int, int, int, int]:
    """Inception's crop (Szegedy et al. 2014, section 6): area in [min_area, 1], aspect in [3/4, 4/3], ten tries, else centre.

    Returns left, top, width, height.
    """
    for u_area, u_ratio in uniforms[3:23].reshape(10, 2).tolist():
        area = width * height * (min_area + (1 - min_area) * u_area)
        ratio = math.exp(math.log(3 / 4) + u_ratio * math.log(16 / 9))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(uniforms[1] * (width - w + 1)), int(uniforms[2] * (height - h + 1)), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, w, h


def padded_crop(image: Image.Image, size: int, padding: int, uniforms: np.ndarray) -> Image.Image:
    """A shift by up to ``padding`` pixels in a black border (He et al. 2015, section 4.2)."""
    left, top = int(uniforms[1] * (2 * padding + 1)) - padding, int(uniforms[2] * (2 * padding + 1)) - padding
    return image.crop((left, top, left + size, top + size))


def erase(pixels: np.ndarray, probability: float, colour: np.ndarray, uniforms: np.ndarray) -> None:
    """Paint a rectangle of uint8 [side, side, 3] over with uint8 [3] (Zhong et al. 2017, 3.2): 2% to 33% of the area, aspect
    0.3 to 3.3, ten tries."""
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


@dataclass(frozen=True)
class Mix:
    """How each sample of a micro-batch is mixed with the one at its place in the reversed micro-batch."""

    lam: float
    """The sample's own part of its target; the other's is 1 - lam."""
    box: tuple[int, int, int, int] | None
    """Top, bottom, left, right of the pixels that are the other's (CutMix); None: all are blended by lam (mixup)."""


def draw_mix(random: np.random.Generator, mixup: float, cutmix: float, size: int) -> Mix | None:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a micro-batch of ``size`` pixels a side, as timm draws them.

    ``mixup``, ``cutmix``: alpha of the Beta distribution, 0: off; with both on, either with probability 1/2. CutMix's box may
    reach over the border, so that its lam is that of the area that is left.
    """
    if not mixup and not cutmix:
        return None
    cuts = random.random() < 0.5 if mixup and cutmix else cutmix > 0
    alpha = cutmix if cuts else mixup
    lam = float(random.beta(alpha, alpha))
    if not cuts:
        return Mix(lam, None)
    side = int(size * math.sqrt(1 - lam))
    y, x = (int(centre) for centre in random.integers(0, size, 2))
    top, left = max(0, y - side // 2), max(0, x - side // 2)
    bottom, right = min(size, y + (side + 1) // 2), min(size, x + (side + 1) // 2)
    return Mix(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))
