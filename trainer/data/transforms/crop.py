"""Resizing and cropping."""

import math

import numpy as np
from PIL import Image

_LARGEST_RESIZED = 16
"""Pixels of a whole resized image, in squares of its short side, above which only the crop is made.
"""


def eval_transform(image: Image.Image, size: int, crop: float) -> Image.Image:
    """Resize the short side to ``size / crop`` (bilinear, antialiased) and take the centre, as
    torchvision's presets do.

    The whole resized image is made first, so that results equal torchvision's, unless it is much
    longer than high: of a 4,000 x 1 image it would have 262 million pixels. Then only the centre is
    made, which differs by two grey levels of rounding at most.
    """
    short = round(size / crop)
    width, height = image.size
    new_width, new_height = (
        (short, int(short * height / width))
        if width <= height
        else (int(short * width / height), short)
    )
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    if new_width * new_height > _LARGEST_RESIZED * short * short:
        across, down = width / new_width, height / new_height
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if min(width, height) != short:
        image = image.resize((new_width, new_height), Image.Resampling.BILINEAR)
    return image.crop((left, top, left + size, top + size)) if image.size != (size, size) else image


def crop_box(
    width: int, height: int, min_area: float, uniforms: np.ndarray
) -> tuple[int, int, int, int]:
    """Inception's crop (Szegedy et al. 2014, section 6): area in [min_area, 1], aspect in [3/4,
    4/3], ten tries, else centre.

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
    left, top = (
        int(uniforms[1] * (2 * padding + 1)) - padding,
        int(uniforms[2] * (2 * padding + 1)) - padding,
    )
    return image.crop((left, top, left + size, top + size))
