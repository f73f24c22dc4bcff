"""Mixup and CutMix: draws which samples of a micro-batch are mixed, and how."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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


def draw_mix(random: np.random.Generator, mixup: float, cutmix: float, size: int) -> Mix | None:
    """Draws mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) parameters, as timm does.

    ``mixup``, ``cutmix``: alpha of the Beta distribution; 0 disables the method. If both are
    enabled, each is chosen with probability 1/2. ``size``: side length of the images in pixels.
    CutMix's box may extend beyond the border, so its lam is computed from the clipped area.
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
