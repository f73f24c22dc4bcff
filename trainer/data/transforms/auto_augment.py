"""RandAugment and TrivialAugment, equivalent to torchvision's implementations.

RandAugment: Cubuk et al. 2019. TrivialAugment with the wide augmentation space: Mueller and Hutter
2021. Each operation takes three random numbers: its index, its sign and its magnitude.
"""

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from pydantic import Field

from trainer.data.transforms.augmentation import ImageAugmentation, register

CHANGES = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
BINS = 31
"""Number of magnitudes of an operation, from 0 (weakest) to 30."""
_MAX_LAYERS = 4
"""Maximum number of operations per image."""

_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}


class _AutoAugment(ImageAugmentation):
    auto: Literal["none", "rand", "trivial"] = "none"
    """Random color and geometric transforms: `rand` is RandAugment (Cubuk et al. 2019), `trivial`
    is TrivialAugment (Mueller and Hutter 2021).
    """


@register
class RandAugment(_AutoAugment):
    """Applies ``rand_layers`` random operations of the same magnitude in sequence."""

    stream: ClassVar[str] = "rand_augment"
    num_uniforms: ClassVar[int] = 3 * _MAX_LAYERS

    rand_layers: Annotated[int, Field(ge=1, le=_MAX_LAYERS)] = 2
    """Number of transforms that `rand` applies to an image."""
    rand_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Strength of the transforms of `rand`, from 0 to 30."""

    @property
    def enabled(self) -> bool:
        return self.auto == "rand"

    def apply(self, pixels: np.ndarray, uniforms: np.ndarray, fill: np.ndarray) -> None:
        image = Image.fromarray(pixels)
        for layer in range(self.rand_layers):
            which, sign = uniforms[3 * layer : 3 * layer + 2]
            name = CHANGES[int(which * len(CHANGES))]
            image = change(
                image,
                name,
                _strength(name, self.rand_magnitude, image.width, wide=False)
                * (1 if sign < 0.5 else -1),
            )
        pixels[:] = image


@register
class TrivialAugment(_AutoAugment):
    """Applies one random operation with a uniformly drawn magnitude."""

    stream: ClassVar[str] = "trivial_augment"
    num_uniforms: ClassVar[int] = 3

    @property
    def enabled(self) -> bool:
        return self.auto == "trivial"

    def apply(self, pixels: np.ndarray, uniforms: np.ndarray, fill: np.ndarray) -> None:
        image = Image.fromarray(pixels)
        which, sign, strength = uniforms
        name = CHANGES[int(which * len(CHANGES))]
        pixels[:] = change(
            image,
            name,
            _strength(name, int(strength * BINS), image.width, wide=True)
            * (1 if sign < 0.5 else -1),
        )


def _strength(name: str, magnitude: int, width: int, wide: bool) -> float:
    """Converts ``magnitude`` (0 to 30) to the operation's own unit."""
    part = magnitude / (BINS - 1)
    if name.startswith("shear"):
        return part * (0.99 if wide else 0.3)
    if name.startswith("translate"):
        return part * (32.0 if wide else 150.0 / 331.0 * width)
    if name == "rotate":
        return part * (135.0 if wide else 30.0)
    return (
        part * (0.99 if wide else 0.9)
        if name in _ENHANCERS
        else part * (6 if wide else 4)
        if name == "posterize"
        else part
    )


def change(image: Image.Image, name: str, strength: float) -> Image.Image:
    """Applies one operation.

    ``strength``: slope for shear, pixels for translation, degrees for rotation; for the enhancers
    (brightness, color, contrast, sharpness) the value added to a factor of 1; for posterize the
    number of bits removed; for solarize the value subtracted from a threshold of 1. Operations
    without a direction use the absolute value.
    """
    if name in _ENHANCERS:
        return _ENHANCERS[name](image).enhance(1.0 + strength)
    if name == "rotate":
        return image.rotate(strength, Image.Resampling.NEAREST)
    if name.startswith(("shear", "translate")):
        matrix = {
            "shear_x": (1, strength, 0, 0, 1, 0),
            "shear_y": (1, 0, 0, strength, 1, 0),
            "translate_x": (1, 0, math.trunc(strength), 0, 1, 0),
            "translate_y": (1, 0, 0, 0, 1, math.trunc(strength)),
        }[name]
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(abs(strength)))
    if name == "solarize":
        return ImageOps.solarize(image, round(255 * (1 - abs(strength))))
    if name == "autocontrast":
        return ImageOps.autocontrast(image)
    return ImageOps.equalize(image) if name == "equalize" else image
