"""The base classes of augmentations, and the list of all augmentations."""

from collections.abc import Mapping
from typing import ClassVar, Self, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

Uniforms = Mapping[str, np.ndarray]
"""Random numbers in [0, 1) of one sample, by random stream: float64 [num_uniforms]."""


class Augmentation(BaseModel):
    """An augmentation: its recipe keys, its random stream, and what it does.

    The fields of a subclass are the recipe keys ``augment.FIELD``; a field's docstring is the
    description of its key. The defaults must leave a new augmentation disabled. Augmentations that
    share a key inherit its field from one base class.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, use_attribute_docstrings=True, defer_build=True
    )

    stream: ClassVar[str]
    """Name of the random stream, which determines its numbers: it must never change."""
    num_uniforms: ClassVar[int] = 0
    """Random numbers that a sample takes from the stream; 0 if batches are augmented."""

    @property
    def enabled(self) -> bool:
        """Whether the recipe uses this augmentation."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: BaseModel) -> Self:
        """Returns the augmentation that the keys of ``config``, an ``AugmentConfig``, describe."""
        return cls(**{name: getattr(config, name) for name in cls.model_fields})


class ImageAugmentation(Augmentation):
    """An augmentation that changes the pixels of one cropped image."""

    def apply(self, pixels: np.ndarray, uniforms: np.ndarray, fill: np.ndarray) -> None:
        """Changes an image in place.

        ``pixels``: uint8 [side, side, 3]. ``uniforms``: float64 [num_uniforms], in [0, 1).
        ``fill``: uint8 [3], the color of ``data.mean``. Must be a pure function of its arguments.
        """
        raise NotImplementedError


AUGMENTATIONS: list[type[Augmentation]] = []
"""All augmentations. Those of images are applied in this order."""

_Class = TypeVar("_Class", bound=type[Augmentation])


def register(augmentation: _Class) -> _Class:
    """Adds a class to ``AUGMENTATIONS``. Raises ValueError if its stream exists already."""
    if any(other.stream == augmentation.stream for other in AUGMENTATIONS):
        raise ValueError(f"there are two augmentations with the stream {augmentation.stream!r}")
    AUGMENTATIONS.append(augmentation)
    return augmentation


def enabled_augmentations(config: BaseModel) -> list[Augmentation]:
    """Returns the augmentations that an ``AugmentConfig`` enables, in order."""
    augmentations = [augmentation.from_config(config) for augmentation in AUGMENTATIONS]
    return [augmentation for augmentation in augmentations if augmentation.enabled]
