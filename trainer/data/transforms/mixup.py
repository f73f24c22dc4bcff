"""Mixup and CutMix: draws how the samples of a micro-batch are mixed, and mixes them."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from trainer.config.field_types import Alpha
from trainer.data.transforms.augmentation import Augmentation, register

if TYPE_CHECKING:  # the loader works without torch
    from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """Mixing parameters of one micro-batch.

    Each sample is mixed with the sample at the same position in the reversed micro-batch.
    """

    lam: float
    """Weight of the sample's own target; the other sample's target has weight 1 - lam."""
    box: tuple[int, int, int, int] | None
    """Top, bottom, left, right of the pixels taken from the other sample (CutMix).

    None: all pixels are blended by ``lam`` (mixup).
    """


@register
class Mixup(Augmentation):
    """Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of micro-batches, as in timm.

    If both are enabled, each is chosen with probability 1/2.
    """

    stream: ClassVar[str] = "mixup"

    mixup: Alpha = 0.0
    """Alpha of the Beta distribution with which two images and their targets are blended (Zhang et
    al. 2018); 0: off.
    """
    cutmix: Alpha = 0.0
    """Alpha of the Beta distribution of the area that is replaced by another image (Yun et al.
    2019); 0: off. If mixup is on as well, each micro-batch uses one of them, with probability 1/2
    each.
    """

    @property
    def enabled(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def draw(self, random: np.random.Generator, size: int) -> Mix:
        """Draws the parameters of one micro-batch.

        ``size``: side length of the images in pixels. CutMix's box may extend beyond the border, so
        its lam is computed from the clipped area.
        """
        cuts = random.random() < 0.5 if self.mixup and self.cutmix else self.cutmix > 0
        alpha = self.cutmix if cuts else self.mixup
        lam = float(random.beta(alpha, alpha))
        if not cuts:
            return Mix(lam, None)
        side = int(size * math.sqrt(1 - lam))
        y, x = (int(centre) for centre in random.integers(0, size, 2))
        top, left = max(0, y - side // 2), max(0, x - side // 2)
        bottom, right = min(size, y + (side + 1) // 2), min(size, x + (side + 1) // 2)
        return Mix(1 - (bottom - top) * (right - left) / size**2, (top, bottom, left, right))


def apply_mix(images: "Tensor", mix: Mix | None) -> "Tensor":
    """Mix each image with the one at the same position in the reversed batch.

    ``images`` [N, C, H, W] is overwritten.
    """
    if mix is None:
        return images
    if mix.box is None:
        others = images.flip(0)
        return images.mul_(mix.lam).add_(others, alpha=1 - mix.lam)
    top, bottom, left, right = mix.box
    part = images[:, :, top:bottom, left:right]
    part.copy_(part.flip(0))
    return images
