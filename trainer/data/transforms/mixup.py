"""Mixup and CutMix: which samples of a micro-batch are mixed, and how."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mix:
    """How each sample of a micro-batch is mixed with the one at its place in the reversed
    micro-batch.
    """

    lam: float
    """The sample's own part of its target; the other's is 1 - lam."""
    box: tuple[int, int, int, int] | None
    """Top, bottom, left, right of the pixels that are the other's (CutMix); None: all are blended
    by lam (mixup).
    """


def draw_mix(random: np.random.Generator, mixup: float, cutmix: float, size: int) -> Mix | None:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a micro-batch of ``size`` pixels a
    side, as timm draws them.

    ``mixup``, ``cutmix``: alpha of the Beta distribution, 0: off; with both on, either with
    probability 1/2. CutMix's box may reach over the border, so that its lam is that of the area
    that is left.
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
