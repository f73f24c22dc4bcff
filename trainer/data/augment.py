"""From a decoded image to the square that the network sees. Randomness comes in as numbers, so every stage is a pure function."""

import math

import numpy as np
from PIL import Image

UNIFORMS = 24
"""Random numbers that one training sample uses: flip, two for the place, then two for each of ten tries at a crop."""


def eval_transform(image: Image.Image, size: int, crop: float) -> Image.Image:
    """Resize the short side to ``size / crop`` (bilinear, antialiased) and take the centre, as torchvision's presets do."""
    short = round(size / crop)
    width, height = image.size
    if min(width, height) != short:
        new = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
        image = image.resize(new, Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size)) if image.size != (size, size) else image


def random_resized_crop(image: Image.Image, size: int, min_area: float, uniforms: np.ndarray) -> Image.Image:
    """Inception's crop (Szegedy et al. 2014, section 6): area in [min_area, 1], aspect in [3/4, 4/3], ten tries, else centre."""
    width, height = image.size
    for u_area, u_ratio in uniforms[3:23].reshape(10, 2):
        area = width * height * (min_area + (1 - min_area) * u_area)
        ratio = math.exp(math.log(3 / 4) + u_ratio * math.log(16 / 9))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(uniforms[1] * (width - w + 1)), int(uniforms[2] * (height - h + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    return image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)


def padded_crop(image: Image.Image, size: int, padding: int, uniforms: np.ndarray) -> Image.Image:
    """A shift by up to ``padding`` pixels in a black border (He et al. 2015, section 4.2)."""
    left, top = int(uniforms[1] * (2 * padding + 1)) - padding, int(uniforms[2] * (2 * padding + 1)) - padding
    return image.crop((left, top, left + size, top + size))


def train_transform(
    image: Image.Image, size: int, crop: str, padding: int, min_area: float, flip: bool, eval_crop: float, uniforms: np.ndarray
) -> Image.Image:
    """The training view of one image; ``uniforms``: UNIFORMS numbers in [0, 1)."""
    if crop == "resized":
        image = random_resized_crop(image, size, min_area, uniforms)
    else:
        image = eval_transform(image, size, eval_crop)
        if crop == "padded":
            image = padded_crop(image, size, padding, uniforms)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and uniforms[0] < 0.5 else image
