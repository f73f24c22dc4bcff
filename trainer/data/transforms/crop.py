"""Resizing and cropping."""

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from trainer.data.transforms.augmentation import Augmentation, register

_LARGEST_RESIZED = 16
"""Size limit of the full resized image, in multiples of its squared short side.

Above it, only the crop is resized.
"""


def eval_transform(image: Image.Image, size: int, crop: float) -> Image.Image:
    """Resizes the short side to ``size / crop`` (bilinear, antialiased) and takes the center crop.

    This matches torchvision's presets. The full image is resized first, so that results equal
    torchvision's, unless the image is extremely elongated: a 4,000 x 1 image would be resized to
    262 million pixels. In that case only the center is resized, which differs by at most two gray
    levels of rounding.
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


class _Crop(Augmentation):
    crop: Literal["resized", "padded", "none"] = "resized"
    """Training crop: `resized` has a random area and aspect ratio; `padded` is a random shift
    within a zero border; `none` crops as in evaluation.
    """


@register
class RandomResizedCrop(_Crop):
    """The Inception-style crop (Szegedy et al. 2014, section 6).

    Random numbers: two for the position, then two for each of ten attempts.
    """

    stream: ClassVar[str] = "random_resized_crop"
    num_uniforms: ClassVar[int] = 22

    min_area: Annotated[float, Field(gt=0, le=1)] = 0.08
    """Minimum fraction of the image area that `resized` keeps."""

    @property
    def enabled(self) -> bool:
        return self.crop == "resized"

    def box(self, width: int, height: int, uniforms: np.ndarray) -> tuple[int, int, int, int]:
        """Returns the (left, top, width, height) of the crop, in pixels of the image.

        The area is in [min_area, 1] of the image and the aspect ratio in [3/4, 4/3]. After ten
        failed attempts, the center is used.
        """
        min_area = self.min_area
        for u_area, u_ratio in uniforms[2:].reshape(10, 2).tolist():
            area = width * height * (min_area + (1 - min_area) * u_area)
            ratio = math.exp(math.log(3 / 4) + u_ratio * math.log(16 / 9))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(uniforms[0] * (width - w + 1)), int(uniforms[1] * (height - h + 1)), w, h
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        return (width - w) // 2, (height - h) // 2, w, h


@register
class PaddedCrop(_Crop):
    """A crop of the padded image, which shifts it by up to ``padding`` pixels in each direction.

    He et al. 2015, section 4.2. The padding is black.
    """

    stream: ClassVar[str] = "padded_crop"
    num_uniforms: ClassVar[int] = 2

    padding: Annotated[int, Field(ge=0, le=16384)] = 4
    """Border width of `padded`, in pixels."""

    @property
    def enabled(self) -> bool:
        return self.crop == "padded"

    def shift(self, image: Image.Image, size: int, uniforms: np.ndarray) -> Image.Image:
        """Returns a crop of ``size`` x ``size`` pixels."""
        left, top = (
            int(uniforms[0] * (2 * self.padding + 1)) - self.padding,
            int(uniforms[1] * (2 * self.padding + 1)) - self.padding,
        )
        return image.crop((left, top, left + size, top + size))
